"""Peak memory of converting a checkpoint, against its size.

    python benchmarks/convert.py                             # 1.1B parameters, bfloat16 and float32; 9 GB of disk
    python benchmarks/convert.py --layers 2 --hidden 512     # a smoke test

A random Llama (by default 22 layers of 2048) is written shard by shard; each conversion runs in a process of its own,
whose peak resident memory is the figure, Python and torch included.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanoworks.checkpoint.convert import convert
from nanoworks.checkpoint.safetensors_file import Spec
from nanoworks.checkpoint.weights import hf_keymap, write_shards
from nanoworks.models import build_model, config_from_dict
from nanoworks.tokenizer import train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layouts", nargs="+", default=["hf", "gguf"])
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # source, out, layout, verify: in the child
    args = parser.parse_args()
    if args.one:
        return run_one(*args.one)
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        for dtype in args.dtypes:
            source = Path(root) / dtype
            size = write_random(source, args.layers, args.hidden, getattr(torch, dtype))
            print(f"{dtype}: {size / 1e9:.2f} GB")
            for layout in args.layouts:
                for verify in ("", "verify"):
                    measure(source, Path(root) / "out", layout, verify, size)
            shutil.rmtree(source)


def write_random(path: Path, layers: int, hidden: int, dtype: torch.dtype) -> int:
    """Write a Llama with normal weights and return their bytes; no more than one tensor is in memory."""
    values = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 512,
        "max_position_embeddings": 2048,
    }
    with torch.device("meta"):
        model = build_model(config_from_dict(values))
    keymap = hf_keymap(model)
    specs = {str(keymap.to_foreign(n)): Spec(dtype, tuple(p.shape)) for n, p in model.named_parameters()}
    path.mkdir()
    torch.manual_seed(0)

    def random(name: str) -> torch.Tensor:
        spec = specs[name]
        return torch.ones(spec.shape, dtype=dtype) if "norm" in name else torch.randn(spec.shape).mul(0.02).to(dtype)

    write_shards(path, specs, random, max_shard_bytes=1_000_000_000)
    (path / "config.json").write_text(json.dumps(model.config.to_hf()))
    train_tokenizer([Path(__file__).read_text()], 320).save(path)
    return sum(spec.nbytes for spec in specs.values())


def measure(source: Path, out: Path, layout: str, verify: str, size: int) -> None:
    command = [sys.executable, __file__, "--one", str(source), str(out), layout, verify]
    start = time.perf_counter()
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    seconds = time.perf_counter() - start
    print(
        f"  to {layout}{', verified' if verify else '':<10} peak {peak / 1e9:5.2f} GB = {peak / size:.2f} x "
        f"the checkpoint, {seconds:.0f} s",
        flush=True,
    )
    shutil.rmtree(out)


def run_one(source: str, out: str, layout: str, verify: str) -> None:
    convert(source, Path(out), layout, verify=bool(verify))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
