from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.engine import Completion, Delta, Engine, EngineConfig, Request, SamplingParams
from nanoworks.models import Decoder
from nanoworks.nn import kernels
from nanoworks.nn.kernel_context import KernelCache
from nanoworks.tokenizer import Tokenizer

Greedy = Callable[[Decoder, list[int], int], list[int]]
Logprobs = Callable[[Decoder, list[int]], torch.Tensor]

PROMPTS = [[1, 2, 3], list(range(40)), [200], [7, 7, 7, 7, 7, 7, 7, 7], list(range(100, 117))]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return not engine.has_work and stats.blocks_used == stats.running == stats.waiting == 0


def read(deltas: Iterator[Delta]) -> tuple[list[int], str, str | None]:
    ids, text, reason = [], "", None
    for delta in deltas:
        ids += delta.token_ids
        text += delta.text
        reason = delta.finish_reason
    return ids, text, reason


def write(model: Decoder, answers: dict[int, int]) -> None:
    """Make the model answer by a table: after token a comes token b, nothing else matters."""
    size = model.config.hidden_size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        codes = torch.randn(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
        model.embed_tokens.weight.copy_(codes)
        for norm in (m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.ndim == 1):
            norm.weight.fill_(1)
        for before, after in answers.items():
            model.head.lm_head.weight[after] += codes[before]


# ------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", ["llama", "nanochat"])
@pytest.mark.parametrize("max_batch_tokens", [1, 7, 2048])
def test_greedy_is_that_of_the_dense_model(
    family: str, max_batch_tokens: int, new_model: Callable[..., Decoder], greedy: Greedy, tokenizer: Tokenizer
) -> None:
    model = new_model(family)
    engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=max_batch_tokens, block_size=4, tools=False))
    found = engine.generate(PROMPTS, GREEDY)
    for prompt, [completion] in zip(PROMPTS, found, strict=True):
        assert completion.token_ids == greedy(model, prompt, 20)
        assert completion.finish_reason == "length"
        assert completion.mask == [1] * 20
        assert completion.text == tokenizer.decode(completion.token_ids)
    assert idle(engine)


def test_a_tiny_pool_preempts_and_gives_the_same_tokens(model: Decoder, tokenizer: Tokenizer) -> None:
    params = [replace(GREEDY, temperature=t, seed=i, n=1 + i % 3) for i, t in enumerate([0, 1.0, 0.8, 0, 1.0])]
    roomy = Engine(model, tokenizer, EngineConfig(block_size=4))
    tight = Engine(model, tokenizer, EngineConfig(block_size=4, num_blocks=16, max_batch_tokens=20))
    expected = roomy.generate(PROMPTS, params)
    found = tight.generate(PROMPTS, params)
    assert roomy.stats().preemptions == 0
    assert tight.stats().preemptions > 3
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]
    assert [[c.text for c in group] for group in found] == [[c.text for c in group] for group in expected]
    assert idle(tight)


