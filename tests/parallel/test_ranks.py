"""The ranks that the tests of this folder run on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import RankError, ranks


def sums(scale: float) -> tuple[float, int]:
    x = torch.tensor(scale * (dist.get_rank() + 1))
    dist.all_reduce(x)
    return float(x), os.getpid()


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("told to")
    dist.barrier()


def dies() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hangs() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_results_come_in_order_of_rank_from_the_same_workers() -> None:
    first, second = ranks(2).run(sums, 1.0), ranks(4).run(sums, 2.0)
    assert [value for value, _ in first] == [3.0] * 2
    assert [value for value, _ in second] == [20.0] * 4
    assert [pid for _, pid in second[:2]] == [pid for _, pid in first]


@pytest.mark.parametrize(
    ("function", "args", "said"),
    [(fails_on, (1,), "rank 1: .*ValueError: told to"), (dies, (), "rank 1: the process ended")],
)
def test_a_rank_that_fails_fails_the_case_and_not_the_next(function: object, args: tuple[int, ...], said: str) -> None:
    with pytest.raises(RankError, match=f"(?s){said}"):
        ranks(2).run(function, *args)  # type: ignore[arg-type]
    assert [value for value, _ in ranks(2).run(sums, 1.0)] == [3.0, 3.0]


def test_a_rank_that_hangs_fails_the_case_after_the_timeout() -> None:
    with pytest.raises(RankError, match="rank 0: no answer in 2 s"):
        ranks(2).run(hangs, timeout=2)
