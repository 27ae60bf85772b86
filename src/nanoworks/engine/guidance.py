"""Structured output: says at each step which tokens may come under a grammar.

The parser is llguidance's (MIT, https://github.com/guidance-ai/llguidance). It computes a mask from the state of a
parser over bytes in tens of microseconds and precomputes nothing for a grammar, so one is ready in milliseconds, and
it bounds the work of a step and the size of a grammar. Ours is what binds it to a tokenizer, compiles off the step
loop, and sees to it that a document ends.

Guarantees: the text of a sample that ended with "stop" is a whole document of its grammar. Space between the parts of
JSON is fixed (`{"a": 1, "b": [2]}`, as json.dumps writes it), so no model can loop over blanks. A JSON document ends
before `max_tokens` cuts it, where `max_tokens` leaves room for the shortest way to the end (`GrammarState.fit`).
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nanoworks.common.errors import UserError, missing_extra
from nanoworks.engine.closing import LONGEST, START, closing, scan
from nanoworks.engine.grammar import Grammar
from nanoworks.tokenizer.tokenizer import Tokenizer

COMPILE_SECONDS = 10.0
"""A request whose grammar is not ready by then fails. The limits below stop the work itself long before."""
_CACHED = 64
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,  # the most that a hostile expression costs is half a second
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # some 40 MB
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


class GrammarCompiler:
    """Makes parsers for one tokenizer, in threads of its own, and keeps the newest. UserError without llguidance."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise missing_extra("llguidance", "structured") from None
        self._library = llguidance
        self._tokenizer = tokenizer
        self._vocabulary: Vocabulary | None = None
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="nanoworks-grammar")
        self._cache: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()
        self._lock = threading.Lock()

    def submit(self, grammar: Grammar) -> Future[Compiled]:
        """Begin to compile; the result raises UserError when `grammar` is wrong or too complex."""
        future = self._cache.pop(grammar, None) or self._pool.submit(self._compile, grammar)
        self._cache[grammar] = future
        while len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return future

    def _compile(self, grammar: Grammar) -> Compiled:
        with self._lock:
            self._vocabulary = self._vocabulary or Vocabulary(self._library, self._tokenizer)
        vocabulary = self._vocabulary
        try:
            limits = self._library.LLParserLimits(**_LIMITS)
            source = _source(self._library.LLMatcher, grammar)
            matcher = self._library.LLMatcher(vocabulary.handle, source, limits=limits, log_level=0)
            if not matcher.is_error():
                matcher.compute_bitmask()  # the first is the dearest: not in the step loop
            problem = matcher.get_error()
        except Exception as error:
            problem = str(error)
        if problem:
            # In the library's words, but for this one.
            reason = "no text can match it" if problem.startswith("NoExtension") else problem
            reason = reason.replace("<non-verbose/>", "").strip()[:500]
            raise UserError(f"the {grammar.kind} is invalid, or too complex: {reason}")
        way = closing(matcher, vocabulary.spell, START, LONGEST) if grammar.is_json else None
        return Compiled(matcher, vocabulary, 0 if way is None else 32 + 2 * len(way))


class Compiling:
    """Requests that wait for their grammars. The library is loaded when the first one comes."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._compiler: GrammarCompiler | None = None
        self._waiting: dict[str, tuple[Future[Compiled], float]] = {}  # and since when

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def check(self) -> None:
        """Raise UserError where no grammar can be compiled."""
        if self._tokenizer is None:
            raise UserError("a grammar needs a tokenizer")
        self._compiler = self._compiler or GrammarCompiler(self._tokenizer)

    def add(self, request_id: str, grammar: Grammar) -> None:
        assert self._compiler is not None, "check() comes first"
        self._waiting[request_id] = self._compiler.submit(grammar), time.monotonic()

    def drop(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)

    def take(self, *, wait: bool) -> list[tuple[str, Compiled | str]]:
        """Return the requests that need not wait any more, each with its grammar or what is wrong with that; `wait`
        for one at most a moment."""
        if wait:
            futures.wait([future for future, _ in self._waiting.values()], 0.05, futures.FIRST_COMPLETED)
        ready: list[tuple[str, Compiled | str]] = []
        for request_id, (future, since) in list(self._waiting.items()):
            if future.done():
                error = future.exception()
                ready.append((request_id, future.result() if error is None else str(error)))
            elif time.monotonic() - since > COMPILE_SECONDS:
                ready.append((request_id, f"the grammar was not ready after {COMPILE_SECONDS:.0f} s; simplify it"))
        for request_id, _ in ready:
            self.drop(request_id)
        return ready


def _source(library: Any, grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            return library.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_STYLE)
        case "json_schema":
            return library.grammar_from_json_schema(grammar.text, overrides=_JSON_STYLE)
        case "regex":
            return library.grammar_from_regex(grammar.text)
        case "lark":
            return library.grammar_from_lark(grammar.text)
        case "choice":
            return library.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(grammar.text))))


class Vocabulary:
    """The bytes of every token, in the parser's form and ours."""

    def __init__(self, library: Any, tokenizer: Tokenizer) -> None:
        special = set(tokenizer.special_tokens.values()) | set(tokenizer.stop_ids)
        tokens = tokenizer.backend.tokens
        self.tokens = [b"" if i in special else tokens.get(i, b"") for i in range(tokenizer.vocab_size)]
        self._ids = {token: i for i, token in reversed(list(enumerate(self.tokens))) if token}
        self._longest = max(map(len, self._ids))
        self.spell = lru_cache(4096)(self._spell)
        """Return tokens whose bytes are a text, the longest first; None if the vocabulary lacks a byte."""
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(special)
        named = [b"\xff<%d>" % i if i in special else token for i, token in enumerate(self.tokens)]
        self.handle = library.LLTokenizer(
            library.TokenizerWrapper(_Wrapped(self, named)), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eos_id
        )

    def _spell(self, text: bytes) -> list[int] | None:
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                return None
            ids.append(self._ids[text[at:end]])
            at = end
        return ids


