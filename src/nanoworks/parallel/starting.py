"""From the environment that torchrun leaves to the strategy of this rank.

    torchrun --nproc-per-node 8 -m nanoworks train pretrain/llama-1b parallel.tensor=2

Without torchrun there is one rank and `SingleDevice`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.parallel.mesh import degrees, world_size
from nanoworks.parallel.strategy import SingleDevice, Strategy


def own_device(device: torch.device) -> torch.device:
    """Of several devices of this machine the one of this rank, and the default from now on."""
    if device.type != "cuda" or world_size() == 1:
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise UserError(
            f"rank {index} of this machine has no GPU: there are {torch.cuda.device_count()}; start torchrun with "
            f"--nproc-per-node {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def restarted() -> bool:
    """Whether torchrun started this process again after a failure: the run then goes on from its last step."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def open_strategy(
    section: ParallelSection,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compile: bool,
    activation_checkpointing: Checkpointing,
) -> Strategy:
    """The strategy that `section` asks for; `dtype` is that of the arithmetic.

    Raises:
        UserError: the section does not fit the world that was started.
    """
    options: dict[str, Any] = {"compile": compile, "activation_checkpointing": activation_checkpointing}
    if section.strategy == "deepspeed":
        if "RANK" not in os.environ:
            raise UserError("parallel.strategy=deepspeed needs torchrun, for one device too: --nproc-per-node 1")
        from nanoworks.parallel.deepspeed import DeepSpeed
        from nanoworks.parallel.rendezvous import start_group

        start_group(device, section)
        return DeepSpeed(section, device, dtype, **options)
    if world_size() == 1:
        degrees(section, 1)
        return SingleDevice(device, **options)
    from nanoworks.parallel.native import Native
    from nanoworks.parallel.rendezvous import start_group

    start_group(device, section)
    return Native(section, device, dtype, **options)


def log_to_file(directory: Path, rank: int) -> None:
    """Send what this rank logs to `directory`/rank-N.log; only the first rank keeps talking to the terminal."""
    directory.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(directory / f"rank-{rank:03d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("nanoworks")
    for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:  # that of the stage before
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.propagate = rank == 0


def log_failure(error: Exception) -> None:
    """A rank's last words, in its own log; the terminal gets them from whoever catches `error`."""
    logger = logging.getLogger("nanoworks")
    why = (type(error), error, error.__traceback__)
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "this rank ends:", (), why)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
