from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest

from nanoworks.engine import Engine, SamplingParams
from nanoworks.serve.session import ChatSession
from nanoworks.serve.terminal import Terminal


def talk(engine: Engine, lines: list[str], monkeypatch: pytest.MonkeyPatch, **params: object) -> ChatSession:
    """Feed `lines` to a terminal that reads from a pipe; what it prints is in capsys."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    session = ChatSession(engine, SamplingParams(**{"max_tokens": 8, "temperature": 0, **params}))  # type: ignore[arg-type]
    Terminal(session).run()
    return session


def test_an_answer_with_its_tool_call(
    calculating_engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(calculating_engine, ["What is 2*3?"], monkeypatch, max_tokens=20)
    out, err = capsys.readouterr()
    assert out == "=[calculator: 2*3 = 6] !\n"
    assert err == ""


def test_commands(random_engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def messages(*lines: str) -> list[tuple[str, str]]:
        session = talk(random_engine, list(lines), monkeypatch)
        every = session.conversation()["messages"]
        return [(m["role"], m["content"]) for m in every if m["role"] != "assistant"]

    assert messages("one", "two") == [("user", "one"), ("user", "two")]
    assert messages("one", "two", "/regenerate", "/r") == [("user", "one"), ("user", "two")]
    assert messages("one", "two", "/edit three") == [("user", "one"), ("user", "three")]
    assert messages("one", "/clear", "two") == [("user", "two")]
    assert messages("/system Be kind.", "one") == [("system", "Be kind."), ("user", "one")]
    assert messages("/system Be kind.", "/system -", "one") == [("user", "one")]
    assert messages("one", "/quit", "two") == [("user", "one")]
    assert messages("", "  ", "one") == [("user", "one")]
    file = tmp_path / "saved.jsonl"
    session = talk(random_engine, ["one", f"/save {file}"], monkeypatch)
    assert json.loads(file.read_text()) == session.conversation()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["/regenrate"], "did you mean 'regenerate'"),
        (["/r"], "no message yet"),
        (["/edit x"], "no message yet"),
        (["one", "/edit"], "/edit TEXT"),
        (["/save"], "/save FILE"),
        (["/save /nowhere/at/all"], "cannot write /nowhere/at/all"),
        (["x" * 300], "128"),
    ],
)
def test_a_mistake_is_explained_and_the_conversation_goes_on(
    random_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    words: str,
) -> None:
    session = talk(random_engine, [*lines, "go on"], monkeypatch)
    assert words in capsys.readouterr().err
    assert session.last_user_text == "go on"


def test_ctrl_c_stops_the_answer_and_not_the_program(
    endless_engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def write(text: str, *, dim: bool = False) -> None:
        written.append(text)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("nanoworks.serve.terminal._write", write)
    before = signal.getsignal(signal.SIGINT)
    session = talk(endless_engine, ["hi", "/system"], monkeypatch, max_tokens=15_000)
    assert 4 <= len(session.messages[-1]["content"]) < 1000
    assert "(stopped)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert endless_engine.stats().running == 0
