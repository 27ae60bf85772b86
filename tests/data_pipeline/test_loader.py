"""The loader end to end: exact positions, ranks, conversations, the background thread."""

from __future__ import annotations

import gc
import json
import threading
import time
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.data import ConversationSource, Loader, Mixture, build_source
from nanoworks.tasks.base import build_task
from nanoworks.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer


def load(mixture, tokenizer, **options):
    return Loader(mixture, tokenizer, **{"sequence_length": 16, "batch_size": 2, "buffer": 6, "prefetch": 0, **options})


def same(a, b) -> bool:
    tensors = ("tokens", "targets", "weights", "documents")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors) and (a.state, a.stats) == (b.state, b.stats)


class Chats:
    """Conversations of many lengths, some longer than a row."""

    name = "chats"

    def __init__(self, chat, count, longest=30) -> None:
        self._items = [chat(f"question {i}"[: i % longest], "answer " * (i % 4) + "!") for i in range(count)]

    def __len__(self) -> int:
        return len(self._items)

    def conversation(self, i):
        return self._items[i]


@settings(deadline=None)
@given(data=st.data())
def test_a_saved_position_goes_on_with_exactly_the_next_batch(memory_source, chat, tokenizer, data):
    draw = data.draw
    lengths = st.lists(st.lists(st.integers(0, 40), max_size=6), min_size=1, max_size=5)
    texts = memory_source(
        [
            [f"{page}-{i}".ljust(n, "x") for i, n in enumerate(page_lengths)]
            for page, page_lengths in enumerate([[7], *draw(lengths)])
        ],
        shuffle=draw(st.booleans()),
    )
    mixture = Mixture([texts, ConversationSource(Chats(chat, 9))], [1.0, draw(st.floats(0.1, 3))])
    options = {
        "packing": draw(st.sampled_from(["best_fit", "stream", "padded"])),
        "overlong": draw(st.sampled_from(["truncate", "drop"])),
        "buffer": draw(st.integers(1, 12)),
        "batch_size": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 5)),
    }
    taken = draw(st.integers(1, 12))
    batches = list(islice(load(mixture, tokenizer, **options), taken + 6))
    state = json.loads(json.dumps(batches[taken - 1].state))
    resumed = list(islice(load(mixture, tokenizer, state=state, **options), 6))
    assert all(map(same, resumed, batches[taken:]))
    assert len(resumed) == 6


def test_a_position_is_exact_on_every_rank_and_over_epochs(memory_source, tokenizer):
    source = memory_source([[f"{page} {i}" * (i + 1) for i in range(5)] for page in range(7)], shuffle=True)
    for rank in range(3):
        options = {"rank": rank, "world_size": 3}
        batches = list(islice(load(source, tokenizer, **options), 40))
        assert batches[-1].stats["epoch"] >= 2
        resumed = load(source, tokenizer, state=batches[30].state, **options)
        assert all(map(same, islice(resumed, 9), batches[31:]))


def test_a_finite_loader_can_be_resumed_to_its_end(memory_source, tokenizer):
    source = memory_source([[f"{page} {i}" * (i + 1) for i in range(5)] for page in range(7)])
    batches = list(load(source, tokenizer, infinite=False))
    for k in range(len(batches)):
        rest = list(load(source, tokenizer, infinite=False, state=batches[k].state))
        assert len(rest) == len(batches) - k - 1
        assert all(map(same, rest, batches[k + 1 :]))


def test_the_state_is_small_however_long_the_documents(memory_source, tokenizer):
    source = memory_source([["x" * 10_000] * 50])
    batch = next(iter(load(source, tokenizer, buffer=50)))
    assert len(json.dumps(batch.state)) < 4000


def test_ranks_read_different_documents_and_together_all(memory_source, tokenizer):
    source = memory_source([[f"<{page}.{i}>" for i in range(6)] for page in range(8)])
    seen = []
    for rank in range(2):
        for batch in load(source, tokenizer, rank=rank, world_size=2, infinite=False, packing="padded"):
            seen += [bytes(row[row < 256].tolist()) for row in batch.tokens]
    texts = sorted(text for text in seen if text)
    assert texts == sorted(text.encode() for text in source)


