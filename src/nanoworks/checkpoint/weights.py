"""Weights between a model and safetensors files in Hugging Face's layout, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nanoworks.checkpoint.keymap import KeyMap, Place
from nanoworks.checkpoint.safetensors_file import Layout, SafetensorsFile, Spec, write_file
from nanoworks.common.errors import UserError
from nanoworks.models import ARCHITECTURES, Decoder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

Cut = Callable[[Decoder], Callable[[str, Tensor], Tensor]]
"""Given a model, keeps a share of it and returns what takes the share of a tensor (see `parallel.tensor.Shard.cut`)."""

Parts = Mapping[int | None, str]
"""The foreign tensors that make one of ours: by expert, or the only one under None."""


Read = Callable[[str], Tensor]
"""Gives the whole of our tensor of a name."""


def write_weights(
    model: Decoder, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, read: Read | None = None
) -> None:
    """Write `model.safetensors`, or numbered shards with an index when it would exceed `max_shard_bytes`.

    `read` gives the values where those of `model` are elsewhere (it may then be on the meta device). It is called for
    each parameter once, in the order of `owned_parameters`, and only one result is held.
    """
    find = read or model.get_parameter
    parts = dict(_separate(model, hf_keymap(model)))
    specs = {
        name: Spec(p.dtype, tuple(p.shape if expert is None else p.shape[1:])) for name, (p, expert) in parts.items()
    }
    names = {id(p): name for name, p in owned_parameters(model).items()}
    held: tuple[Tensor | None, Tensor | None] = None, None

    def part(name: str) -> Tensor:
        nonlocal held
        parameter, expert = parts[name]
        if held[0] is not parameter:
            held = parameter, find(names[id(parameter)]).detach()
        assert held[1] is not None
        return held[1] if expert is None else held[1][expert]

    write_shards(directory, specs, part, max_shard_bytes=max_shard_bytes)


def write_shards(
    directory: Path, specs: Mapping[str, Spec], read: Callable[[str], Tensor], *, max_shard_bytes: int
) -> None:
    """Write the tensors that `read` gives by name, in as many files as `max_shard_bytes` asks for."""
    shards = split(specs, max_shard_bytes)
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        layout = Layout.of({name: specs[name] for name in shard}, {"format": "pt"})
        write_file(directory / file, layout, ((name, read(name)) for name in shard))
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        write_index(directory, specs, weight_map)


def write_index(directory: Path, specs: Mapping[str, Spec], weight_map: Mapping[str, str]) -> None:
    """Write the index of shards, `weight_map` being tensor name -> file, as transformers writes it."""
    metadata = {
        "total_parameters": sum(math.prod(s.shape) for s in specs.values()),
        "total_size": sum(s.nbytes for s in specs.values()),
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def split(specs: Mapping[str, Spec], max_shard_bytes: int) -> list[list[str]]:
    """Names in groups of at most `max_shard_bytes`, in order; a tensor that is larger is alone."""
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


class WeightFiles:
    """The weights of a Hugging Face directory: known from the headers, read when asked for. A context manager."""

    def __init__(self, directory: Path, model: Decoder, *, mapped: bool = False) -> None:
        """Compare the headers with `model`, whose parameters may be on the meta device. `mapped`: what is read stays in
        the files (see `SafetensorsFile.read`).

        Raises:
            UserError: pickled weights only, a file that is missing or damaged, or a tensor that is missing, unknown
                or of another shape than the model's (all named).
        """
        self.directory, self._mapped = directory, mapped
        self.files: list[SafetensorsFile] = []
        try:
            for path in _paths(directory):
                self.files.append(SafetensorsFile(path))
            self._home = {name: file for file in self.files for name in file.specs}
            for name, file in _weight_map(directory).items():
                if name not in self._home:
                    raise UserError(f"{INDEX} says that {directory / file} holds {name}, which it does not")
            keymap = hf_keymap(model)
            found = {
                foreign: (keymap.to_ours(foreign) or Place(foreign, None), file.specs[foreign].shape)
                for foreign, file in self._home.items()
                if not foreign.endswith("rotary_emb.inv_freq")  # derived from the config
            }
            self.parts = arrange(model, found, str(directory))
        except UserError:
            self.close()
            raise

    @property
    def specs(self) -> dict[str, Spec]:
        """Of every tensor that belongs to the model, by its name in the files, in the model's order."""
        names = [foreign for parts in self.parts.values() for foreign in parts.values()]
        return {name: self._home[name].specs[name] for name in names}

    def read(self, name: str) -> Tensor:
        """The tensor `name` (as the files call it); UserError when it is not finite."""
        tensor = self._home[name].read(name, mapped=self._mapped)
        check_finite(tensor, name, str(self.directory))
        return tensor

    def read_ours(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Our tensor `name`, experts stacked; `dtype` None keeps what the files hold."""
        return _join(self.parts[name], self.read, dtype, None)

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_weights(
    model: Decoder,
    directory: Path,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    cut: Cut | None = None,
    mapped: bool = False,
) -> None:
    """Fill `model` (which may be on the meta device) from the safetensors files of `directory`.

    `dtype` None keeps what the files hold; `mapped` leaves it there (see `SafetensorsFile.read`); `cut` leaves a share
    of the model, of which no more than one whole tensor is held at a time. UserError as for `WeightFiles` and where a
    value is not finite.
    """
    with WeightFiles(directory, model, mapped=mapped) as files:
        take = None if cut is None else cut(model)
        _load(model, files.parts, files.read, device=device, dtype=dtype, take=take)


def fill(
    model: Decoder,
    tensors: Iterable[tuple[Place, str, Tensor]],
    source: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Assign (place, their name, tensor) to the parameters of `model`, which must all be met."""
    held = {foreign: (place, tensor) for place, foreign, tensor in tensors}
    parts = arrange(model, {f: (place, tuple(t.shape)) for f, (place, t) in held.items()}, source)

    def read(foreign: str) -> Tensor:
        check_finite(held[foreign][1], foreign, source)
        return held[foreign][1]

    _load(model, parts, read, device=device, dtype=dtype)


def arrange(
    model: Decoder, found: Mapping[str, tuple[Place, tuple[int, ...]]], source: str
) -> dict[str, dict[int | None, str]]:
    """For each parameter of `model`, which of the tensors `found` (foreign name -> place and shape) make it.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; it is named with both shapes.
    """
    expected = owned_parameters(model)
    family = model.config.model_type
    parts: dict[str, dict[int | None, str]] = {name: {} for name in expected}
    for foreign, ((name, expert), found_shape) in found.items():
        if name not in expected:
            if name == "head.lm_head.weight" and model.config.tie_word_embeddings:
                continue  # some writers store a tied weight twice
            raise UserError(f"{source}: tensor {foreign} has no place in a {family} of this config")
        shape = tuple(expected[name].shape[expert is not None :])
        if found_shape != shape:
            raise UserError(f"{source}: tensor {foreign} is {found_shape}, the config asks for {shape}")
        if expert is not None and expert >= expected[name].size(0):
            raise UserError(
                f"{source}: tensor {foreign} is of expert {expert}, the config has {expected[name].size(0)}"
            )
        parts[name][expert] = foreign
    missing = [name for name, made in parts.items() if not made]
    for name, made in parts.items():
        if made and None not in made:
            missing += [f"expert {e} of {name}" for e in range(expected[name].size(0)) if e not in made]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        shape = tuple(expected[missing[0].split()[-1]].shape)
        raise UserError(f"{source}: no tensor for {missing[0]} {shape}{more}; is this a {family}, and complete?")
    return {name: dict(sorted(made.items(), key=lambda item: item[0] or 0)) for name, made in parts.items()}


def check_finite(tensor: Tensor, name: str, source: str) -> None:
    """UserError when `tensor` holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        return
    # A sum is not finite when a value is not, and needs no memory; only where it overflows is each value looked at.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise UserError(
            f"{source}: tensor {name} holds NaN or infinite values; the run that wrote it had diverged, "
            "take a checkpoint from before"
        )


def owned_parameters(model: Decoder) -> Mapping[str, Tensor]:
    """Every parameter once: a tied head is the embedding's."""
    return dict(model.named_parameters())


def hf_keymap(model: Decoder) -> KeyMap:
    return KeyMap(ARCHITECTURES.get(model.config.model_type).keymaps["hf"])


def _separate(model: Decoder, keymap: KeyMap) -> Iterator[tuple[str, tuple[Tensor, int | None]]]:
    """Every tensor under its foreign name: the parameter, and which of stacked experts (None: all of it)."""
    for name, tensor in owned_parameters(model).items():
        assert keymap.to_foreign(name) is not None, f"the key map of {model.config.model_type} lacks {name}"
        for expert in range(tensor.size(0)) if keymap.stacks(name) else (None,):
            yield str(keymap.to_foreign(name, expert)), (tensor, expert)


def _load(
    model: Decoder,
    parts: Mapping[str, Parts],
    read: Callable[[str], Tensor],
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    take: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    state = {}
    for name, made in parts.items():
        tensor = _join(made, read, dtype, device)
        state[name] = tensor if take is None else take(name, tensor)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


def _join(
    parts: Parts, read: Callable[[str], Tensor], dtype: torch.dtype | None, device: str | torch.device | None
) -> Tensor:
    """One of our tensors from its parts: the only one, or experts stacked one after the other."""
    if None in parts:
        tensor = read(parts[None])
        return tensor.to(device=device, dtype=dtype or tensor.dtype)
    stack: Tensor | None = None
    for expert, foreign in parts.items():
        tensor = read(foreign)
        if stack is None:
            stack = torch.empty(len(parts), *tensor.shape, device=device, dtype=dtype or tensor.dtype)
        stack[expert] = tensor
    assert stack is not None
    return stack


def _paths(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    files = [directory / name for name in sorted(set(_weight_map(directory).values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though {INDEX} names it")
    if files:
        return files
    if list(directory.glob("*.bin")) or list(directory.glob("*.pth")) or list(directory.glob("*.pt")):
        raise UserError(
            f"{directory} holds pickled weights only, which can run code when read; convert them to safetensors "
            "first (transformers: save_pretrained(..., safe_serialization=True))"
        )
    raise UserError(f"{directory} holds no {SINGLE} and no {INDEX}")


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file, as the index says; empty where the weights are one file."""
    index = directory / INDEX
    if (directory / SINGLE).is_file() or not index.is_file():
        return {}
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is damaged; copy it again from where the model came") from None
