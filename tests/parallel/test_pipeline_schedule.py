"""Pipeline schedules on paper: even cuts, bubbles, micro-batch counts, and the search over them."""

from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.parallel.pipeline_schedule import SCHEDULES, check_micro_batches, search, simulate
from nanoworks.parallel.pipeline_split import Costs, estimated_costs, measured_costs, split
from tests.parallel.test_pipeline import T, model_of, step_of


def test_split_is_even_by_cost() -> None:
    assert split(Costs(0, (1.0,) * 8, 0), 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert [len(layers) for layers in split(Costs(0.1, (1.0,) * 8, 3.0), 4)] == [2, 3, 2, 1]
    assert [len(layers) for layers in split(Costs(0, (5.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0), 2)] == [1, 5]
    costs = Costs(0.5, (1.0, 2.0, 1.0), 2.0)
    assert costs.stages(split(costs, 2)) == [3.5, 3.0]


def test_costs_follow_the_model() -> None:
    dense, sparse = model_of("llama", 3), model_of("mixtral", 3)
    costs = estimated_costs(dense, T)
    assert costs.head == 2 * 32 * 64
    assert 3 * (costs.embedding + sum(costs.layers) + costs.head) == pytest.approx(dense.flops_per_token(T), rel=0.01)
    idle = estimated_costs(sparse, T)  # 2 of 4 experts work
    assert 3 * (sum(idle.layers) + idle.head) == pytest.approx(sparse.flops_per_token(T), rel=0.01)
    measured = measured_costs(dense, step_of(0, 1)[0].tokens)
    assert len(measured.layers) == 3
    assert min(measured.embedding, measured.head, *measured.layers) > 0
    assert all(p.grad is None for p in dense.parameters())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (4, 16)])
def test_bubbles_are_those_of_the_papers(n: int, m: int) -> None:
    """GPipe and 1F1B: (n - 1) / (m + n - 1); v stages a rank: (n - 1) / (v m + n - 1). Zero bubble is below both."""
    gpipe, one = simulate("gpipe", n, [1.0] * n, m), simulate("1f1b", n, [1.0] * n, m)
    assert gpipe.fraction == pytest.approx((n - 1) / (m + n - 1))
    assert one.fraction == pytest.approx((n - 1) / (m + n - 1))
    assert (gpipe.in_flight, one.in_flight) == (m, n)
    for v in (2, 3):
        interleaved = simulate("interleaved_1f1b", n, [1.0] * n * v, m)
        assert interleaved.fraction == pytest.approx((n - 1) / (v * m + n - 1))
    for name in ("interleaved_zero_bubble", "zbv"):
        assert simulate(name, n, [1.0] * n * 2, m).fraction < (n - 1) / (2 * m + n - 1)
    uneven = simulate("1f1b", n, [1.0] * (n - 1) + [2.0], m)
    assert uneven.fraction > one.fraction
    assert simulate("1f1b", n, [1.0] * n, m, send=0.1).seconds > one.seconds


def test_micro_batch_counts() -> None:
    for name in SCHEDULES:
        check_micro_batches(name, 4, 8)
    with pytest.raises(UserError, match=r"rounds of about 4.*Counts that do: .*train.tokens_per_step"):
        check_micro_batches("interleaved_1f1b", 4, 9)


def test_search() -> None:
    costs = Costs(0.1, (1.0,) * 16, 1.0)
    found = search(costs, 4, 16, max_stages_per_rank=2)
    best = found[0]
    assert best.bubble is not None
    assert best.schedule in ("zbv", "interleaved_zero_bubble")
    assert best.micro_batches == 16
    # where a pass costs something by itself, fewer and larger micro-batches win
    dear = search(costs, 4, 16, overhead=40.0, max_stages_per_rank=2)[0]
    assert dear.micro_batches < 16
    narrow = search(costs, 4, 16, max_rows_in_flight=4)
    assert narrow[0].bubble is not None
    refused = [c for c in narrow if c.bubble is None]
    assert any("memory for 4" in c.reason for c in refused if c.schedule == "gpipe")
    assert all("layers" in c.reason for c in search(Costs(0, (1.0,) * 4, 0), 4, 8) if c.stages_per_rank > 1)
