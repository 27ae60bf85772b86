"""Ranks that are killed, that hang and that are slow: who is named, what is left on disk, and how the run goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.checkpoint import steps_of
from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.train.stragglers import LayerClock, Stragglers
from nanoworks.train.watch import verdict
from tests.parallel.ranks import RankError, ranks
from tests.parallel.test_launch import _resume, run, tiny, weights


def _happens(recipe: Recipe, event: str) -> Any:
    return run(recipe, event=event, at=5)


def test_a_killed_rank_ends_the_run_and_it_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, killed = tiny(tmp_path, "whole"), tiny(tmp_path, "killed")
    directory = ranks(2).run(_resume, whole)[0].run
    with pytest.raises(RankError, match="the process ended"):
        ranks(2).run(_happens, killed, "kill")
    assert [p.name for p in steps_of(directory.with_name("killed"))] == ["step-000003"]
    assert ranks(2).run(_resume, killed)[0].finished
    ours, theirs = weights(directory), weights(directory.with_name("killed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    rows = [json.loads(line) for line in (directory.with_name("killed") / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 7))


@pytest.mark.parametrize(
    "event",
    [pytest.param("hang", marks=pytest.mark.slow), "hang while reading", pytest.param("stop", marks=pytest.mark.slow)],
)
def test_a_hanging_rank_is_named_and_every_rank_leaves_its_stacks(tmp_path: Path, event: str) -> None:
    recipe = tiny(tmp_path, "hangs", parallel={"timeout_minutes": 0.02}, checkpoint={"every": 0})
    with pytest.raises(RankError, match="rank 0: the process ended"):
        ranks(2).run(_happens, recipe, event, timeout=30)
    logs = tmp_path / "runs" / "hangs" / "logs"
    said = (logs / "rank-000.log").read_text()
    assert "rank 1 hangs" in said
    assert "in step 5" in said
    assert "_step" in said  # its own stacks
    assert "all_gather" in (logs / "rank-000.collectives.json").read_text()
    if event == "stop":
        assert "no answer, its process is stopped" in said
    else:
        assert "the others wait for it in a communication and it is at test_launch.py" in said
        theirs = (logs / "rank-001.log").read_text()
        assert "in <lambda>" in theirs
        assert "rank 1 hangs" in theirs


def standing(where: str, **groups: int) -> dict[str, Any]:
    return {"groups": groups, "where": where, "host": "node", "step": 3}


def test_who_hangs() -> None:
    # Four ranks, two copies (a of ranks 0 and 1, b of 2 and 3) of two shards; rank 1 sleeps. 0 waits for it in a, 3 in
    # the sum over copies, and 2 in that with 0, so 0 is behind 2, but it is ahead of 1.
    found = {
        0: standing("x", all=5, a=3, even=1),
        1: standing("loader.py:8 (read)", all=5, a=2, odd=1),
        2: standing("x", all=5, b=4, even=2),
        3: standing("x", all=5, b=4, odd=2),
    }
    assert verdict(found, 4).startswith("rank 1 hangs: the others wait")
    assert "loader.py:8 (read), host node" in verdict(found, 4)
    assert verdict({r: s for r, s in found.items() if r != 3}, 4).startswith("rank 3 hangs: no answer")
    assert "all at the same communication: rank 0 at x" in verdict({0: found[0], 1: found[0]}, 2)


def test_a_slow_rank_is_named_once_and_measured(caplog: pytest.LogCaptureFixture) -> None:
    stragglers = Stragglers(0, "node-0", window=2)
    others = [[0, "node-1", 0.9, 0.01], [1, "node-2", 3.0, 0.01]]  # the last is of another stage: other work
    for _ in range(2):
        assert not stragglers.add(0.5, 0.01)
        assert stragglers.add(0.5, 0.01)
        metrics = stragglers.compare(lambda own: [own, [0, "node-1", 0.5, 0.01], *others])
    assert metrics["ranks/compute_seconds"] == pytest.approx(0.7)
    assert metrics["ranks/compute_slowest"] == 2
    assert metrics["ranks/compute_seconds_slowest"] == 0.9
    assert [r.message for r in caplog.records] == [
        "rank 2 on node-1 holds the others up: 0.900 s a step in the layers' forward passes, 1.8 times the median of "
        "the other ranks (over 2 steps)"
    ]


def test_a_run_measures_its_ranks(tmp_path: Path) -> None:
    values = {"train": {"length": "10 steps", "micro_batch_size": 1}, "checkpoint": {"every": 0}}
    directory = ranks(2).run(_happens, tiny(tmp_path, "slow", **values), "slow")[0].run
    [row] = [
        r for r in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()) if "ranks/data_slowest" in r
    ]
    assert row["step"] == 10
    assert row["ranks/data_slowest"] == 1
    assert row["ranks/data_seconds_slowest"] > 0.05
    assert 0 < row["ranks/compute_seconds"] <= row["ranks/compute_seconds_slowest"] < row["train/step_seconds"]
    assert "rank 1 on" in (directory / "logs" / "rank-000.log").read_text()


class Sleeper(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return x


def test_the_clock_counts_layers_and_only_while_it_runs() -> None:
    layer = Sleeper()
    clock = LayerClock([layer], torch.device("cpu"))
    layer(torch.ones(1))
    assert (clock.passes, clock.take()) == (1, 0.0)
    clock.running = True
    layer(torch.ones(1))
    layer(torch.ones(1))
    assert clock.passes == 3
    assert clock.take() >= 0.1
    assert clock.take() == 0.0
    clock.close()
    layer(torch.ones(1))
    assert clock.passes == 3


def test_a_port_in_use_and_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import torch.distributed as dist

    from nanoworks.parallel import rendezvous

    monkeypatch.setattr(rendezvous, "_MEETING", rendezvous.timedelta(seconds=1))
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        values = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=r"another program uses that port.*--standalone"):
            rendezvous._meet()
    monkeypatch.setenv("RANK", "1")  # and now nobody listens
    with pytest.raises(UserError, match=r"no rank 0 at 127.0.0.1:.*firewall"):
        rendezvous._meet()
    assert not dist.is_initialized()


def test_ranks_find_the_living_in_a_store_that_dead_ones_have_used(tmp_path: Path) -> None:
    import threading

    import torch.distributed as dist

    from nanoworks.parallel.rendezvous import _agree

    def connect() -> dist.Store:
        return dist.FileStore(str(tmp_path / "store"), -1)

    store = connect()
    for key, value in {"first": "dead", "dead/1": "x", "dead/2": "y", "dead/heard": '["x", "y"]'}.items():
        store.set(key, value)
    met: dict[int, Any] = {}

    def come(rank: int) -> None:
        met[rank] = _agree(connect(), rank, 3)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]  # the first rank comes last
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(10)
    met[0].set("word", "given")
    assert met[1].get("word") == met[2].get("word") == b"given"
    assert not store.check(["dead/word"])


def test_ranks_that_do_not_come_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from nanoworks.parallel import rendezvous

    monkeypatch.setattr(rendezvous, "_MEETING", rendezvous.timedelta(seconds=0.2))
    store = dist.FileStore(str(tmp_path / "store"), -1)
    with pytest.raises(UserError, match="rank 0 has not come in"):
        rendezvous._agree(store, 1, 3)
    with pytest.raises(UserError, match="ranks 1, 2 of 3 have not come in"):
        rendezvous._agree(store, 0, 3)


def _first_alone(file: str) -> str:
    import os

    import torch.distributed as dist

    from nanoworks.parallel.rendezvous import first_alone

    rank = dist.get_rank()

    def work() -> str:
        path = Path(file)
        if rank == 0:
            time.sleep(0.2)
            path.write_text("from 0")
        return path.read_text()

    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    try:
        return first_alone(work)
    finally:
        os.environ.pop("WORLD_SIZE")


def test_the_first_rank_works_alone(tmp_path: Path) -> None:
    assert ranks(2).run(_first_alone, str(tmp_path / "made")) == ["from 0", "from 0"]
