"""Writes the tables of docs/scaling.md from the planner: `python scripts/scaling_tables.py` (a part of `make docs`)."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from nanoworks.common.human import count, duration, percent
from nanoworks.config import load_recipe
from nanoworks.parallel import support
from nanoworks.train.plan import Forecast, cluster, plan, workload

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
RECIPES = ("pretrain/llama-1b", "pretrain/llama-3b", "pretrain/mixtral-8x1b")
DEVICES = ("4xA6000", "8xH200", "256xH100")
VOCABULARY = 32768


def table() -> str:
    """The best way for each recipe on each cluster, eager and compiled."""
    lines = [
        "| recipe | devices | best way | rows | recompute | GiB | tokens/s | MFU | time | cost | tokens/s compiled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in RECIPES:
        for devices in DEVICES:
            best, compiled = (_best(name, devices, compile=flag) for flag in ("false", "true"))
            cells = [f"`{name}`", devices]
            if best is None or compiled is None:
                cells += ["does not fit", *[""] * 8]
            else:
                assert best.hours is not None
                assert best.dollars is not None
                cells += [
                    best.name,
                    f"{best.rows} x {best.micro_batches}",
                    best.checkpointing,
                    f"{best.memory.total / 2**30:.1f}",
                    count(best.tokens_per_second),
                    percent(best.mfu),
                    duration(best.hours * 3600),
                    f"${count(best.dollars)}",
                    count(compiled.tokens_per_second),
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(recipe: str, devices: str, *, compile: str) -> Forecast | None:
    resolved = load_recipe(recipe, [f"hardware.compile={compile}"])
    found = plan(workload(resolved, torch.device("cuda"), vocab_size=VOCABULARY), cluster(devices))
    return found.forecasts[0] if found.forecasts else None


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, made in (("kinds", support.table()), ("scaling_tables", table())):
        block = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        text = block.sub(lambda m, made=made: f"{m[1]}\n{made.strip()}\n\n{m[2]}", text)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
