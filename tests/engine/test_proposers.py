"""Proposers on their own, and verified by a plain loop without a cache: the output is that of plain greedy decoding."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.checkpoint.medusa import SavedHeads, save_heads
from nanoworks.common.errors import UserError
from nanoworks.engine import EngineConfig, Request, SamplingParams
from nanoworks.engine.adjust import Row
from nanoworks.engine.proposers import Proposer
from nanoworks.engine.proposers.draft import DraftModelProposer
from nanoworks.engine.proposers.medusa import MedusaProposer, best_tree
from nanoworks.engine.proposers.ngram import Index, NgramProposer
from nanoworks.engine.sampler import sample, sample_seed
from nanoworks.engine.sequence import Draft, Sequence
from nanoworks.engine.speculation import Speculator, Verified
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.medusa import MedusaHeads
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer
from tests.engine.conftest import build

LENGTH = 24
PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], [7, 8, 9, 10, 11, 12, 13], [40], list(range(60))]


def sequence(prompt: list[int], max_tokens: int = LENGTH, temperature: float = 0.0, seed: int = 0) -> Sequence:
    request = Request(prompt, SamplingParams(temperature=temperature))
    return Sequence(
        request, 0, max_tokens=max_tokens, stop_ids=frozenset(), seed=sample_seed(seed, 0), text=None, tool=None
    )


def drafter(model: Decoder, *, num_seqs: int = 8, batch_tokens: int = 32) -> DraftModelProposer:
    return DraftModelProposer(model, vocab_size=265, max_num_seqs=num_seqs, max_batch_tokens=batch_tokens, block_size=4)


def medusa(model: Decoder, size: int = 8) -> MedusaProposer:
    heads = MedusaHeads(model.config.hidden_size, 3)
    ranks = [[0.5, 0.3, 0.1], [0.4, 0.2, 0.1], [0.3, 0.2, 0.1]]
    return MedusaProposer(SavedHeads(heads, ranks), model, size=size, vocab_size=model.config.vocab_size)


@torch.no_grad()
def forward(model: Decoder, s: Sequence, drafted: tuple[int, ...] = ()) -> tuple[int, torch.Tensor]:
    """The token that follows the known ones and `drafted`, and the hidden state it comes from."""
    tokens = torch.tensor([[*s.ids, *drafted]])
    hidden = model(tokens, DenseContext(tokens))[0, -1]
    [token] = sample(model.head(hidden)[None], [Row(s, drafted)], vocab_size=model.config.vocab_size).tokens
    return token, hidden


def decode(
    model: Decoder, speculator: Speculator | None, prompts: list[list[int]], temperature: float = 0.0
) -> tuple[list[list[int]], int]:
    """Decode all prompts at once as the engine does it, each row computed from scratch; returns the outputs and the
    number of steps after the prompts."""
    sequences = [sequence(prompt, temperature=temperature, seed=i) for i, prompt in enumerate(prompts)]
    for s in sequences:
        token, s.hidden = forward(model, s)
        s.append(token, 0.0, None)
    steps = 0
    while running := [s for s in sequences if not s.finished]:
        steps += 1
        if speculator is None:
            for s in running:
                s.append(forward(model, s)[0], 0.0, None)
            continue
        speculator.before(running)
        verified, hiddens = [], []
        for s in running:
            assert s.draft is None or len(s.draft) <= s.max_tokens - len(s.completion.token_ids) - 1
            results = [forward(model, s, path) for path in ((), *(s.draft.paths if s.draft else ()))]
            verified.append(Verified(s, s.draft, [token for token, _ in results]))
            hiddens.append([hidden for _, hidden in results])
        outcomes = speculator.after(verified, known=len(running))
        for v, hidden, (accepted, token) in zip(verified, hiddens, outcomes, strict=True):
            s = v.sequence
            s.hidden = hidden[accepted[-1] + 1 if accepted else 0]
            tokens = [v.draft.tokens[i] for i in accepted] if v.draft else []
            for new in (*tokens, token):
                assert not s.finished
                s.append(new, 0.0, None)
            if s.finished:
                speculator.release(s)
    return [s.completion.token_ids for s in sequences], steps


def always(proposer: Proposer, max_draft: int = 8) -> Speculator:
    """Drafts as much as it may at every step: on this clock drafts cost nothing and wrong ones do not matter."""
    speculator = Speculator(proposer, max_draft=max_draft, clock=lambda: 0.0)
    speculator.length.limits = lambda sequences: [max_draft] * len(sequences)  # type: ignore[method-assign]
    return speculator


@pytest.fixture(scope="module")
def expected(model: Decoder, greedy: Callable[[Decoder, list[int], int], list[int]]) -> list[list[int]]:
    return [greedy(model, prompt, LENGTH) for prompt in PROMPTS]


KINDS: dict[str, Callable[[Decoder], Proposer]] = {
    "ngram": lambda model: NgramProposer(2),
    "draft itself": drafter,
    "draft another": lambda model: drafter(build(hidden_size=48)),
    "draft in little memory": lambda model: drafter(model, num_seqs=1),
    "draft of a short context": lambda model: drafter(build(context=40)),
    "medusa": medusa,
}


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_plain_decoding(model: Decoder, expected: list[list[int]], kind: str) -> None:
    speculator = always(KINDS[kind](model))
    outputs, steps = decode(model, speculator, PROMPTS)
    assert outputs == expected
    assert speculator.drafted > 0
    if kind == "draft itself":
        assert speculator.accepted == speculator.drafted
        assert steps == -(-(LENGTH - 1) // 9)
    proposer = speculator.proposer
    if isinstance(proposer, DraftModelProposer):
        assert proposer.num_used_blocks == 0


@pytest.mark.parametrize("kind", ["ngram", "draft itself", "medusa"])
def test_adaptive_output_is_that_of_plain_decoding(model: Decoder, expected: list[list[int]], kind: str) -> None:
    outputs, _ = decode(model, Speculator(KINDS[kind](model), max_draft=4), PROMPTS)
    assert outputs == expected


@pytest.mark.parametrize("kind", ["ngram", "draft itself", "draft another", "medusa"])
def test_sampled_output_with_a_seed_is_that_of_plain_decoding(model: Decoder, kind: str) -> None:
    plain, _ = decode(model, None, PROMPTS, temperature=0.5)
    speculator = always(KINDS[kind](model))
    assert decode(model, speculator, PROMPTS, temperature=0.5)[0] == plain
    assert speculator.accepted > 0 or kind != "draft itself"


# ------------------------------------------------------------------------------------------------------ n-grams


def longest_match(ids: list[int], n: int) -> int:
    """Tokens of the longest earlier occurrence of the end of `ids`, by looking everywhere."""
    return max((k for k in range(n, len(ids)) for e in range(k, len(ids)) if ids[e - k : e] == ids[-k:]), default=0)


def test_ngram_finds_the_longest_match_as_the_text_grows() -> None:
    rng = random.Random(0)
    for n in (1, 2, 3):
        ids: list[int] = []
        index = Index(n)
        found = 0
        for _ in range(120):
            ids += [rng.randrange(4) for _ in range(rng.choice([1, 1, 1, 3]))]
            if rng.random() < 0.2:
                continue  # a step without a look-up
            proposed = index.continuation(ids, 5)
            wanted = longest_match(ids, n)
            assert bool(proposed) == bool(wanted)
            if not proposed:
                continue
            found += 1
            assert len(proposed) == 5
            # It follows a place where at least as much matches as within the newest places of the n-gram.
            ends = [e for e in range(n, len(ids)) if ids[e - n : e] == ids[-n:]][-16:]
            best = max(_common_end(ids, e) for e in ends)
            assert any(_common_end(ids, e) == best and _follows(ids, e, proposed) for e in ends)
        assert found > 20


def _common_end(ids: list[int], end: int) -> int:
    return next((k for k in range(min(end, 32)) if ids[end - 1 - k] != ids[-1 - k]), min(end, 32))


def _follows(ids: list[int], end: int, proposed: list[int]) -> bool:
    text = ids[end:]
    return proposed == [text[i % len(text)] for i in range(len(proposed))]


def test_ngram_goes_on_with_a_text_that_repeats_itself() -> None:
    s = sequence([5, 6, 7, 5, 6, 7, 5, 6, 7])
    [draft] = NgramProposer(3).propose([s], [7])
    assert draft == Draft([5, 6, 7, 5, 6, 7, 5], [-1, 0, 1, 2, 3, 4, 5])
    assert NgramProposer(3).propose([sequence([1, 2, 3, 4]), s], [4, 0]) == [None, None]


def test_ngram_keeps_no_sequence_that_ended() -> None:
    proposer, s = NgramProposer(), sequence([1, 2, 3])
    proposer.propose([s], [4])
    proposer.release(s)
    proposer.release(s)
    assert not proposer._indexes


# -------------------------------------------------------------------------------------------------- a draft model


def test_draft_model_follows_what_becomes_of_its_sequences(
    model: Decoder, greedy: Callable[[Decoder, list[int], int], list[int]]
) -> None:
    """Whatever was accepted, forced, skipped or pushed out, the proposals are the model's greedy continuations."""
    rng = random.Random(1)
    proposer = drafter(model, num_seqs=1, batch_tokens=7)  # one context's blocks for four sequences
    sequences = [sequence(prompt, 100) for prompt in PROMPTS]
    refused = 0
    for _ in range(25):
        chosen = rng.sample(sequences, rng.randint(1, 4))
        limits = [rng.randint(0, 5) for _ in chosen]
        drafts = proposer.propose(chosen, limits)
        for s, limit, draft in zip(chosen, limits, drafts, strict=True):
            proposed = [] if draft is None else draft.tokens
            refused += limit > len(proposed)
            assert proposed == greedy(model, s.ids, len(proposed))
            assert len(proposed) in (0, limit)
            accepted = rng.randint(0, len(proposed))
            s.ids += proposed[:accepted] + [rng.randrange(265) for _ in range(rng.choice([0, 1, 1, 4]))]
            if len(s.ids) > 110:
                proposer.release(s)
                sequences[sequences.index(s)] = sequence(rng.choice(PROMPTS), 100)
    for s in sequences:
        proposer.release(s)
    assert proposer.num_used_blocks == 0
    assert refused  # memory was really short


