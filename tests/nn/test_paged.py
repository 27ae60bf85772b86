"""Paged attention against dense: same model, same tokens, any mixture of chunk sizes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Literal, cast

import pytest
import torch
from torch import Tensor

from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.nn import kernel_context, kernels
from nanoworks.nn.context import DenseContext, Window
from nanoworks.nn.kernel_context import KernelCache, KernelContext
from nanoworks.nn.pack import pack
from nanoworks.nn.paged import KVCache, KVShape, PagedContext
from nanoworks.nn.paged_inputs import PagedInputs
from nanoworks.nn.triton_context import TritonContext

Backend = Literal["torch", "kernels", "triton"]
BLOCK_SIZES: dict[Backend, int] = {"torch": 4, "kernels": kernel_context.BLOCK_SIZE, "triton": 4}
BLOCK_SIZE = BLOCK_SIZES["torch"]
CPU = torch.device("cpu")
Windows = tuple[Window | None, Window | None]


@pytest.fixture(params=["torch", "kernels"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "kernels" and (reason := kernels.why_not()):
        pytest.skip(reason)
    return cast(Backend, request.param)


def random_model(
    family: str,
    *,
    kv_heads: int = 2,
    windows: Windows = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    seed: int = 0,
) -> Decoder:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(seed)
    model = build_model(config_from_dict({"model_type": family, **sizes})).eval()
    for layer, window in zip(model.layers, windows, strict=True):
        attention = layer.self_attn
        attention.window, attention.scale, attention.softcap = window, scale, softcap  # type: ignore[union-attr,assignment]
        attention.sinks = torch.nn.Parameter(torch.zeros(4)) if sinks else None  # type: ignore[union-attr,assignment]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


class PagedRun:
    """Feeds sequences to a model through scattered blocks of a cache that is full of NaN to begin with.

    What is behind the window of all layers is given up before each step: its blocks leave the table and are NaN again.
    """

    def __init__(
        self, model: Decoder, sequences: list[Tensor], rng: random.Random, backend: Backend = "torch", room: int = 0
    ) -> None:
        self.sequences, self.block_size = sequences, BLOCK_SIZES[backend]
        sizes = [-(-(len(s) + room) // self.block_size) for s in sequences]
        blocks = list(range(1, sum(sizes) + 1))
        rng.shuffle(blocks)
        self.tables = [{place: blocks.pop() for place in range(n)} for n in sizes]
        shape = KVShape.of(model, CPU)
        self.window = shape.window
        self.device = torch.device("cuda") if backend == "triton" and torch.cuda.is_available() else CPU
        self.context = TritonContext if backend == "triton" else PagedContext
        self.cache: KVCache | KernelCache
        if backend == "kernels":
            self.model = cast(Decoder, pack(model))
            self.cache = KernelCache(shape, sum(sizes) + 1, int8=False)
        else:
            self.model = model if self.device == CPU else copy.deepcopy(model).to(self.device)
            self.cache = KVCache(shape, sum(sizes) + 1, self.block_size, self.device)
        self.cache.data[:, :, 1:] = float("nan")
        self.done = [0] * len(sequences)
        self.cache.apply([], [b for table in self.tables for b in table.values()])

    def step(self, sizes: list[int]) -> list[tuple[int, Tensor]]:
        """Feed `sizes[i]` tokens of sequence i; return (i, hidden states) of those that had any."""
        chosen = [i for i, size in enumerate(sizes) if size]
        tokens, positions, prev, slots = [], [], [], []
        for i in chosen:
            self.forget(i)
            ids = self.sequences[i].tolist()
            for p in range(self.done[i], self.done[i] + sizes[i]):
                tokens.append(ids[p])
                positions.append(p)
                prev.append(ids[p - 1] if p else -1)
                slots.append(self.slot(i, p))
            self.done[i] += sizes[i]
        counts = [len(self.tables[i]) for i in chosen]
        padding = [[0] * (max(counts) - count) for count in counts]
        behind = max(len(s) for s in self.sequences)
        return self.run(
            chosen,
            PagedInputs(
                tokens=torch.tensor(tokens),
                positions=torch.tensor(positions),
                prev_tokens=torch.tensor(prev),
                slots=torch.tensor(slots),
                block_tables=torch.tensor(
                    [[*self.tables[i].values(), *zeros] for i, zeros in zip(chosen, padding, strict=True)]
                ),
                block_counts=counts,
                block_places=torch.tensor(
                    [[*self.tables[i], *(behind for _ in zeros)] for i, zeros in zip(chosen, padding, strict=True)]
                )
                if any(len(table) <= max(table) for table in self.tables)
                else None,
                query_lengths=[sizes[i] for i in chosen],
                context_lengths=[self.done[i] for i in chosen],
            ),
        )

    def run(self, chosen: list[int], inputs: PagedInputs) -> list[tuple[int, Tensor]]:
        context: KernelContext | PagedContext | TritonContext
        if isinstance(self.cache, KernelCache):
            context = KernelContext(self.cache, inputs)
        else:
            values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
            tensors = {name: value.to(self.device) for name, value in values.items() if isinstance(value, Tensor)}
            inputs = replace(inputs, **tensors)
            context = self.context(self.cache, inputs)
        hidden = self.model(inputs.tokens, context).cpu()
        return list(zip(chosen, hidden.split(list(inputs.query_lengths)), strict=True))

    def slot(self, i: int, place: int) -> int:
        return self.tables[i][place // self.block_size] * self.block_size + place % self.block_size

    def forget(self, i: int) -> None:
        window, ids = self.window, self.sequences[i].tolist()
        if window is None:
            return
        for place in list(self.tables[i]):
            held = range(place * self.block_size, (place + 1) * self.block_size)
            visible = (
                p > self.done[i] - window.size or p < window.first or (p < len(ids) and ids[p] in window.token_ids)
                for p in held
            )
            if not any(visible):
                self.cache.data[:, :, self.tables[i].pop(place)] = float("nan")


def chunkings(run: PagedRun, rng: random.Random) -> Iterator[list[int]]:
    """Random sizes, with many ones, until every sequence is through."""
    while any(done < len(s) for done, s in zip(run.done, run.sequences, strict=True)):
        wish = [rng.choice([0, 1, 1, 1, 2, 3, 7, 20]) for _ in run.sequences]
        sizes = [min(w, len(s) - done) for w, s, done in zip(wish, run.sequences, run.done, strict=True)]
        if any(sizes):
            yield sizes


def compare(model: Decoder, seed: int, backend: Backend, count: int = 6) -> PagedRun:
    """Run random sequences in random chunks and compare every logit with the dense model's."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sequences = [torch.randint(0, 64, (rng.randint(1, 90),)) for _ in range(count)]
    run = PagedRun(model, sequences, rng, backend)
    parts: list[list[Tensor]] = [[] for _ in sequences]
    for sizes in chunkings(run, rng):
        for i, hidden in run.step(sizes):
            parts[i].append(hidden)
    for ids, hidden in zip(sequences, parts, strict=True):
        expected = model.head(model(ids[None], DenseContext(ids[None]))[0])
        torch.testing.assert_close(model.head(torch.cat(hidden)), expected, atol=1e-5, rtol=1e-5)
    return run


