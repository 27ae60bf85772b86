"""The planner: what it predicts against what sharding gives, what it refuses, and how it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.config import load_recipe
from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.parallel.mesh import Degrees
from nanoworks.train.plan import Workload, cluster, forecast, plan, workload
from nanoworks.train.plan.automatic import automatic
from nanoworks.train.plan.measure import measure
from nanoworks.train.plan.outcome import lines, predicted_against_actual
from tests.train.tiny import recipe

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def works() -> dict[str, Workload]:
    names = ("llama-1b", "llama-3b", "mixtral-8x1b")
    return {name: workload(load_recipe(f"pretrain/{name}"), CUDA, vocab_size=32768) for name in names}


def _forecast(work: Workload, gpus: str, *, rows: int = 1, checkpointing: Checkpointing = "none", **values: Any) -> Any:
    section = ParallelSection(**values)
    names = ("pipeline", "replicate", "shard", "context", "tensor", "expert")
    degrees = Degrees(**{name: getattr(section, name) for name in names})
    return forecast(work, cluster(gpus), degrees, section, rows=rows, checkpointing=checkpointing)


FEW_WORLDS = (
    "8:pretrain/llama-1b",
    "8:pretrain/mixtral-8x1b:tensor=2",
    "8:pretrain/llama-1b:pipeline=4:rank=7",
    "64:pretrain/mixtral-8x1b:expert=8",
)
MORE_WORLDS = (
    "64:pretrain/llama-3b:context=4:replicate=2",
    "256:pretrain/llama-1b:tensor=8:replicate=4",
    "64:pretrain/llama-3b:tensor=4",
    "64:pretrain/mixtral-8x1b",
    "64:pretrain/mixtral-8x1b:pipeline=4:shard=16:rank=48:pipeline_schedule=interleaved_1f1b",
    "256:pretrain/llama-3b",
    "256:pretrain/mixtral-8x1b:tensor=8",
    "256:pretrain/mixtral-8x1b:expert=4:shard=16:replicate=16",
)


@pytest.mark.parametrize("jobs", [FEW_WORLDS, pytest.param(MORE_WORLDS, marks=pytest.mark.slow)], ids=["few", "more"])
def test_parameter_bytes_of_a_rank_are_those_of_real_sharding_over_8_64_and_256_ranks(jobs: tuple[str, ...]) -> None:
    script = Path(__file__).parent / "parallel" / "fake_world.py"
    done = subprocess.run([sys.executable, str(script), *jobs], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["job"] for row in found] == list(jobs)
    for row in found:
        assert row["planned"] == row["sharded"] > 0, row


def test_lasting_bytes_are_those_of_the_tensors_of_a_model_that_trains(tmp_path: Path) -> None:
    from nanoworks.models import build_model
    from nanoworks.train.resolve import resolve

    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    for optimizer in ("adamw", "muon_adamw"):
        r = recipe(tmp_path, model={**model, **heads}, optim={"name": optimizer})
        work = workload(r, torch.device("cpu"))
        predicted = _forecast(work, "cpu", shard=1).memory
        real = build_model(work.model.config)
        resolved = resolve(r)
        state = resolved.optimizer(real.param_groups(), resolved.optimizer_options).state_dict().values()
        parameters = sum(p.numel() * p.element_size() for p in real.parameters())
        assert predicted.parameters == predicted.gradients == parameters
        assert predicted.optimizer == pytest.approx(sum(t.numel() * t.element_size() for t in state), rel=0.02)


def test_the_best_way_comes_first_and_all_that_are_named_fit(works: dict[str, Workload]) -> None:
    for gpus in ("8xH200", "4xA6000"):
        planned = plan(works["llama-3b"], cluster(gpus))
        times = [f.seconds.total for f in planned.forecasts]
        assert times[0] <= min(times) * 1.03
        assert all(f.memory.total <= planned.cluster.hardware.memory() for f in planned.forecasts)
        assert all(f.degrees.world == planned.cluster.count for f in planned.forecasts)
    # 43 GiB of parameters, gradients and optimizer do not fit a card of 48 GB whole, but they do in shares
    assert all(f.degrees.replicate < 4 for f in planned.forecasts)
    assert any(r.what == "replicate=4" and "GiB of 47.0" in r.reason for r in planned.refused)


def test_what_no_way_fits_is_refused_with_the_reasons(works: dict[str, Workload]) -> None:
    planned = plan(works["llama-3b"], cluster("1x24GB"))
    assert not planned.forecasts
    with pytest.raises(UserError, match=r"no way .* 24GB .*\n.*needs .* GiB of 23.5 with 1 row .* checkpointing"):
        planned.best()


def test_degrees_that_do_not_divide_are_refused_by_name(works: dict[str, Workload]) -> None:
    reasons = {r.what: r.reason for r in plan(works["llama-1b"], cluster("32xH100")).refused}
    assert "must divide num_attention_heads=32 and num_key_value_heads=8" in reasons["tensor=16"]
    assert "16 layers" in reasons["pipeline=32"]


def test_a_family_that_tensor_ranks_cannot_train_is_not_planned_so() -> None:
    work = workload(load_recipe("pretrain/nanochat_2026", ["model.depth=12"]), CUDA, vocab_size=32768)
    found = plan(work, cluster("2xH100"))
    assert all(f.degrees.tensor == 1 for f in found.forecasts)
    assert any(r.what == "tensor=2" and "embeddings" in r.reason for r in found.refused)


def test_sharding_checkpointing_and_tensor_ranks_each_save_what_they_should(works: dict[str, Workload]) -> None:
    work = works["llama-1b"]
    whole, sharded = _forecast(work, "8xH200", replicate=8, shard=1), _forecast(work, "8xH200", shard=8)
    assert sharded.memory.lasting == pytest.approx(whole.memory.lasting / 8, rel=0.01)
    assert sharded.memory.activations == whole.memory.activations
    again = _forecast(work, "8xH200", shard=8, rows=8, checkpointing="full")
    plain = _forecast(work, "8xH200", shard=8, rows=8)
    assert again.memory.activations < plain.memory.activations / 2
    assert again.seconds.products > 1.2 * plain.seconds.products
    tensor = _forecast(work, "8xH200", shard=4, tensor=2, sequence_parallel=True, rows=8)
    assert tensor.memory.activations == pytest.approx(plain.memory.activations / 2, rel=0.01)
    assert tensor.seconds.tensor > 0 == plain.seconds.tensor


def test_selective_checkpointing_lies_between_and_is_not_for_compiled_layers(works: dict[str, Workload]) -> None:
    work = works["llama-1b"]
    plain, selective, full = (
        _forecast(work, "8xH200", shard=8, rows=8, checkpointing=how) for how in ("none", "selective", "full")
    )
    assert plain.memory.activations > 1.3 * selective.memory.activations > 1.3 * full.memory.activations
    assert plain.seconds.products == selective.seconds.products < full.seconds.products
    assert plain.seconds.elementwise < selective.seconds.elementwise
    with pytest.raises(UserError, match="none or full with compile"):
        load_recipe("pretrain/llama-1b", ["hardware.compile=true", "hardware.activation_checkpointing=selective"])
    assert load_recipe("pretrain/llama-3b").hardware.activation_checkpointing == "full"  # written true


def test_every_kind_that_trains_is_weighed(works: dict[str, Workload]) -> None:
    found = plan(works["mixtral-8x1b"], cluster("8xH200")).forecasts
    for name in ("pipeline", "replicate", "shard", "context", "tensor", "expert"):
        assert any(getattr(f.degrees, name) > 1 for f in found), name
    assert len({f.section.pipeline_schedule for f in found if f.degrees.pipeline > 1}) > 1


def test_a_pipelines_bubble_shrinks_with_more_micro_batches(works: dict[str, Workload]) -> None:
    work = works["llama-1b"]
    few = _forecast(work, "8xH200", pipeline=4, shard=2, rows=32)
    many = _forecast(work, "8xH200", pipeline=4, shard=2, rows=4)
    assert few.micro_batches == 8
    assert few.bubble > many.bubble > 0
    assert few.seconds.pipeline > many.seconds.pipeline
    with pytest.raises(UserError, match="16"):
        _forecast(work, "32xH200", pipeline=32, shard=1)


def test_traffic_between_nodes_costs_more_than_inside_one(works: dict[str, Workload]) -> None:
    work = works["llama-3b"]
    inside, across = _forecast(work, "8xA6000", shard=4, replicate=2), _forecast(work, "8xA6000", shard=8)
    assert across.seconds.data > inside.seconds.data


def test_experts_over_more_ranks_than_there_are_are_even(works: dict[str, Workload]) -> None:
    work = works["mixtral-8x1b"]
    shard_64, ideal = _forecast(work, "64xH100", shard=64), 4 * work.model.num_parameters() / 64
    assert shard_64.memory.parameters < 1.01 * ideal  # eight experts, each cut into eight


def test_overrides_are_a_recipe_that_is_the_forecast(works: dict[str, Workload]) -> None:
    best = plan(works["llama-1b"], cluster("8xH200")).best()
    again = load_recipe("pretrain/llama-1b", best.overrides)
    for name in ("replicate", "shard", "tensor", "pipeline"):
        assert getattr(again.parallel, name) == getattr(best.degrees, name)
    assert again.train.micro_batch_size == best.rows
    assert again.hardware.activation_checkpointing == best.checkpointing


def test_an_rl_stage_keeps_room_for_the_keys_and_values_of_its_samples(tmp_path: Path) -> None:
    work = workload(recipe(tmp_path, "rl"), CUDA)
    c = work.model.config
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4  # the recipe asks for float32
    assert _forecast(work, "1x24GB", shard=1).memory.kv_cache == token * 6 * work.sequence_length
    assert work.tokens is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH20", "did you mean 'h200'"),
        ("0xH100", "like 8xH200"),
        ("2xmissing.yaml", "no profile"),
    ],
)
def test_devices_that_are_unknown_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster(text)


def test_a_profile_of_ones_own_and_a_typo_in_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("{name: mine, memory_gbs: 100, link_gbs: 10, network_gbs: 1, devices_per_node: 2}")
    assert str(cluster(f"4x{file}")) == "4xmine"
    assert cluster(f"4x{file}").nodes == 2
    file.write_text("{name: mine, memory_gb: 100, link_gbs: 10, network_gbs: 1, devices_per_node: 2}")
    with pytest.raises(UserError, match=r"memory_gb: unknown key \(did you mean 'memory_gib'\?\)"):
        cluster(str(file))
    file.write_text("just text")
    with pytest.raises(UserError, match="a mapping is expected"):
        cluster(str(file))


def test_a_measurement_corrects_the_times_and_a_wrong_machine_is_refused(
    tmp_path: Path, works: dict[str, Workload]
) -> None:
    work, devices = workload(recipe(tmp_path), torch.device("cpu")), cluster("cpu")
    found = plan(work, devices)
    measured = measure(work, devices, found.best(), repeats=1)
    assert measured.seconds > 0
    slower = plan(work, devices, scale=10.0).best()
    assert slower.seconds.products > 5 * found.best().seconds.products
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="this machine has a"):
            measure(works["llama-1b"], cluster("8xH200"), plan(works["llama-1b"], cluster("8xH200")).best())


def test_predicted_against_actual_is_two_lines(tmp_path: Path) -> None:
    expected = _forecast(workload(recipe(tmp_path), torch.device("cpu")), "cpu", shard=1)
    expected = replace(expected, tokens_per_second=256 / expected.seconds.total)
    seconds = 10 * expected.seconds.total / 0.9
    figures = predicted_against_actual(expected, steps=10, seconds=seconds, peak_bytes=[expected.memory.total, 5])
    said = lines(figures)
    assert said[0].endswith("(-10%)")
    assert said[1].endswith("(+0%)")


def test_the_command_prints_a_table_or_json(works: dict[str, Workload]) -> None:
    from typer.testing import CliRunner

    from nanoworks.cli.main import app

    arguments = ["plan", "pretrain/llama-1b", "--gpus", "8xH200", "--vocab-size", "32768"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "ways to run it" in shown.output
    assert "parallel.shard" in shown.output
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    best = plan(works["llama-1b"], cluster("8xH200")).best()
    assert values["ways"][0]["memory"]["total"] == best.memory.total
    assert values["ways"][0]["overrides"] == best.overrides


def test_auto_turns_a_recipe_into_what_the_planner_ranks_first(tmp_path: Path) -> None:
    r = recipe(tmp_path, parallel={"strategy": "auto"})
    chosen, best = automatic(r, torch.device("cpu"), 2)
    assert chosen.parallel.strategy == "native"
    assert best.degrees.world == 2
    assert chosen.train.micro_batch_size == best.rows
    assert (chosen.parallel.replicate, chosen.parallel.shard) == (best.degrees.replicate, best.degrees.shard)
    assert r.parallel.strategy == "auto"
