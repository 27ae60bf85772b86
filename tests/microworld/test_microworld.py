"""The micro-world: same text in every process, nothing of the test split in training, answers that are right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from itertools import pairwise
from random import Random

import pytest

from nanoworks.common.errors import UserError
from nanoworks.data.microworld import KINDS, distinct_examples, split_of
from nanoworks.data.microworld.documents import DOCUMENTS
from nanoworks.data.microworld.facts import QUESTIONS
from nanoworks.data.microworld.world import FACTS, PROPERTIES
from nanoworks.data.registry import build_source
from nanoworks.engine.tools import calculate

COUNT = 3000
PAGES = 40


@pytest.fixture(scope="module")
def sets():
    return {
        (name, split): distinct_examples(draw, split, COUNT, seed=seed)
        for name, draw in KINDS.items()
        for seed, split in ((1, "train"), (2, "test"))
    }


@pytest.fixture(scope="module")
def training_text():
    source = build_source("microworld", {"pages": PAGES})
    return [document for page in range(PAGES) for document in source.read(page)]


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_test_share_no_key_and_no_prompt(sets, kind):
    train, test = sets[kind, "train"], sets[kind, "test"]
    assert len(train) > 50
    assert len(test) > 10
    assert not {e.key for e in train} & {e.key for e in test}
    assert not {e.question for e in train} & {e.question for e in test}


def test_every_key_keeps_its_split(sets):
    for (_, split), examples in sets.items():
        assert {split_of(example.key) for example in examples} == {split}


def test_no_test_question_occurs_in_the_training_text(sets, training_text):
    asked = {
        line.removeprefix("Question: ").removeprefix("Multiple Choice question: ")
        for document in training_text
        for line in document.splitlines()
        if line.startswith("Question: ")
    }
    for kind in ("arithmetic", "counting", "facts", "identity", "spelling"):
        assert not asked & {e.question for e in sets[kind, "test"]}
    text = "\n".join(training_text)
    for example in sets["choice", "test"]:
        assert example.question not in text
    # The test above must be able to fail: the questions of the training split are found this way.
    assert asked & {e.question for e in sets["facts", "train"]}


def test_words_and_calculations_of_the_test_split_are_absent_from_training_text(sets, training_text):
    text = "\n".join(training_text)
    words = set(text.replace(":", " ").replace('"', " ").split())
    solved = set(re.findall(r"^Answer: \w+: (\S+) = \d+\n####", text, re.MULTILINE))  # in one step

    def steps(split):
        keys = {e.key.removeprefix("arithmetic/") for e in sets["arithmetic", split]}
        return {key for key in keys if key.replace("//", "").count("/") == 0}

    assert not words & {e.key.removeprefix("word/") for e in sets["spelling", "test"]}
    assert not solved & steps("test")
    assert solved & steps("train")


def test_every_fact_is_stated_and_asked_in_training(training_text):
    text = "\n".join(training_text)
    for fact in FACTS:
        assert any(fact.state(way) in text for way in range(len(fact.property.statements)))
        splits = Counter(split_of(example.key) for example in QUESTIONS[fact])
        assert splits["train"] >= 2


def test_every_test_fact_is_asked_in_a_phrasing_that_training_lacks(sets):
    tested = {example.question for example in sets["facts", "test"]}
    trained = {e.question for examples in QUESTIONS.values() for e in examples if split_of(e.key) == "train"}
    assert len(tested) > 150
    assert not tested & trained
    for example in (*sets["choice", "train"], *sets["choice", "test"]):
        question = example.question.splitlines()[0].removeprefix("Multiple Choice question: ")
        assert question in trained


def test_values_are_equally_frequent():
    for prop in PROPERTIES:
        counts = Counter(fact.value for fact in FACTS if fact.property is prop)
        assert set(counts) == set(prop.values)
        assert len(set(counts.values())) == 1


def test_the_letter_of_the_right_choice_is_no_guess(sets):
    letters = Counter()
    for example in sets["choice", "train"]:
        choices = [line.removeprefix("- ") for line in example.question.splitlines() if line.startswith("- ")]
        assert len(set(choices)) == 4
        stated = example.parts[-1][1].removeprefix("It is ")
        assert stated in choices
        assert stated.endswith(f"={example.answer}")
        letters[example.answer] += 1
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 0.3 * COUNT


@pytest.mark.parametrize("kind", ["arithmetic", "counting"])
def test_the_calculator_gives_every_stated_output(sets, kind):
    for example in sets[kind, "train"][:500]:
        parts = example.parts
        for (name, text), (next_name, output) in pairwise(parts):
            if name == "python":
                assert next_name == "python_output"
                assert str(calculate(text)) == output
        assert parts[-1] == ("text", f"#### {example.answer}")


def test_spelled_letters_are_those_of_the_word(sets):
    for example in sets["spelling", "train"][:500]:
        assert example.answer.replace(" ", "") == example.key.removeprefix("word/")


def fingerprint() -> str:
    """A hash over pages of both splits and examples of every kind."""
    digest = sha256()
    for split in ("train", "val"):
        source = build_source("microworld", {"split": split, "seed": 3})
        for page in (0, 7, 1023):
            digest.update("\0".join(source.read(page)).encode())
    for draw in KINDS.values():
        for example in distinct_examples(draw, "test", 50, seed=5):
            digest.update(repr(example).encode())
    return digest.hexdigest()


def test_another_process_with_another_hash_seed_generates_the_same():
    command = "from tests.microworld.test_microworld import fingerprint; print(fingerprint())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", command],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["src", "."])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {fingerprint()}


def test_seed_page_and_split_change_the_documents():
    pages = {
        (seed, split, page): tuple(build_source("microworld", {"seed": seed, "split": split}).read(page))
        for seed in (0, 1)
        for split in ("train", "val")
        for page in (0, 1)
    }
    assert len(set(pages.values())) == len(pages)


def test_the_mix_decides_which_documents_are_written():
    documents = build_source("microworld", {"mix": {"spelling": 1.0}}).read(0)
    assert all("spell" in d.lower() or "letters" in d for d in documents)


@pytest.mark.parametrize(
    ("mix", "message"),
    [({"artcle": 1.0}, "article"), ({"article": 0.0}, "positive"), ({}, "mix")],
)
def test_a_wrong_mix_is_refused_with_the_reason(mix, message):
    with pytest.raises(UserError, match=message):
        build_source("microworld", {"mix": mix})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_kind_of_document_is_plain_text_of_modest_length(name):
    rng = Random(0)
    for _ in range(50):
        document = DOCUMENTS[name].write(rng, "train")
        assert document.endswith("\n")
        assert 20 < len(document) < 1500
        assert document.isascii()
