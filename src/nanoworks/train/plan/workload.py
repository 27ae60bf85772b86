"""What a recipe asks for, as far as a plan is concerned: its model on the meta device, and the tokens it trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nanoworks.checkpoint import locate
from nanoworks.checkpoint.checkpoint import read_json
from nanoworks.common.errors import UserError
from nanoworks.config import ModelConfig, Recipe
from nanoworks.config.recipe import parse_length
from nanoworks.models import Decoder, build_model
from nanoworks.models.registry import config_from_hf
from nanoworks.nn.moe import MoE
from nanoworks.parallel.pipeline_split import Costs, estimated_costs
from nanoworks.tokenizer import Tokenizer
from nanoworks.train.activations import Kept, trace_activations
from nanoworks.train.resolve import model_config, resolve

ASSUMED_VOCABULARY = 32768
"""Of a recipe whose tokenizer is not there yet."""


@dataclass(frozen=True)
class Workload:
    recipe: Recipe
    model: Decoder
    """On the meta device."""
    dtype: torch.dtype
    device: torch.device
    """Of the kind that the plan is for."""
    sequence_length: int
    tokens_per_step: int
    tokens: float | None
    """Of the whole run; None where only the data can tell."""
    matrix_state_bytes: int
    orthogonalises: bool
    """The optimizer orthogonalises matrices (Muon)."""
    whole_matrices: bool
    """It cannot when ranks hold parts of them."""
    kept: Kept
    costs: Costs
    """FLOPs of a token's forward."""
    flops_per_token: int
    rollout_sequences: int
    """That an rl stage samples at once."""
    notes: tuple[str, ...]
    """What had to be assumed."""

    @property
    def num_experts(self) -> int:
        return max((m.num_experts for m in self.model.modules() if isinstance(m, MoE)), default=0)


def workload(
    recipe: Recipe, device: torch.device, *, vocab_size: int | None = None, config: ModelConfig | None = None
) -> Workload:
    """The work of `recipe` on devices of the kind of `device`, which need not be here.

    Args:
        vocab_size: of the tokenizer; None: of the one that the recipe names, or an assumption if it is not there.
        config: of the model; None: as the recipe says, or what it starts from.

    Raises:
        UserError: a fault of the recipe, or a model to start from that is not there.
    """
    resolved = resolve(recipe)
    notes: list[str] = []
    with torch.device("meta"):
        model = build_model(config or _config(recipe, vocab_size, notes))
    dtype = torch.float32
    if recipe.hardware.dtype == "bfloat16" or (recipe.hardware.dtype == "auto" and device.type != "cpu"):
        dtype = torch.bfloat16
    length, sequences = recipe.data.sequence_length, 0
    tokens_per_step = recipe.train.tokens_per_step
    if recipe.stage.name == "rl":
        o = resolved.stage_options
        sequences = o.prompts_per_step * o.samples_per_prompt
        tokens_per_step = sequences * length
        notes.append(f"rl: {sequences} answers a step, prompt and answer together taken as {length} tokens")
    return Workload(
        recipe=recipe,
        model=model,
        dtype=dtype,
        device=device,
        sequence_length=length,
        tokens_per_step=tokens_per_step,
        tokens=_tokens(recipe, model, tokens_per_step, notes),
        matrix_state_bytes=resolved.optimizer.matrix_state_bytes,
        orthogonalises="muon" in recipe.optim.name,
        whole_matrices=resolved.optimizer.whole_matrices,
        kept=trace_activations(
            model, sequence_length=length, dtype=dtype, device=device, documents=recipe.data.document_mask
        ),
        costs=estimated_costs(model, length),
        flops_per_token=model.flops_per_token(length),
        rollout_sequences=sequences,
        notes=tuple(notes),
    )


def _config(recipe: Recipe, vocab_size: int | None, notes: list[str]) -> ModelConfig:
    if recipe.init_from is not None:
        try:
            config = config_from_hf(read_json(locate(recipe.init_from) / "config.json"))
        except (OSError, UserError) as error:
            raise UserError(
                f"the model to start from is not there ({error}); give its shape instead: init_from=null "
                "tokenizer=DIRECTORY model.model_type=..."
            ) from None
        return config.changed(recipe.model) if recipe.model else config
    return model_config(recipe, vocab_size=vocab_size or _vocabulary(recipe, notes))


def _vocabulary(recipe: Recipe, notes: list[str]) -> int:
    if recipe.model and recipe.model.get("vocab_size"):
        return int(recipe.model["vocab_size"])
    if recipe.tokenizer and Path(recipe.tokenizer).is_dir():
        return Tokenizer.load(recipe.tokenizer).vocab_size
    notes.append(f"no tokenizer at {recipe.tokenizer}: a vocabulary of {ASSUMED_VOCABULARY} is assumed")
    return ASSUMED_VOCABULARY


def _tokens(recipe: Recipe, model: Decoder, tokens_per_step: int, notes: list[str]) -> float | None:
    amount, unit = parse_length(recipe.train.length)
    if unit == "steps":
        return amount * tokens_per_step
    if unit == "tokens":
        return amount
    if unit == "tokens_per_parameter":
        return amount * model.num_active_parameters()
    if unit == "flops":
        return amount / model.flops_per_token(recipe.data.sequence_length)
    notes.append(f"train.length is {recipe.train.length!r}: only the data can tell how long that is")
    return None
