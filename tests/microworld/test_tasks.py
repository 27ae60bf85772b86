"""The micro-world's tasks: reference answers score 1, wrong ones 0, and training never meets a test example."""

from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tasks import build_task

NAMES = [f"microworld_{kind}" for kind in ("arithmetic", "choice", "counting", "facts", "identity", "spelling")]


def reference(task, i: int) -> str:
    content = task.conversation(i)["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_right_and_that_of_another_answer_wrong(name):
    task = build_task(name, {"limit": 60})
    wrong = 0
    for i in range(len(task)):
        assert task.score(i, reference(task, i)) == 1.0
        assert task.score(i, "") == 0.0
        for j in range(len(task)):
            if task.examples[j].answer != task.examples[i].answer:
                assert task.score(i, reference(task, j)) == 0.0
                wrong += 1
    assert wrong > 0


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_defaults_have_a_size(name):
    train, test = build_task(name, {"split": "train", "limit": 2000}), build_task(name)
    assert 10 < len(test) <= 200
    prompts = [{t.conversation(i)["messages"][0]["content"] for i in range(len(t))} for t in (train, test)]
    assert len(prompts[1]) == len(test)
    assert not prompts[0] & prompts[1]
    with pytest.raises(IndexError):
        test.conversation(len(test))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("microworld_arithmetic", "Add: 1+1\n#### {answer}", "{answer}"),
        ("microworld_choice", "I say one={answer}\n", "{answer}=one"),
        ("microworld_facts", "Well, {answer}!", "{answer} or {wrong}"),
        ("microworld_spelling", "It goes: {answer}", "It goes: x {answer}"),
    ],
)
def test_another_wording_is_judged_by_what_it_states(name, right, wrong):
    task = build_task(name, {"limit": 20})
    for i, example in enumerate(task.examples):
        values = {"answer": example.answer, "wrong": (example.wrong or ("",))[0]}
        assert task.score(i, right.format(**values)) == 1.0
        assert task.score(i, wrong.format(**values)) == 0.0


def test_a_file_is_refused_because_the_examples_are_generated():
    with pytest.raises(UserError, match="path"):
        build_task("microworld_facts", {"path": "facts.jsonl"})