def test_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    def with_merge(merge: bytes) -> Tokenizer:
        return Tokenizer.from_ranks({**{bytes([i]): i for i in range(256)}, merge: 256}, SPLIT_PATTERN)

    model, tokenizer = build(vocab_size=266), with_merge(b"ab")
    for name, own in (("swapped", with_merge(b"cd")), ("bare", None), ("good", tokenizer)):
        with save_checkpoint(tmp_path / name, build(vocab_size=266 if own else 300), own, metadata={}):
            pass

    def config(name: str) -> EngineConfig:
        return EngineConfig(block_size=8, speculate="draft", draft_model=str(tmp_path / name))

    with pytest.raises(UserError, match=r"swapped.*266 tokens.*the model.*266 tokens.*different vocabularies"):
        Speculator.of(config("swapped"), model, tokenizer)
    with pytest.raises(UserError, match=r"bare.*300 tokens.*266 tokens"):
        Speculator.of(config("bare"), model, None)
    assert Speculator.of(config("good"), model, tokenizer)
    with pytest.raises(UserError, match="needs a draft model"):
        Speculator.of(EngineConfig(speculate="draft"), model, tokenizer)
    assert Speculator.of(EngineConfig(), model, tokenizer) is None


# --------------------------------------------------------------------------------------------------------- Medusa


