from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanoworks.tasks import build_task, sandbox
from nanoworks.tasks.humaneval import complete_program, extract_code

needs_namespaces = pytest.mark.skipif(bool(sandbox._obstacle()), reason=f"no sandbox here: {sandbox._obstacle()}")

BODY = "    return math.ceil(n / 2)\n"
FUNCTION = f"def half(n):\n{BODY}"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("Here:\n```python\nx = 1\ny = 2\n```\nand\n```\nz\n```", "x = 1\ny = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\nwhile", "x = 1\nwhile"),  # cut off by max_tokens
        ("    return 1\n", "    return 1\n"),
    ],
)
def test_extract_code(completion, code):
    assert extract_code(completion) == code


def test_a_new_definition_replaces_the_stub_and_a_body_continues_it():
    prompt = 'def half(n):\n    """Half."""\n'
    assert complete_program(prompt, BODY, "half") == prompt + BODY
    assert complete_program(prompt, FUNCTION, "half") == f"{prompt}\n\n{FUNCTION}"
    assert complete_program(prompt, "def halfway(n): pass", "half") == prompt + "def halfway(n): pass"


@needs_namespaces
@pytest.mark.parametrize(
    ("completion", "score"),  # one that never ends gets a second, the others as long as a busy machine needs
    [
        (BODY, 1.0),  # the prompt's import is part of the program
        (FUNCTION, 1.0),
        (f"Sure!\n```python\n{FUNCTION}\n```\nDone.", 1.0),
        ("    return n // 2\n", 0.0),
        ("```python\ndef half(n): return math.ceil(\n```", 0.0),
        ("def half(n):\n    import os\n    os._exit(0)", 0.0),
        ("def half(n):\n    import socket\n    socket.create_connection(('127.0.0.1', 1))", 0.0),
        ("def half(n):\n    import os\n    while True:\n        os.fork()", 0.0),
        ("def half(n):\n    return bytearray(10**12)", 0.0),
        ("def half(n):\n    while True: pass", 0.0),
    ],
)
def test_completions_are_run_against_the_tests(files, completion, score):
    seconds = 1 if "while True: pass" in completion else 60
    task = build_task("humaneval", {"path": files("humaneval"), "timeout_seconds": seconds})
    assert task.score(0, completion) == score


@needs_namespaces
def test_every_canonical_solution_of_the_official_file_passes(shared_dir):
    task = build_task("humaneval", {"path": str(shared_dir / "data" / "HumanEval.jsonl.gz"), "timeout_seconds": 60})
    assert len(task) == 164
    # half of them as the bare body, half as the whole program in a fence
    answers = [
        task.rows[i]["canonical_solution"]
        if i % 2
        else f"```python\n{task.conversation(i)['messages'][-1]['content']}\n```"
        for i in range(164)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(task.execute, range(164), answers))
    failed = {task.rows[i]["task_id"]: result.error for i, result in enumerate(results) if not result.passed}
    assert failed == {}
