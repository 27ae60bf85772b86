"""Decoding on this machine's accelerator: tokens/s with CUDA graphs and without, beside transformers.

    python benchmarks/gpu_serving.py                              # Llama of 120M and 1.1B, bfloat16, random weights
    python benchmarks/gpu_serving.py --device cpu --sizes tiny    # that it works, not a measurement

Before anything is timed, what is about to be timed is checked: attention against the portable one, logits against
transformers, tokens with graphs against those without. Then each in turn, three rounds, medians; the prompt is 128
tokens, and only steps in which every sequence decodes are timed. The limit at batch 1 is the time it takes to read the
weights and the cache once, at the rate the device copies memory within itself.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from nanoworks.checkpoint import load_checkpoint
from nanoworks.common.device import choose_device, choose_dtype
from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.engine.request import Request
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.paged import KVShape
from nanoworks.nn.triton_context import why_not

VOCAB = 32000
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "120m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}
PROMPT, WARM_UP, ROUNDS = 128, 8, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", default="120m,1b", help=", ".join(SIZES))
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--tokens", type=int, default=128, help="decoded by each sequence")
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, {dtype}, PyTorch {torch.__version__}, memory copied at {bandwidth / 1e9:,.0f} GB/s")
    with torch.no_grad():
        for size in args.sizes.split(","):
            serve(size, [int(b) for b in args.batches.split(",")], args.tokens, device, dtype, bandwidth)


def serve(
    size: str, batches: list[int], tokens: int, device: torch.device, dtype: torch.dtype, bandwidth: float
) -> None:
    peer, model = models(size, device, dtype)
    shape = KVShape.of(model, device)
    attention = "portable, this is no GPU"
    if device.type == "cuda":
        reason = why_not(shape, model.config.num_attention_heads // shape.num_key_value_heads, device)
        attention = f"portable, as the Triton kernel does not run: {reason}" if reason else "the Triton kernel, checked"
    print(f"\n{size}: {model.num_parameters() / 1e6:,.0f}M parameters; attention: {attention}")
    graphs, eager = (engine(model, max(batches), tokens, graphs=graphs) for graphs in (True, False))
    check(model, peer, graphs, eager, device)
    print("| batch | graphs tok/s | eager tok/s | transformers tok/s | graphs / transformers | of the limit |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in batches:
        ways: list[Callable[[], float]] = [
            lambda batch=batch: decode(graphs, batch, tokens, device),  # type: ignore[misc]
            lambda batch=batch: decode(eager, batch, tokens, device),  # type: ignore[misc]
            lambda batch=batch: decode_peer(peer, batch, tokens, device),  # type: ignore[misc]
        ]
        for way in ways:
            way()
        rates = [
            statistics.median(column) for column in zip(*([way() for way in ways] for _ in range(ROUNDS)), strict=True)
        ]
        limit = "-"
        if batch == 1:
            weights = sum(p.numel() for p in model.parameters()) - model.embed_tokens.weight.numel()
            read = weights * dtype.itemsize + (PROMPT + tokens / 2) * shape.bytes_per_token
            limit = f"{rates[0] * read / bandwidth:.0%}"
        shown = " | ".join(f"{rate:,.0f}" for rate in rates)
        print(f"| {batch} | {shown} | {rates[0] / rates[2]:.2f} | {limit} |", flush=True)


def models(size: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Decoder]:
    """The same random Llama from transformers and as ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    own = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCAB,
        num_key_value_heads=min(4, own["num_attention_heads"]),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        **own,
    )
    peer = LlamaForCausalLM(config).to(dtype).eval()
    peer.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        model = load_checkpoint(directory, device=device, dtype=dtype).model
    return peer.to(device), model.eval()


def engine(model: Decoder, batch: int, tokens: int, *, graphs: bool) -> Engine:
    blocks = batch * -(-(PROMPT + WARM_UP + tokens + 16) // 16)
    config = EngineConfig(
        num_blocks=blocks, max_num_seqs=batch, max_batch_tokens=8192, cuda_graphs=graphs, prefix_caching=False
    )
    return Engine(model, None, config)


def check(model: Decoder, peer: Any, graphs: Engine, eager: Engine, device: torch.device) -> None:
    """Say how far ours is from transformers, and whether graphs change a token."""
    ids = torch.tensor(prompts(1), device=device)
    ours, theirs = model.head(model(ids, DenseContext(ids))), peer(ids).logits.float()
    error = float((ours - theirs).norm() / theirs.norm())
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    asked = prompts(3)
    with_graphs, without = ([group[0].token_ids for group in e.generate(asked, params)] for e in (graphs, eager))
    same = sum(a == b for x, y in zip(with_graphs, without, strict=True) for a, b in zip(x, y, strict=True))
    print(
        f"logits differ from transformers' by {error:.1e} of their norm; {same} of 96 tokens are the same with graphs"
    )
    assert error < 0.05, "the model is not the one transformers runs"
    if graphs._runner._graphs is not None and not graphs._runner._graphs.works:
        print("CUDA graphs could not be recorded: the first column is eager")


def prompts(batch: int) -> list[list[int]]:
    rng = random.Random(batch)
    return [[rng.randrange(3, VOCAB) for _ in range(PROMPT)] for _ in range(batch)]


def decode(engine: Engine, batch: int, tokens: int, device: torch.device) -> float:
    """Tokens/s of steps in which all sequences decode."""
    params = SamplingParams(max_tokens=WARM_UP + tokens, temperature=0.0, ignore_eos=True)
    for prompt in prompts(batch):
        engine.add(Request(prompt, params))
    before = engine.stats().tokens_generated
    while engine.stats().tokens_generated - before < batch * WARM_UP:
        engine.step()
    begun = engine.stats().tokens_generated
    start = now(device)
    while engine.has_work:
        engine.step()
    return (engine.stats().tokens_generated - begun) / (now(device) - start)


def decode_peer(peer: Any, batch: int, tokens: int, device: torch.device) -> float:
    """The same from transformers: the time of a long answer less that of a short one."""
    ids = torch.tensor(prompts(batch), device=device)
    times = []
    for length in (WARM_UP, WARM_UP + tokens):
        start = now(device)
        peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0)
        times.append(now(device) - start)
    return batch * tokens / (times[1] - times[0])


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_bandwidth(device: torch.device, repeat: int = 20) -> float:
    """Bytes/s read and written by a copy of a tensor that fits no cache; the best of `repeat`."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(repeat):
        start = now(device)
        target.copy_(source)
        best = max(best, 2 * source.numel() / (now(device) - start))
    return best


if __name__ == "__main__":
    main()
