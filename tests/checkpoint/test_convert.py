"""`convert`: nothing is lost on the way, both sides answer alike, and a result that does not is kept aside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nanoworks.checkpoint import convert as module
from nanoworks.checkpoint import load_checkpoint, parity
from nanoworks.checkpoint.convert import ParityError, convert
from nanoworks.checkpoint.nanochat import export_nanochat
from nanoworks.checkpoint.weights import write_index, write_weights
from nanoworks.cli.convert import parse_size
from nanoworks.cli.main import app
from nanoworks.common.errors import UserError
from nanoworks.nn.context import DenseContext
from tests.checkpoint import models
from tests.hub import hub

HUB_CONFIGS = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "pretraining_tp": 1},
    "mistral": {"sliding_window": 96},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def hugging_face(path: Path, family: str, **save: Any) -> Path:
    """A directory written by transformers, with everything that comes with a model on the hub."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=[304, 301],
        tie_word_embeddings=False,
        **HUB_CONFIGS[family],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path, **save)
    models.tokenizer().save(path)
    (path / "special_tokens_map.json").write_text('{"bos_token": "<|bos|>"}')
    (path / "LICENSE").write_text("free")
    return path


def certificate(path: Path) -> dict[str, Any]:
    return json.loads((path / parity.FILE).read_text())


