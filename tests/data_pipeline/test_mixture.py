"""Several sources read as one."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.data import Mixture, MixtureReader
from nanoworks.data.mixture import size


def test_an_empty_mixture_is_refused():
    with pytest.raises(UserError, match="the mixture is empty"):
        Mixture([])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_a_positive_number(memory_source, weight):
    with pytest.raises(UserError, match="give a positive number"):
        Mixture([memory_source([["a"]])], [weight])


def test_every_source_has_a_weight_or_none_has(memory_source):
    with pytest.raises(UserError, match="2 sources but 1 weights"):
        Mixture([memory_source([["a"]]), memory_source([["b"]])], [1.0])


@settings(max_examples=20)
@given(weights=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4))
def test_shares_are_of_the_text_not_of_the_documents(memory_source, weights):
    sources = [memory_source([["x" * 10 ** (k % 3)]]) for k in range(len(weights))]  # 1, 10, 100 characters
    taken = [0] * len(weights)
    for address, document in islice(MixtureReader(Mixture(sources, weights)), 4000):
        taken[address[0]] += size(document)
    for have, weight in zip(taken, weights, strict=True):
        assert have / sum(taken) == pytest.approx(weight / sum(weights), abs=0.05)


def test_conversations_count_by_what_they_say(chat):
    assert size(chat("abc", "de")) == size("abcde")
    parts = [{"type": "text", "text": "ab"}, {"type": "python", "text": "1+1"}]
    assert size({"messages": [{"role": "assistant", "content": parts}]}) == size("ab1+1")


def test_a_finite_mixture_reads_every_source_to_its_end(memory_source):
    mixture = Mixture([memory_source([list("ab")]), memory_source([list("vwxyz")])], [10.0, 1.0])
    assert sorted(document for _, document in MixtureReader(mixture, epochs=1)) == list("abvwxyz")


@given(read=st.integers(0, 60))
def test_resuming_gives_exactly_what_would_have_followed(memory_source, read):
    def reader() -> MixtureReader:
        long = memory_source([[f"{page}.{i}" * 3 for i in range(4)] for page in range(3)], shuffle=True)
        return MixtureReader(Mixture([long, memory_source([list("abc")])], [1.0, 0.3]), seed=7)

    whole = list(islice(reader(), read + 30))
    interrupted = reader()
    list(islice(interrupted, read))
    resumed = reader()
    resumed.load_state(json.loads(json.dumps(interrupted.state())))
    assert list(islice(resumed, 30)) == whole[read:]


def test_documents_are_found_again_by_their_addresses(memory_source):
    mixture = Mixture([memory_source([list("abc"), list("de")]), memory_source([list("xyz")])])
    drawn = list(MixtureReader(mixture, epochs=1))[::-1]
    assert mixture.fetch([address for address, _ in drawn]) == [document for _, document in drawn]


def test_data_that_changed_since_the_state_was_saved_is_an_error(memory_source):
    with pytest.raises(UserError, match="the data changed"):
        Mixture([memory_source([["a"]])]).fetch([[0, 0, 5]])
