"""What ranks save, each its parts, and others read: more or fewer ranks, another strategy, one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoworks.checkpoint import load_checkpoint, save_state
from nanoworks.checkpoint.checkpoint import write_model
from nanoworks.checkpoint.sharded import Shards, host_copies, load_parts, save_parts, saving_group
from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.models import build_model
from nanoworks.parallel import SingleDevice, Strategy
from nanoworks.parallel.native import Native
from nanoworks.train.optim import OPTIMIZERS
from tests.parallel import tiny
from tests.parallel.ranks import ranks

CPU = torch.device("cpu")


class Trained:
    """A tiny model with its optimizer, in this process or spread over the ranks that run this."""

    def __init__(self, model: str, optim: str, section: dict[str, Any] | None) -> None:
        self.strategy: Strategy = SingleDevice(CPU)
        if section is not None:
            self.strategy = Native(ParallelSection(**section), CPU, torch.float32)
        self.model = self.strategy.prepare(tiny.model(model)).train()
        cls = OPTIMIZERS.get(optim)
        self.optimizer = cls(self.model.param_groups(), cls.Options(**tiny.OPTIMIZATION[optim]))

    def step(self, number: int) -> float:
        """Take a step; returns its loss."""
        rows, mesh = tiny.data(number), self.strategy.mesh
        scale = 1.0 / float(rows.weights.sum())
        mine = rows.part(mesh.data_rank, mesh.data_world_size)
        self.optimizer.zero_grad()
        losses = self.strategy.forward_backward([mine.part(i, 2) for i in range(2)], tiny.compute, scale)
        self.strategy.clip(self.model, 0.5)
        self.strategy.step(self.optimizer, 1.0, number)
        return self.strategy.sum([sum(float(loss.sum.detach()) for loss in losses)])[0] * scale

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()} | self.optimizer.state_dict()

    def whole(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.strategy.wholes(self.tensors)}


def saved(directory: Path, model: str, optim: str, section: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """Save after two steps; what was saved, and the loss of the step after."""
    trained = Trained(model, optim, section)
    for number in range(2):
        trained.step(number)
    save_parts(directory, trained.tensors, saving_group())
    return trained.whole(), trained.step(2)


def loaded(directory: Path, model: str, optim: str, section: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """What another strategy makes of it, and its loss of the step after."""
    trained = Trained(model, optim, section)
    load_parts(directory, trained.tensors, saving_group())
    return trained.whole(), trained.step(2)


CASES = [
    # model, optimizer, ranks and section that save, and those that load; True where their arithmetic is the same
    ("llama", "adamw", 4, {}, 2, {}, False),
    ("mixtral", "muon_adamw", 4, {}, 4, {"tensor": 2, "shard": 2, "loss_parallel": True}, False),
    ("llama", "muon_adamw", 4, {}, 4, {"replicate": 2, "shard": 2}, True),
    ("mixtral", "adamw", 2, {"replicate": 2}, 2, {}, True),
    ("mixtral", "adamw", 4, {"tensor": 2, "shard": 2}, 2, {"tensor": 2}, False),
    ("llama_tied", "adamw", 2, {"tensor": 2}, 4, {}, False),
    ("llama", "adamw", 2, {"pipeline": 2, "shard": 1}, 2, {}, False),
    ("mixtral", "muon_adamw", 4, {}, 4, {"pipeline": 2, "shard": 2}, False),
    ("mixtral", "adamw", 4, {"pipeline": 2, "shard": 2}, 4, {"tensor": 2}, False),
    ("llama", "muon_adamw", 2, {"pipeline": 2, "shard": 1}, 2, {"pipeline": 2, "shard": 1}, True),
    ("mixtral", "muon_adamw", 4, {"expert": 2, "shard": 4}, 4, {}, False),
    ("mixtral", "adamw", 2, {}, 4, {"expert": 2, "replicate": 2, "shard": 2}, False),
    ("llama", "adamw", 4, {"context": 2, "shard": 2}, 2, {}, False),
    ("mixtral", "adamw", 4, {"context": 2, "tensor": 2}, 4, {"expert": 2, "shard": 4}, False),
]
QUICK = (0, 1, 2, 7)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if i in QUICK else pytest.mark.slow) for i, case in enumerate(CASES)], ids=str
)
def test_a_step_saved_by_some_ranks_is_the_same_on_others(tmp_path: Path, case: Any) -> None:
    model, optim, n, section, m, other, bitwise = case
    before, loss = ranks(n).run(saved, tmp_path, model, optim, section)[0]
    after, found = ranks(m).run(loaded, tmp_path, model, optim, other)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert found == loss if bitwise else found == pytest.approx(loss, abs=1e-6)

    with Shards(tmp_path) as shards:  # and one process, which sees no ranks at all
        whole = dict(shards)
    assert whole.keys() == before.keys()
    assert all(torch.equal(before[name], whole[name]) for name in before)
    alone = Trained(model, optim, None)
    alone.model.load_state_dict(whole, strict=False)
    alone.optimizer.load_state_dict({name: whole[name] for name in alone.optimizer.state_dict()})
    assert alone.step(2) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("optim", ["adamw", "muon_adamw"])
def test_ranks_read_their_parts_of_what_one_process_saved(tmp_path: Path, optim: str) -> None:
    alone = Trained("mixtral", optim, None)
    alone.step(0)
    alone.step(1)
    before = alone.whole()
    save_state(tmp_path / "state", before, {})
    after, found = ranks(4).run(loaded, tmp_path / "state", "mixtral", optim, {"tensor": 2, "shard": 2})[0]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert found == pytest.approx(alone.step(2), abs=1e-6)


def test_an_export_from_shards_is_what_one_process_would_write(tmp_path: Path) -> None:
    before, _ = ranks(4).run(saved, tmp_path / "parts", "mixtral", "adamw", {"tensor": 2, "shard": 2})[0]
    with torch.device("meta"):
        shape = build_model(tiny.model("mixtral").config)
    (tmp_path / "hf").mkdir()
    with Shards(tmp_path / "parts") as shards:
        write_model(tmp_path / "hf", shape, None, metadata={}, read=shards.__getitem__)
    found = load_checkpoint(tmp_path / "hf").model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in found.items())


def copied(section: dict[str, Any]) -> bool:
    trained = Trained("llama", "adamw", section)
    copies, before = host_copies(trained.tensors), trained.whole()
    trained.step(0)
    after = dict(trained.strategy.wholes(copies))
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_on_the_host_stays_when_training_goes_on() -> None:
    assert all(ranks(4).run(copied, {"tensor": 2, "shard": 2}))


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    ranks(2).run(saved, tmp_path, "llama", "adamw", {})
    next(tmp_path.glob("shard-00001-*")).unlink()
    with pytest.raises(UserError, match=r"holds only some parts of .*: a shard is missing beside shard-00002-.*copy"):
        Shards(tmp_path)
