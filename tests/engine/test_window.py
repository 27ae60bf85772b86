"""Sliding windows in the engine: bounded memory, the same tokens as without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.engine import Engine, EngineConfig, Request, SamplingParams
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext, Window

Greedy = Callable[[Decoder, list[int], int], list[int]]
Logprobs = Callable[[Decoder, list[int]], torch.Tensor]

GREEDY = SamplingParams(max_tokens=60, temperature=0)
PROMPTS = [[1, 2, 3], list(range(90)), [200], [i * i % 251 for i in range(170)], list(range(100, 117))]
WINDOWS: dict[str, tuple[Window | None, Window | None]] = {
    "one window": (Window(12), Window(12)),
    "one for each layer": (Window(5), Window(21)),
    "first tokens": (Window(12, first=3), Window(12, first=3)),
    "listed tokens": (Window(12, token_ids=tuple(range(0, 250, 7))), Window(9, first=1, token_ids=(5,))),
    "one layer sees all": (None, Window(12)),
}

UNBOUNDED = ("listed tokens", "one layer sees all")


def windowed(new_model: Callable[..., Decoder], *windows: Window | None, context: int = 512) -> Decoder:
    model = new_model(context=context)
    for layer, window in zip(model.layers, windows, strict=True):
        layer.self_attn.window = window  # type: ignore[union-attr,assignment]
    return model


@contextmanager
def one_thread() -> Iterator[None]:
    """Such small products are slower on many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------- memory


@torch.no_grad()
def test_twenty_thousand_tokens_in_constant_memory_are_those_of_the_uncached_model(
    new_model: Callable[..., Decoder],
) -> None:
    """A token sees 255 before it in each of two layers, so it depends on the 510 before it and on nothing else: the
    uncached model gives its logits from those alone, at their true positions. That is done for every token."""
    window, length = 256, 20_000
    model = new_model("mistral", context=32_768, sliding_window=window)
    for parameter in model.parameters():
        parameter.mul_(2)  # from 0.3 to 0.6: below that, greedy output soon runs in circles
    engine = Engine(model, None, EngineConfig(block_size=16, num_blocks=40))
    used, ids, logprobs = [], [1, 2, 3], []
    with one_thread():
        for delta in engine.stream(ids, replace(GREEDY, max_tokens=length)):
            used.append(engine.stats().blocks_used)
            ids += delta.token_ids
            logprobs += delta.logprobs
    assert len(ids) == 3 + length
    assert max(used) == 17  # 16 blocks hold the window, and one more when it does not begin with a block
    assert set(used[1000:-1]) == {16, 17}
    assert used[-1] == 0
    assert len({tuple(ids[i : i + 8]) for i in range(3, length)}) > 0.9 * length, "in circles: a poor test"

    reach = len(model.layers) * (window - 1)
    with one_thread():
        for start in range(2, length + 2, 500):
            stop = min(start + 500, length + 2)
            begin = max(0, start - reach)
            tokens = torch.tensor([ids[begin:stop]])
            context = DenseContext(tokens)
            context.positions = context.positions + begin
            dense = model.head(model(tokens, context))[0, start - begin :].log_softmax(-1)
            found = torch.tensor(logprobs[start - 2 : stop - 2])
            chosen = dense.gather(1, torch.tensor(ids[start + 1 : stop + 1])[:, None])[:, 0]
            torch.testing.assert_close(found, chosen, atol=1e-4, rtol=1e-4)
            # The likeliest one; two that tie within rounding may change places.
            assert (chosen > dense.amax(-1) - 1e-4).all()


def test_a_pool_that_only_just_holds_the_window(new_model: Callable[..., Decoder], greedy: Greedy) -> None:
    model = windowed(new_model, Window(20, first=2), Window(20, first=2))
    # 20 tokens touch 6 blocks of 4 at most, and one is global.
    engine = Engine(model, None, EngineConfig(block_size=4, num_blocks=7))
    assert engine.max_context == 512
    prompt = PROMPTS[3]
    peak, ids = 0, []
    for delta in engine.stream(prompt, GREEDY):
        ids += delta.token_ids
        peak = max(peak, engine.stats().blocks_used)
    assert ids == greedy(model, prompt, 60)
    assert peak == 7
    assert engine.stats().preemptions == 0
    one_less = Engine(model, None, EngineConfig(block_size=4, num_blocks=6))
    assert one_less.max_context == 24
    with pytest.raises(UserError, match="the KV cache holds 24"):
        one_less.check(Request(prompt, GREEDY))