def test_on_another_number_of_ranks_the_data_goes_on_without_repeats(memory_source, tokenizer):
    source = memory_source([[f"<{page}.{i}>" for i in range(6)] for page in range(40)])
    old = list(islice(load(source, tokenizer, rank=0, world_size=2, packing="padded"), 20))
    texts = [bytes(row[row < 256].tolist()) for batch in old for row in batch.tokens]
    state = old[-1].state
    for rank in range(3):
        new = load(source, tokenizer, rank=rank, world_size=3, packing="padded", infinite=False, state=state)
        texts += [bytes(row[row < 256].tolist()) for batch in new for row in batch.tokens if (row < 256).any()]
    assert len(texts) == len(set(texts)) > 120


def test_a_validation_set_smaller_than_the_buffer_repeats_no_row(memory_source, tokenizer):
    source = memory_source([[f"{i:02} is a number" for i in range(20)]])
    loader = load(source, tokenizer, buffer=1000, infinite=False)
    first, again = ([row for batch in loader for row in batch.tokens.tolist()] for _ in range(2))
    filled = [tuple(row) for row in first if any(token < 256 for token in row)]
    assert len(set(filled)) == len(filled)
    assert first == again  # each iteration begins anew
    tokens = [token for row in filled for token in row]
    assert sum(token == 256 for token in tokens) >= 20


def test_taking_more_than_there_is_ends_quietly(memory_source, tokenizer):
    assert len(list(islice(load(memory_source([["a"]]), tokenizer, infinite=False), 1000))) == 1


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_a_conversation_longer_than_a_row_is_cut_or_dropped_and_counted(chat, tokenizer, packing):
    class Items(Chats):
        def __init__(self) -> None:
            self._items = [chat("short", "one"), chat("x" * 40, "never seen"), chat("short", "a" * 40)]

    def run(overlong):
        source = ConversationSource(Items(), shuffle=False)
        return list(load(source, tokenizer, packing=packing, overlong=overlong, infinite=False))

    cut, dropped = run("truncate"), run("drop")
    assert cut[-1].stats["truncated"] == 2
    assert cut[-1].stats["dropped"] == 0
    assert cut[-1].stats["cropped"] == 0
    assert sum(batch.num_supervised for batch in cut) == 3 + 11
    assert dropped[-1].stats["dropped"] == 2
    assert sum(batch.num_supervised for batch in dropped) == 3


def test_a_conversation_that_just_fits_is_not_counted_as_cut(chat, tokenizer):
    class Items(Chats):
        def __init__(self) -> None:
            self._items = [chat("x" * 8, "y" * 8)]  # 17 tokens with BOS, a row of T + 1

    [batch] = load(ConversationSource(Items()), tokenizer, batch_size=1, infinite=False)
    assert batch.stats["truncated"] == 0
    assert batch.stats["padding"] == 0
    assert batch.num_supervised == 8


def test_only_conversations_too_long_to_keep_is_an_error_not_a_hang(chat, tokenizer):
    class Items(Chats):
        def __init__(self) -> None:
            self._items = [chat("x" * 50, "y")] * 200

    with pytest.raises(UserError, match="every conversation is longer than a row"):
        next(iter(load(ConversationSource(Items()), tokenizer, overlong="drop")))
    assert list(load(ConversationSource(Items()), tokenizer, overlong="drop", infinite=False)) == []


def test_the_loss_may_lie_on_all_tokens_of_a_conversation(chat, tokenizer):
    source = ConversationSource(Chats(chat, 5))
    all_, some = (
        sum(b.num_supervised for b in load(source, tokenizer, loss_on=on, infinite=False, packing="padded"))
        for on in ("all", "assistant")
    )
    assert all_ > some > 0


def test_a_batch_moves_to_a_device_and_may_leave_the_documents_out(memory_source, tokenizer):
    batch = next(iter(load(memory_source([["abc"]]), tokenizer, documents=False)))
    assert batch.documents is None
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.weights.device.type == "meta"
    assert moved.state is batch.state
    assert (batch.tokens.dtype, batch.targets.dtype, batch.weights.dtype) == (torch.int64, torch.int64, torch.float32)