class _Wrapped:
    """What llguidance asks of a tokenizer; a 0xFF before its name marks a special token."""

    def __init__(self, vocabulary: Vocabulary, tokens: list[bytes]) -> None:
        self.eos_token_id, self.bos_token_id = vocabulary.eos_token_id, vocabulary.bos_token_id
        self.tokens, self.special_token_ids = tokens, vocabulary.special_token_ids
        self._spell = vocabulary.spell

    def __call__(self, text: bytes) -> list[int]:
        return self._spell(text) or []


@dataclass(frozen=True)
class Compiled:
    """A grammar ready for one tokenizer.

    Attributes:
        matcher: a parser at the start, to be copied.
        horizon: remaining tokens from which on the way to the end is watched; 0 never.
    """

    matcher: Any
    vocabulary: Vocabulary
    horizon: int

    def start(self, ends: Iterable[int]) -> GrammarState:
        """Return the state of a new sample, whose output `ends` end."""
        return GrammarState(self.matcher.deep_copy(), self, ends)


class GrammarError(Exception):
    """A sample cannot go on under its grammar; the text says why."""


class GrammarState:
    """Where one sample is in its grammar.

    Args:
        matcher: a parser at the start, this sample's own.
        compiled: what it was made from.
        ends: tokens that end the output; they are allowed where a document may end, and nowhere else.
    """

    def __init__(self, matcher: Any, compiled: Compiled, ends: Iterable[int]) -> None:
        self._matcher, self._compiled = matcher, compiled
        self._ends = sorted(ends)
        self._end_words, self._end_bits = _bits(self._ends)
        self._length = 0
        self._scan = START

    def follow(self, output: Sequence[int]) -> None:
        """Take in what is new in `output`, the tokens of the sample so far."""
        new = list(output[self._length :])
        self._length += len(new)
        if new and new[-1] in self._ends:
            new.pop()
        self._scan = scan(self._scan, self._bytes(new))
        if new:
            self._matcher.consume_tokens(new)

    @property
    def finished(self) -> bool:
        """Whether the document is whole and nothing may follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allow(self, mask: np.ndarray, drafted: Sequence[int], *, end: bool) -> None:
        """Write the tokens that may follow `drafted` into `mask`, one bit each (int32, the lowest first).

        Where `drafted` breaks the grammar itself all are allowed: such a row is never used. `end`: whether the output
        may end now if the document is whole; it may in any case if nothing else is possible.
        """
        taken = self._advance(drafted)
        if taken is None:
            mask[:] = -1
            return
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        whole = matcher.is_accepting()
        error = matcher.get_error() if matcher.is_error() else ""
        matcher.rollback(taken)
        if error:
            raise GrammarError(f"the grammar is too complex or failed: {error}")
        mask[self._end_words] &= ~self._end_bits
        if whole and (end or not mask.any()):
            mask[self._end_words] |= self._end_bits
        if not mask.any():
            raise GrammarError("the grammar allows no token of this vocabulary here")

    def fit(self, token: int, drafted: Sequence[int], remaining: int) -> int:
        """Return `token`, or the first token of the way to the end if `token` would make that longer than what is
        left: `remaining` tokens, this one included. Only for JSON, and only near the limit, where it matters."""
        if remaining > self._compiled.horizon or token in self._ends:
            return token
        taken = self._advance(drafted)
        if taken is None:
            return token
        before = scan(self._scan, self._bytes(drafted))
        matcher, spell = self._matcher, self._compiled.vocabulary.spell
        try:
            if matcher.try_consume_tokens([token]):
                way = closing(matcher, spell, scan(before, self._bytes([token])), remaining - 1)
                matcher.rollback(1)
                if way is not None:
                    return token
            way = closing(matcher, spell, before, remaining)
            if way:
                return way[0]
            return self._ends[0] if way is not None and self._ends else token
        finally:
            matcher.rollback(taken)

    def _advance(self, drafted: Sequence[int]) -> int | None:
        """Take in drafted tokens for the moment; return how many to roll back, None (and nothing taken) where they
        break the grammar."""
        taken = self._matcher.try_consume_tokens(list(drafted)) if drafted else 0
        if taken < len(drafted) or any(token in self._ends for token in drafted):
            self._matcher.rollback(taken)
            return None
        return taken

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._compiled.vocabulary.tokens[token] for token in tokens)


def _bits(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return which words of a mask the bits of `ids` are in, and these bits of each (int32)."""
    words: dict[int, int] = {}
    for i in ids:
        words[i // 32] = words.get(i // 32, 0) | 1 << i % 32
    return np.array(list(words), dtype=np.int64), np.array(list(words.values()), dtype=np.uint32).view(np.int32)
