"""Files of weights: the same bytes as the library's, and what is said of those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoworks.checkpoint import load_checkpoint
from nanoworks.checkpoint.safetensors_file import DTYPES, Layout, SafetensorsFile, Spec, write_file
from nanoworks.checkpoint.weights import INDEX, write_weights
from nanoworks.common.errors import UserError
from tests.checkpoint import models


def ours(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_file(path, Layout.of(specs, metadata), tensors.items())
    return path.read_bytes()


def test_files_are_byte_identical_to_the_librarys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"t{i % 3}.{name}": torch.randn(3, 5).to(dtype) for i, (name, dtype) in enumerate(DTYPES.items())}
    tensors |= {"naïve": torch.zeros(0), "scalar": torch.tensor(2.5), "turned": torch.randn(4, 3).t()}
    for count in (1, 2, len(tensors)):  # headers of several lengths: the padding differs
        chosen = dict(list(tensors.items())[-count:])
        save_file({k: v.contiguous() for k, v in chosen.items()}, tmp_path / "theirs", metadata={"format": "pt"})
        assert ours(tmp_path / "ours", chosen, {"format": "pt"}) == (tmp_path / "theirs").read_bytes()
    with SafetensorsFile(tmp_path / "theirs") as file:
        assert file.specs.keys() == tensors.keys()
        assert file.layout.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            read = file.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_a_layout_is_kept_as_it_is(tmp_path: Path) -> None:
    """Other writers order tensors otherwise; written with the header that was read, nothing moves."""
    a, b = torch.randn(3), torch.randn(2, 2)
    header = json.dumps(
        {
            "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
            "a": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]},
        }
    ).encode()
    data = len(header).to_bytes(8, "little") + header + b.numpy().tobytes() + a.numpy().tobytes()
    (tmp_path / "foreign").write_bytes(data)
    with SafetensorsFile(tmp_path / "foreign") as file:
        write_file(tmp_path / "copy", file.layout, {"a": file.read("a"), "b": file.read("b")}.items())
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("cut", [4, 20, -1])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"f is truncated or altered"):
        SafetensorsFile(tmp_path / "f")


def test_a_mapped_tensor_is_private_and_outlives_its_file(tmp_path: Path) -> None:
    held = {
        "wide": torch.randn(300, 70, dtype=torch.float64),
        "halves": torch.randn(5001).bfloat16(),
        "odd": torch.arange(7, dtype=torch.uint8),
        "one": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(held, path)
    before = path.read_bytes()
    with SafetensorsFile(path) as file:
        mapped = {name: file.read(name, mapped=True) for name in held}
    for name, tensor in held.items():
        assert (mapped[name].dtype, mapped[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(mapped[name], tensor), name
    mapped["wide"].zero_()
    assert path.read_bytes() == before
    path.unlink()
    assert torch.equal(mapped["halves"], held["halves"])


def test_where_files_cannot_be_mapped_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no such device")

    save_file({"a": torch.arange(5.0)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("nanoworks.checkpoint.safetensors_file.mmap.mmap", refused)
    with SafetensorsFile(tmp_path / "model.safetensors") as file:
        assert torch.equal(file.read("a", mapped=True), torch.arange(5.0))


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    for entry, words in (
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "should take 16 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}, "at 0"),
        ({"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}, "unknown dtype F7"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "no shape"),
        ({"shape": [2]}, "data_offsets"),
    ):
        header = json.dumps({"a": entry}).encode()
        (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(UserError, match=words):
            SafetensorsFile(tmp_path / "f")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral", "qwen3_moe"])
def test_shards_hold_what_one_file_does(tmp_path: Path, family: str) -> None:
    model = models.make(family)
    write_weights(model, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "s").mkdir()
    write_weights(model, tmp_path / "s", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "s" / INDEX).read_text())
    files = sorted((tmp_path / "s").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
    assert index["metadata"] == {
        "total_parameters": model.num_parameters(),
        "total_size": sum(t.nbytes for t in whole.values()),
    }
    for file in files:
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name
            assert torch.equal(tensor, whole.pop(name)), name
    assert not whole
    assert ("lm_head.weight" in index["weight_map"]) == (family != "llama-tied")


def alter(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a single file, None removes one; the manifest, which would notice, goes."""
    (path / "manifest.json").unlink(missing_ok=True)
    tensors = {**load_file(path / "model.safetensors"), **change}
    save_file({k: v for k, v in tensors.items() if v is not None}, path / "model.safetensors", {"format": "pt"})


def test_nan_and_infinity_are_named(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m", models.make())
    good = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = good[name].clone()
        bad[3, 4] = value
        alter(path, {name: bad})
        with pytest.raises(UserError, match=rf"{name} holds NaN or infinite values"):
            load_checkpoint(path)
    # A sum that overflows is no value that does.
    alter(path, {name: torch.full_like(good[name], 60000, dtype=torch.float16)})
    load_checkpoint(path)


def test_experts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m", models.make("mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    tensor = load_file(path / "model.safetensors")[name.format(2)]
    alter(path, {name.format(2): None})
    with pytest.raises(UserError, match=r"no tensor for expert 2 of layers\.1\.mlp\.experts\.down_proj\.weight"):
        load_checkpoint(path)
    alter(path, {name.format(2): tensor, name.format(4): tensor.clone()})
    with pytest.raises(UserError, match=rf"tensor {name.format(4)} is of expert 4, the config has 4"):
        load_checkpoint(path)
    alter(path, {name.format(4): None, name.format(3): tensor[:5].clone()})
    with pytest.raises(UserError, match=rf"{name.format(3)} is \(5, 96\), the config asks for \(64, 96\)"):
        load_checkpoint(path)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m", models.make())
    (path / "manifest.json").unlink()
    (path / "model.safetensors").unlink()
    write_weights(models.make(), path, max_shard_bytes=100_000)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.other.weight"] = next(iter(index["weight_map"].values()))
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-0000.-of-.*safetensors holds model\.other\.weight, which it does not"):
        load_checkpoint(path)
    (path / INDEX).write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        load_checkpoint(path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m", models.make(vocab_size=300))
    with pytest.raises(UserError, match="the tokenizer has 320 tokens but the model only 300"):
        load_checkpoint(path)
