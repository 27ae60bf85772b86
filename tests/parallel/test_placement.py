"""Experts numbered anew by how much a run used them, so that expert ranks get about equal work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanoworks.checkpoint import load_checkpoint
from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.nn.context import DenseContext
from nanoworks.parallel.placement import balanced_order, imbalance, place_experts
from tests.parallel import tiny
from tests.parallel.ranks import ranks
from tests.parallel.test_expert import block, of, on, until_a_power_cut
from tests.parallel.test_launch import run


def test_experts_are_placed_by_how_much_they_are_used() -> None:
    assert balanced_order([0.4, 0.3, 0.2, 0.1], 2) == [0, 3, 1, 2]
    assert balanced_order([0.25] * 4, 2) == [0, 1, 2, 3]
    assert imbalance([0.4, 0.3, 0.2, 0.1], 2) == pytest.approx(1.4)
    shares = torch.rand(64, generator=torch.Generator().manual_seed(0)).square().tolist()
    order = balanced_order(shares, 8)
    assert sorted(order) == list(range(64))
    assert imbalance([shares[e] for e in order], 8) < 1.01 < 1.2 < imbalance(shares, 8)


def use(path: Path, shares: list[list[float]]) -> Path:
    rows = [{"step": step, "layers": [0, 1], "shares": shares} for step in (1, 2)]
    path.mkdir(exist_ok=True)
    (path / "experts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_of_new_numbers_computes_the_same(tmp_path: Path) -> None:
    model, tokens = tiny.model("mixtral"), tiny.data(0).tokens
    for layer in model.layers:
        layer.mlp.add_selection_bias()  # type: ignore[union-attr,operator]
        torch.nn.init.normal_(layer.mlp.e_score_correction_bias)  # type: ignore[union-attr,arg-type]
    before, old = model(tokens, DenseContext(tokens)), block(model).experts.up_proj.weight.clone()
    place_experts(model, use(tmp_path / "run", [[0.1, 0.2, 0.3, 0.4], [0.25] * 4]), 2)
    torch.testing.assert_close(model(tokens, DenseContext(tokens)), before)
    assert torch.equal(block(model).experts.up_proj.weight, old[[0, 3, 1, 2]])


def test_a_use_of_experts_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other experts .*0: 2.*than this one's .*0: 4"):
        place_experts(tiny.model("mixtral"), use(tmp_path / "other", [[0.5, 0.5]] * 2), 2)
    with pytest.raises(UserError, match="does not tell how a run used its experts"):
        place_experts(tiny.model("mixtral"), tmp_path, 2)
    with pytest.raises(ValueError, match="needs expert: 2 or more"):
        ParallelSection(expert_placement="runs/a")


@pytest.mark.slow
def test_a_run_with_experts_placed_is_the_run_without(tmp_path: Path) -> None:
    """Loss and validation are those of the old numbers; a resumed run keeps the new ones."""
    shares = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]
    used = str(use(tmp_path / "used", shares))
    assert ranks(2).run(run, of(tmp_path, "plain", expert=2))[0].finished
    placed = of(tmp_path, "placed", expert=2, expert_placement=used)
    assert "power cut" in ranks(2).run(until_a_power_cut, placed)[0]
    assert ranks(2).run(on, placed)[0].finished
    runs = [tmp_path / "runs" / name for name in ("plain", "placed")]
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in runs]
    for ours, theirs in zip(*rows, strict=True):
        for name in ("train/loss", "val/loss", "train/grad_norm", "moe/entropy"):
            if name in ours:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4), (ours["step"], name)
    plain, new = (load_checkpoint(d).model for d in runs)
    torch.testing.assert_close(block(new).gate.weight, block(plain).gate.weight[[0, 3, 1, 2]], atol=1e-4, rtol=1e-3)
