"""What is particular to nanochat of 2026: windows, padding, the dial, roles; its numbers are in the golden tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from nanoworks.common.errors import UserError
from nanoworks.config.recipe import Checkpointing
from nanoworks.models import build_model, config_from_dict, config_from_hf
from nanoworks.models.nanochat_2026 import Nanochat2026, Nanochat2026Config, short_window
from nanoworks.nn.context import DenseContext, Window

TINY: dict[str, Any] = {
    "model_type": "nanochat_2026",
    "vocab_size": 70,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 6,
}


def config(**changes: Any) -> Nanochat2026Config:
    made = config_from_dict({**TINY, **changes})
    assert isinstance(made, Nanochat2026Config)
    return made


def model(**changes: Any) -> Nanochat2026:
    built = build_model(config(**changes))
    assert isinstance(built, Nanochat2026)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return built


def test_the_short_window_is_a_quarter_of_the_context_in_tiles_and_the_token_itself() -> None:
    contexts = (64, 256, 512, 513, 1000, 2048, 4096)
    assert [short_window(context) for context in contexts] == [129, 129, 129, 257, 257, 513, 1025]


def test_the_pattern_repeats_and_the_last_layer_sees_everything() -> None:
    def seen(**changes: Any) -> list[Window | None]:
        made = config(**changes)
        return [made.window(i) for i in range(made.num_hidden_layers)]

    short = Window(6)
    assert seen(num_hidden_layers=6) == [short, short, short, None, short, None]
    assert seen(window_pattern="SL") == [short, None, short, None, None]
    assert seen(window_pattern="L") == [None] * 5
    with pytest.raises(UserError, match="window_pattern"):
        config(window_pattern="SML")


def test_the_dial_rounds_the_width_up_to_whole_heads() -> None:
    shapes = {}
    for depth in (1, 4, 5, 12):
        made = config_from_dict({"model_type": "nanochat_2026", "depth": depth, "vocab_size": 100})
        shapes[depth] = (made.hidden_size, made.num_attention_heads, made.head_dim, made.num_hidden_layers)
    assert shapes == {1: (128, 1, 128, 1), 4: (256, 2, 128, 4), 5: (384, 3, 128, 5), 12: (768, 6, 128, 12)}


def test_figures_of_every_depth_are_nanochats(shared_dir: Path) -> None:
    lines = (shared_dir / "golden/nanochat/new/hyperparams.jsonl").read_text().splitlines()
    assert len(lines) == 5
    for line in lines:
        golden = json.loads(line)
        made = config_from_dict(
            {"model_type": "nanochat_2026", "depth": golden["depth"], "vocab_size": golden["vocab"]}
        )
        assert isinstance(made, Nanochat2026Config)
        with torch.device("meta"):
            built = Nanochat2026(made)
        assert built.num_parameters() == golden["num_params"]
        assert built.scaling_parameters() == golden["num_scaling_params"]
        assert built.flops_per_token(2048) == golden["num_flops_per_token"]
        windows = [made.window(i) for i in range(made.num_hidden_layers)]
        assert [2048 if w is None else w.size - 1 for w in windows] == [w for w, _ in golden["window_sizes"]]


def test_the_window_is_written_down_so_that_a_longer_context_does_not_move_it() -> None:
    written = config(sliding_window=129).to_hf()
    longer = config_from_hf({**written, "max_position_embeddings": 8192})
    assert isinstance(longer, Nanochat2026Config)
    assert longer.window(0) == Window(129)


def test_padding_of_the_vocabulary_gets_neither_probability_nor_gradient() -> None:
    padded = model().train()
    assert padded.embed_tokens.weight.shape == padded.head.lm_head.weight.shape == (128, 32)
    tokens = torch.arange(40).view(2, 20)
    targets = torch.arange(30, 70).view(2, 20)
    hidden = padded(tokens, DenseContext(tokens))
    logits = padded.head(hidden)
    assert logits.shape == (2, 20, 70)
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = padded.head.loss(hidden, targets, torch.ones(2, 20))
    torch.testing.assert_close(loss, expected)
    logprobs = padded.head.logprobs(hidden, targets)
    torch.testing.assert_close(-logprobs.sum(), expected)
    loss.backward()
    for table in (padded.embed_tokens.weight, padded.head.lm_head.weight, padded.value_embeds["0"].weight):
        assert isinstance(table, torch.Tensor)
        assert table.grad is not None
        assert table.grad[:40].abs().sum() > 0
        assert not table.grad[70:].any()


def test_gradients_are_those_of_plain_torch_operations() -> None:
    """The CPU's hand-written backward passes against autograd in float64."""
    fast, exact = model(), model().double()
    tokens = torch.randint(70, (2, 20), generator=torch.Generator().manual_seed(1))
    for each in (fast.train(), exact.train()):
        each.head(each(tokens, DenseContext(tokens))).square().mean().backward()
    for name, parameter in fast.named_parameters():
        reference = exact.get_parameter(name).grad
        assert parameter.grad is not None
        assert reference is not None
        assert (parameter.grad.double() - reference).norm() <= 1e-4 * reference.norm(), name


def test_activation_checkpointing_changes_nothing() -> None:
    tokens = torch.arange(20)[None]
    grads = []
    choices: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for recompute in choices:
        m = model().train()
        m.activation_checkpointing = recompute
        m(tokens, DenseContext(tokens)).square().sum().backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.grad is not None})
    for found in grads[1:]:
        assert found.keys() == grads[0].keys()
        assert all(torch.equal(grads[0][name], found[name]) for name in found)


def test_only_the_token_before_smears_into_a_token() -> None:
    m = model().eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    embedded = m.embed(tokens, DenseContext(tokens))
    torch.testing.assert_close(embedded[0, 0], m.norm(m.embed_tokens.weight[3]))
    other = torch.tensor([[3, 9, 5, 6]])
    moved = (m.embed(other, DenseContext(other)) != embedded).any(-1)
    assert moved.tolist() == [[False, True, True, False]]


def test_every_parameter_has_one_role() -> None:
    m = model()
    groups = m.param_groups()
    names = [name for members in groups.values() for name, _ in members]
    assert sorted(names) == sorted(name for name, _ in m.named_parameters())
    assert {name for name, _ in groups["embedding.value"]} == {f"value_embeds.{i}.weight" for i in (0, 2, 4)}
    assert {name for name, _ in groups["other.smear"]} == {"smear_gate.weight", "smear_lambda", "backout_lambda"}
    assert all(name.startswith("layers.") and p.ndim == 2 for name, p in groups["matrix"])
    assert "layers.4.self_attn.ve_gate.weight" in dict(groups["matrix"])


def test_too_narrow_for_its_gates_is_refused() -> None:
    with pytest.raises(UserError, match="hidden_size"):
        config(hidden_size=16)
