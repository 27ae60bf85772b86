"""The Triton kernel, in Triton's interpreter where there is no GPU, against dense attention; and fused projections."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nanoworks.nn.context import Attending, DenseContext, Window
from nanoworks.nn.fused import fuse
from nanoworks.nn.linear import Slice, set_compute_dtype
from nanoworks.nn.paged import KVShape
from nanoworks.nn.triton_context import difference, why_not
from tests.models.families import VARIANTS, make, name_of
from tests.nn import test_paged
from tests.nn.test_paged import Windows, compare, random_model

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CASES: list[tuple[dict[str, object], Windows]] = [
    ({}, (None, Window(5))),
    ({"kv_heads": 1, "softcap": 2.0, "sinks": True, "scale": 0.2}, (Window(70, first=6), None)),
    ({"kv_heads": 4}, (Window(6, first=3), Window(3, first=3))),
    ({"sinks": True}, (Window(7, token_ids=(3, 9)), Window(4, first=1, token_ids=(11, 50, 51)))),
]


@pytest.mark.parametrize(("options", "windows"), CASES)
@torch.no_grad()
def test_it_equals_dense_for_any_mixture_of_chunks(options: dict[str, object], windows: Windows) -> None:
    compare(random_model("llama", windows=windows, **options), 0, "triton", count=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [1, 3])
@torch.no_grad()
def test_parts_of_a_context_are_merged(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoworks.nn import triton_attention

    monkeypatch.setattr(triton_attention, "num_splits", lambda *_: 4)  # more than there are tiles of keys
    options, windows = CASES[case]
    compare(random_model("nanochat", windows=windows, **options), 1, "triton", count=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("windows", [(None, None), (Window(12), None)])
@torch.no_grad()
def test_drafted_tokens_see_their_own_paths(windows: Windows) -> None:
    test_paged.test_each_drafted_token_sees_its_own_path("llama", windows, "triton")


@pytest.mark.parametrize(("group", "head_dim", "dtype"), [(3, 24, torch.float32), (1, 16, torch.float16)])
def test_the_probe_runs_it(group: int, head_dim: int, dtype: torch.dtype) -> None:
    assert why_not(KVShape(1, 2, head_dim, dtype), group, DEVICE) == ""


@pytest.mark.parametrize("window", [None, Window(30), Window(130, first=70), Window(64, first=128), Window(1, first=1)])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, None), (5.0, [0.3, -2.0, 4.0, 1.0])])
@torch.no_grad()
def test_far_behind_only_what_a_window_shows_is_read(
    window: Window | None, softcap: float | None, sinks: list[float] | None
) -> None:
    """Contexts of ten tiles of keys, in four parts."""
    shape = KVShape(1, 2, 16, torch.float32)
    given = None if sinks is None else torch.tensor(sinks, device=DEVICE)
    assert difference(shape, 2, DEVICE, Attending(window, softcap=softcap, sinks=given)) < 1e-5


def test_the_probe_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoworks.nn import triton_attention

    shape = KVShape(1, 1, 16, torch.float32)
    monkeypatch.setattr(triton_attention, "attend", lambda out, *_, **__: out.zero_())
    assert "off by" in why_not(shape, 1, DEVICE)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(triton_attention, "attend", fail)
    assert why_not(shape, 1, DEVICE) == "RuntimeError: out of resource: shared memory"


def test_few_sequences_are_split_and_many_are_not() -> None:
    from nanoworks.nn.triton_attention import num_splits

    assert num_splits(8, 4096, 132) == 32
    assert num_splits(8, 512, 132) == 4  # 128 keys each
    assert num_splits(64, 4096, 132) == 4
    assert num_splits(512, 4096, 132) == 1


def test_it_compiles_for_gpus() -> None:
    """All the way to machine code, which needs no GPU; in a process of its own, where Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.nn.compile_triton"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("ok") == 8


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
@torch.no_grad()
def test_fused_projections_compute_the_same(variant: tuple[str, dict[str, object]]) -> None:
    family, changes = variant
    model = make(family, **changes)
    fused = fuse(model)
    assert any(isinstance(module, Slice) for module in fused.modules())
    assert not any(isinstance(module, Slice) for module in model.modules())
    tokens = torch.randint(0, 96, (2, 30))
    expected = model.head(model(tokens, DenseContext(tokens)))
    torch.testing.assert_close(fused.head(fused(tokens, DenseContext(tokens))), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fused_projections_keep_the_compute_dtype_and_the_biases() -> None:
    model = make("llama", attention_bias=True, mlp_bias=True)
    set_compute_dtype(model, torch.bfloat16)
    fused = fuse(model)
    wholes = {module.whole for module in fused.modules() if isinstance(module, Slice)}
    assert {whole.weight.dtype for whole in wholes} == {torch.bfloat16}
    assert len(wholes) == 2 * model.config.num_hidden_layers
    assert fused.embed_tokens.weight is model.embed_tokens.weight
    tokens = torch.randint(0, 96, (1, 12))
    expected = model(tokens, DenseContext(tokens))
    torch.testing.assert_close(fused(tokens, DenseContext(tokens)), expected, atol=2e-2, rtol=2e-2)