@pytest.mark.parametrize("window", [None, Window(1), Window(5), Window(64)])
@pytest.mark.parametrize(("family", "kv_heads"), [("nanochat", 4), ("nanochat", 1), ("llama", 2), ("llama", 4)])
@torch.no_grad()
def test_paged_equals_dense_for_any_mixture_of_chunks(
    family: str, kv_heads: int, window: Window | None, backend: Backend
) -> None:
    for seed in range(3):
        compare(random_model(family, kv_heads=kv_heads, windows=(None, window), seed=seed), seed, backend)


WINDOWS: list[Windows] = [
    (Window(5), Window(5)),
    (Window(9), Window(2)),
    (Window(6, first=3), Window(6, first=3)),
    (Window(1, first=5), Window(17)),
    (Window(7, token_ids=(3, 9)), Window(4, first=1, token_ids=(11, 50, 51))),
    (None, Window(3, first=2, token_ids=(5,))),
]


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("family", ["llama", "nanochat"])
@torch.no_grad()
def test_windows_with_global_tokens_need_only_what_they_show(family: str, windows: Windows, backend: Backend) -> None:
    for seed in range(3):
        run = compare(random_model(family, windows=windows, seed=seed), seed, backend)
        if backend == "torch":  # larger blocks hold all that is shown for longer
            assert any(len(table) <= max(table) for table in run.tables) is (windows[0] is not None)


