"""The CPU kernels against PyTorch, and the loader's ways out. Attention is in test_paged, families in tests/models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanoworks.nn import kernels
from nanoworks.nn.kernel_context import KernelCache
from nanoworks.nn.mlp import SquaredReLU, SwiGLU
from nanoworks.nn.moe import Experts
from nanoworks.nn.norm import RMSNorm
from nanoworks.nn.pack import pack
from nanoworks.nn.packed import Dense, PackedLinear
from nanoworks.nn.paged import KVShape
from nanoworks.nn.quantized import Precision, QuantizedLinear

needs_kernels = pytest.mark.skipif(kernels.why_not() is not None, reason=f"no kernels: {kernels.why_not()}")
ROWS = (1, 2, 3, 5, 6, 7, 13, 40)
SHAPES = [(64, 64), (100, 96), (257, 130), (30, 34)]
"""(outputs, inputs): whole panels and parts of them."""


def quantized_rows(x: torch.Tensor, group: int) -> torch.Tensor:
    """What is left of x (M, K) float32 when each `group` of inputs is rounded to bytes."""
    K = x.size(1)
    grouped = F.pad(x, (0, -K % group)).view(len(x), -1, group)
    scales = grouped.abs().amax(2, keepdim=True) / 127
    rounded = (grouped / torch.where(scales == 0, 1.0, scales)).round() * scales
    return rounded.flatten(1)[:, :K]


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_products(dtype: torch.dtype, N: int, K: int, bias: bool) -> None:
    torch.manual_seed(N)
    weight, b = torch.randn(N, K).to(dtype), torch.randn(N).to(dtype) if bias else None
    leaf = PackedLinear(Dense(weight, b))
    for M in ROWS:
        x = torch.randn(M, K).to(dtype)
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        y = leaf(x)
        assert y.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y.double(), expected, atol=tolerance * K**0.5, rtol=tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_products_are_those_of_the_portable_leaf(
    precision: Precision, N: int, K: int, dtype: torch.dtype
) -> None:
    """But for the rows, which the kernels round to bytes: given rounded rows, both compute the same."""
    torch.manual_seed(K)
    leaf = QuantizedLinear.of(torch.randn(N, K), precision, torch.randn(N))
    packed = PackedLinear(leaf, to_float=True)
    for M in ROWS:
        x = torch.randn(M, K).to(dtype)
        expected = leaf(quantized_rows(x.float(), leaf.group or K))
        assert (packed(x) - expected).norm() < 3e-3 * expected.norm()  # a number may lie halfway between two bytes
        exact = leaf(x.float())
        assert (packed(x) - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.01), ("int4", 0.12)])
def test_rounding_keeps_weights_close(precision: Precision, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 100)
    leaf = QuantizedLinear.of(weight, precision)
    assert (leaf.dequantize() - weight).norm() < most * weight.norm()
    assert (leaf.in_features, leaf.out_features) == (100, 70)
    zero = QuantizedLinear.of(torch.zeros(3, 40), precision)
    assert not zero.dequantize().any()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_is_a_slice(precision: Precision, dim: int) -> None:
    leaf = QuantizedLinear.of(torch.randn(8, 128), precision)
    whole = leaf.dequantize()
    leaf.shard(dim, 1, 2)
    assert torch.equal(leaf.dequantize(), whole.chunk(2, dim)[1])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [64, 40, 100])
@pytest.mark.parametrize("kind", [SwiGLU, SquaredReLU])
def test_feed_forward_blocks(kind: type[torch.nn.Module], inner: int, dtype: torch.dtype) -> None:
    torch.manual_seed(inner)
    block = kind(48, inner).to(dtype)
    packed = pack(block)
    for M in ROWS:
        x = torch.randn(M, 48).to(dtype)
        expected = block.double()(x.double())
        block.to(dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(packed(x).double(), expected, atol=tolerance, rtol=tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    for size in (16, 50, 768):
        norm = RMSNorm(size, eps=1e-5)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(9, size).to(dtype)
        expected = F.rms_norm(x.double(), (size,), norm.weight.double(), 1e-5)
        y = pack(norm)(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


@needs_kernels
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_a_row_does_not_depend_on_the_others(precision: Precision | None) -> None:
    torch.manual_seed(0)
    block = SwiGLU(96, 128).bfloat16()
    packed = pack(block, quantize=precision)
    x = torch.randn(40, 96).bfloat16()
    together = packed(x)
    for size in ROWS:
        for start in range(0, 40 - size + 1, 11):
            assert torch.equal(packed(x[start : start + size]), together[start : start + size])


@needs_kernels
@pytest.mark.parametrize("inner", [64, 40])
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
def test_experts_are_their_blocks_one_by_one(precision: Precision | None, inner: int) -> None:
    torch.manual_seed(inner)
    experts = Experts(5, 48, inner).bfloat16()
    packed = pack(experts, quantize=precision)
    x = torch.randn(13, 48).bfloat16()
    chosen = torch.stack([torch.randperm(4)[:3] for _ in x])  # nobody's is the last
    weights = torch.rand(13, 3)
    blocks = []
    for i in range(5):
        block = SwiGLU(48, inner)
        for leaf, stack in ((block.gate_proj, experts.gate_proj), (block.up_proj, experts.up_proj)):
            leaf.weight.data = stack.weight[i].data
        block.down_proj.weight.data = experts.down_proj.weight[i].data
        blocks.append(pack(block, quantize=precision))
    y = packed(x, weights, chosen)
    for n in range(13):
        parts = [weights[n, j] * blocks[e](x[n : n + 1])[0].float() for j, e in enumerate(chosen[n].tolist())]
        torch.testing.assert_close(y[n].float(), sum(parts), atol=1e-5, rtol=2**-8)
        assert torch.equal(packed(x[n : n + 1], weights[n : n + 1], chosen[n : n + 1])[0], y[n])


@needs_kernels
def test_an_expert_that_does_not_exist_is_refused() -> None:
    packed = pack(Experts(4, 16, 16))
    with pytest.raises(RuntimeError, match="no such expert"):
        packed(torch.randn(2, 16), torch.rand(2, 1), torch.tensor([[0], [5]]))


@needs_kernels
def test_packing_leaves_the_model_or_consumes_it() -> None:
    block = SwiGLU(64, 64)
    before = block.gate_proj.weight.clone()
    pack(block)
    assert torch.equal(block.gate_proj.weight, before)
    x = torch.randn(3, 64)
    expected = block(x)
    torch.testing.assert_close(pack(block, consume=True)(x), expected, atol=1e-5, rtol=1e-5)
    assert block.gate_proj.weight.numel() == block.down_proj.weight.numel() == 0


@needs_kernels
@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_moved_tokens_arrive_whole(dtype: torch.dtype, int8: bool) -> None:
    """A cache in which a token was moved equals one into which it was written there."""
    D, K = 8, 2
    options = torch.classes.nanoworks.HeadOptions(0, None, None, 0.0, 1.0, 0, 0, 0.0, None)

    def cache_with(slots: list[int]) -> KernelCache:
        cache = KernelCache(KVShape(2, K, D, dtype), 8, int8=int8)
        cache.apply([], [*range(1, 8)])
        torch.manual_seed(0)
        for layer in range(2):
            for slot in slots:
                place, block = torch.tensor([0]), torch.tensor([[slot // 8]])
                step = torch.classes.nanoworks.PagedStep(
                    place, torch.tensor([slot]), block, None, [1], [1], [1], None, None
                )
                q, k, v = (torch.randn(1, K, D).to(dtype) for _ in range(3))
                torch.ops.nanoworks.attend(q, k, v, None, None, step, cache.handle, layer, options)
        return cache

    moved, written = cache_with([20, 35, 47]), cache_with([17, 18, 40])
    moved.apply([], [], [(20, 17), (35, 18), (47, 40)])
    moved.apply([], [], [(63, slot) for slot in (20, 35, 47)])  # 63 is empty
    assert torch.equal(moved.data, written.data) or (int8 and _same_but_for_scale_zero(moved, written))


def _same_but_for_scale_zero(a: KernelCache, b: KernelCache) -> bool:
    assert a.scales is not None
    assert b.scales is not None
    return torch.equal(a.scales, b.scales) and torch.equal(a.data[:, 1], b.data[:, 1])


def test_switched_off_they_are_not_there(tmp_path: Path) -> None:
    code = "from nanoworks.nn import kernels; print(kernels.why_not())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NANOWORKS_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "NANOWORKS_KERNELS=0" in run.stdout
    assert "inference runs through PyTorch" in run.stderr


def test_without_a_compiler_the_reason_is_said(tmp_path: Path) -> None:
    code = "from nanoworks.nn import kernels; print(kernels.why_not())"
    environment = {**os.environ, "NANOWORKS_CACHE": str(tmp_path), "CXX": "no-such-compiler"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "written for Linux" not in run.stdout and "lacks" not in run.stdout:
        assert "no-such-compiler" in run.stdout


def test_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_cpu_features", lambda: frozenset({"avx2"}))
    kernels.why_not.cache_clear()
    try:
        reason = kernels.why_not()
        assert reason is not None
        assert "avx512_bf16" in reason or "written for Linux" in reason
    finally:
        kernels.why_not.cache_clear()
