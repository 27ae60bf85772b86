from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoworks.checkpoint import latest_step, load_checkpoint, load_state, locate, save_checkpoint, save_state
from nanoworks.checkpoint.keymap import KeyMap
from nanoworks.checkpoint.weights import write_weights
from nanoworks.common import files
from nanoworks.common.errors import UserError
from nanoworks.models import Decoder, build_model, config_from_dict


def tiny(family: str = "llama", **changes: object) -> Decoder:
    torch.manual_seed(0)
    values = {
        "model_type": family,
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    return build_model(config_from_dict({**values, **changes}))


def write(path: Path, model: Decoder | None = None) -> Path:
    with save_checkpoint(path, model or tiny(), None, metadata={}):
        pass
    return path


def test_truncated_altered_and_missing_files_are_named_and_the_step_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000004" / "config.json").unlink()
    weights = tmp_path / "step-000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    weights = tmp_path / "step-000002" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    assert latest_step(tmp_path) == tmp_path / "step-000001"
    for step, word in ((4, "missing"), (3, "truncated"), (2, "altered")):
        assert any(f"step-{step:06d}" in r.message and word in r.message for r in caplog.records)
    with pytest.raises(UserError, match=r"step-000003/model\.safetensors is truncated"):
        load_checkpoint(tmp_path / "step-000003")


def test_a_disk_full_during_a_save_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path / "step-000001")
    before = (good / "model.safetensors").read_bytes()

    def full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write_manifest", full)
    for target in ("step-000001", "step-000002"):
        with pytest.raises(UserError, match="No space left on device; free some space"):
            write(tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]
    assert (good / "model.safetensors").read_bytes() == before


def test_a_really_full_disk_is_reported(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match="No space left on device"), files.atomic_directory(tmp_path / "d"):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_no_step(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        save_checkpoint(tmp_path / "step-000001", tiny(), None, metadata={}),
    ):
        raise KeyboardInterrupt
    assert latest_step(tmp_path) is None


def test_shards_with_an_index_load_like_one_file(tmp_path: Path) -> None:
    model = tiny()
    write(tmp_path / "m", model)
    (tmp_path / "m" / "manifest.json").unlink()
    (tmp_path / "m" / "model.safetensors").unlink()
    write_weights(model, tmp_path / "m", max_shard_bytes=4000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    loaded = load_checkpoint(tmp_path / "m").model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    next((tmp_path / "m").glob("model-00002-*")).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-.* is missing, though"):
        load_checkpoint(tmp_path / "m")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "manifest.json").unlink()
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    norm = "model.norm.weight"
    save_file({**tensors, norm: torch.ones(5)}, weights)
    with pytest.raises(UserError, match=rf"tensor {norm} is \(5,\), the config asks for \(16,\)"):
        load_checkpoint(path)
    save_file({**tensors, "model.extra.weight": torch.ones(5)}, weights)
    with pytest.raises(UserError, match=r"tensor model\.extra\.weight has no place"):
        load_checkpoint(path)
    save_file({k: v for k, v in tensors.items() if k != norm}, weights)
    with pytest.raises(UserError, match=r"no tensor for head\.norm\.weight"):
        load_checkpoint(path)


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m", tiny("nanochat"))
    (path / "manifest.json").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama", "hidden_act": "silu"}))
    with pytest.raises(UserError, match="llama"):
        load_checkpoint(path)
    (path / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(UserError, match=r"unknown model_type 'lama' \(did you mean 'llama'\?\)"):
        load_checkpoint(path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m")
    (path / "manifest.json").unlink()
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        load_checkpoint(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        locate(tmp_path)
    with pytest.raises(UserError, match="neither a directory nor a hub id"):
        locate(tmp_path / "absent")
    (tmp_path / "runs" / "base-sft").mkdir(parents=True)
    for mistyped, meant in {"runs/base-stf": "base-sft", "run/base-sft": "runs"}.items():
        with pytest.raises(UserError, match=rf"\(did you mean '{meant}'\?\)"):
            locate(tmp_path / mistyped)


def test_an_unreachable_hub_names_the_offline_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="without a connection give a local directory"):
        locate("nobody/nothing")


def test_state_round_trip(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"a": torch.arange(3)}, {"step": 7})
    state, values = load_state(tmp_path / "state")
    with state:
        tensors = dict(state)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert values == {"step": 7}
    with pytest.raises(UserError, match="start a new run with init_from"):
        load_state(tmp_path / "other")


def test_keymap_both_ways() -> None:
    keymap = KeyMap(
        {"layers.*.q.weight": "h.*.c_q.weight", "layers.*.experts": "h.*.expert.#.w", "head.*": "lm_head.*"}
    )
    assert keymap.to_foreign("layers.12.q.weight") == "h.12.c_q.weight"
    assert keymap.to_ours("lm_head.weight") == ("head.weight", None)
    assert keymap.stacks("layers.3.experts")
    assert not keymap.stacks("layers.3.q.weight")
    assert keymap.to_foreign("layers.3.experts", 7) == "h.3.expert.7.w"
    assert keymap.to_ours("h.3.expert.7.w") == ("layers.3.experts", 7)
    assert keymap.to_ours("other") is None