@pytest.mark.parametrize("windows", [(None, None), (Window(6), None), (Window(6, first=3), Window(3, token_ids=(4,)))])
@pytest.mark.parametrize(
    ("scale", "softcap", "sinks"), [(None, 2.0, False), (None, None, True), (0.2, 2.0, True), (0.2, None, False)]
)
@pytest.mark.parametrize("family", ["llama", "nanochat"])
@torch.no_grad()
def test_scale_softcap_and_sinks(
    family: str, scale: float | None, softcap: float | None, sinks: bool, windows: Windows, backend: Backend
) -> None:
    compare(random_model(family, windows=windows, scale=scale, softcap=softcap, sinks=sinks), 0, backend)


TREE = [-1, -1, 0, 0, 1, 3, 5]
"""Parents of a drafted tree, so its paths are 0, 1, 0-2, 0-3, 1-4, 0-3-5, 0-3-5-6."""


@pytest.mark.parametrize("windows", [(None, None), (Window(12), None)])
@pytest.mark.parametrize("family", ["llama", "nanochat"])
@torch.no_grad()
def test_each_drafted_token_sees_its_own_path(family: str, windows: Windows, backend: Backend) -> None:
    model = random_model(family, windows=windows)
    sequences = [torch.randint(0, 64, (n,)) for n in (21, 15, 40)]
    run = PagedRun(model, sequences, random.Random(1), backend, room=len(TREE))
    run.step([20, 15, 38])
    # In one step: sequence 0 a known token and a tree, 1 nothing new but a tree is not possible, 2 two known tokens.
    drafted = torch.randint(0, 64, (len(TREE),)).tolist()
    paths: list[list[int]] = []
    for i, parent in enumerate(TREE):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    ids = sequences[0].tolist()
    tables = [list(run.tables[i].values()) for i in (0, 2)]
    width = max(map(len, tables))
    inputs = PagedInputs(
        tokens=torch.tensor([ids[20], *drafted, *sequences[2][38:].tolist()]),
        positions=torch.tensor([20, *(20 + len(path) for path in paths), 38, 39]),
        prev_tokens=torch.tensor(
            [ids[19], *(drafted[p] if p >= 0 else ids[20] for p in TREE), *sequences[2][37:39].tolist()]
        ),
        slots=torch.tensor([*(run.slot(0, 20 + i) for i in range(1 + len(TREE))), run.slot(2, 38), run.slot(2, 39)]),
        block_tables=torch.tensor([[*table, *[0] * (width - len(table))] for table in tables]),
        block_counts=[len(table) for table in tables],
        query_lengths=[1 + len(TREE), 2],
        context_lengths=[21, 40],
        tree=torch.tensor([0, *(sum(1 << i for i in path) for path in paths), 0, 0]),
    )
    (_, hidden), (_, other) = run.run([0, 2], inputs)
    for i, path in enumerate(paths):
        text = torch.tensor([*ids, *(drafted[j] for j in path)])
        expected = model(text[None], DenseContext(text[None]))[0, -1]
        torch.testing.assert_close(hidden[1 + i], expected, atol=1e-5, rtol=1e-5)
    expected = model(sequences[2][None], DenseContext(sequences[2][None]))[0, 38:]
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_lengths_are_those_of_each_tokens_sequence() -> None:
    run = PagedRun(random_model("llama"), [torch.arange(9), torch.arange(4), torch.arange(6)], random.Random(0))
    seen = []
    run.model.rope.register_forward_pre_hook(lambda _, given: seen.append([t.tolist() for t in given]))
    run.step([3, 1, 0])
    run.step([2, 0, 4])
    assert seen == [[[0, 1, 2, 0], [3, 3, 3, 1]], [[3, 4, 0, 1, 2, 3], [5, 5, 4, 4, 4, 4]]]


