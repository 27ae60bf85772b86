"""Modules of a model that runs on the CPU kernels: linear leaves in the kernels' layout, and the blocks around them
that run as one operator each (attention with its projections, feed-forward with both).

`pack` makes such a model from an ordinary one. Weights are copied once, into panels; forward passes only. Each row of a
product is summed in an order that does not depend on the other rows, so a token's result does not depend on what
else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.nn.attention import Attention
from nanoworks.nn.context import Attending
from nanoworks.nn.norm import RMSNorm
from nanoworks.nn.quantized import QuantizedLinear
from nanoworks.nn.rope import RoPE

_F32, _BF16, _INT8, _INT4 = range(4)
_GLU_SILU, _SQUARED_RELU = 1, 2


@dataclass(frozen=True)
class Dense:
    """A matrix (out, in) in the dtype it works in, and a bias (out,)."""

    weight: Tensor
    bias: Tensor | None = None


Matrix = Dense | QuantizedLinear


class PackedLinear(nn.Module):
    """A linear leaf in the kernels' layout. `to_float`: outputs are float32 whatever the input is."""

    def __init__(self, matrix: Matrix, *, to_float: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = _weight(matrix).shape
        self.to_float, self.dtype = to_float, _input_dtype(matrix)
        self.matrix = packed(matrix)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.dtype is None else x.to(self.dtype)
        return torch.ops.nanoworks.linear(x.contiguous(), self.matrix, self.to_float)


def _weight(matrix: Matrix) -> Tensor:
    return matrix.weight if isinstance(matrix, Dense) else matrix.values


def _input_dtype(matrix: Matrix) -> torch.dtype | None:
    """What inputs must be cast to; None: float32 and bfloat16 are both welcome."""
    return matrix.weight.dtype if isinstance(matrix, Dense) else None


def packed(matrix: Matrix, *, parts: int = 1) -> Any:
    """Return a `PackedMatrix` (see gemm.h).

    `parts`: the outputs are so many equal parts one after the other, and each panel takes its share of each of them
    (2: gate and up). Each part must then be of whole shares.
    """
    weight, scales = _weight(matrix), None
    if isinstance(matrix, Dense):
        kind, step, width = (_F32, 1, 64) if weight.dtype == torch.float32 else (_BF16, 2, 64)
    else:
        kind, step, width = (_INT8, 4, 64) if matrix.group is None else (_INT4, matrix.group, 32)
        scales = matrix.scales
    N, K = weight.shape

    def panels(x: Tensor) -> Tensor:
        """(N, *) -> (P, width, *), in the order of the outputs of the product."""
        if parts > 1:
            assert N % width == 0, "a panel would hold unequal shares"
            x = x.view(parts, -1, width // parts, x.size(1)).transpose(0, 1).reshape(N, -1)
        return (F.pad(x, (0, 0, 0, -N % width)) if N % width else x).view(-1, width, x.size(1))

    weight = F.pad(weight, (0, -K % step)) if K % step else weight  # without need it would be a copy
    padded = weight.size(1)
    rows = panels(weight)
    if kind == _INT8:
        rows = rows ^ -128
        scales = panels(cast(Tensor, scales)).flatten()
    elif kind == _INT4:
        nibbles = (rows + 8).view(torch.uint8).unflatten(2, (-1, 2, 4))  # (P, 32, K / 8, 2, 4)
        rows = (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).flatten(2)
        scales = panels(cast(Tensor, scales)).transpose(1, 2).half().contiguous()
    # What lies beside one another in a lane moves as one number of 32 bits.
    data = rows.contiguous().view(torch.int32).transpose(1, 2).contiguous()
    bias = None if matrix.bias is None else panels(matrix.bias.detach().float()[:, None]).flatten()[:N].contiguous()
    return torch.classes.nanoworks.PackedMatrix(
        kind, N, K, padded, step if kind == _INT4 else padded, data, scales, bias
    )


def _split(outer: Matrix | nn.Module) -> tuple[Any, nn.Module | None]:
    """The matrix an operator ends with, or the module that goes on behind it."""
    return (packed(outer), None) if isinstance(outer, (Dense, QuantizedLinear)) else (None, outer)


class PackedAttention(nn.Module):
    """`Attention` as one operator; the context is a `nn.kernel_context.KernelContext`.

    `outer` is the output projection, or a module that does it after the operator (one that sums over ranks).
    """

    def __init__(self, attention: Attention, qkv: Matrix, outer: Matrix | nn.Module) -> None:
        super().__init__()
        self.layer, self.window, self.rotate = attention.layer, attention.window, attention.rotate
        self.dtype, self.qkv = _input_dtype(qkv), packed(qkv)
        self.outer, self.after = _split(outer)
        q_norm, k_norm = cast("tuple[RMSNorm | None, RMSNorm | None]", (attention.q_norm, attention.k_norm))
        norm = 0 if q_norm is None else 2 if attention.norm_after_rope else 1
        assert (q_norm is None) == (k_norm is None), "q and k are normalised both or neither"
        self.options = head_options(
            attention.head_dim,
            Attending(attention.window, attention.scale, attention.softcap, attention.sinks),
            norm=norm,
            norm_weights=(_float_weight(q_norm), _float_weight(k_norm)),
            eps=0.0 if q_norm is None else q_norm.eps,
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ctx: Any) -> Tensor:
        cos, sin = rotation if self.rotate else (None, None)
        x = x if self.dtype is None else x.to(self.dtype)
        y = torch.ops.nanoworks.attention(
            x, self.qkv, self.outer, cos, sin, ctx.step(self.window), ctx.cache.handle, self.layer, self.options
        )
        return y if self.after is None else self.after(y)


def head_options(
    head_dim: int,
    how: Attending,
    *,
    norm: int = 0,
    norm_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
) -> Any:
    """Return `HeadOptions` (see attention.h)."""
    window, scale, softcap, sinks = how
    return torch.classes.nanoworks.HeadOptions(
        norm,
        *norm_weights,
        eps,
        head_dim**-0.5 if scale is None else scale,
        0 if window is None else window.size,
        0 if window is None else window.first,
        softcap or 0.0,
        None if sinks is None else sinks.detach().float(),
    )


def _float_weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None or norm.weight is None else norm.weight.detach().float()


class PackedFeedForward(nn.Module):
    """`SwiGLU` or `SquaredReLU` as one operator; `outer` as in `PackedAttention`."""

    def __init__(self, inner: Matrix, outer: Matrix | nn.Module, *, glu: bool) -> None:
        super().__init__()
        self.dtype, self.inner = _input_dtype(inner), packed(inner, parts=2 if glu else 1)
        self.outer, self.after = _split(outer)
        self.epilogue = _GLU_SILU if glu else _SQUARED_RELU

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.dtype is None else x.to(self.dtype)
        y = torch.ops.nanoworks.feed_forward(x.contiguous(), self.inner, self.outer, self.epilogue)
        return y if self.after is None else self.after(y)


class PackedExperts(nn.Module):
    """`Experts` as one operator."""

    def __init__(self, blocks: Sequence[tuple[Matrix, Matrix]]) -> None:
        super().__init__()
        self.dtype = _input_dtype(blocks[0][0])
        self.stack = torch.classes.nanoworks.ExpertStack(_GLU_SILU)
        for inner, outer in blocks:
            self.stack.add(packed(inner, parts=2), packed(outer))

    def send(self, x: Tensor, experts: Tensor, drop: Tensor | None = None) -> None: ...

    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, drop: Tensor | None = None, sent: None = None
    ) -> Tensor:
        assert drop is None, "packed models are for inference, where nothing is dropped"
        inputs = (x if self.dtype is None else x.to(self.dtype)).contiguous()
        y = torch.ops.nanoworks.mixture(inputs, weights.float().contiguous(), experts.contiguous(), self.stack)
        return y.to(x.dtype)


class PackedNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps, self.weight = norm.eps, _float_weight(norm)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.nanoworks.rms_norm(x.contiguous(), self.weight, self.eps)


class RoPETable(nn.Module):
    """`RoPE` that looks up what it computed before, in float32 as the kernels take it."""

    def __init__(self, rope: RoPE) -> None:
        super().__init__()
        self.rope = rope
        self._cos = self._sin = torch.empty(0)

    def forward(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.rope.depends_on_length:
            cos, sin = self.rope(positions, lengths)
            return cos.float().contiguous(), sin.float().contiguous()
        if (most := int(positions.max())) >= len(self._cos):
            places = torch.arange(max(256, 1 << (most + 1).bit_length()))
            cos, sin = self.rope(places, places)
            self._cos, self._sin = cos.float(), sin.float()
        return self._cos[positions], self._sin[positions]


class PackedStack(nn.Module):
    """Consecutive layers of the pre-norm kind (`nn.layer`), all of a model, as one operator."""

    def __init__(self, layers: Sequence[tuple[PackedNorm, PackedAttention, PackedNorm, PackedFeedForward]]) -> None:
        super().__init__()
        self.windows = [attention.window for _, attention, _, _ in layers]
        self.kinds = set(self.windows)
        self.stack = torch.classes.nanoworks.PackedStack()
        for i, (first, attention, second, block) in enumerate(layers):
            assert attention.layer == i, "a stack holds all layers in order"
            self.stack.add(
                first.weight,
                first.eps,
                attention.qkv,
                attention.outer,
                attention.options,
                attention.rotate,
                second.weight,
                second.eps,
                block.inner,
                block.outer,
                block.epilogue,
            )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ctx: Any) -> Tensor:
        kinds = {window: ctx.step(window) for window in self.kinds}
        steps = [kinds[window] for window in self.windows]
        return torch.ops.nanoworks.run_layers(x, self.stack, *rotation, steps, ctx.cache.handle)
