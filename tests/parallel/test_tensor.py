"""Shares of a model give together what the whole gives, for every family; ranks are threads here."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoworks.common.errors import UserError
from nanoworks.models import ARCHITECTURES, Architecture, Decoder, build_model
from nanoworks.nn.context import DenseContext
from nanoworks.parallel.tensor import Shard, Summed, join, planned
from tests.models.families import VARIANTS, families, make, name_of


class Threads:
    """Sums over ranks that are threads of this process."""

    def __init__(self, n: int) -> None:
        self._barrier = threading.Barrier(n, timeout=30)
        self._parts: list[Tensor] = []
        self._lock = threading.Lock()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self._parts.append(tensor)
        self._barrier.wait()
        total = torch.stack(self._parts).sum(0)
        if self._barrier.wait() == 0:
            self._parts = []
        self._barrier.wait()
        return total


def logits_of_shares(shares: list[Decoder], tokens: Tensor) -> list[Tensor]:
    results: list[Any] = [None] * len(shares)

    @torch.no_grad()
    def run(rank: int) -> None:
        model = shares[rank]
        results[rank] = model.head(model(tokens, DenseContext(tokens)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "rope_scaling" not in v[1]], ids=name_of)
def test_two_shares_give_the_logits_of_the_whole(variant: tuple[str, dict[str, Any]]) -> None:
    family, changes = variant
    whole = make(family, **changes)
    threads = Threads(2)
    shares = []
    for rank in range(2):
        # As a loader does it: shapes first, then one tensor at a time.
        with torch.device("meta"):
            share = build_model(whole.config)
        take = Shard(rank, 2).cut(share)
        state = {name: take(name, tensor) for name, tensor in whole.named_parameters()}
        share.load_state_dict(state, strict=False, assign=True)
        share.tie_weights()
        join(share, threads.all_reduce)
        shares.append(share.eval())
    tokens = torch.arange(40).view(2, 20) * 7 % 96
    with torch.no_grad():
        expected = whole.head(whole(tokens, DenseContext(tokens)))
    for logits in logits_of_shares(shares, tokens):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    held = sum(p.numel() for p in shares[1].layers.parameters())
    assert held < 0.62 * sum(p.numel() for p in whole.layers.parameters()), "a share is about half of the layers"


@pytest.mark.parametrize("family", families())
def test_every_rule_of_a_plan_names_a_leaf_and_cut_outputs_meet_a_sum(family: str) -> None:
    model = make(family)
    styles = planned(model)
    sums = sum(style == "rowwise" for style in styles.values())
    assert sums == 2 * len(model.layers)
    join(model, lambda tensor: tensor)
    assert sum(isinstance(module, Summed) for module in model.modules()) == sums


def test_a_model_that_is_loaded_may_be_cut_too() -> None:
    whole, share = make("llama"), make("llama")
    Shard(1, 2).cut(share)
    name = "layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(share.get_parameter(name), whole.get_parameter(name)[:, 56:])
    assert share.get_parameter(name).is_contiguous()


def test_what_cannot_be_divided_is_refused_with_what_can() -> None:
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96}
    with pytest.raises(UserError, match=r"tensor_parallel=4 must divide .*_heads=12 and .*_heads=6; use 1 or 2"):
        Shard(0, 4).cut(make("llama", **sizes))
    with pytest.raises(UserError, match=r"does not divide the 110 features of layers\.0\.mlp\.gate_proj"):
        Shard(0, 3).cut(make("llama", **{**sizes, "intermediate_size": 110}))


def test_a_family_without_a_plan_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = ARCHITECTURES.get("llama")
    bare = Architecture("llama", llama.config_cls, llama.model_cls, llama.keymaps)
    model = make("llama")
    monkeypatch.setattr(ARCHITECTURES, "get", lambda name: bare if name == "llama" else llama)
    with pytest.raises(UserError, match="family llama has no plan for tensor_parallel"):
        Shard(0, 2).cut(model)
