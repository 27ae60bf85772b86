"""safetensors files, read and written one tensor at a time, so that no more than one is in memory.

What `write_file` writes is, byte for byte, what `safetensors.torch.save_file` does. A file is the length of a header
(8 bytes, little-endian), the header (JSON) and the data (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from nanoworks.common.errors import UserError

# In the order in which the library lays tensors out: by dtype, the widest first, then by name.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: i for i, dtype in enumerate(_NAMES)}


class Spec(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """A header, and where in the data each tensor begins, in the order of the data."""

    header: bytes
    specs: Mapping[str, Spec]
    starts: Mapping[str, int]

    @property
    def metadata(self) -> dict[str, str]:
        return json.loads(self.header).get("__metadata__", {})

    @classmethod
    def of(cls, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> Layout:
        """The library's layout of tensors with these names."""
        ordered = dict(sorted(specs.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])))
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        starts, end = {}, 0
        for name, spec in ordered.items():
            starts[name] = end
            offsets = [end, end + spec.nbytes]
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        return cls(text + b" " * (-len(text) % 8), ordered, starts)


class SafetensorsFile:
    """An open file: its header is read at once, a tensor when it is asked for. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """UserError when the file is missing, truncated, or not what it should be."""
        self.path = path
        try:
            # Unbuffered: tensors are read straight to where they stay.
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        try:
            self.layout = _read_layout(self._file)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._file.close()
            raise UserError(f"{path} is truncated or altered: {error}") from None
        self._data = 8 + len(self.layout.header)

    @property
    def specs(self) -> Mapping[str, Spec]:
        return self.layout.specs

    def read(self, name: str, *, mapped: bool = False) -> Tensor:
        """Return the tensor `name` on the CPU: a copy.

        `mapped`: it stays in the file where the file system allows that, read when it is touched; what is written to it
        is not. For those who read it once, or who would keep a copy beside it. The file must not be written to as long
        as the tensor lives; it may be deleted, though not on another machine's disk.
        """
        spec = self.specs[name]
        if mapped and spec.nbytes:
            with contextlib.suppress(OSError):
                return self._map(spec, self._data + self.layout.starts[name])
        data = torch.empty(spec.nbytes, dtype=torch.uint8)
        self._file.seek(self._data + self.layout.starts[name])
        view, done = data.numpy().data, 0
        while done < len(view):  # one read gives 2 GiB at most
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise UserError(f"{self.path} is truncated: {name} ends too early")
            done += count
        return data.view(spec.dtype).view(spec.shape)

    def _map(self, spec: Spec, start: int) -> Tensor:
        skipped = start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            self._file.fileno(), skipped + spec.nbytes, access=mmap.ACCESS_COPY, offset=start - skipped
        )  # of its own, so that it goes with the tensor
        count = math.prod(spec.shape)
        return torch.frombuffer(pages, dtype=spec.dtype, count=count, offset=skipped).view(spec.shape)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_file(path: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors`, (name, tensor) in any order, to where `layout` has them; all of them must come."""
    missing = set(layout.specs)
    data = 8 + len(layout.header)
    with path.open("wb", buffering=0) as file:
        file.write(len(layout.header).to_bytes(8, "little") + layout.header)
        for name, tensor in tensors:
            spec = layout.specs[name]
            assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name} is not what the layout says"
            file.seek(data + layout.starts[name])
            view = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            done = 0
            while done < len(view):
                done += file.write(view[done:])
            missing.discard(name)
    assert not missing, f"{path} was not given {sorted(missing)[:3]}"


def _read_layout(file: BinaryIO) -> Layout:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    header = file.read(length)
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    specs, starts, end = {}, {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name} has the unknown dtype {entry['dtype']}")
        spec = Spec(DTYPES[entry["dtype"]], _shape(entry["shape"]))
        start, stop = entry["data_offsets"]
        if start != end or stop - start != spec.nbytes:
            raise ValueError(f"tensor {name} lies at {start} to {stop}, it should take {spec.nbytes} bytes at {end}")
        specs[name], starts[name], end = spec, start, stop
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes, the header speaks of {8 + length + end}")
    return Layout(header, specs, starts)


def _shape(value: Sequence[int]) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n >= 0 for n in value):
        raise ValueError(f"no shape: {value}")
    return tuple(value)
