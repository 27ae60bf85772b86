"""Who goes first: priorities that age, clients that take turns, and a queue with an end."""

from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.engine import Engine, EngineConfig, QueueFull, Request, SamplingParams
from nanoworks.engine.fairness import AGEING
from nanoworks.engine.scheduler import Scheduler
from nanoworks.engine.sequence import Sequence
from nanoworks.models import Decoder
from tests.engine.test_scheduler import make, sizes, step


def arrive(
    scheduler: Scheduler, name: str, *, length: int = 4, max_tokens: int = 3, priority: int = 0, client: str = ""
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    request = Request([1] * length, params, request_id=name, priority=priority, client=client)
    sequence = Sequence(request, 0, max_tokens=max_tokens, stop_ids=frozenset(), seed=0, text=None, tool=None)
    scheduler.add(sequence)
    return sequence


def order_of_service(scheduler: Scheduler, steps: int = 10_000) -> list[str]:
    """Names of the requests in the order in which they first ran."""
    seen: dict[str, None] = {}
    for _ in range(steps):
        if not (scheduler.running or scheduler.waiting):
            break
        seen.update(dict.fromkeys(chunk.sequence.request.request_id for chunk in step(scheduler).chunks))
    return list(seen)


def test_higher_priorities_go_first_and_equal_ones_in_order_of_arrival() -> None:
    scheduler = make(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 5), ("e", 1), ("f", -1)):
        arrive(scheduler, name, priority=priority)
    assert order_of_service(scheduler) == ["d", "b", "e", "a", "c", "f"]


@pytest.mark.parametrize("client", ["", "other"])
def test_a_low_priority_waits_its_time_and_no_longer(client: str) -> None:
    scheduler = make(max_num_seqs=1)
    low = arrive(scheduler, "low", priority=0, client=client)
    steps = 0
    while low.num_computed == 0 and steps < 10 * AGEING:
        if len(scheduler.waiting) < 3:  # there is always someone of a higher priority
            arrive(scheduler, f"high {steps}", priority=2)
        step(scheduler)
        steps += 1
    assert 2 * AGEING <= steps <= 3 * AGEING + 10


def test_the_lowest_priority_gives_way_the_youngest_of_them_first() -> None:
    scheduler = make(num_blocks=8, block_size=4)
    names = [("low old", 0), ("high", 1), ("low young", 0)]
    for name, priority in names:
        arrive(scheduler, name, priority=priority, max_tokens=20)
    preempted: list[str] = []
    while scheduler.running or scheduler.waiting:
        before = scheduler.num_preemptions
        step(scheduler)
        if scheduler.num_preemptions > before:
            preempted += [s.request.request_id for s in scheduler.waiting]
    assert preempted
    assert preempted[0] == "low young"
    assert "high" not in preempted


def test_clients_take_turns_by_what_they_were_served() -> None:
    scheduler = make(max_num_seqs=1)
    for i in range(4):
        arrive(scheduler, f"many {i}", client="many")
    for i in range(2):
        arrive(scheduler, f"few {i}", client="few")
    assert order_of_service(scheduler) == ["many 0", "few 0", "many 1", "few 1", "many 2", "many 3"]


def test_tokens_count_not_requests() -> None:
    scheduler = make(max_num_seqs=1, max_batch_tokens=100)
    for i in range(2):
        arrive(scheduler, f"long {i}", length=40, client="long")
    for i in range(8):
        arrive(scheduler, f"short {i}", length=4, client="short")
    order = order_of_service(scheduler)
    assert order.index("long 1") == 8  # 40 + 2 tokens are those of seven requests of 4 + 2
    assert order[0] == "long 0"


def test_a_newcomer_has_not_saved_up_turns() -> None:
    scheduler = make(max_num_seqs=1)
    for i in range(30):
        arrive(scheduler, f"old {i}", client="old")
    for _ in range(30):
        step(scheduler)
    for i in range(30):
        arrive(scheduler, f"new {i}", client="new")
    order = order_of_service(scheduler)
    assert {name.split()[0] for name in order[1:3]} == {"old", "new"}


def test_priority_comes_before_fairness() -> None:
    scheduler = make(max_num_seqs=1)
    arrive(scheduler, "first", client="busy", length=50)
    arrive(scheduler, "urgent", client="busy", priority=1)
    arrive(scheduler, "other", client="idle")
    assert order_of_service(scheduler) == ["urgent", "other", "first"]


def test_nothing_is_kept_of_clients_that_left() -> None:
    scheduler = make()
    for i in range(50):
        arrive(scheduler, f"{i}", client=f"{i}")
    order_of_service(scheduler)
    queue = scheduler.waiting
    assert not any((queue._queues, queue._members, queue._served, queue._served_at))


def test_a_long_prompt_leaves_each_running_sequence_its_token() -> None:
    scheduler = make(max_batch_tokens=8)
    talking = [arrive(scheduler, f"{i}", length=1, max_tokens=50) for i in range(3)]
    step(scheduler)
    arrive(scheduler, "long", length=50, priority=9)  # its rank is before theirs
    assert sizes(step(scheduler)) == [1, 1, 1, 5]
    for _ in range(4):
        assert sizes(step(scheduler)) == [5, 1, 1, 1]
    assert all(len(s.completion.token_ids) == 6 for s in talking)


def test_a_request_too_many_is_refused_by_numbers(model: Decoder) -> None:
    engine = Engine(model, None, EngineConfig(max_queue=3, max_num_seqs=1))
    for i in range(3):
        engine.check_queue()
        engine.add(Request([i + 1], SamplingParams(max_tokens=2, ignore_eos=True)))
    with pytest.raises(QueueFull, match="3 requests wait already and the limit is 3") as error:
        engine.check_queue()
    assert (error.value.waiting, error.value.limit) == (3, 3)
    assert isinstance(error.value, UserError)
    engine.step()
    engine.check_queue()  # one of them runs now
    with pytest.raises(QueueFull):
        engine.check_queue(arriving=1)
    assert len(engine.generate([[1]] * 20, SamplingParams(max_tokens=1))) == 20  # a job may be of any size