def same_files(source: Path, result: Path) -> None:
    ours = {"manifest.json", parity.FILE}
    names = {p.name for p in source.iterdir()} - ours
    assert {p.name for p in result.iterdir()} - ours == names
    for name in names:
        assert (result / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("family", HUB_CONFIGS)
def test_hugging_face_to_hugging_face_is_byte_identical(tmp_path: Path, family: str) -> None:
    source = hugging_face(tmp_path / "in", family)
    convert(source, tmp_path / "out", "hf")
    same_files(source, tmp_path / "out")
    found = certificate(tmp_path / "out")
    assert found["verified"]
    assert found["greedy_agreement"] == 1
    assert found["max_logit_difference"] < 1e-5
    assert found["result_read_by"].startswith("transformers ")
    assert found["positions"] > found["greedy_tokens"] == 4 * parity.GREEDY_TOKENS


@pytest.mark.parametrize("family", HUB_CONFIGS)
def test_through_the_model_and_back_is_byte_identical(tmp_path: Path, family: str) -> None:
    """As a training run reads and writes it."""
    source = hugging_face(tmp_path / "in", family)
    model = load_checkpoint(source).model
    write_weights(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    module.write_sorted(tmp_path / "config.json", model.config.to_hf())
    assert (tmp_path / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_shards_stay_the_shards_they_were(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in", "llama", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    convert(source, tmp_path / "out", "hf")
    same_files(source, tmp_path / "out")


def test_one_shard_with_an_index(tmp_path: Path) -> None:
    """Some repositories have one shard, and an index of it."""
    source = hugging_face(tmp_path / "in", "llama")
    names = load_file(source / "model.safetensors").keys()
    shard = "model-00001-of-00001.safetensors"
    (source / "model.safetensors").rename(source / shard)
    write_index(source, {}, dict.fromkeys(names, shard))
    convert(source, tmp_path / "out", "hf", verify=False)
    same_files(source, tmp_path / "out")
    convert(source, tmp_path / "half", "hf", dtype=torch.float16, verify=False)
    assert load_checkpoint(tmp_path / "half").model.embed_tokens.weight.dtype == torch.float16


def test_dtype_and_size_of_shards(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "in", "mixtral", max_shard_size="60KB")
    names = [p.name for p in source.glob("*.safetensors")]
    convert(source, tmp_path / "bf16", "hf", dtype=torch.bfloat16)
    assert sorted(p.name for p in (tmp_path / "bf16").glob("*.safetensors")) == sorted(names)
    for name in names:
        before, after = load_file(source / name), load_file(tmp_path / "bf16" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k].bfloat16(), after[k]) for k in before)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    found = certificate(tmp_path / "bf16")
    assert found["verified"]
    assert found["rounding"]["max_logit_difference"] > 100 * found["max_logit_difference"] > 0
    assert found["source"]["dtype"], found["result"]["dtype"] == ("float32", "bfloat16")

    convert(source, tmp_path / "one", "hf", max_shard_bytes=10**9)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for name in names:
        assert all(torch.equal(tensor, whole.pop(key)) for key, tensor in load_file(source / name).items())
    assert not whole
    assert not list((tmp_path / "one").glob("*.index.json"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("family", models.FAMILIES)
def test_ours_generates_the_same_in_transformers(tmp_path: Path, family: str) -> None:
    """64 greedy tokens by from_pretrained and by our model without a cache."""
    model = models.make(family)
    convert(models.save(tmp_path / "in", model), tmp_path / "out", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs.generation_config.eos_token_id = None  # 64 whatever they are
    prompt = torch.tensor([models.tokenizer().encode("the quick brown", bos=True)])
    options = transformers.GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=options)
    tokens = prompt
    with torch.inference_mode():
        for _ in range(64):
            logits = model.head(model(tokens, DenseContext(tokens))[:, -1:])
            tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
    assert tokens.tolist() == expected.tolist()


def test_a_result_that_answers_otherwise_is_kept_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.save(tmp_path / "in", models.make())
    write_file = module.write_file

    def exchange(path: Path, layout: Any, tensors: Any) -> None:
        """Write the gate where the up projection belongs, in one layer."""
        name = "model.layers.1.mlp.{}_proj.weight"
        all_of = dict(tensors)
        all_of[name.format("up")], all_of[name.format("gate")] = all_of[name.format("gate")], all_of[name.format("up")]
        write_file(path, layout, all_of.items())

    monkeypatch.setattr(module, "write_file", exchange)
    for _ in range(2):  # a second failure replaces the first
        with pytest.raises(ParityError, match=r"logits by .* is allowed; it was kept in .*out\.failed"):
            convert(source, tmp_path / "out", "hf")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.failed"]
        found = certificate(tmp_path / "out.failed")
        assert not found["verified"]
        assert found["max_logit_difference"] > found["tolerance"]
    convert(source, tmp_path / "out", "hf", verify=False)
    found = certificate(tmp_path / "out")
    assert not found["verified"]
    assert found["reason"] == "--no-verify was given"


def test_nan_in_the_result_is_no_parity(tmp_path: Path) -> None:
    class Broken:
        reader = "nobody"

        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.full((*tokens.shape, 320), torch.nan)

    model = models.make()
    reference = parity.refer(parity.Whole(model), parity.prompts(model.config, None))
    assert parity.certify(reference, parity.Whole(model), tolerance=0.0)["verified"]
    found = parity.certify(reference, Broken(), tolerance=0.1)
    assert not found["verified"]
    assert found["positions_within_tolerance"] == 0


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_streamed_model_is_the_whole_one(tmp_path: Path, family: str) -> None:
    model = models.make(family)
    path = models.save(tmp_path / "in", model)
    start = parity.prompts(model.config, models.tokenizer())
    assert start.size(1) > (96 if family == "mistral" else 0)  # beyond the window
    with parity.streamed(path) as side:
        assert torch.equal(side.logits(start), parity.Whole(model).logits(start))
        held = [n for n, p in side.model.named_parameters() if n.startswith("layers.") and p.device.type != "meta"]
        assert not held


def test_large_models_are_not_read_by_transformers() -> None:
    config = models.make().config
    assert parity.transformers_reads(config, 10**8)
    assert not parity.transformers_reads(config, 10**9)


def test_nanochat_to_hugging_face_and_back(tmp_path: Path, shared_dir: Path) -> None:
    source = shared_dir / "golden/nanochat/old/base/base_checkpoints/d2"
    convert(source, tmp_path / "hf", "hf")
    found = certificate(tmp_path / "hf")
    assert found["verified"]
    assert found["source"]["layout"] == "nanochat"
    convert(tmp_path / "hf", tmp_path / "back", "nanochat")
    assert certificate(tmp_path / "back")["verified"]
    (file,) = (tmp_path / "back").glob("model_*.pt")
    assert file.name == "model_000120.pt"
    ours = torch.load(file, weights_only=True)
    theirs = torch.load(source / file.name, weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k].float()) for k in ours)
    convert(source, tmp_path / "small", "hf", dtype=torch.bfloat16, max_shard_bytes=300_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    assert certificate(tmp_path / "small")["verified"]


@pytest.mark.parametrize("real", [True, False])
def test_nanochat_of_2026_to_hugging_face_and_back(tmp_path: Path, real: bool, request: pytest.FixtureRequest) -> None:
    """The same bytes of every tensor and the same configuration: a checkpoint of nanochat itself, and a tiny one."""
    if real:
        source = request.getfixturevalue("shared_dir") / "golden/nanochat/new/base/base_checkpoints/d4"
    else:
        source = tmp_path / "d2"
        layers = {"intermediate_size": 256, "num_key_value_heads": 4, "vocab_size": 320}
        export_nanochat(models.make("nanochat_2026", **layers), models.tokenizer(), source, step=120)
    convert(source, tmp_path / "hf", "hf")
    found = certificate(tmp_path / "hf")
    assert found["verified"]
    assert found["source"]["layout"] == "nanochat"
    convert(tmp_path / "hf", tmp_path / "back", "nanochat")
    assert certificate(tmp_path / "back")["verified"]
    ours, theirs = (torch.load(d / "model_000120.pt", weights_only=True) for d in (tmp_path / "back", source))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert ours[key].shape == tensor.shape, key
        assert ours[key].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes(), key
    ours_meta, their_meta = (json.loads((d / "meta_000120.json").read_text()) for d in (tmp_path / "back", source))
    assert ours_meta["model_config"] == their_meta["model_config"]


def test_bad_requests(tmp_path: Path) -> None:
    source = models.save(tmp_path / "in", models.make())
    with pytest.raises(UserError, match="in exists already"):
        convert(source, source, "hf")
    with pytest.raises(UserError, match="only the nanochat family has nanochat's layout, this is a llama"):
        convert(source, tmp_path / "out", "nanochat")
    (tmp_path / "out.failed").mkdir()
    with pytest.raises(UserError, match=r"out\.failed is in the way"):
        convert(source, tmp_path / "out", "hf")
    for text in ("5 apples", "-1GB", "0", "GB"):
        with pytest.raises(UserError, match="is no size"):
            parse_size(text)
    assert [parse_size(t) for t in ("5GB", "0.5 mb", "64KB", "1000")] == [5 * 10**9, 500_000, 64_000, 1000]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.save(tmp_path / "in", models.make())

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "certify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The hub's clients with an empty cache; `setattr` of the address is left to the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return monkeypatch


def test_a_hub_id_is_fetched_without_what_is_not_needed(tmp_path: Path, online: pytest.MonkeyPatch) -> None:
    source = hugging_face(tmp_path / "in", "qwen2")
    files = {p.name: p.read_bytes() for p in source.iterdir()}
    extra = {"pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"other", "README.md": b"hello", "run.py": b"!"}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"}
    with hub({"someone/model": {**files, **extra}, "someone/pickled": pickled}) as url:
        online.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        online.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        convert("someone/model", tmp_path / "out", "hf")
        with pytest.raises(UserError, match=r"someone/pickled has pickled weights only \(pytorch_model\.bin\)"):
            convert("someone/pickled", tmp_path / "pickled", "hf")
        with pytest.raises(UserError, match="someone/nothing is no directory here, and could not be fetched"):
            convert("someone/nothing", tmp_path / "nothing", "hf")
    same_files(source, tmp_path / "out")
    fetched = {p.name for p in (tmp_path / "cache").rglob("*") if not p.is_dir()}
    assert not fetched & {"pytorch_model.bin", "README.md", "run.py"}


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    source = models.save(tmp_path / "in", models.make())
    options = ["--to", "hf", "--dtype", "bfloat16", "--max-shard-size", "50KB"]
    result = CliRunner().invoke(app, ["convert", str(source), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'out'}" in result.output.replace("\n", "")
    assert certificate(tmp_path / "out")["verified"]
    shutil.rmtree(tmp_path / "out")
    result = CliRunner().invoke(app, ["convert", str(source), "--out", str(tmp_path / "out"), *options, "--no-verify"])
    assert result.exit_code == 0, result.output
    assert not certificate(tmp_path / "out")["verified"]