def test_logprobs_are_those_of_the_dense_model(model: Decoder, tokenizer: Tokenizer, logprobs: Logprobs) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=1, logprobs=3, prompt_logprobs=True, ignore_eos=True)
    [[completion]] = Engine(model, tokenizer, EngineConfig(max_batch_tokens=16)).generate([PROMPTS[1]], params)
    ids = PROMPTS[1] + completion.token_ids
    dense = logprobs(model, ids)
    expected = [float(dense[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    assert completion.prompt_logprobs + completion.logprobs == pytest.approx(expected, abs=1e-4)
    for i, top in enumerate(completion.top_logprobs):
        values, tokens = dense[len(PROMPTS[1]) - 1 + i].topk(3)
        assert [token for token, _ in top] == tokens.tolist()
        assert [p for _, p in top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_seed_gives_the_same_sample_alone_and_in_company(model: Decoder, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=15, seed=5, ignore_eos=True, n=3)
    alone = [Engine(model, tokenizer).generate([p], params)[0] for p in PROMPTS]
    together = Engine(model, tokenizer).generate(PROMPTS, params)
    assert [[c.token_ids for c in group] for group in together] == [[c.token_ids for c in group] for group in alone]
    other = Engine(model, tokenizer).generate(PROMPTS, replace(params, seed=6))
    assert [g[0].token_ids for g in other] != [g[0].token_ids for g in together]


def test_each_sample_draws_its_own_first_token(model: Decoder, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=1, temperature=3.0, seed=0, n=40)
    [group] = Engine(model, tokenizer).generate([[1, 2, 3]], params)
    assert len({c.token_ids[0] for c in group}) > 10


def test_samples_read_their_prompt_once(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    engine.generate([PROMPTS[1]], SamplingParams(max_tokens=4, n=8, ignore_eos=True))
    assert engine.stats().tokens_computed == 40 + 8 * 3


def test_more_samples_than_seats(model: Decoder, tokenizer: Tokenizer) -> None:
    params = SamplingParams(max_tokens=5, seed=2, n=9, ignore_eos=True)
    [expected] = Engine(model, tokenizer).generate([[1, 2]], params)
    [found] = Engine(model, tokenizer, EngineConfig(max_num_seqs=2)).generate([[1, 2]], params)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_weights_may_change_between_jobs(
    new_model: Callable[..., Decoder], tokenizer: Tokenizer, greedy: Greedy
) -> None:
    model = new_model()
    engine = Engine(model, tokenizer)
    before = engine.generate([[1, 2, 3]], GREEDY)[0][0].token_ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    after = engine.generate([[1, 2, 3]], GREEDY)[0][0].token_ids
    assert after == greedy(model, [1, 2, 3], 20) != before


def test_bfloat16(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    [[completion]] = Engine(new_model().bfloat16(), tokenizer).generate([[1, 2, 3]], GREEDY)
    assert len(completion.token_ids) == 20


def test_progress_is_told_of_every_sample(model: Decoder, tokenizer: Tokenizer) -> None:
    calls: list[tuple[int, int]] = []
    Engine(model, tokenizer).generate(
        PROMPTS, replace(GREEDY, n=2, max_tokens=3), progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (10, 10)
    assert calls == sorted(calls)


# ------------------------------------------------------------------------------------------------- ends


def test_stop_strings_cut_the_text_across_tokens(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    model = new_model()
    write(model, {ord(a): ord(b) for a, b in zip("abcdefg", "bcdefgh", strict=True)})
    engine = Engine(model, tokenizer)
    params = SamplingParams(max_tokens=20, temperature=0, stop=("ef", "xyz"))
    [[completion]] = engine.generate([list(b"a")], params)
    assert (completion.text, completion.finish_reason) == ("bcd", "stop")
    assert completion.token_ids == list(b"bcdef")
    deltas = list(engine.stream(list(b"a"), params))
    assert [d.text for d in deltas] == ["b", "c", "d", "", ""]


def test_held_back_text_comes_when_the_length_ends_it(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    model = new_model()
    write(model, {ord(a): ord(b) for a, b in zip("abcdefg", "bcdefgh", strict=True)})
    params = SamplingParams(max_tokens=4, temperature=0, stop=("ef",))
    assert read(Engine(model, tokenizer).stream(list(b"a"), params)) == (list(b"bcde"), "bcde", "length")


def test_stop_ids_and_the_end_of_a_turn(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    end = tokenizer.special_tokens["<|assistant_end|>"]
    model = new_model()
    write(model, {ord("a"): ord("b"), ord("b"): end, end: ord("c"), ord("c"): ord("a")})
    engine = Engine(model, tokenizer)
    params = SamplingParams(max_tokens=6, temperature=0)
    [[completion]] = engine.generate([list(b"a")], params)
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([ord("b"), end], "b", "stop")
    [[completion]] = engine.generate([list(b"a")], replace(params, ignore_eos=True))
    assert completion.text == "b<|assistant_end|>cab<|assistant_end|>"
    [[completion]] = engine.generate([list(b"a")], replace(params, ignore_eos=True, stop_ids=(ord("c"),)))
    assert (completion.text, completion.finish_reason) == ("b<|assistant_end|>", "stop")


def test_a_stream_never_shows_half_a_character(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    model = new_model()
    chain = [ord("a"), *"€".encode(), ord("b"), *"é".encode()[:1]]
    write(model, dict(pairwise(chain)))
    params = SamplingParams(max_tokens=5, temperature=0)
    deltas = list(Engine(model, tokenizer).stream([ord("a")], params))
    assert [d.text for d in deltas] == ["", "", "€", "b", "�"]


def test_the_calculator_forces_its_result(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    special = tokenizer.special_tokens
    chain = [ord("a"), special["<|python_start|>"], *b"6*7", special["<|python_end|>"]]
    model = new_model()
    answers = dict(pairwise(chain))
    write(model, answers | {special["<|output_end|>"]: ord("!"), ord("!"): special["<|assistant_end|>"]})
    engine = Engine(model, tokenizer)
    [[completion]] = engine.generate([[ord("a")]], SamplingParams(max_tokens=50, temperature=0, logprobs=1))
    assert completion.text == "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>!"
    assert completion.mask == [1] * 5 + [0] * 4 + [1] * 2
    assert completion.logprobs[5:9] == [0.0] * 4
    assert [len(top) for top in completion.top_logprobs] == completion.mask
    [[completion]] = engine.generate([[ord("a")]], SamplingParams(max_tokens=7, temperature=0))
    assert completion.text.endswith("<|output_start|>4")  # forced tokens count, and end at the limit
    assert len(completion.token_ids) == 7
    plain = Engine(model, tokenizer, EngineConfig(tools=False))
    [[completion]] = plain.generate([[ord("a")]], SamplingParams(max_tokens=6, temperature=0))
    assert completion.mask == [1] * 6


def test_cancel(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=2))
    requests = [Request(prompt, replace(GREEDY, n=2)) for prompt in PROMPTS]
    for request in requests:
        engine.add(request)
    engine.step()
    for request in requests:  # of which some run, some wait, and some have not forked
        engine.cancel(request.request_id)
        engine.cancel(request.request_id)
    ends = [d for d in engine.step() if d.finish_reason]
    assert [(d.request_id, d.index, d.finish_reason) for d in ends] == [
        (request.request_id, index, "cancelled") for request in requests for index in range(2)
    ]
    assert idle(engine)
    engine.cancel("nobody")


def test_closing_a_stream_cancels_it(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    stream = engine.stream([1, 2, 3], GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    engine.step()
    assert idle(engine)


def test_streams_may_be_read_in_turns(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    expected = engine.generate([[1], [2]], GREEDY)
    streams = [engine.stream([1], GREEDY), engine.stream([2], GREEDY)]
    texts = ["", ""]
    for pair in zip(*streams, strict=True):
        texts = [text + delta.text for text, delta in zip(texts, pair, strict=True)]
    assert texts == [group[0].text for group in expected]
    assert idle(engine)


def test_not_a_number_ends_its_own_request_only(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    model = new_model()
    expected = Engine(model, tokenizer).generate([[1, 2, 3], [4, 5]], GREEDY)
    with torch.no_grad():
        model.embed_tokens.weight[250] = math.nan
    engine = Engine(model, tokenizer, EngineConfig(block_size=4, num_blocks=24, max_batch_tokens=16))
    poisoned = [9, 250, *range(30)]  # read in chunks, so its NaN reach the cache before its logits show them
    first, broken, second = engine.generate([[1, 2, 3], poisoned, [4, 5]], [GREEDY, replace(GREEDY, n=2), GREEDY])
    assert [c.finish_reason for c in broken] == ["error", "error"]
    assert [c.token_ids for c in broken] == [[], []]
    assert [g[0].token_ids for g in (first, second)] == [g[0].token_ids for g in expected]
    # Its blocks are used again, and do no harm.
    again = engine.generate([[1, 2, 3], [4, 5]], GREEDY)
    assert [g[0].token_ids for g in again] == [g[0].token_ids for g in expected]
    assert idle(engine)
    [likelihood] = engine.loglikelihood([(poisoned, [1, 2])])
    assert math.isnan(likelihood.sum)
    # The scores show it before the prompt is through, so the second sample never came into being.
    [group] = engine.generate([poisoned], replace(GREEDY, prompt_logprobs=True, n=2))
    assert [c.finish_reason for c in group] == ["error", "error"]
    assert idle(engine)


def test_a_model_that_raises_leaves_a_clean_engine(
    new_model: Callable[..., Decoder], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model()
    engine = Engine(model, tokenizer)
    expected = engine.generate([[1, 2]], GREEDY)
    stream = engine.stream([1, 2, 3], GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner.model, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([[1, 2]] * 3, replace(GREEDY, n=2))
    assert read(stream)[2] == "error"  # what it had in the cache may be incomplete
    assert engine.generate([[1, 2]], GREEDY) == expected
    assert idle(engine)


# ------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("max_batch_tokens", [3, 2048])
def test_loglikelihood_is_that_of_the_dense_model(
    max_batch_tokens: int, model: Decoder, tokenizer: Tokenizer, logprobs: Logprobs, greedy: Greedy
) -> None:
    engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=max_batch_tokens, block_size=4))
    contexts = [[1, 2, 3], list(range(30)), [9]]
    pairs = [(c, greedy(model, c, 3)) for c in contexts]
    pairs += [(c, k) for c in contexts for k in ([5], [6], [5, 6, 7, 8, 9], [])]
    pairs += [(c, [5, *greedy(model, [*c, 5], 1)]) for c in contexts]  # the last token is the likeliest, the first not
    for (context, continuation), found in zip(pairs, engine.loglikelihood(pairs), strict=True):
        dense = logprobs(model, [*context, *continuation])[len(context) - 1 :]
        expected = [float(dense[i, token]) for i, token in enumerate(continuation)]
        assert found.tokens == pytest.approx(expected, abs=1e-4)
        assert found.sum == pytest.approx(sum(expected), abs=1e-4)
        assert found.greedy is (continuation == greedy(model, context, len(continuation)))
    assert idle(engine)


def test_loglikelihood_in_a_tiny_pool(model: Decoder, tokenizer: Tokenizer) -> None:
    pairs = [(list(range(i, i + 20)), [i + j, 3, 4, 5][: 1 + j]) for i in range(6) for j in range(4)]
    expected = Engine(model, tokenizer).loglikelihood(pairs)
    tight = Engine(model, tokenizer, EngineConfig(block_size=4, num_blocks=7, max_batch_tokens=16))
    for a, b in zip(tight.loglikelihood(pairs), expected, strict=True):
        assert a.tokens == pytest.approx(b.tokens, abs=1e-4)
    assert idle(tight)


def test_a_shared_context_is_computed_once(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    context = list(range(50))
    engine.loglikelihood([(context, [letter]) for letter in range(4)])
    assert engine.stats().tokens_computed == 50  # one row scores all four letters


def test_prompt_logprobs_without_generation(model: Decoder, tokenizer: Tokenizer, logprobs: Logprobs) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=True)
    [[completion], [single]] = Engine(model, tokenizer).generate([[4, 5, 6, 7], [4]], params)
    dense = logprobs(model, [4, 5, 6, 7])
    assert completion.prompt_logprobs == pytest.approx([float(dense[i, i + 5]) for i in range(3)], abs=1e-4)
    assert (completion.token_ids, completion.finish_reason) == ([], "length")
    assert single == Completion(finish_reason="length")


# ------------------------------------------------------------------------------------------------- limits


def test_max_tokens_zero(model: Decoder, tokenizer: Tokenizer) -> None:
    assert Engine(model, tokenizer).generate([[1, 2]], SamplingParams(max_tokens=0)) == [
        [Completion(finish_reason="length")]
    ]


def test_output_is_clipped_to_the_context(model: Decoder, tokenizer: Tokenizer, greedy: Greedy) -> None:
    prompt = [i % 256 for i in range(120)]
    [[completion]] = Engine(model, tokenizer).generate([prompt], replace(GREEDY, max_tokens=1000))
    assert completion.token_ids == greedy(model, prompt, 8)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("config", "length", "numbers"),
    [
        (EngineConfig(), 128, ("128 tokens", "the context holds 128")),
        (EngineConfig(), 300, ("300 tokens", "the context holds 128")),
        (EngineConfig(num_blocks=5, block_size=4), 21, ("21 tokens", "the KV cache holds 20")),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_with_both_numbers(
    config: EngineConfig, length: int, numbers: tuple[str, str], model: Decoder, tokenizer: Tokenizer
) -> None:
    engine = Engine(model, tokenizer, config)
    for refuse in (
        lambda: engine.generate([[1], [1] * length], GREEDY),
        lambda: engine.stream([1] * length, GREEDY),
        lambda: engine.add(Request([1] * length, GREEDY)),
        lambda: engine.loglikelihood([([1] * (length - 1), [2, 3])]),
    ):
        with pytest.raises(UserError) as error:
            refuse()
        assert numbers[1] in str(error.value)
    with pytest.raises(UserError, match=numbers[0]):
        engine.check(Request([1] * length, GREEDY))
    assert idle(engine)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [([], "at least one token"), ([1, 265], "outside the model's vocabulary of 265"), ([-1], "-1")],
)
def test_bad_prompts_are_refused(prompt: list[int], reason: str, model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=reason):
        Engine(model, tokenizer).generate([prompt], GREEDY)


def test_a_request_id_is_used_once_at_a_time(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    engine.add(Request([1], GREEDY, request_id="a"))
    with pytest.raises(UserError, match="'a'"):
        engine.add(Request([1], GREEDY, request_id="a"))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"stop": ("",)},
        {"stop": "END"},
        {"logprobs": -1},
        {"n": 0},
        {"n": 2, "max_tokens": 0},
    ],
)
def test_bad_sampling_parameters_name_themselves(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_a_tokenizer_larger_than_the_model_is_refused(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="265 tokens and the model 200"):
        Engine(new_model(vocab_size=200), tokenizer)


def test_a_padded_vocabulary_is_never_sampled(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> None:
    model = new_model(vocab_size=300)
    params = SamplingParams(max_tokens=50, temperature=5.0, ignore_eos=True, n=4)
    [group] = Engine(model, tokenizer).generate([[1]], params)
    assert max(max(c.token_ids) for c in group) < 265


def test_without_a_tokenizer(model: Decoder, greedy: Greedy) -> None:
    engine = Engine(model, None)
    [[completion]] = engine.generate([[1, 2, 3]], GREEDY)
    assert (completion.token_ids, completion.text) == (greedy(model, [1, 2, 3], 20), "")
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        engine.generate([[1]], SamplingParams(stop=("x",)))


def test_the_size_of_the_cache(model: Decoder) -> None:
    def blocks(**options: object) -> int:
        return Engine(model, None, EngineConfig(**options)).stats().blocks_total  # type: ignore[arg-type]

    assert blocks(max_num_seqs=3, block_size=16) == 3 * 8
    assert blocks(num_blocks=11) == 11
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, head_dim, bytes
    assert blocks(kv_memory=1 / 1024, block_size=16) == 2**20 // (16 * per_token)
    if kernels.available():
        in_bytes = 2 * 2 * 2 * (8 + 4)  # a byte a feature, a float32 scale a head
        assert blocks(kv_memory=1 / 1024, block_size=8, kv_dtype="int8") == 2**20 // (8 * in_bytes)
        int8 = Engine(model, None, EngineConfig(kv_memory=1 / 1024, kv_dtype="int8"))
        held = int8._runner.cache
        assert isinstance(held, KernelCache)
        assert held.scales is not None
        assert held.data.nbytes + held.scales.nbytes <= 2**20 + 2 * 8 * in_bytes  # and the null block
    with pytest.raises(UserError, match="give more memory"):
        blocks(kv_memory=1e-9)
