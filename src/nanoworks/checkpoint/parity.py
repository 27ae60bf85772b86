"""The certificate of a conversion: the same prompts through what was converted and what came out of it.

Both sides compute in float32, one after the other. Ours is read layer by layer, so that a side takes the memory
of the embedding, the head and one layer, however large the model is.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nanoworks.checkpoint.gguf.llama_cpp import LlamaCpp
from nanoworks.checkpoint.weights import WeightFiles
from nanoworks.config.model import ModelConfig
from nanoworks.models import Decoder, build_model, config_from_hf
from nanoworks.nn.context import DenseContext
from nanoworks.tokenizer import Tokenizer

FILE = "parity.json"
SEED = 0
PROMPT_TOKENS = 32
RANDOM_PROMPTS = 2
GREEDY_TOKENS = 16

# Of the largest logit. Both sides have the same weights, rounded or not. float32: other kernels, other order of sums.
# The others: the rounding of activations through all layers, by a reader that computes in that dtype.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

# nanochat keeps its rotations in bfloat16, transformers its in float32.
NANOCHAT_TOLERANCE = 2e-3

# With experts, rounded activations send a token that is near a tie to another expert, and all is different from there
# on. So many of the positions must be within the tolerance all the same.
EXPERTS_SHARE = 0.5

# A model of at most this size in float32 is read by transformers, if installed, and otherwise by us:
# transformers holds all of it.
MAX_TRANSFORMERS_BYTES = 1_000_000_000

TEXTS = (
    "The quick brown fox jumps over the lazy dog, 12345 times in 2024; then it's done.",
    "def add(a: int, b: int) -> int:\n    return a + b  # naïve, 你好, 🙂\n",
)


class Side(Protocol):
    """A model under comparison."""

    reader: str

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, vocab_size) float32."""
        ...


@dataclass
class Reference:
    """What the source answers.

    `tokens` (B, T), of which the last `greedy` are its own, and `logits` (B, T - 1, V) after each but the last. Where
    the result has rounded weights, these are the source's with the same rounding; `rounding` says what that changed.
    """

    tokens: Tensor
    logits: Tensor
    greedy: int
    reader: str
    rounding: dict[str, Any] | None = None


class Streamed:
    """A Hugging Face directory through our model, a layer at a time."""

    reader = f"nanoworks {metadata.version('nanoworks')}"

    def __init__(self, model: Decoder, files: WeightFiles, rounded: torch.dtype | None = None) -> None:
        """`model` is on the meta device; weights are rounded to `rounded` before use."""
        self.model, self._files, self._rounded = model, files, rounded
        kept = {name: self._read(name) for name in files.parts if not name.startswith("layers.")}
        model.load_state_dict(kept, strict=False, assign=True)
        model.tie_weights()
        for i, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(self._loader(f"layers.{i}."))
            layer.register_forward_hook(self._unloader(layer))
        model.eval()

    def _read(self, name: str) -> Tensor:
        return self._files.read_ours(name, self._rounded).float()

    def _loader(self, prefix: str) -> Any:
        names = [name for name in self._files.parts if name.startswith(prefix)]

        def load(layer: nn.Module, _: Any) -> None:
            state = {name.removeprefix(prefix): self._read(name) for name in names}
            layer.load_state_dict(state, strict=False, assign=True)

        return load

    def _unloader(self, layer: nn.Module) -> Any:
        empty = dict(layer.named_parameters())
        return lambda layer, *_: layer.load_state_dict(empty, strict=False, assign=True) and None

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model.head(self.model(tokens, DenseContext(tokens)))


class Whole:
    """A model that is in memory already."""

    reader = Streamed.reader

    def __init__(self, model: Decoder, rounded: torch.dtype | None = None) -> None:
        """`model` itself is rounded to `rounded`, and is float32 from then on."""
        self.model = model.to(rounded).float().eval() if rounded is not None else model.float().eval()

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model.head(self.model(tokens, DenseContext(tokens)))


