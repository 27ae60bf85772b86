"""The `moe` section of a recipe in effect: losses, biases, schedules, metrics, exact resume, wrong knobs refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanoworks.checkpoint import load_checkpoint, steps_of
from nanoworks.common.errors import UserError
from nanoworks.config.recipe import MoeSection
from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.moe import MoE, load_balancing_loss, router_z_loss
from nanoworks.train.experts import EXPERTS, ROUTER, ExpertTraining, expert_training, utilisation_entropy
from nanoworks.train.launch import launch
from nanoworks.train.muon import newton_schulz
from nanoworks.train.optim import OPTIMIZERS
from nanoworks.train.supervised import Pretrain
from nanoworks.train.trainer import Trainer
from tests.train.test_trainer import assert_same_end, metrics_of
from tests.train.tiny import recipe

MODEL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 128,
}


def tiny(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    model = build_model(config_from_dict({**MODEL, "vocab_size": 50, "num_key_value_heads": 2, **changes}))
    model.init_weights()
    return model.train()


def layers(model: Decoder) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def training(tmp_path: Path, model: Decoder | None = None, **section: Any) -> ExpertTraining:
    return ExpertTraining(model or tiny(), MoeSection(**section), tmp_path)


def forward(model: Decoder, rows: int = 4, length: int = 16) -> dict[int, Any]:
    tokens = torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(3))
    ctx = DenseContext(tokens)
    model(tokens, ctx)
    assert ctx.routing is not None
    return ctx.routing


def test_a_run_logs_losses_and_the_use_of_experts(tmp_path: Path) -> None:
    run = launch(recipe(tmp_path, model=MODEL, moe={"z_loss_coef": 0.01, "balance_coef": 0.02})).run
    rows = metrics_of(run)
    for row in rows:
        assert 0.3 < row["moe/entropy"] <= 1
        assert row["moe/imbalance"] >= 1
        assert row["moe/drop_rate"] == row["moe/over_capacity"] == 0
        assert 1.5 < row["moe/balance_loss"] < 8  # 2 experts a token: 2 when even
        assert row["moe/entropy"] == pytest.approx((row["moe/layer_00/entropy"] + row["moe/layer_01/entropy"]) / 2)
        assert row["moe/z_loss"] > 0
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    use = [json.loads(line) for line in (run / "experts.jsonl").read_text().splitlines()]
    assert [u["step"] for u in use] == list(range(1, 13))
    assert use[-1]["layers"] == [0, 1]
    assert sum(use[-1]["shares"][1]) == pytest.approx(1, abs=1e-3)
    assert utilisation_entropy(use[-1]["shares"][1]) == pytest.approx(rows[-1]["moe/layer_01/entropy"], abs=1e-3)


def test_the_loss_that_is_logged_is_that_of_the_text_and_the_one_that_is_trained_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float, float]] = []
    loss = Pretrain.loss

    def watched(self: Pretrain, model: Any, batch: Any) -> Any:
        found = loss(self, model, batch)
        parts = {name: float(value.detach()) for name, value in found.metrics.items()}
        added = 0.5 * parts["moe/balance_loss"] + 0.25 * parts["moe/z_loss"]
        seen.append((float(found.sum.detach()), parts["train/loss"], added))
        return found

    monkeypatch.setattr(Pretrain, "loss", watched)
    changes: dict[str, Any] = {"train": {"length": "1 steps"}, "moe": {"balance_coef": 0.5, "z_loss_coef": 0.25}}
    [row] = metrics_of(launch(recipe(tmp_path, model=MODEL, **changes)).run)
    for total, text, added in seen:
        assert total == pytest.approx(text + added, rel=1e-5)
        assert added > 10
    assert row["train/loss"] == pytest.approx(sum(text for _, text, _ in seen) / row["train/tokens"], rel=1e-5)


def test_losses_leave_out_padding_and_weigh_by_the_coefficients(tmp_path: Path) -> None:
    model = tiny()
    training_ = training(tmp_path, model, balance_coef=0.5, z_loss_coef=0.1)
    routing = forward(model)
    weights = torch.ones(4, 16)
    weights[0, :3] = 0  # a prompt: it is routed like everything else
    weights[1, 10:] = 0  # padding
    weights[2] = 0
    keep = torch.ones(4, 16, dtype=torch.bool)
    keep[1, 10:] = keep[2] = False
    total, parts = training_.loss(routing, weights)
    kept = keep.flatten()
    balance = sum(load_balancing_loss([r], kept) for r in routing.values()) / 2
    expected = 0.5 * balance + 0.1 * router_z_loss(routing.values(), kept)
    torch.testing.assert_close(total, expected)
    assert parts.keys() == {"moe/balance_loss", "moe/z_loss"}
    together = training(tmp_path, model, balance_coef=0.5, balance_over="model").loss(routing, weights)[0]
    torch.testing.assert_close(together, 0.5 * load_balancing_loss(routing.values(), kept))
    assert float(training_._use[0].counts.sum()) == 2 * int(keep.sum())


def test_an_all_masked_batch_adds_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Pretrain.loss

    def masked(self: Pretrain, model: Any, batch: Any) -> Any:
        found = loss(self, model, replace(batch, weights=torch.zeros_like(batch.weights), num_supervised=0))
        assert float(found.sum.detach()) == 0.0
        return found

    monkeypatch.setattr(Pretrain, "loss", masked)
    before = tiny_weights(tmp_path, "untouched", steps=1)
    assert all(tensor.isfinite().all() for tensor in before.values())
    [row] = metrics_of(tmp_path / "runs" / "untouched")
    assert row["train/loss"] == row["train/grad_norm"] == 0


def tiny_weights(root: Path, name: str, *, steps: int, **section: Any) -> dict[str, torch.Tensor]:
    moe = {"balance_coef": 0.1, "z_loss_coef": 0.1, **section}
    run = launch(recipe(root, model=MODEL, moe=moe, run={"name": name}, train={"length": f"{steps} steps"})).run
    return load_file(steps_of(run)[-1] / "model.safetensors")


@pytest.mark.parametrize("name", ["adamw", "muon_adamw", "muon_adamw_2026"])
def test_resume_is_bit_equal_with_biases_and_every_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    moe = {
        "bias_update_rate": 0.01,
        "balance_coef": 0.1,
        "balance_coef_final": 0.0,
        "z_loss_coef": 0.001,
        "expert_dropout": 0.2,
        "capacity_factor": 1.2,
        "active_experts_start": 4,
        "active_experts_steps": 10,
        "open_experts_start": 2,
        "open_experts_steps": 9,
        "router_lr_fraction": 0.5,
        "router_lr_fraction_final": 0.1,
        "expert_lr_fraction": 1.5,
    }
    changes: dict[str, Any] = {"model": MODEL, "moe": moe, "optim": {"name": name}}
    whole = launch(recipe(tmp_path, **changes)).run
    step, cut = Trainer._step, recipe(tmp_path, run={"name": "cut"}, **changes)

    def interrupted(self: Trainer, batches: Any) -> None:
        if self.progress.step == 7:
            raise RuntimeError("power cut")
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            launch(cut)
    assert launch(cut, resume=True).finished
    assert_same_end(whole, tmp_path / "runs" / "cut")
    tensors = load_file(steps_of(whole)[-1] / "model.safetensors")
    bias = tensors["model.layers.0.block_sparse_moe.gate.e_score_correction_bias"]
    assert 0.01 <= float(bias.abs().max()) <= 0.12 + 1e-6
    for a, b in zip(metrics_of(whole), metrics_of(tmp_path / "runs" / "cut"), strict=True):
        assert a["moe/entropy"] == b["moe/entropy"]


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    moe = {"expert_dropout": 0.3, "capacity_factor": 1.0, "bias_update_rate": 0.01}
    runs = [
        launch(
            recipe(
                tmp_path,
                model=MODEL,
                moe=moe,
                run={"name": f"c{on}"},
                train={"length": "4 steps"},
                hardware={"activation_checkpointing": on},
            )
        ).run
        for on in (False, True, "selective")
    ]
    for other in runs[1:]:
        assert_same_end(runs[0], other)
        assert [r["moe/drop_rate"] for r in metrics_of(runs[0])] == [r["moe/drop_rate"] for r in metrics_of(other)]


def test_biases_bring_an_unbalanced_router_to_balance(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.embed_tokens.weight += (
            0.02  # what all tokens have in common, the first expert likes and the last does not
        )
        for moe in layers(model):
            torch.nn.init.normal_(moe.gate.weight, std=0.2)
            moe.gate.weight[0] += 0.1
            moe.gate.weight[3] -= 0.1
    control = training(tmp_path, model, bias_update_rate=0.02)
    entropies = []
    with torch.no_grad():
        for step in range(150):
            control.begin(step, 150, {})
            control.loss(forward(model), torch.ones(4, 16))
            entropies.append(control.metrics()["moe/entropy"])
            control.finish()
    assert entropies[0] < 0.9
    assert max(entropies[-20:]) > 0.98
    assert sum(entropies[-20:]) / 20 > 0.96
    assert control.balance_coef == 0.0  # the bias takes the loss's place
    assert model.config.router_selection_bias  # type: ignore[attr-defined]


def test_a_bias_goes_on_in_the_next_stage_without_being_moved(tmp_path: Path) -> None:
    first = launch(recipe(tmp_path, model=MODEL, moe={"bias_update_rate": 0.05})).run
    bias = layers(load_checkpoint(first).model)[0].e_score_correction_bias
    assert bias is not None
    assert bias.abs().max() > 0
    assert not bias.requires_grad
    again = launch(recipe(tmp_path, model=None, tokenizer=None, init_from=str(first), run={"name": "next"})).run
    after = layers(load_checkpoint(again).model)[0].e_score_correction_bias
    assert after is not None
    assert torch.equal(bias, after)


def test_schedules_follow_the_step(tmp_path: Path) -> None:
    model = tiny()
    control = training(
        tmp_path,
        model,
        balance_coef=0.2,
        balance_coef_final=0.0,
        active_experts_start=4,
        active_experts_steps=4,
        open_experts_start=2,
        open_experts_steps=8,
        router_lr_fraction=1.0,
        router_lr_fraction_final=0.0,
        expert_lr_fraction=3.0,
    )
    lrs = {"matrix": 1.0, ROUTER: 2.0, EXPERTS: 1.0}
    coefficients, active, opened, rates = [], [], [], []
    for step in range(11):
        control.begin(step, 11, lrs)
        rules = layers(model)[1].rules
        coefficients.append(control.balance_coef)
        active.append(rules.top_k)
        opened.append(rules.open_experts)
        rates.append(lrs[ROUTER])
    assert coefficients == pytest.approx([0.2 - 0.02 * i for i in range(11)])
    assert rates == pytest.approx([2 - 0.2 * i for i in range(11)])
    assert lrs == {"matrix": 1.0, ROUTER: pytest.approx(0.0), EXPERTS: 3.0}
    assert active == [4, 4, 3, 3] + [None] * 7
    assert opened == [2, 2, 2, 2, 3, 3, 3, 3, None, None, None]


def test_the_model_decides_the_balance_coefficient_by_default(tmp_path: Path) -> None:
    assert training(tmp_path, tiny(router_aux_loss_coef=0.03)).balance_coef == 0.03
    assert training(tmp_path, tiny(router_aux_loss_coef=0.03), balance_coef=0.0).balance_coef == 0.0


def test_routers_are_a_role_and_stacks_of_experts_are_matrices() -> None:
    model = tiny()
    layers(model)[0].add_selection_bias()
    groups = {role: [name for name, _ in members] for role, members in model.param_groups().items()}
    assert groups[ROUTER] == [f"layers.{i}.mlp.gate.weight" for i in range(2)]
    leaves = ("gate_proj", "up_proj", "down_proj")
    assert groups[EXPERTS] == [f"layers.{i}.mlp.experts.{leaf}.weight" for i in range(2) for leaf in leaves]
    assert not any("bias" in name for names in groups.values() for name in names)
    adamw = OPTIMIZERS.get("adamw")(model.param_groups(), OPTIMIZERS.parse("adamw", {}, where="optim"))
    decay = {g["role"]: g["weight_decay"] for g in adamw._adamw.param_groups}  # type: ignore[attr-defined]
    assert decay["matrix"] == decay[EXPERTS] == 0.1
    assert decay[ROUTER] == 0.0


def test_muon_orthogonalises_each_expert_by_itself() -> None:
    from nanoworks.train.muon import Muon
    from nanoworks.train.muon_2026 import NorMuon

    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 16, 8))
    single = [torch.nn.Parameter(expert.clone()) for expert in stack.detach()]
    stack.grad = torch.randn(3, 16, 8)
    for parameter, grad in zip(single, stack.grad, strict=True):
        parameter.grad = grad.clone()
    before = stack.detach().clone()
    Muon([("stack", stack)]).step(lr=0.1, momentum=0.9)
    Muon([(str(i), p) for i, p in enumerate(single)]).step(lr=0.1, momentum=0.9)
    assert torch.equal(stack.detach(), torch.stack([p.detach() for p in single]))
    expert = torch.nn.Parameter(before[0].clone())
    expert.grad = stack.grad[0].clone()
    both = torch.nn.Parameter(before.clone())
    both.grad = stack.grad
    for parameter in (expert, both):
        NorMuon([("p", parameter)], beta2=0.9, dtype=torch.float32).step(0.1, 0.9)
    torch.testing.assert_close(both.detach()[0], expert.detach())
    update = (before - stack.detach()) / (0.1 * math.sqrt(2))
    values = torch.linalg.svdvals(update)
    assert 0.5 < float(values.min()) < float(values.max()) < 1.3
    assert newton_schulz(stack.grad).shape == (3, 16, 8)


def test_active_parameters_count_the_experts_at_work() -> None:
    model = tiny()
    expert = 3 * 32 * 24
    assert model.num_parameters() - model.num_active_parameters() == 2 * 2 * expert  # 2 layers, 2 idle of 4 experts
    dense = tiny(num_experts_per_tok=4)
    assert dense.num_active_parameters() == dense.num_parameters()
    assert model.flops_per_token(16) == dense.flops_per_token(16) - 6 * 4 * expert


def test_a_length_in_tokens_per_parameter_counts_active_ones(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model": MODEL, "train": {"length": "0.1 tokens_per_parameter"}}
    run = launch(recipe(tmp_path, **changes)).run
    model = load_checkpoint(run).model
    assert json.loads((run / "run.json").read_text())["total_steps"] == int(0.1 * model.num_active_parameters()) // 256


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"active_experts_start": 5, "active_experts_steps": 3}, r"active_experts_start is 5, but there are 4 experts"),
        ({"open_experts_start": 1, "open_experts_steps": 3}, r"open_experts_start is 1; .* from 2 to 4"),
        ({"open_experts_start": 9, "open_experts_steps": 3}, r"open_experts_start is 9"),
    ],
)
def test_numbers_that_do_not_fit_the_model_are_errors(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        training(tmp_path, **section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"capacity_factor": 0}, "capacity_factor"),
        ({"expert_dropout": 1.0}, "expert_dropout"),
        ({"overflow": "dropless"}, "capacity_factor; give one"),
        ({"active_experts_start": 3}, "go together"),
        ({"open_experts_steps": 3}, "go together"),
        ({"capacity": 1.0}, "capacity"),
    ],
)
def test_impossible_sections_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeSection(**section)


def test_a_dense_model_refuses_what_only_experts_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"moe.capacity_factor: the model is a nanochat, which has no experts"):
        launch(recipe(tmp_path, moe={"capacity_factor": 1.25}))
    assert not (tmp_path / "runs" / "pretrain").exists()
    llama = {key: value for key, value in MODEL.items() if key != "num_local_experts"} | {"model_type": "llama"}
    dense = build_model(config_from_dict({**llama, "vocab_size": 50}))
    assert expert_training(dense, MoeSection(overflow="drop"), tmp_path) is None
