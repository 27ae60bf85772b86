"""Training Medusa heads on a frozen model, for `--speculate medusa` (Medusa-1, https://arxiv.org/abs/2401.10774).

The backbone runs without gradients; only the heads learn. Head k (from 0) is taught the token k + 2 places ahead, where
the backbone predicts the next one; the loss is the sum of the heads' losses, that of head k weighted by
`decay ** (k + 1)`, because what lies farther ahead is harder and worth less. A checkpoint of the run is the backbone as
it was, with the heads in `medusa/` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from nanoworks.checkpoint.medusa import Ranks, load_heads, save_heads
from nanoworks.common.errors import UserError
from nanoworks.data import Batch
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.medusa import MedusaHeads, shifted
from nanoworks.train.optim import ParamGroups
from nanoworks.train.stage import STAGES, Loss, StageContext
from nanoworks.train.supervised import Supervised

RANKS = 8
"""Guesses of each head that validation looks at, likeliest first: what the tree of candidates is chosen from."""


@STAGES.register("medusa")
class Medusa(Supervised):
    class Options(Supervised.Options):
        num_heads: int = Field(default=4, gt=0, description="tokens guessed beyond the next one")
        num_layers: int = Field(default=1, gt=0, description="residual blocks of a head")
        own_unembedding: bool = Field(
            default=False,
            description="each head has its own projection to the vocabulary, as in the paper; false: all use the "
            "model's, which is read once for all of them",
        )
        decay: float = Field(default=0.8, gt=0, le=1, description="weight of each head's loss over the one before it")

    def __init__(self, context: StageContext, options: Any) -> None:
        super().__init__(context, options)
        recipe, model = context.recipe, context.model
        if recipe.init_from is None:
            raise UserError("stage medusa adds heads to a trained model: give it as init_from")
        if recipe.optim.name != "adamw":
            raise UserError(f"stage medusa trains with optim.name=adamw, not {recipe.optim.name}")
        self.experts = None  # the routers are frozen too
        model.requires_grad_(False)
        heads = MedusaHeads(
            model.config.hidden_size,
            options.num_heads,
            num_layers=options.num_layers,
            vocab_size=model.config.vocab_size if options.own_unembedding else None,
        )
        heads.copy_unembedding(model.head.lm_head.weight)
        set_compute_dtype(heads, model.head.lm_head.compute_dtype)
        self.heads = heads.to(context.device)
        self._ranks: Ranks = []

    @property
    def trained(self) -> nn.Module:
        return self.heads

    def flops_per_token(self, sequence_length: int) -> int:
        """The backbone's layers forward only, the heads both ways, a borrowed unembedding without its gradient."""
        model, heads = self.context.model, self.heads
        unembedding = model.head.lm_head.weight.numel()
        backbone = model.flops_per_token(sequence_length) // 3 - 2 * unembedding
        borrowed = 0 if heads.lm_heads else 4 * unembedding * heads.num_heads
        return backbone + borrowed + 6 * sum(p.numel() for p in heads.parameters())

    def param_groups(self) -> ParamGroups:
        named = list(self.heads.named_parameters())
        return {
            "matrix": [(n, p) for n, p in named if n.startswith("blocks.") and p.ndim == 2],
            "unembedding": [(n, p) for n, p in named if n.startswith("lm_heads.")],
            "other": [(n, p) for n, p in named if p.ndim == 1],
        }

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        targets, weights = self._targets(batch)
        losses = self.heads.losses(self._hidden(batch), model.head, targets, weights)
        decay = self.options.decay
        total = torch.stack([loss * decay ** (k + 1) for k, loss in enumerate(losses)]).sum()
        return Loss(total, {f"medusa/loss_{k + 1}": loss for k, loss in enumerate(losses)})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How often each head is right: its likeliest guess, and one of its five likeliest."""
        if self.validation is None:
            return {}
        model, device = self.context.model, self.context.device
        heads = self.heads.num_heads
        nats, counts, right = torch.zeros(heads), torch.zeros(heads), torch.zeros(heads, RANKS)
        with self._open(self.validation, infinite=False) as loader:
            seen = 0
            for cpu_batch in loader:
                batch = cpu_batch.to(device)
                hidden = self._hidden(batch)
                targets, weights = self._targets(batch)
                losses = self.heads.losses(hidden, model.head, targets, weights)
                nats += torch.stack(losses).cpu()
                for piece, wanted, weight in zip(
                    hidden.split(_ROWS), targets.split(_ROWS, 1), weights.split(_ROWS, 1), strict=True
                ):
                    guesses = self.heads.logits(piece, model.head).topk(RANKS).indices  # (n, K, R)
                    hits = (guesses == wanted.t()[..., None]) & (weight.t()[..., None] > 0)
                    right += hits.sum(0).cpu()
                    counts += (weight > 0).sum(1).cpu()
                seen += batch.num_supervised
                if seen >= self.context.recipe.eval.tokens:
                    break
        counts = counts.clamp_min(1)
        self._ranks = (right / counts[:, None]).tolist()
        means = (nats / counts).tolist()
        decay = self.options.decay
        metrics = {"val/loss": sum(mean * decay ** (k + 1) for k, mean in enumerate(means))}
        for k, ranks in enumerate(self._ranks, start=1):
            metrics[f"medusa/top1_{k}"] = ranks[0]
            metrics[f"medusa/top5_{k}"] = sum(ranks[:5])
        return metrics

    def save(self, directory: Path) -> None:
        save_heads(directory, self.heads, self.context.model, ranks=self._ranks)

    def resume(self, directory: Path) -> None:
        saved = load_heads(directory, self.context.model)
        self.heads.load_state_dict(saved.heads.state_dict())
        self._ranks = saved.ranks

    @torch.no_grad()
    def _hidden(self, batch: Batch) -> Tensor:
        """(N, C) of all tokens of the batch; the frozen model runs as it does when it serves."""
        model = self.context.model.eval()
        return model(batch.tokens, DenseContext(batch.tokens, documents=batch.documents)).flatten(0, -2)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        targets, weights = shifted(batch.targets, batch.weights, batch.documents, self.heads.num_heads)
        return targets.flatten(1), weights.flatten(1)


_ROWS = 256
"""Positions whose logits validation holds at a time."""