class Transformers:
    """A directory as Hugging Face's library reads it."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.reader = f"transformers {metadata.version('transformers')}"
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits.float()


@contextmanager
def streamed(directory: Path, rounded: torch.dtype | None = None) -> Iterator[Streamed]:
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = build_model(config_from_hf(raw))
    with WeightFiles(directory, model) as files:
        yield Streamed(model, files, rounded)
        model.to("meta")  # its hooks refer to it in a circle, so that it would stay for a while


def transformers_reads(config: ModelConfig, parameters: int) -> bool:
    """Whether transformers is here, knows the family, and may hold a model of this size."""
    if parameters * 4 > MAX_TRANSFORMERS_BYTES or find_spec("transformers") is None:
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.model_type in CONFIG_MAPPING_NAMES


def prompts(config: ModelConfig, tokenizer: Tokenizer | None, max_length: int | None = None) -> Tensor:
    """(B, T) ids: fixed texts, or counting where there is no tokenizer, and random ones; longer than a small window.

    With the greedy tokens they stay within `max_length`, and within the model's context.
    """
    length = PROMPT_TOKENS
    window = getattr(config, "sliding_window", None)
    if window is not None and window <= 256:
        length += window
    length = max(1, min(length, (max_length or config.max_position_embeddings) - GREEDY_TOKENS))
    rows = []
    for i, text in enumerate(TEXTS):
        ids = tokenizer.encode(text, bos=True) if tokenizer else list(range(i, i + length))
        rows.append([id % config.vocab_size for id in (ids * length)[:length]])
    generator = torch.Generator().manual_seed(SEED)
    random = torch.randint(config.vocab_size, (RANDOM_PROMPTS, length), generator=generator)
    return torch.cat([torch.tensor(rows), random])


def refer(side: Side, start: Tensor, *, greedy: int = GREEDY_TOKENS) -> Reference:
    """Continue the prompts `start` (B, T) greedily and keep the logits on the way."""
    tokens = start
    for _ in range(greedy):
        logits = side.logits(tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return Reference(tokens, logits, greedy, side.reader)


def round_reference(reference: Reference, side: Side) -> None:
    """Let `side`, the source with rounded weights, be the reference for what was written with the same rounding."""
    logits = side.logits(reference.tokens[:, :-1])
    agree = _greedy(logits, reference)
    reference.rounding = {
        "max_logit_difference": float(_difference(logits, reference.logits).max()),
        "greedy_agreement": float(agree.float().mean()),
    }
    reference.logits = logits


def certify(reference: Reference, result: Side | LlamaCpp, *, tolerance: float, share: float = 1.0) -> dict[str, Any]:
    """Compare `result` with the reference on its tokens.

    `tolerance` is a share of the largest logit, `share` the part of all positions that must be within it.

    A result that agrees on every greedy token of the reference, given those before, generates the same text. Of
    llama.cpp only the log-probabilities of the likeliest tokens are compared, at the greedy positions.
    """
    expected, tokens = reference.logits, reference.tokens[:, :-1]
    scale = float(expected.abs().max())
    if isinstance(result, LlamaCpp):
        expected = expected[:, -reference.greedy :].log_softmax(-1)
        logits = result.log_probabilities(tokens, first=tokens.size(1) - reference.greedy)
        expected = expected[..., : logits.size(-1)].masked_fill(logits == -torch.inf, -torch.inf)
    else:
        logits = result.logits(tokens)
    difference = _difference(logits, expected)
    within = float((difference <= tolerance * scale).float().mean())  # NaN is not
    agree = _greedy(logits, reference)
    certificate = {
        "verified": within >= share,
        "max_logit_difference": float(difference.max()),
        "max_logit": scale,
        "tolerance": tolerance * scale,
        "relative_tolerance": tolerance,
        "greedy_tokens": agree.numel(),
        "greedy_agreement": float(agree.float().mean()),
        "prompts": {
            "fixed": len(TEXTS),
            "random": RANDOM_PROMPTS,
            "seed": SEED,
            "tokens": reference.tokens.size(1) - reference.greedy,
        },
        "positions": difference.numel(),
        "positions_within_tolerance": within,
        "positions_required": share,
        "source_read_by": reference.reader,
        "result_read_by": result.reader,
    }
    if reference.rounding is not None:
        certificate["rounding"] = reference.rounding
    return certificate


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """(B, T) largest absolute difference at each position, NaN if there is one; equal infinities do not differ."""
    return torch.stack([torch.where(x == y, 0.0, x - y).abs().amax(-1) for x, y in zip(a, b, strict=True)])


def _greedy(logits: Tensor, reference: Reference) -> Tensor:
    """(B, greedy) whether the likeliest token is the source's own."""
    return logits[:, -reference.greedy :].argmax(-1) == reference.tokens[:, -reference.greedy :]


def versions(packages: Sequence[str] = ("nanoworks", "torch", "transformers", "gguf", "xllamacpp")) -> dict[str, str]:
    """Of what takes part in a conversion, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
