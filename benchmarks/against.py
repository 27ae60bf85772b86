"""Is training as fast as it was? This tree beside an older one, on the same machine, in turns.

    python benchmarks/against.py REV [--recipe demo/pretrain] [--steps 150] [--rounds 5] [path=value ...]

REV is checked out aside. Each run is a process of its own that trains the recipe; its figure is the median time of a
step without the first ten. Ratios are taken within a round, and their median shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent.parent
WARMUP = 10


def nanoworks(tree: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "nanoworks", *arguments], cwd=tree, env=environment, text=True, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} in {tree} failed:\n{done.stdout}{done.stderr}")


def step_seconds(tree: Path, folder: Path, name: str, recipe: str, steps: int, overrides: list[str]) -> float:
    """Median seconds of a step of one run."""
    quiet = [f"train.length={steps} steps", "train.sample_every=0", "eval.every=0", "checkpoint.every=0"]
    changes = [f"run.root={folder}", f"run.name={name}", f"tokenizer={folder / 'tokenizer'}", *quiet, *overrides]
    nanoworks(tree, "train", recipe, *changes)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return median([row["train/step_seconds"] for row in rows if "train/step_seconds" in row][WARMUP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", metavar="REV")
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--recipe", default="demo/pretrain")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, older = Path(scratch), Path(scratch) / "older"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", older, options.rev], cwd=HERE, check=True)
        try:
            corpus = [str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
            nanoworks(HERE, "tokenizer", "train", *corpus, "--vocab-size", "2048", "--out", str(folder / "tokenizer"))
            ratios = []
            for number in range(options.rounds):
                trees = {"before": older, "now": HERE}
                order = sorted(trees, reverse=bool(number % 2))  # neither is always the first
                took = {
                    which: step_seconds(
                        trees[which], folder, f"{which}-{number}", options.recipe, options.steps, options.overrides
                    )
                    for which in order
                }
                ratios.append(took["before"] / took["now"])
                print(
                    f"round {number + 1}: before {1000 * took['before']:.1f} ms, now {1000 * took['now']:.1f} ms a "
                    f"step, {ratios[-1]:.3f} times as fast",
                    flush=True,
                )
            print(f"median: {median(ratios):.3f} times as fast as {options.rev}")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", older], cwd=HERE, check=True)


if __name__ == "__main__":
    main()
