"""From one layout of a checkpoint to another, tensor by tensor, with a certificate that both answer alike.

    convert("runs/sft", Path("export"), "gguf", dtype=torch.float16)

The result is written beside its place under another name and compared with the source; it takes its place when it
passed, and is kept as OUT.failed when not.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoworks.checkpoint import parity
from nanoworks.checkpoint.checkpoint import (
    check_vocabulary,
    load_checkpoint,
    locate,
    read_json,
    save_checkpoint,
    write_sorted,
)
from nanoworks.checkpoint.gguf import export, llama_cpp
from nanoworks.checkpoint.gguf.tokenizer import GgufTokenizer
from nanoworks.checkpoint.nanochat import export_nanochat, is_nanochat
from nanoworks.checkpoint.safetensors_file import Layout, Spec, write_file
from nanoworks.checkpoint.weights import INDEX, SINGLE, WeightFiles, write_index, write_shards, write_weights
from nanoworks.common.errors import UserError, missing_extra
from nanoworks.common.files import MANIFEST, atomic_directory, verify_directory, write_json
from nanoworks.models import Decoder, build_model, config_from_hf
from nanoworks.tokenizer import Tokenizer

LAYOUTS = ("hf", "nanochat", "gguf")

# Besides the weights, what belongs to a model in Hugging Face's layout.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")


Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many bytes of how many; 0 of 0 where nobody knows."""


class ParityError(UserError):
    """The result answers otherwise than the source. It was kept aside."""


