from __future__ import annotations

import re

import pytest

from nanoworks.common.errors import UserError
from nanoworks.engine.tools import calculate
from nanoworks.tasks import build_task
from nanoworks.tasks.spelling import WORDS, read_words


def test_splits_share_no_word():
    train, test = read_words(WORDS, "train"), read_words(WORDS, "test")
    assert not set(train) & set(test)
    assert len(train) + len(test) == len(WORDS.read_text().split())
    assert len(test) > 100


def test_examples_differ_by_index_and_split_and_repeat_by_seed():
    train, test = (build_task("spelling_bee", {"split": split, "size": 200}) for split in ("train", "test"))
    questions = [train.conversation(i)["messages"][0]["content"] for i in range(200)]
    assert len(set(questions)) > 190
    assert questions == [
        build_task("spelling_bee", {"split": "train"}).conversation(i)["messages"][0]["content"] for i in range(200)
    ]
    assert not set(questions) & {test.conversation(i)["messages"][0]["content"] for i in range(200)}


def test_the_answer_counts_as_the_calculator_does():
    task = build_task("spelling_bee", {"size": 300})
    zeros = 0
    for i in range(len(task)):
        text, call, output, final = task.conversation(i)["messages"][1]["content"]
        assert str(calculate(call["text"])) == output["text"]
        assert final["text"].endswith(f"#### {output['text']}")
        assert text["text"].count("hit!") == int(output["text"])
        word = re.match(r"'(\w+)'", call["text"]).group(1)
        assert f"{word}:{','.join(word)}\n" in text["text"]
        zeros += output["text"] == "0"
    assert 0 < zeros < 60


def test_own_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"w{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(26)))
    task = build_task("simple_spelling", {"path": str(path)})
    question, answer = (message["content"] for message in task.conversation(0)["messages"])
    word = question.removeprefix("Spell the word: ")
    assert answer == f"{word}:{','.join(word)}"
    assert word in path.read_text()


def test_bad_lists_of_words_are_refused(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("good b4d\n")
    with pytest.raises(UserError, match="word 2, 'b4d'"):
        read_words(path, "test")
    path.write_text("")
    with pytest.raises(UserError, match="none of its 0 words"):
        read_words(path, "test")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_words(path, "test")
    with pytest.raises(UserError, match="cannot be read"):
        read_words(tmp_path / "missing.txt", "test")
