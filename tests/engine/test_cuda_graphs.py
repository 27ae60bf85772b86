"""What a CUDA graph needs besides CUDA: fixed buffers, padding that disturbs nobody. Replay is a plain call here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.engine.cuda_graphs import DecodeGraphs, Forward, buckets
from nanoworks.engine.runner import Runner
from nanoworks.models import Decoder
from nanoworks.nn.context import ForwardContext, Window
from nanoworks.nn.paged import KVCache, KVShape, PagedContext
from nanoworks.nn.paged_inputs import PagedInputs
from nanoworks.nn.triton_context import TritonContext
from tests.models.families import TINY, make

CPU = torch.device("cpu")
BLOCK_SIZE = 4
CONTEXT = 64
MAX_ROWS = 11
Context = Callable[[KVCache, PagedInputs], ForwardContext]
BLOCKS = 1 + MAX_ROWS * CONTEXT // BLOCK_SIZE


def test_buckets_cover_every_number_of_rows() -> None:
    assert buckets(1) == [1]
    assert buckets(11) == [1, 2, 4, 8, 11]
    assert buckets(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


class Steps:
    """Two caches with the same content, one for steps as they are and one for those with padding."""

    def __init__(
        self, model: Decoder, table_width: int = CONTEXT // BLOCK_SIZE, context: Context = PagedContext
    ) -> None:
        self.model, self.context, shape = model, context, KVShape.of(model, CPU)
        self.plain, self.padded = (KVCache(shape, BLOCKS + 1, BLOCK_SIZE, CPU) for _ in range(2))
        self.plain.data.normal_()
        self.plain.data[:, :, 0] = 0
        self.plain.data[:, :, BLOCKS] = 0
        self.plain.tokens.random_(0, 96)
        self.padded.data.copy_(self.plain.data)
        self.padded.tokens.copy_(self.plain.tokens)
        self.calls: list[PagedInputs] = []
        self.graphs = DecodeGraphs(
            max_rows=MAX_ROWS,
            table_width=table_width,
            block_size=BLOCK_SIZE,
            scratch_block=BLOCKS,
            windowed=shape.window is not None,
            device=CPU,
        )

    def run(self, inputs: PagedInputs) -> Tensor | None:
        return self.graphs.run(inputs, self._forward)

    def _forward(self, inputs: PagedInputs) -> Tensor:
        self.calls.append(inputs)
        return self.model(inputs.tokens, self.context(self.padded, inputs))

    def compare(self, inputs: PagedInputs) -> None:
        expected = self.model(inputs.tokens, PagedContext(self.plain, inputs))
        hidden = self.run(inputs)
        assert hidden is not None
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
        written = self.padded.data[:, :, 1:BLOCKS]
        torch.testing.assert_close(written, self.plain.data[:, :, 1:BLOCKS], atol=1e-5, rtol=1e-5)
        assert torch.equal(self.padded.tokens[1:BLOCKS], self.plain.tokens[1:BLOCKS])
        assert not self.padded.data[:, :, 0].any()  # the null block is zeros for ever


def decode_step(lengths: list[int], *, gaps: bool = False) -> PagedInputs:
    """One token each of sequences that then have so many; `gaps`: all but the last three blocks were given up."""
    tables, places = [], []
    for i, length in enumerate(lengths):
        mine = list(range(-(-length // BLOCK_SIZE)))[-3 if gaps else None :]
        places.append(mine)
        tables.append([1 + i * CONTEXT // BLOCK_SIZE + place for place in mine])
    width = max(map(len, tables))
    tokens = torch.randint(0, 96, (2, len(lengths)))
    return PagedInputs(
        tokens=tokens[0],
        positions=torch.tensor(lengths) - 1,
        prev_tokens=torch.where(torch.tensor(lengths) > 1, tokens[1], -1),
        slots=torch.tensor([t[-1] * BLOCK_SIZE + (n - 1) % BLOCK_SIZE for t, n in zip(tables, lengths, strict=True)]),
        block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables]),
        block_counts=[len(t) for t in tables],
        block_places=torch.tensor([p + [CONTEXT] * (width - len(p)) for p in places]) if gaps else None,
        query_lengths=[1] * len(lengths),
        context_lengths=lengths,
    )


def lengths(rows: int) -> list[int]:
    return torch.randint(1, CONTEXT + 1, (rows,)).tolist()


@pytest.mark.parametrize("family", list(TINY))
@torch.no_grad()
def test_a_padded_step_equals_the_plain_one(family: str) -> None:
    steps = Steps(make(family))
    for rows in (3, 1, MAX_ROWS, 5, 3):
        steps.compare(decode_step(lengths(rows)))


@torch.no_grad()
def test_every_bucket_serves_all_numbers_of_rows_up_to_it() -> None:
    steps = Steps(make("llama"))
    for rows in range(1, MAX_ROWS + 1):
        steps.compare(decode_step(lengths(rows)))
    assert [len(inputs.tokens) for inputs in steps.calls] == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]


@torch.no_grad()
def test_lengths_that_change_the_rotation_are_those_of_the_step() -> None:
    steps = Steps(make("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=16))
    for rows in (2, 7):
        steps.compare(decode_step(lengths(rows)))


@torch.no_grad()
def test_tables_with_gaps_and_without_take_turns() -> None:
    model = make("llama")
    for layer in model.layers:
        layer.self_attn.window = Window(7)  # type: ignore[union-attr,assignment]
    steps = Steps(model, table_width=4)  # one more than is used
    for rows, gaps in ((3, True), (3, False), (6, True), (1, True), (2, False)):
        steps.compare(decode_step(lengths(rows) if gaps else [11] * rows, gaps=gaps))
    steps.compare(decode_step([12, 30], gaps=True))  # one that sees its first tokens still
    assert steps.run(decode_step([17])) is None  # a table that is too wide


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the GPU")
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_padding_does_not_disturb_the_triton_kernel(family: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    steps = Steps(make(family), context=TritonContext)
    for rows in (3, 1, 5):
        steps.compare(decode_step(lengths(rows)))


@torch.no_grad()
def test_the_buffers_stay_where_they_are_and_results_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(make("llama"))
    output = torch.empty(2, 64)

    def record(inputs: PagedInputs, forward: Forward) -> Callable[[], Tensor]:
        return lambda: output.copy_(forward(inputs))  # as a graph, always to the same place

    monkeypatch.setattr(steps.graphs, "_record", record)
    first = steps.run(decode_step([5, 9]))
    assert first is not None
    kept = first.clone()
    steps.run(decode_step([3, 30]))
    one, two = steps.calls
    assert one is two  # what was recorded is what is replayed
    assert torch.equal(first, kept)


@torch.no_grad()
def test_other_steps_are_left_to_the_caller() -> None:
    steps = Steps(make("llama"))
    step = decode_step([4, 8])
    assert steps.run(replace(step, tree=torch.zeros(2, dtype=torch.long))) is None
    assert steps.run(replace(step, query_lengths=[2], context_lengths=[8])) is None
    assert steps.run(replace(step, block_places=torch.zeros_like(step.block_tables))) is None  # no window
    assert steps.run(decode_step([4] * (MAX_ROWS + 1))) is None
    assert not steps.calls


@torch.no_grad()
def test_a_model_that_cannot_be_recorded_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(make("llama"))

    def fail(inputs: PagedInputs, forward: Forward) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(steps.graphs, "_record", fail)
    assert steps.run(decode_step([4])) is None
    assert not steps.graphs.works


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the GPU")
@pytest.mark.parametrize("family", ["llama", "mistral", "nanochat_2026"])
def test_an_engine_with_kernel_and_graphs_gives_the_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    model = make(family)
    prompts = [[1, 2, 3], list(range(20, 50)), [9]]
    params = SamplingParams(max_tokens=6, temperature=0.0)
    config = EngineConfig(block_size=BLOCK_SIZE, num_blocks=64, max_batch_tokens=24)
    expected = [group[0].token_ids for group in Engine(model, None, config).generate(prompts, params)]
    monkeypatch.setattr(Runner, "_choose_context", lambda *_: TritonContext)
    engine = Engine(model, None, config)
    assert [group[0].token_ids for group in engine.generate(prompts, params)] == expected
    assert 4 in engine._runner._graphs._replays  # three rows and one of padding