def convert(
    source: str | Path,
    out: Path,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    verify: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Write the model at `source` (a run, step, directory or hub id) to the new directory `out`.

    Args:
        layout: one of `LAYOUTS`.
        dtype: of the weights; None keeps what is stored.
        max_shard_bytes: for "hf"; None keeps the source's files.
        verify: compare both sides; parity.json says so either way.

    Raises:
        ParityError: they differ; the result is in OUT.failed.
        UserError: `out` exists, the source is damaged, or its family has no such layout.
    """
    failed = out.with_name(out.name + ".failed")
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    if failed.exists() and not (failed / parity.FILE).is_file():
        raise UserError(f"{failed} is in the way: a result that fails would go there; choose another --out")
    if layout == "gguf" and verify and not llama_cpp.installed():
        raise UserError(f"{missing_extra('xllamacpp', 'gguf')}, or write without a check: --no-verify")
    model = _Model(locate(source))
    if layout == "gguf" and dtype is None:
        dtype = model.dtype if _name(model.dtype) in parity.TOLERANCE else torch.float32
    target = dtype or model.dtype
    work = out.with_name(f".{out.name}.unverified")
    try:
        if layout == "gguf":
            export.check_gguf(model.config)
            if model.tokenizer is None:
                raise UserError(f"{model.directory} has no tokenizer.json, and llama.cpp loads no model without one")
        if layout == "nanochat" and not model.config.model_type.startswith("nanochat"):
            raise UserError(f"only the nanochat family has nanochat's layout, this is a {model.config.model_type}")
        certificate: dict[str, Any] = {"verified": False, "reason": "--no-verify was given"}
        if verify:
            progress("computing what the source answers", 0, 0)
            with model.side() as side:
                longest = export.context_length(model.config) if layout == "gguf" else None
                start = parity.prompts(model.config, model.tokenizer, longest)
                reference = parity.refer(side, start)
            if target not in (model.dtype, torch.float32):
                with model.side(target) as side:
                    parity.round_reference(reference, side)
        done = 0

        def written(count: int) -> None:
            nonlocal done
            done += count
            progress("writing", done, model.parameters * target.itemsize)

        _write(model, work, layout, dtype, max_shard_bytes, written)
        model.release()
        if verify:
            _return_freed_memory()
            progress("comparing it with what was written", 0, 0)
            certificate = _compare(reference, work, layout, model, target)
        certificate.setdefault("versions", parity.versions())
        certificate["source"] = {"path": str(source), "layout": model.layout, "dtype": _name(model.dtype)}
        certificate["result"] = {"layout": layout, "dtype": _name(target)}
        if layout == "gguf" and (note := model.gguf_tokenizer().note):
            certificate["note"] = note
        write_json(work / parity.FILE, certificate)
        if verify and not certificate["verified"]:
            shutil.rmtree(failed, ignore_errors=True)
            os.rename(work, failed)
            raise ParityError(
                f"the result differs from {source}: logits by {certificate['max_logit_difference']:.3g} where "
                f"{certificate['tolerance']:.3g} is allowed; it was kept in {failed}, see its {parity.FILE}"
            )
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Model:
    """What is converted: a directory in Hugging Face's layout, of which only headers are read, or a nanochat
    checkpoint, which is loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.loaded: Decoder | None = None
        self.metadata: Mapping[str, Any] = {}
        if is_nanochat(directory):
            checkpoint = load_checkpoint(directory)
            self.layout, self.loaded, self.tokenizer = "nanochat", checkpoint.model, checkpoint.tokenizer
            self.config, self.metadata = checkpoint.config, checkpoint.metadata
            self.dtype = next(self.loaded.parameters()).dtype
            self.parameters = self.loaded.num_parameters()
            return
        self.layout = "hf"
        verify_directory(directory)
        self.raw = read_json(directory / "config.json")
        self.config = config_from_hf(self.raw)
        self.metadata = self.raw.get("nanoworks", {})
        self.tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
        check_vocabulary(self.config, self.tokenizer)
        with WeightFiles(directory, self.empty()) as files:
            sizes: Counter[torch.dtype] = Counter()
            for spec in files.specs.values():
                sizes[spec.dtype] += spec.nbytes
        self.dtype = sizes.most_common(1)[0][0]
        self.parameters = self.empty().num_parameters()

    def empty(self) -> Decoder:
        """The model without weights."""
        with torch.device("meta"):
            return build_model(self.config)

    @contextmanager
    def side(self, rounded: torch.dtype | None = None) -> Iterator[parity.Side]:
        if self.loaded is not None:
            yield parity.Whole(self.loaded, rounded)
        else:
            with parity.streamed(self.directory, rounded) as side:
                yield side

    def whole(self, dtype: torch.dtype | None) -> Decoder:
        if self.loaded is None:
            return load_checkpoint(self.directory, dtype=dtype).model
        return self.loaded if dtype is None else self.loaded.to(dtype)

    def gguf_tokenizer(self) -> GgufTokenizer:
        return GgufTokenizer(self.directory, self.config.vocab_size)

    def release(self) -> None:
        self.loaded = None


def _write(
    model: _Model,
    work: Path,
    layout: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int | None,
    written: Callable[[int], None],
) -> None:
    """Write the directory `work`; `written` is told the bytes of each tensor."""
    if layout == "nanochat":
        step = model.metadata.get("step", model.metadata.get("nanochat", {}).get("step", 0))
        export_nanochat(model.whole(dtype), model.tokenizer, work, step=int(step))
    elif model.loaded is not None:
        metadata = {**model.metadata, "parent": str(model.directory)}
        with save_checkpoint(work, model.whole(dtype), model.tokenizer, metadata=metadata) as scratch:
            if max_shard_bytes is not None:
                for written_already in scratch.glob("model*.safetensors*"):
                    written_already.unlink()
                write_weights(model.whole(dtype), scratch, max_shard_bytes=max_shard_bytes)
    else:
        with atomic_directory(work) as scratch, WeightFiles(model.directory, model.empty()) as files:
            if layout == "gguf":
                export.write_gguf(
                    scratch / export.FILE,
                    model.empty(),
                    files,
                    model.gguf_tokenizer(),
                    dtype=dtype or model.dtype,
                    written=written,
                )
            else:
                _copy_companions(model, scratch, dtype)
                _copy_weights(files, scratch, dtype, max_shard_bytes, written)


def _copy_companions(model: _Model, scratch: Path, dtype: torch.dtype | None) -> None:
    """Everything but the weights, unchanged, save for the dtype in config.json."""
    weights = {INDEX, MANIFEST, parity.FILE}
    for path in sorted({p for pattern in _COMPANIONS for p in model.directory.glob(pattern)}):
        if path.is_file() and path.name not in weights and not path.name.endswith(".index.json"):
            shutil.copyfile(path, scratch / path.name)
    if dtype is not None and dtype != model.dtype:
        key = "torch_dtype" if "torch_dtype" in model.raw else "dtype"
        write_sorted(scratch / "config.json", {**model.raw, key: _name(dtype)})


def _copy_weights(
    files: WeightFiles,
    scratch: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int | None,
    written: Callable[[int], None],
) -> None:
    """The same files where no change is asked for; otherwise each tensor once, converted."""
    specs = {name: Spec(dtype or spec.dtype, spec.shape) for name, spec in files.specs.items()}

    def read(name: str) -> Tensor:
        tensor = files.read(name).to(specs[name].dtype)
        written(tensor.nbytes)
        return tensor

    if max_shard_bytes is not None:
        write_shards(scratch, specs, read, max_shard_bytes=max_shard_bytes)
    elif specs == files.specs:
        for file in files.files:
            # The header as it is: whatever its order and metadata, and tensors that the model has no use for.
            tensors = ((name, read(name) if name in specs else file.read(name)) for name in file.specs)
            write_file(scratch / file.path.name, file.layout, tensors)
        if files.files[0].path.name != SINGLE:
            shutil.copyfile(files.directory / INDEX, scratch / INDEX)
    else:
        weight_map = {}
        for file in files.files:
            here = {name: specs[name] for name in file.specs if name in specs}
            layout = Layout.of(here, file.layout.metadata)
            write_file(scratch / file.path.name, layout, ((name, read(name)) for name in layout.specs))
            weight_map.update(dict.fromkeys(here, file.path.name))
        if files.files[0].path.name != SINGLE:
            write_index(scratch, specs, weight_map)


@contextmanager
def _result(work: Path, layout: str, model: _Model) -> Iterator[parity.Side | llama_cpp.LlamaCpp]:
    """The side that reads what was written: another program where there is one."""
    if layout == "gguf":
        yield llama_cpp.LlamaCpp(work / export.FILE)
    elif layout == "nanochat":
        yield parity.Whole(load_checkpoint(work).model)
    elif parity.transformers_reads(model.config, model.parameters):
        yield parity.Transformers(work)
    else:
        with parity.streamed(work) as side:
            yield side


def _compare(
    reference: parity.Reference, work: Path, layout: str, model: _Model, target: torch.dtype
) -> dict[str, Any]:
    """The certificate of what was written to `work`, with weights of dtype `target`."""
    # Ours and transformers compute in float32, llama.cpp in the dtype of the file.
    computed = target if layout == "gguf" else torch.float32
    tolerance = parity.TOLERANCE[_name(computed)]
    rerouted = computed != torch.float32 and hasattr(model.config, "num_experts_per_tok")
    with _result(work, layout, model) as result:
        if isinstance(result, parity.Transformers) and model.config.model_type.startswith("nanochat"):
            tolerance = parity.NANOCHAT_TOLERANCE
        share = parity.EXPERTS_SHARE if rerouted else 1.0
        certificate = parity.certify(reference, result, tolerance=tolerance, share=share)
        if isinstance(result, llama_cpp.LlamaCpp):
            certificate["tokenizer"] = _compare_tokenizers(model, result)
    return certificate


def _compare_tokenizers(model: _Model, result: llama_cpp.LlamaCpp) -> dict[str, int]:
    """How many of the fixed texts llama.cpp encodes as the source's tokenizer does."""
    assert model.tokenizer is not None
    same = [result.encode(text) == model.tokenizer.encode(text) for text in parity.TEXTS]
    return {"texts": len(same), "same_ids": sum(same)}


def _return_freed_memory() -> None:
    """Let the C library give back what one side took before the other is loaded: glibc would keep a part of it."""
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