def test_best_tree_is_the_best_of_every_size() -> None:
    rng = random.Random(2)
    for _ in range(20):
        ranks = [[rng.random() for _ in range(3)] for _ in range(3)]
        paths = [p for depth in (1, 2, 3) for p in itertools.product(range(3), repeat=depth)]
        worth = sorted((_worth(ranks, p) for p in paths), reverse=True)
        tree = best_tree(ranks, 12)
        assert all(parent < i for i, (parent, _, _) in enumerate(tree))
        made = [_path_of(tree, i) for i in range(len(tree))]
        assert len(set(made)) == 12
        for n in range(1, 13):
            assert sum(_worth(ranks, p) for p in made[:n]) == pytest.approx(sum(worth[:n]))
    assert len(best_tree([[1.0, 0.5]], 10)) == 2


def _worth(ranks: list[list[float]], path: tuple[int, ...]) -> float:
    product = 1.0
    for head, rank in enumerate(path):
        product *= ranks[head][rank]
    return product


def _path_of(tree: list[tuple[int, int, int]], node: int) -> tuple[int, ...]:
    parent, head, rank = tree[node]
    assert head == (0 if parent < 0 else tree[parent][1] + 1)
    return (*(_path_of(tree, parent) if parent >= 0 else ()), rank)


def test_medusa_tree_holds_the_likeliest_guesses_of_each_head(model: Decoder) -> None:
    proposer = medusa(model, size=9)
    with torch.no_grad():
        for p in proposer.heads.parameters():
            p.normal_(std=0.3)
    s = sequence([1, 2, 3])
    _, s.hidden = forward(model, s)
    with torch.no_grad():
        best = proposer.heads.logits(s.hidden[None], model.head)[0].topk(3).indices
    [draft, cut, none] = proposer.propose([s, s, sequence([1])], [9, 4, 5])
    assert none is None  # nothing was sampled for it yet
    assert draft is not None
    assert cut == draft.first(4)
    for i, (_, head, rank) in enumerate(proposer.tree):
        assert draft.tokens[i] == int(best[head, rank])
        assert draft.depths[i] == head


def test_medusa_is_read_from_its_run(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    with save_checkpoint(tmp_path / "run", model, tokenizer, metadata={}) as scratch:
        save_heads(scratch, MedusaHeads(32, 2), model, ranks=[])
    config = EngineConfig(speculate="medusa", draft_model=str(tmp_path / "run"), max_draft=5)
    speculator = Speculator.of(config, model, tokenizer)
    assert speculator is not None
    assert speculator.needs_hidden
    assert isinstance(speculator.proposer, MedusaProposer)
    assert len(speculator.proposer.tree) == 5
