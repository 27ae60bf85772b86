from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.engine import Engine, SamplingParams
from nanoworks.serve.parts import PartSplitter
from nanoworks.serve.session import ChatSession, TextSession

PARTS = [
    {"type": "text", "text": "="},
    {"type": "python", "text": "2*3"},
    {"type": "python_output", "text": "6"},
    {"type": "text", "text": "!"},
]


def text(session: ChatSession, message: str) -> str:
    return "".join(piece["text"] for piece in session.ask(message))


def test_history_keeps_the_parts_of_an_answer(calculating_engine: Engine) -> None:
    session = ChatSession(calculating_engine, SamplingParams(temperature=0), system="Be kind.")
    assert text(session, "hi") == "=2*36!"
    assert session.finish_reason == "stop"
    assert session.conversation() == {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": PARTS},
        ]
    }
    assert session.last_user_text == "hi"
    session.drop_last_exchange()
    assert session.messages == []
    assert session.last_user_text is None


def test_a_stopped_answer_keeps_what_was_said(endless_engine: Engine) -> None:
    session = ChatSession(endless_engine, SamplingParams(max_tokens=10_000, temperature=0))
    answer = session.ask("hi")
    assert [next(answer)["text"] for _ in range(3)] == ["a", "b", "a"]
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": "aba"}
    assert session.finish_reason is None
    assert endless_engine.stats().running == 0


def test_a_conversation_that_is_too_long_is_refused_and_left_as_it_was(random_engine: Engine) -> None:
    session = ChatSession(random_engine, SamplingParams(max_tokens=4))
    text(session, "hi")
    before = list(session.messages)
    with pytest.raises(UserError, match="128"):
        text(session, "x" * 300)
    assert session.messages == before


def test_a_seed_repeats_the_conversation_but_not_the_answer(random_engine: Engine) -> None:
    def two_answers() -> list[str]:
        session = ChatSession(random_engine, SamplingParams(max_tokens=8, seed=7))
        answers = []
        for _ in range(2):
            answers.append(text(session, "hi"))
            session.drop_last_exchange()
        return answers

    first, second = two_answers()
    assert first != second
    assert two_answers() == [first, second]


def test_a_base_model_continues_raw_text(random_engine: Engine) -> None:
    session = TextSession(random_engine, SamplingParams(max_tokens=8, temperature=0))
    prompt = random_engine.tokenizer.encode("Once", bos=True)
    [[expected]] = random_engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0))
    shown = "".join(piece["text"] for piece in PartSplitter().feed(expected.text))
    assert text(session, "Once") == shown
    assert text(session, "Once") == shown
