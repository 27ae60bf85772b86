"""On an accelerator: the same answers as on the CPU. Run with `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nanoworks
from nanoworks.common.device import choose_device, supports_bfloat16
from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.models import build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.paged import KVShape
from nanoworks.nn.triton_context import why_not
from nanoworks.train.launch import launch
from tests.models.families import TINY, make
from tests.train.test_trainer import metrics_of
from tests.train.tiny import recipe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    found = choose_device("auto")
    if found.type == "cpu":
        pytest.skip("no accelerator here")
    return found


@pytest.mark.parametrize("family", list(TINY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_the_cpus(device: torch.device, family: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not supports_bfloat16(device):
        pytest.skip("this accelerator has no bfloat16")
    torch.manual_seed(0)
    model = build_model(config_from_dict({"model_type": family, **TINY[family]}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    tokens = torch.randint(0, 96, (4, 64))
    results = []
    for place in (torch.device("cpu"), device):
        model.to(place).zero_grad()
        t = tokens.to(place)
        loss = model.head.loss(model(t, DenseContext(t)), t.roll(-1, 1), torch.ones_like(t, dtype=torch.float32))
        loss.backward()
        results.append((loss.item(), model.layers[0].self_attn.q_proj.weight.grad.cpu().clone()))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert results[0][0] == pytest.approx(results[1][0], rel=tolerance)
    error = (results[0][1] - results[1][1]).norm() / results[0][1].norm()
    assert error < 10 * tolerance


@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "rl"])
def test_every_stage_trains_on_it(device: torch.device, tmp_path: Path, stage: str) -> None:
    run = launch(recipe(tmp_path, stage, hardware={"device": "auto", "dtype": "auto"})).run
    rows = metrics_of(run)
    assert len(rows) == 12
    assert all(r["train/mfu"] > 0 for r in rows)


def test_greedy_answers_equal_the_cpus(device: torch.device, tmp_path: Path) -> None:
    run = launch(recipe(tmp_path, hardware={"device": "cpu"}, train={"length": "30 steps"})).run
    prompts = [[1, 2, 3], list(range(20, 60)), [7] * 33]
    params = SamplingParams(max_tokens=24, temperature=0.0)
    ids = [
        [group[0].token_ids for group in nanoworks.load(run, device=place).engine().generate(prompts, params)]
        for place in ("cpu", device.type)
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128), (7, 80), (8, 256)])
def test_the_attention_kernel_runs(device: torch.device, group: int, head_dim: int, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        pytest.skip("Triton is for CUDA")
    assert why_not(KVShape(1, 2, head_dim, dtype), group, device) == ""


@pytest.mark.parametrize("family", list(TINY))
def test_graphs_change_no_token(device: torch.device, family: str) -> None:
    if device.type != "cuda":
        pytest.skip("graphs are for CUDA")
    prompts = [[1, 2, 3], list(range(20, 50)), [7] * 17, [9]]
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    model = make(family)
    expected = [group[0].token_ids for group in Engine(model, None).generate(prompts, params)]
    model.to(device)
    for graphs in (False, True):
        engine = Engine(model, None, EngineConfig(num_blocks=64, cuda_graphs=graphs))
        answers = engine.generate(prompts, params)
        assert [group[0].token_ids for group in answers] == expected
        used = engine._runner._graphs
        assert (used is not None) is graphs
        if used is not None and "moe" not in family and family != "mixtral":  # grouped products may wait for the GPU
            assert used.works
