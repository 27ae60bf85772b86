"""Structured output on models with random weights, which know no JSON at all: only the grammar makes it."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.engine import Completion, Engine, EngineConfig, SamplingParams
from nanoworks.engine.closing import LONGEST, START, closing, scan
from nanoworks.engine.grammar import MAX_TEXT, Grammar, grammar_for_tools
from nanoworks.engine.guidance import Compiled, GrammarCompiler, GrammarError
from nanoworks.models import Decoder
from nanoworks.tokenizer import Tokenizer, train_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "minItems": 1},
        "friend": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "age", "tags", "friend"],
    "additionalProperties": False,
}
CALL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
WAVE = {"type": "function", "function": {"name": "wave"}}


@pytest.fixture(scope="module")
def engine(model: Decoder, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def compiled(compiler: GrammarCompiler, grammar: Grammar) -> Compiled:
    return compiler.submit(grammar).result(timeout=30)


def generate(engine: Engine, grammar: Grammar, **params: Any) -> list[Completion]:
    given = {"max_tokens": 100, "seed": 0, "n": 8, **params}
    [completions] = engine.generate([[1, 2, 3]], SamplingParams(grammar=grammar, **given))
    return completions


def is_person(value: Any) -> bool:
    return (
        list(value) == ["name", "age", "tags", "friend"]
        and len(value["name"]) >= 2
        and isinstance(value["age"], int)
        and value["age"] >= 0
        and bool(value["tags"])
        and all(tag in ("a", "b", None) for tag in value["tags"])
        and (value["friend"] is None or is_person(value["friend"]))
    )


# -------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("max_tokens", [60, 110])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_schema_always_ends_in_a_valid_document(engine: Engine, temperature: float, max_tokens: int) -> None:
    """A string, a number and a list of any length, and a recursion: without the way to the end most would be cut."""
    for completion in generate(engine, Grammar.json_schema(PERSON), temperature=temperature, max_tokens=max_tokens):
        assert completion.finish_reason == "stop"
        assert len(completion.token_ids) <= max_tokens
        assert is_person(json.loads(completion.text))


@pytest.mark.parametrize("max_tokens", [2, 7, 50])
def test_any_object_ends_within_its_tokens(engine: Engine, max_tokens: int) -> None:
    completions = generate(engine, Grammar("json_object"), max_tokens=max_tokens, temperature=3.0, n=20)
    assert all(isinstance(json.loads(completion.text), dict) for completion in completions)
    assert {completion.finish_reason for completion in completions} == {"stop"}
    assert len({completion.text for completion in completions}) > (1 if max_tokens == 50 else 0)


def test_with_too_few_tokens_for_any_document_the_reason_is_length(engine: Engine) -> None:
    for completion in generate(engine, Grammar.json_schema(PERSON), max_tokens=20):
        assert completion.finish_reason == "length"


def test_there_is_no_free_space(engine: Engine) -> None:
    """A model that loves blanks gets only those of json.dumps, outside of strings."""
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 5}
    bias = {ord(space): 80.0 for space in " \t\r\n"}
    for completion in generate(engine, Grammar.json_schema(schema), logit_bias=bias):
        assert completion.text == json.dumps(json.loads(completion.text))


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "[a-c]{2,5}x"), "[a-c]{2,5}x"),
        (Grammar("regex", "(yes|no)+!"), "(yes|no)+!"),
        (Grammar.choice(["yes", 'a "quoted"\nline', "née", "\\d/x"]), '(yes|a "quoted"\nline|née|\\\\d/x)'),
        (Grammar("lark", 'start: "(" start ")" | "x"'), r"\(*x\)*"),
    ],
)
def test_other_grammars_hold(engine: Engine, grammar: Grammar, pattern: str) -> None:
    completions = generate(engine, grammar, max_tokens=120, n=30)
    ended = [completion.text for completion in completions if completion.finish_reason == "stop"]
    assert len(ended) >= 25
    assert all(re.fullmatch(pattern, text) for text in ended)
    assert len(set(ended)) > 1


def test_special_tokens_come_only_as_the_end(engine: Engine, tokenizer: Tokenizer) -> None:
    bias = dict.fromkeys(tokenizer.special_tokens.values(), 90.0)
    special = set(tokenizer.special_tokens.values())
    for completion in generate(engine, Grammar("regex", "a{3}b*"), logit_bias=bias):
        assert completion.text == "aaa"
        assert set(completion.token_ids[:-1]).isdisjoint(special)
        assert completion.token_ids[-1] in tokenizer.stop_ids


def test_min_tokens_puts_the_end_off_unless_nothing_else_is_possible(engine: Engine, tokenizer: Tokenizer) -> None:
    bias = {tokenizer.eos_id: 100.0}
    for completion in generate(engine, Grammar("regex", "a*"), min_tokens=9, logit_bias=bias):
        assert completion.text == "a" * 9
    for completion in generate(engine, Grammar("regex", "aaa"), min_tokens=9):
        assert (completion.text, completion.finish_reason) == ("aaa", "stop")


def test_ignore_eos_still_ends_with_a_whole_document(engine: Engine) -> None:
    for completion in generate(engine, Grammar.json_schema(PERSON), ignore_eos=True):
        assert completion.finish_reason == "stop"
        assert is_person(json.loads(completion.text))


def test_rows_with_and_without_a_grammar_share_a_step(engine: Engine) -> None:
    plain = SamplingParams(max_tokens=30, seed=3)
    guided = SamplingParams(max_tokens=60, seed=3, grammar=Grammar("json_object"))
    [[alone]] = engine.generate([[5, 6]], plain)
    [[together], [document]] = engine.generate([[5, 6], [5, 6]], [plain, guided])
    assert together == alone
    assert isinstance(json.loads(document.text), dict)


def test_a_preempted_sample_keeps_its_place_in_the_grammar(model: Decoder, tokenizer: Tokenizer) -> None:
    small = Engine(model, tokenizer, EngineConfig(block_size=4, num_blocks=40))
    params = SamplingParams(max_tokens=100, temperature=3.0, seed=0, n=3, grammar=Grammar.json_schema(PERSON))
    [completions] = small.generate([[1, 2, 3]], params)
    assert small.stats().preemptions > 0
    [expected] = Engine(model, tokenizer).generate([[1, 2, 3]], params)
    assert [c.text for c in completions] == [c.text for c in expected]
    assert all(is_person(json.loads(completion.text)) for completion in completions)


def test_a_vocabulary_of_long_tokens(new_model: Callable[..., Decoder]) -> None:
    text = json.dumps([{"name": "Ann", "age": 3, "tags": ["a"], "friend": None}] * 50)
    tokenizer = train_tokenizer([text * 20], vocab_size=400)
    engine = Engine(new_model(vocab_size=tokenizer.vocab_size), tokenizer)
    for completion in generate(engine, Grammar.json_schema(PERSON), max_tokens=60, temperature=2.0):
        assert completion.finish_reason == "stop"
        assert is_person(json.loads(completion.text))


# ------------------------------------------------------------------------------------------------ the state


@settings(deadline=None)
@given(st.data())
def test_the_mask_behind_drafts_is_that_of_plain_decoding(compiler: GrammarCompiler, data: st.DataObject) -> None:
    """Walk at random; at every point look ahead, also along tokens that break the grammar, and leave no trace."""
    start = compiled(compiler, Grammar.json_schema(PERSON))
    ends = compiler._tokenizer.stop_ids
    state, walked = start.start(ends), []
    for _ in range(data.draw(st.integers(1, 12))):
        mask = np.zeros(9, dtype=np.int32)
        state.allow(mask, (), end=True)
        for length in range(1, min(4, len(walked)) + 1):
            behind = start.start(ends)
            behind.follow(walked[:-length])
            other = np.zeros_like(mask)
            behind.allow(other, [*walked[-length:-1], 0], end=True)  # byte 0 never comes in JSON
            assert (other == -1).all()
            behind.allow(other, walked[-length:], end=True)
            assert (other == mask).all()
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        walked.append(data.draw(st.sampled_from(allowed.tolist())))
        state.follow(walked)
        if state.finished:
            break


def test_fit_does_not_depend_on_how_the_tokens_were_taken(compiler: GrammarCompiler) -> None:
    start = compiled(compiler, Grammar.json_schema(PERSON))
    text = list(b'{"name": "abcdefg", "age": 1')
    for remaining in range(1, 60):
        known, drafted = start.start([260]), start.start([260])
        known.follow(text)
        drafted.follow(text[:10])
        assert known.fit(ord("2"), (), remaining) == drafted.fit(ord("2"), text[10:], remaining)


def test_a_state_that_was_broken_says_so(compiler: GrammarCompiler) -> None:
    state = compiled(compiler, Grammar("regex", "abc")).start([260])
    state.follow([ord("x")])
    with pytest.raises(GrammarError, match="grammar"):
        state.allow(np.zeros(9, dtype=np.int32), (), end=True)
    assert not state.finished


@pytest.mark.parametrize("text", ["{", '{"a', '{"a\\', '{"a\\u00', "[[1, -", '{"x": tr', '["é', '[{"a": [{"b": 1.5e'])
def test_there_is_a_way_to_the_end_from_anywhere(compiler: GrammarCompiler, text: str) -> None:
    start = compiled(compiler, Grammar("json_schema", "{}"))
    matcher, data = start.matcher.deep_copy(), text.encode()
    data = data[:-1] if text.endswith("é") else data  # in the middle of a character
    assert matcher.consume_tokens(list(data))
    way = closing(matcher, start.vocabulary.spell, scan(START, data), LONGEST)
    assert way is not None
    json.loads(data + bytes(way))
    assert len(way) <= 8
    assert closing(matcher, start.vocabulary.spell, scan(START, data), len(way) - 1) is None


# ------------------------------------------------------------------------------------------------- bad input

DOUBLING: dict[str, Any] = {"d0": {"type": "object", "properties": {"a": {"type": "string"}}}}
for i in range(1, 40):
    DOUBLING[f"d{i}"] = {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2}

HOSTILE = {
    "doubling references": Grammar.json_schema({"$defs": DOUBLING, "$ref": "#/$defs/d39"}),
    "product of alternatives": Grammar.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in (0, 1)]} for i in range(20)]}
    ),
    "nothing but a loop": Grammar.json_schema({"$ref": "#"}),
    "a thousand required": Grammar.json_schema(
        {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}, "required": [f"p{i}" for i in range(1000)]}
    ),
    "a million characters": Grammar.json_schema({"type": "string", "minLength": 10**6}),
    "a billion items": Grammar.json_schema({"type": "array", "maxItems": 10**9}),
    "nested repetition": Grammar("regex", "((a{100}){100}){100}"),
    "nested repetition in a pattern": Grammar.json_schema({"type": "string", "pattern": "^((a{100}){100}){100}$"}),
    "exponential automaton": Grammar("regex", "(a|b)*a(a|b){30}"),
    "catastrophic backtracking": Grammar("regex", "((a*)*)*$"),
    "deep brackets": Grammar("regex", "(" * 5000 + "a" + ")" * 5000),
    "endless rule": Grammar("lark", "start: a\na: a a"),
    "ambiguous rule": Grammar("lark", 'start: a\na: a a | "x"'),
}


@pytest.mark.timeout(60)  # without bounds it would be hours
@pytest.mark.parametrize("grammar", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_grammar_costs_little_and_harms_no_other(engine: Engine, grammar: Grammar) -> None:
    """It runs as far as it can or fails by name; seconds at most, whichever."""
    hostile = SamplingParams(max_tokens=20, grammar=grammar, seed=0)
    plain = SamplingParams(max_tokens=5, seed=0, ignore_eos=True)
    [[result], [other]] = engine.generate([[1], [1]], [hostile, plain])
    assert len(other.token_ids) == 5
    assert result.finish_reason != "cancelled"
    assert (result.finish_reason == "error") == ("too complex" in result.error)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"type": "foo"}', "json_schema is invalid.*foo"),
        ("json_schema", '{"type": "string", "format": "nonsense"}', "nonsense"),
        ("json_schema", '{"not": {}}', 'Unimplemented keys: \\["not"\\]'),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', "Unsatisfiable"),
        ("json_schema", '{"$ref": "http://example.com/schema"}', "not present"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("lark", "start: nothing", "nothing"),
    ],
)
def test_a_wrong_grammar_fails_by_name(engine: Engine, kind: Any, text: str, message: str) -> None:
    [completion] = generate(engine, Grammar(kind, text), n=1)
    assert completion.finish_reason == "error"
    assert re.search(message, completion.error)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "{", "is no JSON"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_schema", "[" * 50_000, "nested too deeply"),
        ("json_schema", " " * (MAX_TEXT + 1), f"at most {MAX_TEXT}"),
        ("choice", "[]", "needs a JSON list"),
        ("choice", '["a", ""]', "none of them empty"),
        ("choice", '[{"a": 1}]', "list of strings"),
        ("nonsense", "", "kind"),
    ],
)
def test_what_is_wrong_at_sight_is_refused_at_once(kind: Any, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grammar(kind, text)


def test_a_schema_cannot_change_the_style_of_json(engine: Engine) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 3, "x-guidance": {"whitespace_flexible": True}}
    bias = {ord(" "): 80.0}
    for completion in generate(engine, Grammar.json_schema(schema), logit_bias=bias):
        assert completion.text == json.dumps(json.loads(completion.text))


def test_a_request_is_cancelled_while_its_grammar_is_compiled(engine: Engine) -> None:
    stream = engine.stream([1], SamplingParams(grammar=Grammar.json_schema({"type": "integer", "multipleOf": 99991})))
    next(engine.stream([1], SamplingParams(max_tokens=1)))
    stream.close()
    assert engine.stats().running == engine.stats().waiting == 0
    deadline = time.monotonic() + 30
    while engine.has_work and time.monotonic() < deadline:
        engine.step()
    assert not engine.has_work


def test_equal_grammars_are_compiled_once(compiler: GrammarCompiler) -> None:
    first = compiler.submit(Grammar("regex", "ab+"))
    assert compiler.submit(Grammar("regex", "ab+")) is first
    for i in range(200):
        compiler.submit(Grammar("regex", f"x{i}"))
    assert compiler.submit(Grammar("regex", "ab+")) is not first


def test_without_a_tokenizer_or_the_library_it_says_so(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(grammar=Grammar("json_object"))
    with pytest.raises(UserError, match="a grammar needs a tokenizer"):
        Engine(model, None).generate([[1]], params)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'nanoworks\[structured\]'"):
        Engine(model, tokenizer).generate([[1]], params)


# ----------------------------------------------------------------------------------------------------- tools


def test_a_named_tool_gives_the_schema_of_its_arguments(engine: Engine) -> None:
    grammar = grammar_for_tools([WAVE, CALL], {"type": "function", "function": {"name": "wave"}})
    assert grammar is not None
    assert {completion.text for completion in generate(engine, grammar)} == {"{}"}


def test_required_gives_a_call_of_any_tool(engine: Engine) -> None:
    grammar = grammar_for_tools([CALL, WAVE], "required")
    assert grammar is not None
    calls = [json.loads(completion.text) for completion in generate(engine, grammar, n=20, temperature=5.0)]
    assert {call["name"] for call in calls} == {"add", "wave"}
    assert all(list(call) == ["name", "arguments"] and isinstance(call["arguments"], dict) for call in calls)


def test_tool_choices_that_force_nothing_or_name_nothing() -> None:
    assert grammar_for_tools([CALL], "auto") is None
    assert grammar_for_tools([CALL], "none") is None
    with pytest.raises(UserError, match="names 'sub', which is not in tools: add"):
        grammar_for_tools([CALL], {"type": "function", "function": {"name": "sub"}})
    with pytest.raises(UserError, match="at least one function"):
        grammar_for_tools([], "required")