def test_a_long_prompt_is_read_in_bounded_memory(new_model: Callable[..., Decoder]) -> None:
    model = windowed(new_model, Window(32), Window(16))
    engine = Engine(model, None, EngineConfig(block_size=4, max_num_seqs=1))
    engine.add(Request([i % 256 for i in range(500)], replace(GREEDY, max_tokens=3)))
    peak = 0
    while engine.has_work:
        engine.step()
        peak = max(peak, engine.stats().blocks_used)
    assert peak <= engine.stats().blocks_total == 17  # 31 tokens in sight and a chunk of 32
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_what_no_window_bounds_still_has_to_fit(kind: str, new_model: Callable[..., Decoder]) -> None:
    engine = Engine(windowed(new_model, *WINDOWS[kind]), None, EngineConfig(block_size=4, num_blocks=20))
    assert engine.max_context == 80
    with pytest.raises(UserError, match=r"90 tokens .* the KV cache holds 80"):
        engine.generate([PROMPTS[1]], GREEDY)
    whole = Engine(windowed(new_model, *WINDOWS[kind]), None, EngineConfig(block_size=4, max_num_seqs=3))
    assert whole.stats().blocks_total == 3 * 128


def test_listed_tokens_keep_their_blocks(new_model: Callable[..., Decoder]) -> None:
    engine = Engine(windowed(new_model, *[Window(8, token_ids=(7,))] * 2), None, EngineConfig(block_size=4))
    prompt = [1] * 200
    prompt[50] = prompt[101] = prompt[102] = 7
    engine.add(Request(prompt, replace(GREEDY, max_tokens=2)))
    while not engine.step():
        pass
    assert engine.stats().blocks_used == 2 + 2  # two blocks with listed tokens; what the next token sees


# -------------------------------------------------------------------------------------------------- sameness


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("max_batch_tokens", [1, 7, 2048])
def test_greedy_is_that_of_the_dense_model(
    kind: str, max_batch_tokens: int, new_model: Callable[..., Decoder], greedy: Greedy
) -> None:
    model = windowed(new_model, *WINDOWS[kind])
    engine = Engine(model, None, EngineConfig(block_size=4, max_batch_tokens=max_batch_tokens))
    found = engine.generate(PROMPTS, GREEDY)
    assert [c.token_ids for [c] in found] == [greedy(model, prompt, 60) for prompt in PROMPTS]
    assert engine.stats().blocks_used == 0


def test_global_tokens_of_a_mistral(new_model: Callable[..., Decoder], greedy: Greedy) -> None:
    own = {"sliding_window": 10, "num_global_tokens": 5, "global_token_ids": [3, 60], "num_hidden_layers": 3}
    model = new_model("mistral", context=512, **own)
    [[completion]] = Engine(model, None, EngineConfig(block_size=4)).generate([PROMPTS[1]], GREEDY)
    assert completion.token_ids == greedy(model, PROMPTS[1], 60)
    plain = new_model("mistral", context=512, **own | {"num_global_tokens": 0, "global_token_ids": []})
    assert completion.token_ids != greedy(plain, PROMPTS[1], 60)


@pytest.mark.parametrize("kind", WINDOWS)
def test_samples_and_preemption_change_nothing(
    kind: str, new_model: Callable[..., Decoder], logprobs: Logprobs
) -> None:
    model = windowed(new_model, *WINDOWS[kind])
    params = [
        replace(GREEDY, max_tokens=40, temperature=t, seed=i, n=1 + i % 4) for i, t in enumerate([0, 1, 0.8, 1, 0.5])
    ]
    roomy = Engine(model, None, EngineConfig(block_size=4))
    num_blocks = 53 if kind in UNBOUNDED else 14  # the longest request alone has 53 blocks of tokens
    tight = Engine(model, None, EngineConfig(block_size=4, num_blocks=num_blocks, max_batch_tokens=20))
    expected, found = roomy.generate(PROMPTS, params), tight.generate(PROMPTS, params)
    assert roomy.stats().preemptions == 0
    assert tight.stats().preemptions > 3
    assert tight.stats().blocks_used == roomy.stats().blocks_used == 0
    assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in group] for group in expected]
    for prompt, group in zip(PROMPTS, found, strict=True):
        for completion in group:
            ids = prompt + completion.token_ids
            rows = logprobs(model, ids)[len(prompt) - 1 : -1]
            dense = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", WINDOWS)
def test_scores_of_long_continuations_after_a_shared_prompt(
    kind: str, new_model: Callable[..., Decoder], logprobs: Logprobs
) -> None:
    """The first continuation runs on beyond the prompt in the step in which the others branch off."""
    model = windowed(new_model, *WINDOWS[kind])
    pairs = [(prompt, [(i * k) % 250 for i in range(50)][: 10 * k]) for prompt in PROMPTS for k in (5, 1, 3)]
    engine = Engine(model, None, EngineConfig(block_size=4, max_batch_tokens=64))
    for (prompt, continuation), found in zip(pairs, engine.loglikelihood(pairs), strict=True):
        dense = logprobs(model, prompt + continuation)[len(prompt) - 1 :]
        expected = [float(dense[i, token]) for i, token in enumerate(continuation)]
        assert found.tokens == pytest.approx(expected, abs=1e-4)
    assert engine.stats().blocks_used == 0
