"""Rows of each packing, token by token. A token is a byte, B stands for BOS, . for padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoworks.data.encoding import Encoded
from nanoworks.data.packing import PACKERS, BestFit, Padded, Stream

PAD = 0


def document(number: int, length: int, *, conversation: bool = False) -> Encoded:
    """`length` tokens `number * 100 + 1, + 2, ...`; of a conversation only the second half is supervised."""
    ids = np.arange(1, length + 1, dtype=np.int32) + 100 * number
    mask = (np.arange(length) >= length // 2).astype(np.float32) if conversation else None
    return Encoded([0, 0, number], ids, mask)


def documents(*lengths: int, conversation: bool = False) -> list[Encoded]:
    return [document(n, length, conversation=conversation) for n, length in enumerate(lengths, start=1)]


def pack(packer_type, given_documents, *, batch_size=1, sequence_length=7, buffer=10):
    packer = packer_type(batch_size=batch_size, sequence_length=sequence_length, pad_id=PAD, buffer=buffer)
    feed = iter(given_documents)
    batches = []
    while (packed := packer.pack(feed)) is not None:
        batches.append(packed)
    return packer, batches


def rows(batches):
    """Every row with its T + 1 tokens: the inputs and the last target."""
    return [row.tolist() for b in batches for row in np.hstack([b.tokens, b.targets[:, -1:]])]


def test_best_fit_takes_the_longest_that_fits_and_crops_the_shortest():
    packer, batches = pack(BestFit, documents(3, 5, 4, 9))
    assert rows(batches) == [
        [201, 202, 203, 204, 205, 101, 102, 103],  # 5, then the 3 that fits exactly
        [301, 302, 303, 304, 401, 402, 403, 404],  # 4, then 9 is cropped: nothing fits
    ]
    assert packer.cropped == 5
    assert batches[0].documents.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert all(batch.padding == 0 for batch in batches)


def test_best_fit_takes_the_oldest_of_equal_length():
    _, batches = pack(BestFit, documents(4, 4, 4, 4))
    assert [row[::4] for row in rows(batches)] == [[101, 201], [301, 401]]
    _, batches = pack(BestFit, documents(9, 9))  # nothing fits: the oldest of the shortest is cropped
    assert [row[0] for row in rows(batches)] == [101, 201]


def test_best_fit_chooses_only_within_its_buffer():
    _, batches = pack(BestFit, documents(3, 3, 8), buffer=2)
    assert rows(batches)[0] == [101, 102, 103, 201, 202, 203, 301, 302]


def test_best_fit_never_crops_a_conversation_but_pads():
    packer, batches = pack(BestFit, documents(6, 5, conversation=True))
    assert rows(batches) == [[101, 102, 103, 104, 105, 106, PAD, PAD], [201, 202, 203, 204, 205, PAD, PAD, PAD]]
    assert packer.cropped == 0
    assert [batch.padding for batch in batches] == [2, 3]
    assert batches[0].weights.tolist() == [[0, 0, 1, 1, 1, 0, 0]]
    assert batches[0].documents.tolist() == [[0, 0, 0, 0, 0, 0, 1]]


def test_best_fit_fills_up_behind_a_conversation_with_text():
    chats, texts = documents(6, 6, conversation=True), [document(3, 9)]
    packer, batches = pack(BestFit, chats + texts)
    assert rows(batches)[0] == [101, 102, 103, 104, 105, 106, 301, 302]
    assert packer.cropped == 7
    assert batches[0].weights.tolist() == [[0, 0, 1, 1, 1, 1, 1]]


@given(
    kinds=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=40),
    batch_size=st.integers(1, 3),
    buffer=st.integers(1, 10),
)
def test_best_fit_loses_and_repeats_nothing_but_what_it_counts(kinds, batch_size, buffer):
    # Conversations longer than a row are cut before they are packed.
    given_documents = [
        document(n, min(length, 8) if conversation else length, conversation=conversation)
        for n, (length, conversation) in enumerate(kinds, start=1)
    ]
    packer, batches = pack(BestFit, given_documents, batch_size=batch_size, buffer=buffer)
    placed = [token for row in rows(batches) for token in row if token != PAD]
    assert len(set(placed)) == len(placed)
    assert len(placed) + packer.cropped == sum(len(d.ids) for d in given_documents)
    for d in given_documents:
        held = [int(token) for token in d.ids if token in placed]
        assert held == d.ids[: len(held)].tolist()
        assert held
        assert d.mask is None or len(held) == len(d.ids)
    for row in rows(batches):
        assert row[0] == PAD or row[0] % 100 == 1  # a row starts where a document does
    assert packer.held() == []


def test_stream_runs_on_over_rows_and_takes_one_token_more_a_batch():
    packer, batches = pack(Stream, documents(5, 30), batch_size=2)
    flat = [101, 102, 103, 104, 105, *range(201, 231)]
    assert batches[0].tokens.ravel().tolist() == flat[:14]
    assert batches[0].targets.ravel().tolist() == flat[1:15]
    assert batches[1].tokens.ravel().tolist() == flat[15:29]
    assert batches[0].documents.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0] * 7]
    assert batches[2].tokens.ravel().tolist() == [*flat[30:], *[PAD] * 9]
    assert batches[2].weights.ravel().tolist() == [1] * 4 + [0] * 10
    assert batches[2].padding == 10
    assert packer.held() == []


def test_stream_cuts_conversations_with_their_masks():
    _, batches = pack(Stream, documents(4, 4, conversation=True))
    assert batches[0].weights.tolist() == [[0, 1, 1, 0, 0, 1, 1]]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), batch_size=st.integers(1, 3))
def test_stream_loses_nothing(lengths, batch_size):
    given_documents = documents(*lengths)
    _, batches = pack(Stream, given_documents, batch_size=batch_size)
    flat = np.concatenate([d.ids for d in given_documents])
    size = batch_size * 7 + 1
    # A batch's targets are all its tokens but the first; a single token at the end has no target.
    targets = [batch.targets.ravel()[batch.weights.ravel() > 0] for batch in batches]
    expected = np.delete(flat, np.arange(0, len(flat), size))
    assert np.concatenate([*targets, []]).tolist() == expected.tolist()


def test_padded_has_one_document_a_row_and_is_as_wide_as_the_longest():
    _, batches = pack(Padded, documents(3, 70, 100, conversation=True), batch_size=2, sequence_length=200)
    assert [batch.tokens.shape for batch in batches] == [(2, 128), (2, 128)]
    assert batches[0].tokens[0].tolist() == [101, 102, 103] + [PAD] * 125
    assert batches[0].weights[0].tolist() == [1, 1] + [0] * 126
    assert batches[0].documents[0].tolist() == [0] * 3 + [1] * 125
    assert batches[1].weights[1].sum() == 0  # the last batch has an empty row
    assert batches[0].padding == (128 - 2) + (128 - 69)


def test_padded_crops_a_text_that_is_longer_than_a_row():
    packer, batches = pack(Padded, documents(20))
    assert rows(batches) == [list(range(101, 109))]
    assert packer.cropped == 12


@pytest.mark.parametrize("packing", PACKERS)
def test_no_documents_make_no_batch(packing):
    assert pack(PACKERS[packing], [])[1] == []


@pytest.mark.parametrize("packing", PACKERS)
def test_a_weight_belongs_to_the_target(packing):
    chat = document(1, 6, conversation=True)
    _, [batch] = pack(PACKERS[packing], [chat])
    supervised = batch.targets[batch.weights > 0].tolist()
    assert supervised == chat.ids[chat.mask > 0].tolist()
