"""ARC and MMLU."""

from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tasks import build_task
from nanoworks.tasks.multiple_choice import render_question
from tests.tasks.conftest import ARC, MMLU, write_jsonl


def test_the_letter_follows_its_choice_without_a_space():
    assert render_question("Which?", ("A", "B"), ("ice", "sand")) == (
        "Multiple Choice question: Which?\n- ice=A\n- sand=B\n\nRespond only with the letter of the correct answer."
    )


def test_arc_keeps_its_own_labels(files):
    task = build_task("arc_challenge", {"path": files("arc_challenge")})
    assert task.name == "arc_challenge"
    letters = {task.conversation(i)["messages"][-1]["content"]: task.choices(i) for i in range(len(task))}
    assert letters == {"A": ["A", "B", "C"], "2": ["1", "2"]}


def test_arc_takes_its_set_as_an_option(files):
    path = files("arc_easy")
    assert build_task("arc", {"path": path, "subset": "ARC-Challenge"}).name == "arc_challenge"
    with pytest.raises(UserError, match="subset"):
        build_task("arc_easy", {"path": path, "subset": "ARC-Challenge"})


def test_mmlu_asks_for_the_letter_of_the_index(files):
    task = build_task("mmlu", {"path": files("mmlu")})
    for i in range(len(task)):
        assert task.conversation(i)["messages"][-1]["content"] == "B"
        assert task.choices(i) == ["A", "B", "C", "D"]
    assert (task.score(0, "B"), task.score(0, " B\n"), task.score(0, "A"), task.score(0, "Both")) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmlu", {**MMLU[0], "answer": 4}, r"rows.jsonl:1: answer 4 is not an index"),
        ("mmlu", {**MMLU[0], "choices": ["a"]}, r"rows.jsonl:1: choices is not a list of 4"),
        ("arc_easy", {**ARC[0], "answerKey": "Z"}, r"rows.jsonl:1: answerKey 'Z'"),
        ("arc_easy", {**ARC[0], "choices": ["ice"]}, r"rows.jsonl:1: choices is not an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, row, message):
    task = build_task(name, {"path": write_jsonl(tmp_path / "rows.jsonl", [row])})
    with pytest.raises(UserError, match=message):
        task.conversation(0)
