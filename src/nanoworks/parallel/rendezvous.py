"""Where ranks meet: the process group that torchrun's environment describes, and what comes before there is one."""

from __future__ import annotations

import itertools
import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.parallel.mesh import world_size

T = TypeVar("T")

_MEETING = timedelta(minutes=10)
"""How long ranks that start later, on other machines, are waited for."""

_AFTER_THE_WATCH = timedelta(minutes=1)
"""What a collective waits longer than `parallel.timeout_minutes`, so that the watch over ranks, which can say who is
missing, speaks before the collective, which cannot."""

_groups = itertools.count()
_works = itertools.count()


def start_group(device: torch.device, section: ParallelSection) -> None:
    """Join the process group of this launch, unless this process is in one.

    Raises:
        UserError: the address of the environment is taken, or nobody answers there.
    """
    if dist.is_initialized():
        return
    # torch then remembers the last collectives of this rank: what the watch writes down when a rank hangs.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    store, rank, world = _meet()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        # A prefix of its own: the demo starts a group for each stage, all through one store.
        store=dist.PrefixStore(f"group-{next(_groups)}", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=section.timeout_minutes) + _AFTER_THE_WATCH,
        device_id=device if device.type == "cuda" else None,
    )


def first_alone(work: Callable[[], T]) -> T:
    """Call `work` on the first rank and, when it is done, on the others, which find on disk what it left. It may take a
    day; no process group is needed."""
    if world_size() == 1:
        return work()
    if dist.is_initialized():
        store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    else:
        store, rank, _ = _meet()
    done = f"alone-{next(_works)}"
    if rank == 0:
        result = work()
        store.set(done, "")
        return result
    store.wait([done], timedelta(days=1))
    return work()


@cache
def _meet() -> tuple[dist.Store, int, int]:
    """The store that all ranks of this launch share, this rank, and their number. Kept, because the first rank may be
    the one that serves it."""
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=_MEETING))
        return _agree(store, rank, world), rank, world
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"the ranks are to meet at {where}, but another program uses that port (perhaps a run that has not "
                "ended); choose another: MASTER_PORT=PORT, torchrun --master-port PORT, or torchrun --standalone, "
                "which finds a free one"
            ) from error
        raise UserError(
            f"no rank 0 at {where}: {str(error).splitlines()[0]}; see that it runs, that MASTER_ADDR is its machine as "
            "the others see it, and that no firewall is between them"
        ) from error


def _agree(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The part of `store` that belongs to these processes alone.

    torchrun keeps its store when it restarts the ranks, and so what the killed ones left there: connecting to their
    addresses, the new ones would wait for ever. So the first rank draws a name and publishes it, the others answer
    under it with one of their own, and it repeats what they said: a rank that finds its own answer there is
    talking to the living.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + _MEETING.total_seconds()
    if rank == 0:
        answers = [f"{own}/{other}" for other in range(1, world)]
        store.set("first", own)
        while not store.check(answers):
            if time.monotonic() > deadline:
                missing = [str(other) for other in range(1, world) if not store.check([f"{own}/{other}"])]
                raise UserError(
                    f"ranks {', '.join(missing)} of {world} have not come in {_MEETING.total_seconds():.0f} s; see "
                    "whether they were started, and that each sees the machine of rank 0"
                )
            time.sleep(0.02)
        store.set(f"{own}/heard", json.dumps([store.get(key).decode() for key in answers]))
        return dist.PrefixStore(own, store)
    while time.monotonic() < deadline:
        if store.check(["first"]):
            first = store.get("first").decode()
            store.set(f"{first}/{rank}", own)
            if store.check([f"{first}/heard"]) and json.loads(store.get(f"{first}/heard"))[rank - 1] == own:
                return dist.PrefixStore(first, store)
        time.sleep(0.02)
    raise UserError(f"rank 0 has not come in {_MEETING.total_seconds():.0f} s; see whether it was started")
