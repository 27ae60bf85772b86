from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tasks import build_task
from tests.tasks.conftest import TALK, write_jsonl


def test_lists_and_objects_are_read_in_the_order_of_the_file(tmp_path):
    lists = build_task("conversations", {"path": write_jsonl(tmp_path / "a.jsonl", [t["messages"] for t in TALK])})
    objects = build_task("conversations", {"path": write_jsonl(tmp_path / "b.jsonl", TALK)})
    assert [lists.conversation(i) for i in range(5)] == [objects.conversation(i) for i in range(5)] == TALK


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([{"role": "assistant", "content": "hi"}], "a.jsonl:2: message 0: role"),
        ({"text": "hi"}, "a.jsonl:2: a conversation is"),
        ([], "a.jsonl:2: message 0"),
        (7, "a.jsonl:2: a conversation is"),
    ],
)
def test_a_bad_conversation_is_named_by_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        build_task("conversations", {"path": write_jsonl(tmp_path / "a.jsonl", [TALK[0], line])})


def test_the_file_is_required():
    with pytest.raises(UserError, match="path: required"):
        build_task("conversations")