@torch.no_grad()
def test_one_decoding_step_is_one_padded_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    run = PagedRun(model, [torch.arange(10) % 64, torch.arange(30) % 64, torch.arange(3)], random.Random(0))
    run.step([9, 29, 2])
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *rest, **named: calls.append(q.shape) or attention(q, *rest, **named),
    )
    run.step([1, 1, 1])
    assert calls == [(3, 2, 2, 8)] * model.config.num_hidden_layers  # (sequences, key heads, queries of each, D)


@torch.no_grad()
def test_bfloat16_cache_under_a_float32_model() -> None:
    model = random_model("llama")
    ids = torch.arange(12)
    run = PagedRun(model, [ids], random.Random(0))
    shape = KVShape.of(model, CPU)
    run.cache = KVCache(KVShape(shape.num_layers, shape.num_key_value_heads, shape.head_dim, torch.bfloat16), 4, 4, CPU)
    run.cache.apply([], [1, 2, 3])
    hidden = torch.cat([run.step([size])[0][1] for size in (5, 6, 1)])
    expected = model(ids[None], DenseContext(ids[None]))[0]
    assert (hidden - expected).abs().max() < 0.1 * expected.abs().max()


def test_shape_is_that_of_the_model() -> None:
    model = random_model("llama", kv_heads=2)
    shape = KVShape.of(model, CPU)
    assert shape == KVShape(num_layers=2, num_key_value_heads=2, head_dim=8, dtype=torch.float32)
    assert shape.bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert KVShape.of(model.bfloat16(), CPU).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((None, None), None),
        ((Window(4), None), None),
        ((Window(4), Window(9)), Window(9)),
        ((Window(4, first=2, token_ids=(8, 1)), Window(3, first=1, token_ids=(1, 5))), Window(4, 2, (1, 5, 8))),
    ],
)
def test_the_shape_knows_what_no_layer_sees(windows: Windows, expected: Window | None) -> None:
    assert KVShape.of(random_model("llama", windows=windows), CPU).window == expected


def test_copies_read_before_anything_is_written() -> None:
    cache = KVCache(KVShape(1, 1, 2, torch.float32), 6, 2, CPU)
    for block in range(1, 6):
        cache.data[:, :, block] = block
        cache.tokens[block] = block
    # 1 goes to 2 while 3 goes to 1; 3 is then given out afresh.
    cache.apply([(1, 2), (3, 1)], [3])
    assert cache.data[0, 0, :, 0, 0, 0].tolist() == [0, 3, 1, 0, 4, 5]
    assert (cache.data[:, :, 1] == 3).all()
    assert cache.tokens[1:3, 0].tolist() == [3, 1]


def test_a_slot_outside_the_cache_is_an_error_and_not_dropped() -> None:
    model = random_model("llama")
    cache = KVCache(KVShape.of(model, CPU), 2, BLOCK_SIZE, CPU)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        context = PagedContext(
            cache,
            PagedInputs(
                tokens=torch.tensor([3]),
                positions=torch.tensor([0]),
                prev_tokens=torch.tensor([-1]),
                slots=torch.tensor([2 * BLOCK_SIZE]),
                block_tables=torch.tensor([[1]]),
                block_counts=[1],
                query_lengths=[1],
                context_lengths=[1],
            ),
        )
        model(torch.tensor([3]), context)
