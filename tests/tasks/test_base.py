"""The contract that every task keeps, on small local files."""

from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tasks import TASKS, Task, build_task
from nanoworks.tokenizer import validate_conversation

SCORED = ["arc_challenge", "arc_easy", "gsm8k", "humaneval", "mmlu", "simple_spelling", "spelling_bee"]
TRAINING_ONLY = ["conversations", "smoltalk"]


def make(files, name: str, **options) -> Task:
    path = files(name)
    return build_task(name, options if path is None else {"path": path, **options})


def reference(task: Task, i: int) -> str:
    """The reference answer as the engine would return it as text."""
    content = task.conversation(i)["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


@pytest.mark.parametrize("name", SCORED + TRAINING_ONLY)
def test_a_task_is_a_list_of_complete_conversations(files, name):
    task = make(files, name)
    assert len(task) > 0
    for i in range(min(len(task), 20)):
        conversation = task.conversation(i)
        validate_conversation(conversation)
        assert conversation["messages"][-1]["role"] == "assistant"
        assert conversation == task.conversation(i)


@pytest.mark.parametrize("name", SCORED)
def test_the_reference_is_right_and_something_else_is_wrong(files, name):
    task = make(files, name)
    for i in range(min(len(task), 20)):
        assert task.score(i, reference(task, i)) == 1.0
        assert task.score(i, "#### 77777 no such answer") == 0.0
        assert task.score(i, "") == 0.0


@pytest.mark.parametrize("name", SCORED + TRAINING_ONLY)
def test_an_index_outside_is_an_index_error(files, name):
    task = make(files, name)
    for i in (len(task), len(task) + 7, -1):
        with pytest.raises(IndexError):
            task.conversation(i)


@pytest.mark.parametrize("name", SCORED + TRAINING_ONLY)
def test_a_limit_shortens_and_one_beyond_the_data_is_clipped(files, name):
    whole = make(files, name)
    assert len(make(files, name, limit=1)) == 1
    beyond = make(files, name, limit=10**9)
    assert len(beyond) == len(whole)
    assert beyond.conversation(len(beyond) - 1) == whole.conversation(len(whole) - 1)


@pytest.mark.parametrize("name", TRAINING_ONLY)
def test_a_task_without_right_answers_says_so(files, name):
    with pytest.raises(UserError, match="training data"):
        make(files, name).score(0, "hello")


def test_every_name_of_the_table_is_registered_with_options_of_its_own():
    for name in TASKS:
        task = TASKS.get(name)
        assert task.kind in ("generative", "multiple_choice")
        assert "limit" in TASKS.options(name).model_fields


def test_wrong_names_and_options_name_the_nearest():
    with pytest.raises(UserError, match=r"unknown task 'gms8k'.*gsm8k"):
        build_task("gms8k")
    with pytest.raises(UserError, match=r"eval.tasks.0.spilt: unknown key \(did you mean 'split'\?\)"):
        build_task("gsm8k", {"spilt": "train"}, where="eval.tasks.0")
    with pytest.raises(UserError, match="limit"):
        build_task("gsm8k", {"limit": 0})
    with pytest.raises(UserError, match="split"):
        build_task("gsm8k", {"split": "validation"})
