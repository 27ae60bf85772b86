"""Tensors of which several ranks hold parts, on disk: each rank writes its own and reads its own, without pickle.

`torch.distributed.checkpoint` decides who writes what (of copies one) and who reads what; its Hugging Face storage puts
the parts of a rank into one safetensors file whose metadata says where in the whole each lies. `Shards` makes them
whole again, one tensor at a time and in one process: for an export, or a run that goes on alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nanoworks.checkpoint.safetensors_file import SafetensorsFile, Spec
from nanoworks.common.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def saving_group() -> ProcessGroup:
    """A group of all ranks that only saves: a thread may use it while training uses the others. Every rank."""
    import torch.distributed as dist

    # While one rank joins parts and takes their sums, which takes minutes for a large model, the others wait.
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def save_parts(directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup) -> None:
    """Write a file `shard-*.safetensors` for each rank of `group` into `directory`. Every rank of it.

    Args:
        tensors: by name what this rank has: DTensors, and plain tensors that are whole (if several have one, one of
            them writes it). Names may differ from rank to rank.

    Raises:
        UserError: a rank could not write; the others, which then raise as well, learn which one and why.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _failures_named(f"could not write the parts of {directory.parent}"):
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)


def load_parts(directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup) -> None:
    """Fill `tensors`, which are spread over ranks in any way, from the files of `directory`. Every rank of `group`.

    Each rank reads what its parts need. UserError as from `save_parts`, also when a name is missing.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(directory))
    with _failures_named(f"could not read {directory}"):
        dcp.load(dict(tensors), storage_reader=reader, process_group=group)


@contextmanager
def _failures_named(what: str) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        reasons = [f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(error.failures.items())]
        raise UserError(f"{what}: {'; '.join(reasons)}") from None


def together(group: ProcessGroup, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank; return what each gave, by rank.

    Raises:
        UserError: it failed on a rank, and so fails on all: the message names the rank.
    """
    import torch.distributed as dist

    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (problem, result), group=group)
    problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text is not None]
    if problems:
        raise UserError(f"a step could not be saved: {'; '.join(problems)}")
    return [found for _, found in answers]


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, spread as the tensors are."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


class _Part(NamedTuple):
    file: SafetensorsFile
    name: str
    place: tuple[int, ...]
    """Where in the whole it begins."""

    @property
    def spec(self) -> Spec:
        return self.file.specs[self.name]


class Shards(Mapping[str, Tensor]):
    """Whole tensors by name, each read when it is asked for, from the safetensors files in `directory`.

    A file holds tensors that are whole, or parts of them that it says the place of. A context manager.
    """

    def __init__(self, directory: Path) -> None:
        """UserError when a file is damaged, or a part of a tensor is in none of them (a file is then missing)."""
        self.directory = directory
        self._files: list[SafetensorsFile] = []
        self._parts: dict[str, list[_Part]] = {}
        try:
            for path in sorted(directory.glob("*.safetensors")):
                file = SafetensorsFile(path)
                self._files.append(file)
                places = json.loads(file.layout.metadata.get("DCP_SHARDING_INFO", "{}"))
                for name, spec in file.specs.items():
                    place = places[name]["saved_offsets"] if name in places else [0] * len(spec.shape)
                    self._parts.setdefault(name, []).append(_Part(file, name, tuple(place)))
            self.specs = {name: self._whole(name) for name in self._parts}
        except BaseException:
            self.close()
            raise

    def under(self, prefix: str) -> Shards:
        """Those whose names begin with `prefix`, by the rest of their names."""
        view = copy.copy(self)
        view._parts = {n.removeprefix(prefix): parts for n, parts in self._parts.items() if n.startswith(prefix)}
        view.specs = {n.removeprefix(prefix): spec for n, spec in self.specs.items() if n.startswith(prefix)}
        return view

    def _whole(self, name: str) -> Spec:
        parts = self._parts[name]
        ends = [[at + n for at, n in zip(part.place, part.spec.shape, strict=True)] for part in parts]
        whole = Spec(parts[0].spec.dtype, tuple(max(end) for end in zip(*ends, strict=True)))
        if sum(part.spec.nbytes for part in parts) != whole.nbytes:
            files = ", ".join(file.path.name for file in self._files)
            raise UserError(
                f"{self.directory} holds only some parts of {name}: a shard is missing beside {files}; copy the whole "
                "directory again, or resume from the step before"
            )
        return whole

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        if len(parts) == 1:
            return parts[0].file.read(parts[0].name)
        whole = torch.empty(self.specs[name].shape, dtype=self.specs[name].dtype)
        for file, key, place in parts:
            tensor = file.read(key)
            whole[tuple(slice(at, at + n) for at, n in zip(place, tensor.shape, strict=True))] = tensor
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