def test_unreadable_documents_are_counted(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good text"}\n{"text": "\xff"}\n{"text": "more text"}\n')
    source = build_source("jsonl", {"path": str(tmp_path), "split": "all", "errors": "skip"})
    assert list(load(source, tokenizer, infinite=False))[-1].stats["skipped"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "best-fit"}, r"unknown packing 'best-fit' \(did you mean 'best_fit'\?\)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequence_length": -1}, "sequence_length is -1"),
        ({"buffer": 0}, "buffer is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 is outside a world of 2"),
    ],
)
def test_settings_out_of_range_are_refused(memory_source, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        load(memory_source([["a"]]), tokenizer, **options)


def test_a_position_of_other_data_or_another_order_is_refused(memory_source, chat, tokenizer):
    source = memory_source([["abc"]])
    state = next(iter(load(source, tokenizer))).state
    with pytest.raises(UserError, match=r"of the sources \['MemorySource'\], not \['ConversationSource'\]"):
        load(ConversationSource(Chats(chat, 3)), tokenizer, state=state)
    with pytest.raises(UserError, match="of seed 0, not 1"):
        load(source, tokenizer, seed=1, state=state)


# The background thread


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nanoworks-loader"]


def test_ahead_or_not_the_batches_are_the_same(memory_source, tokenizer):
    source = memory_source([[f"{page} {i}" * i for i in range(9)] for page in range(3)], shuffle=True)
    with load(source, tokenizer, prefetch=3) as ahead:
        assert all(map(same, islice(ahead, 20), islice(load(source, tokenizer), 20)))
    assert not loader_threads()


def test_an_error_in_the_thread_reaches_the_consumer_after_the_batches_before_it(memory_source, tokenizer):
    class Broken(memory_source):
        def read(self, page):
            if page == 3:
                raise UserError("the disk is gone")
            return super().read(page)

    loader = load(Broken([["x" * 31] * 64] * 5), tokenizer, packing="stream", batch_size=1, prefetch=2)
    batches = iter(loader)
    assert len(list(islice(batches, 100))) == 100
    with pytest.raises(UserError, match="the disk is gone"):
        list(batches)
    assert not loader_threads()


@pytest.mark.parametrize("ending", ["close", "with", "let go", "restart"])
def test_the_thread_ends_with_its_consumer(memory_source, tokenizer, ending):
    loader = load(memory_source([["text"]]), tokenizer, prefetch=2)
    batches = iter(loader)
    next(batches)
    assert len(loader_threads()) == 1
    if ending == "close":
        loader.close()
    elif ending == "with":
        with loader:
            pass
    elif ending == "let go":
        del batches
        gc.collect()
    else:
        next(iter(loader))
        gc.collect()
    assert not loader_threads()


def test_no_more_is_prepared_than_asked(memory_source, tokenizer):
    read = []

    class Watched(memory_source):
        def read(self, page):
            read.append(page)
            return super().read(page)

    with load(Watched([["x" * 16]] * 10_000), tokenizer, packing="stream", batch_size=64, prefetch=2) as loader:
        next(iter(loader))
        time.sleep(0.3)
    assert 64 < len(read) < 640


# With the real tokenizer


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 20], 256 + len(SPECIAL_TOKENS) + 20)


def test_texts_begin_with_bos_and_conversations_are_rendered(memory_source, chat, real):
    texts = memory_source([["the quick fox"] * 3])
    mixture = Mixture([texts, ConversationSource(Chats(chat, 5))])
    batches = list(load(mixture, real, sequence_length=64, infinite=False))
    rows = torch.cat([batch.tokens for batch in batches])
    assert (rows[:, 0] == real.bos_id).all()
    assert (rows == real.special_tokens["<|assistant_start|>"]).sum() == 5
    supervised = torch.cat([b.targets[b.weights > 0] for b in batches])
    assert (supervised == real.special_tokens["<|assistant_end|>"]).sum() == 5
    assert not (supervised == real.special_tokens["<|user_start|>"]).any()


def test_a_task_of_the_tasks_package_is_a_source(real):
    task = build_task("microworld_facts", {"limit": 20})
    batches = list(load(ConversationSource(task), real, sequence_length=256, infinite=False))
    assert sum(batch.num_supervised for batch in batches) > 20
