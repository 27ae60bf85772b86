"""Every strategy trains as one process does: loss, gradient norm and final parameters, in float32 (done-when 1)."""

from __future__ import annotations

import functools

import pytest
import torch

from nanoworks.config.parallel import ParallelSection
from nanoworks.parallel.support import KINDS
from tests.parallel import tiny
from tests.parallel.ranks import ranks

CASES = {kind.name: kind for kind in KINDS}
QUICK = {
    ("DDP", "llama", "adamw"),
    ("DDP", "mixtral", "muon_adamw"),
    ("FSDP2", "mixtral", "adamw"),
    ("FSDP2 on 4", "llama", "muon_adamw"),
    ("FSDP2 kept", "llama", "adamw"),
    ("FSDP2 on the host", "mixtral", "muon_adamw"),
    ("HSDP", "llama", "muon_adamw"),
    ("TP", "mixtral", "muon_adamw"),
    ("TP on 4", "llama", "adamw"),
    ("TP + SP", "mixtral", "adamw"),
    ("TP + SP + loss", "llama", "muon_adamw"),
    ("TP x DDP", "llama", "adamw"),
    ("TP x FSDP2", "mixtral", "muon_adamw"),
    ("TP + SP x FSDP2", "llama", "adamw"),
    ("PP gpipe", "llama", "adamw"),
    ("PP 1f1b", "mixtral", "muon_adamw"),
    ("PP interleaved_1f1b", "mixtral", "adamw"),
    ("PP interleaved_zero_bubble", "llama", "muon_adamw"),
    ("PP zbv", "mixtral", "adamw"),
    ("PP on 4", "llama", "muon_adamw"),
    ("PP x DDP", "llama", "muon_adamw"),
    ("PP x FSDP2", "mixtral", "muon_adamw"),
    ("PP interleaved x FSDP2", "llama", "adamw"),
    ("PP zbv x FSDP2", "mixtral", "adamw"),
    ("EP", "mixtral", "muon_adamw"),
    ("EP x FSDP2", "mixtral", "muon_adamw"),
    ("EP x HSDP", "mixtral", "adamw"),
    ("CP all_gather", "mixtral", "adamw"),
    ("CP ulysses", "llama", "muon_adamw"),
    ("CP on 4", "llama", "adamw"),
    ("CP x DDP", "llama", "muon_adamw"),
    ("CP x FSDP2", "mixtral", "muon_adamw"),
    ("CP ulysses x TP", "mixtral", "adamw"),
    ("CP x TP + SP + loss", "llama", "adamw"),
    ("ZeRO 3", "llama", "adamw"),
}
"""Each strategy, model and optimizer at least once; all pairs take two minutes."""
PAIRS = [
    pytest.param(case, model, optim, marks=() if (case, model, optim) in QUICK else pytest.mark.slow)
    for case in CASES
    for model in ("llama", "mixtral")
    for optim in tiny.OPTIMIZATION
    if CASES[case].trains(optim) and (model == "mixtral" or not CASES[case].experts)
]


@functools.cache
def alone(model: str, optim: str) -> tiny.Trained:
    return tiny.train(model, optim)


@pytest.mark.parametrize(("case", "model", "optim"), PAIRS)
def test_a_strategy_trains_as_one_process_does(case: str, model: str, optim: str) -> None:
    kind = CASES[case]
    if "pipeline" in kind.section:
        model = f"{model}_deep"
    compare(
        ranks(kind.ranks).run(tiny.train, model, optim, ParallelSection(**kind.section)), alone(model, optim), optim
    )


def with_checkpointing(section: ParallelSection) -> tiny.Trained:
    return tiny.train("mixtral", section=section, checkpointing="full")


def test_activations_that_are_computed_again_change_nothing() -> None:
    section = ParallelSection(tensor=2, sequence_parallel=True)
    compare(ranks(4).run(with_checkpointing, section), alone("mixtral", "adamw"), "adamw")


@pytest.mark.parametrize("model", ["qwen3", "llama_tied"])
def test_norms_of_heads_biases_and_a_tied_head(model: str) -> None:
    section = ParallelSection(tensor=2, shard=2, sequence_parallel=True, loss_parallel=True)
    compare(ranks(4).run(tiny.train, model, "adamw", section), alone(model, "adamw"), "adamw")


def first_half(optim: str, section: ParallelSection) -> tiny.Trained:
    return tiny.train("mixtral", optim, section, steps=range(3))


def second_half(optim: str, section: ParallelSection, start: tiny.Trained) -> tiny.Trained:
    return tiny.train("mixtral", optim, section, steps=range(3, tiny.STEPS), start=start)


@pytest.mark.parametrize("optim", ["adamw", "muon_adamw"])
def test_state_goes_from_any_mesh_to_any_other(optim: str) -> None:
    """FSDP2 on 4 -> TP x FSDP2 -> and on 2 and on 1: what is saved knows no topology."""
    expected = alone("mixtral", optim)
    saved = ranks(4).run(first_half, optim, ParallelSection())[0]
    for n, values in ((4, {"tensor": 2, "shard": 2}), (2, {"shard": 2}), (2, {"replicate": 2})):
        found = ranks(n).run(second_half, optim, ParallelSection(**values), saved)[0]
        assert found.losses == pytest.approx(expected.losses[3:], abs=1e-5)
        for name, parameter in expected.parameters.items():
            torch.testing.assert_close(found.parameters[name], parameter, atol=1e-4, rtol=1e-3, msg=name)
    ended = tiny.train("mixtral", optim, steps=range(3, tiny.STEPS), start=saved)
    assert ended.losses == pytest.approx(expected.losses[3:], abs=1e-5)


def compare(found: list[tiny.Trained], expected: tiny.Trained, optim: str) -> None:
    for trained in found:
        assert trained.losses == pytest.approx(expected.losses, abs=1e-5)
        assert trained.norms == pytest.approx(expected.norms, rel=1e-4)
        for name, parameter in expected.parameters.items():
            torch.testing.assert_close(trained.parameters[name], parameter, atol=1e-5, rtol=1e-4, msg=name)
        assert trained.state.keys() == expected.state.keys()
