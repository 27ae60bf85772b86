from __future__ import annotations

from nanoworks.tasks import build_task
from nanoworks.tasks.gsm8k import answer_parts


def test_annotations_become_calls_and_outputs():
    parts = answer_parts("She sold 48/2 = <<48/2=24>>24 clips.\n<<48+24=72>>72 in all.\n#### 72")
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "She sold 48/2 = "),
        ("python", "48/2"),
        ("python_output", "24"),
        ("text", "24 clips.\n"),
        ("python", "48+24"),
        ("python_output", "72"),
        ("text", "72 in all.\n#### 72"),
    ]


def test_an_annotation_without_a_result_is_a_call_with_an_empty_output():
    assert answer_parts("<<5>>5")[:2] == [
        {"type": "python", "text": "5"},
        {"type": "python_output", "text": ""},
    ]


def test_the_official_file_loads_renders_and_scores(shared_dir):
    task = build_task("gsm8k", {"path": str(shared_dir / "data" / "gsm8k_train.jsonl"), "split": "train"})
    assert len(task) == 7473
    calls = 0
    for i in range(len(task)):
        question, answer = task.conversation(i)["messages"]
        assert isinstance(question["content"], str)
        calls += sum(part["type"] == "python" for part in answer["content"])
        text = "".join(part["text"] for part in answer["content"])
        assert "<<" not in text
        assert task.score(i, text) == 1.0
    assert calls == 23716
