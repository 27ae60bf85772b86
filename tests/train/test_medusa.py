"""The stage medusa: heads learn on a frozen model, resume to the bit, and belong to their backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanoworks.checkpoint import load_checkpoint, steps_of
from nanoworks.checkpoint.medusa import fingerprint, load_heads
from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.config.base import Method
from nanoworks.nn.context import DenseContext
from nanoworks.nn.head import Head
from nanoworks.nn.linear import Linear
from nanoworks.nn.medusa import MedusaHeads, shifted
from nanoworks.train.launch import launch
from nanoworks.train.trainer import Trainer
from tests.train.test_trainer import assert_same_end, metrics_of
from tests.train.tiny import corpus, recipe


def medusa(root: Path, parent: Path, /, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "stage": {"name": "medusa", "num_heads": 2},
        "run": {"name": "medusa"},
        "init_from": str(parent),
        "data": {
            "train": [{"name": "jsonl", "path": str(corpus(root))}],
            "validation": [{"name": "jsonl", "path": str(corpus(root))}],
        },
        "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0},
        "eval": {"every": 3, "tokens": 2000},
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    made = recipe(root, "pretrain", **values)
    return made.model_copy(update={"tokenizer": None, "model": None})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and in it the run of a model that knows the corpus a little."""
    root = tmp_path_factory.mktemp("medusa")
    made = recipe(root, "pretrain", train={"length": "60 steps"}, checkpoint={"every": 0}, run={"name": "base"})
    return root, launch(made).run


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_heads_learn_what_comes_later(backbone: tuple[Path, Path], tmp_path: Path, own: bool) -> None:
    root, parent = backbone
    made = medusa(
        root,
        parent,
        stage={"name": "medusa", "num_heads": 2, "own_unembedding": own},
        run={"name": "learns", "root": str(tmp_path)},
        train={"length": "120 steps"},
        eval={"every": 30, "tokens": 2000},
        checkpoint={"every": 0},
    )
    run = launch(made).run
    rows = metrics_of(run)
    measured = [r for r in rows if "medusa/top1_1" in r]
    first, last = measured[0], measured[-1]
    assert last["val/loss"] < first["val/loss"]
    for k in (1, 2):
        assert 0 <= last[f"medusa/top1_{k}"] <= last[f"medusa/top5_{k}"] <= 1
        losses = [r[f"medusa/loss_{k}"] for r in rows if f"medusa/loss_{k}" in r]
        assert sum(losses[-5:]) < sum(losses[:5])
    assert last["medusa/top1_1"] > 2 * _untrained(parent, root)
    base, after = load_checkpoint(parent).model, load_checkpoint(run).model
    for name, p in base.named_parameters():
        assert torch.equal(p, after.get_parameter(name)), f"the backbone moved: {name}"
    saved = load_heads(run, after)
    assert saved.ranks[0][0] == pytest.approx(last["medusa/top1_1"])
    assert saved.heads.num_heads == 2
    assert bool(saved.heads.lm_heads) is own


@torch.no_grad()
def _untrained(parent: Path, root: Path) -> float:
    """How often the model's own next token is that after the next: what an untrained head says."""
    loaded = load_checkpoint(parent)
    assert loaded.tokenizer is not None
    right = total = 0
    for line in corpus(root).read_text().splitlines()[:50]:
        tokens = torch.tensor([loaded.tokenizer.encode(json.loads(line)["text"], bos=True)])
        said = loaded.model.head(loaded.model(tokens, DenseContext(tokens))).argmax(-1)
        right += int((said[0, :-2] == tokens[0, 2:]).sum())
        total += tokens.size(1) - 2
    return right / total


def test_resume_is_bit_equal(backbone: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, parent = backbone
    whole = medusa(root, parent, run={"name": "whole", "root": str(tmp_path)})
    launch(whole)
    step, cut = Trainer._step, medusa(root, parent, run={"name": "cut", "root": str(tmp_path)})

    def interrupted(self: Trainer, batches: Any) -> None:
        if self.progress.step == 7:
            raise RuntimeError("power cut")
        step(self, batches)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        launch(cut)
    monkeypatch.setattr(Trainer, "_step", step)
    assert launch(cut, resume=True).finished
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    heads = [load_file(steps_of(tmp_path / name)[-1] / "medusa/medusa.safetensors") for name in ("whole", "cut")]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_targets_stay_in_the_row_and_the_document() -> None:
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    weights = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    documents = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    t, w = shifted(targets, weights, documents, 2)
    assert t[0, 0].tolist()[:3] == [2, 3, 4]
    assert t[1, 1].tolist()[:2] == [7, 8]
    assert w[0].tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]  # position 1 of row 2 would look into the next document
    assert w[1].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert shifted(targets, weights, None, 6)[1][3:].sum() == 0  # beyond the row


def test_wrong_backbone_is_refused(backbone: tuple[Path, Path], tmp_path: Path) -> None:
    root, parent = backbone
    run = launch(medusa(root, parent, run={"name": "short", "root": str(tmp_path)}, train={"length": "2 steps"})).run
    model = load_checkpoint(parent).model
    load_heads(run, model)
    half = load_checkpoint(parent, dtype=torch.bfloat16).model
    assert fingerprint(half) == fingerprint(model)
    assert load_heads(run, half).heads.blocks[0][0].linear.weight.dtype == torch.bfloat16
    with torch.no_grad():
        next(model.layers.parameters()).mul_(1.1)
    with pytest.raises(UserError, match="trained on another model"):
        load_heads(run, model)
    with pytest.raises(UserError, match="holds no Medusa heads"):
        load_heads(parent, half)
    weights = steps_of(run)[-1] / "medusa/medusa.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="is damaged"):
        load_heads(weights.parent, half)


def test_needs_a_trained_model_and_adamw(backbone: tuple[Path, Path], tmp_path: Path) -> None:
    root, parent = backbone
    with pytest.raises(UserError, match=r"optim\.name=adamw"):
        made = medusa(root, parent, run={"name": "muon", "root": str(tmp_path)})
        launch(made.model_copy(update={"optim": Method(name="muon_adamw")}))
    fresh = recipe(root, "pretrain", stage={"name": "medusa"}, run={"name": "fresh"}, optim={"name": "adamw"})
    with pytest.raises(UserError, match="init_from"):
        launch(fresh)


def test_losses_are_those_of_the_logits() -> None:
    torch.manual_seed(0)
    head = Head(torch.nn.LayerNorm(8), Linear(8, 30, bias=False), softcap=5.0)
    for vocab_size in (None, 30):
        heads = MedusaHeads(8, 2, num_layers=2, vocab_size=vocab_size)
        with torch.no_grad():
            for p in heads.parameters():
                p.normal_(std=0.5)
        hidden, targets, weights = torch.randn(6, 8), torch.randint(30, (2, 6)), torch.rand(2, 6)
        logprobs = heads.logits(hidden, head).log_softmax(-1)
        for k, loss in enumerate(heads.losses(hidden, head, targets, weights)):
            expected = -(logprobs[:, k].gather(1, targets[k][:, None])[:, 0] * weights[k]).sum()
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
