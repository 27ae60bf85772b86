from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nanoworks.common.errors import UserError
from nanoworks.tasks import Task, build_task
from tests.tasks.conftest import write_jsonl

ROWS = [
    {"country": "France", "capital": "Paris", "people": 68, "options": ["Rome", "Paris"]},
    {"country": "Italy", "capital": "Rome", "people": 59, "options": ["Rome", "Paris", "Oslo"]},
]


def make(tmp_path: Path, rows=ROWS, **changes) -> Task:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    values = {"name": "capitals", "path": "rows.jsonl", "prompt": "Capital of {{ country }}?", "answer": "capital"}
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in {**values, **changes}.items() if v is not None}))
    return build_task("custom", {"path": str(file)})


def test_prompt_answer_and_order_are_the_files(tmp_path):
    task = make(tmp_path, system="Be brief.")
    assert task.name == "capitals"
    assert task.kind == "generative"
    assert task.conversation(1)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of Italy?"},
        {"role": "assistant", "content": "Rome"},
    ]


@pytest.mark.parametrize(
    ("changes", "right", "wrong"),
    [
        ({"scorer": "exact"}, [" Paris\n"], ["paris", "Paris."]),
        ({"scorer": "contains"}, ["It is PARIS, I think"], ["Pari s"]),
        ({"scorer": "number", "answer": "people"}, ["about 68.0", "not 5 but 68 million"], ["68 or 70", "many"]),
        ({"scorer": "regex", "pattern": r"Answer: (\w+)"}, ["So: Answer: Paris, yes"], ["Paris", "Answer: Rome"]),
    ],
)
def test_scorers(tmp_path, changes, right, wrong):
    task = make(tmp_path, **changes)
    assert [task.score(0, text) for text in right] == [1.0] * len(right)
    assert [task.score(0, text) for text in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize("answer", ["capital", "letter", "index"])
def test_choices_take_a_text_a_letter_or_an_index_as_the_answer(tmp_path, answer):
    rows = [{**ROWS[0], "letter": "B", "index": 1}, {**ROWS[1], "letter": "A", "index": 0}]
    task = make(tmp_path, rows, scorer="choice", choices="options", answer=answer)
    assert task.kind == "multiple_choice"
    assert [task.choices(i) for i in range(2)] == [["A", "B"], ["A", "B", "C"]]
    assert [task.conversation(i)["messages"][-1]["content"] for i in range(2)] == ["B", "A"]
    assert "- Rome=A\n- Paris=B\n" in task.conversation(0)["messages"][0]["content"]
    assert (task.score(0, "B"), task.score(0, "A")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "fuzzy"}, r"task.yaml.scorer"),
        ({"answr": "capital"}, r"task.yaml.answr: unknown key \(did you mean 'answer'\?\)"),
        ({"prompt": None}, r"task.yaml.prompt: required"),
        ({"scorer": "choice"}, r"choice and the field choices go together"),
        ({"scorer": "regex"}, r"regex and pattern go together"),
        ({"scorer": "regex", "pattern": "Answer"}, r"exactly one group"),
        ({"scorer": "regex", "pattern": "(Answer"}, r"not a regular expression"),
        ({"prompt": "{{ country"}, r"task.yaml: prompt: not a Jinja template"),
        ({"prompt": "{{ contry }}"}, r"rows.jsonl:1: the prompt cannot be written: 'contry' is undefined"),
        ({"answer": "capitol"}, r"rows.jsonl:1: no field 'capitol' \(did you mean 'capital'\?\)"),
        ({"scorer": "choice", "choices": "country"}, r"rows.jsonl:1: country is not a list"),
        ({"scorer": "choice", "choices": "options", "answer": "country"}, r"rows.jsonl:1: country 'France' is no"),
        ({"path": "none.jsonl"}, r"none.jsonl: no such file"),
    ],
)
def test_mistakes_are_named_by_field_or_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **changes)


def test_broken_yaml_is_named_by_line(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("name: x\nprompt: [1, 2\nanswer: y\n")
    with pytest.raises(UserError, match=r"task.yaml:3: not YAML"):
        build_task("custom", {"path": str(file)})
    file.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="is a mapping"):
        build_task("custom", {"path": str(file)})


def test_a_prompt_cannot_reach_into_python(tmp_path):
    with pytest.raises(UserError, match="prompt"):
        make(tmp_path, prompt="{{ country.__class__.__mro__[1].__subclasses__() }}")
