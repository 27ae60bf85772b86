"""Every recipe that comes with nanoworks trains three steps: its own choices and options, at toy size, on local data.

A new recipe is under this test as soon as its file is there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanoworks.checkpoint import load_checkpoint, save_checkpoint
from nanoworks.config import Recipe, load_recipe
from nanoworks.config.base import Method
from nanoworks.config.load import read_file, recipes_dir
from nanoworks.data import SOURCES
from nanoworks.models import build_model, config_from_dict
from nanoworks.tokenizer import Tokenizer
from nanoworks.train.launch import launch
from tests.docs.test_nanochat_commands import repositories
from tests.train.tiny import TEXT, corpus, tokenizer

RECIPES = sorted(p for p in recipes_dir().rglob("*.yaml") if "stage" in read_file(p))

SIZES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "sliding_window": 16,
}
"""What a recipe says of its model's size, made small; all else that it says stays."""

SMALL = {
    "hardware.device": "cpu",
    "hardware.dtype": "float32",
    "hardware.threads": 1,
    "data.sequence_length": 128,
    "data.buffer": 20,
    "train.tokens_per_step": 512,
    "train.micro_batch_size": 2,
    "eval.tokens": 256,
    "eval.tasks": [],
}
SMALL_RL = {"stage.prompts_per_step": 2, "stage.samples_per_prompt": 2, "stage.max_new_tokens": 8}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class House:
    """A folder with a tokenizer, a model to start from, and a few rows of the data sets that recipes name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = tokenizer(root)
        self.corpus = corpus(root)
        chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": TEXT}]
        (root / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 20)
        self.rows = {"conversations": root / "chats.jsonl"}
        for repository, task in (
            ("HuggingFaceTB/smol-smoltalk", "smoltalk"),
            ("cais/mmlu", "mmlu"),
            ("allenai/ai2_arc", "arc_easy"),
            ("allenai/ai2_arc", "arc_challenge"),
            ("openai/gsm8k", "gsm8k"),
        ):
            self.rows[task] = root / f"{task}.parquet"
            self.rows[task].write_bytes(next(iter(repositories()[repository].values())))

    def local(self, method: dict[str, Any]) -> dict[str, Any]:
        """A data source or task of a recipe, reading what is here."""
        if method["name"] in SOURCES:
            return {"name": "jsonl", "path": str(self.corpus), "weight": method.get("weight")}
        path = self.rows.get(method["name"])
        return {**method, "limit": 20} | ({} if path is None else {"path": str(path)})

    def parent(self, recipe: Recipe) -> Path:
        """What the recipe may start from: a run of ours, or where it names a model of the hub, one like those."""
        if not str(recipe.init_from).startswith("runs/"):
            return self.hugging_face_model()
        family = "nanochat" if recipe.optim.name.startswith("muon") else "llama"
        path = self.root / family
        if not path.exists():
            own = Tokenizer.load(self.tokenizer)
            sizes = {
                k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            }
            values = {"model_type": family, "vocab_size": own.vocab_size, "max_position_embeddings": 512, **sizes}
            model = build_model(config_from_dict(values))
            model.init_weights()
            with save_checkpoint(path, model, own, metadata={}):
                pass
        return path

    def hugging_face_model(self) -> Path:
        """A directory as transformers writes it, with a tokenizer and a chat template that are not ours."""
        path = self.root / "hugging-face"
        if not path.exists():
            raw = tokenizers.Tokenizer(models.BPE())
            raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            raw.decoder = decoders.ByteLevel()
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
            )
            raw.train_from_iterator([TEXT], trainer)
            fast = transformers.PreTrainedTokenizerFast(
                tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
            )
            fast.save_pretrained(path)
            sizes = {
                k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            }
            config = transformers.LlamaConfig(vocab_size=len(fast), max_position_embeddings=512, **sizes)
            transformers.LlamaForCausalLM(config).save_pretrained(path)
        return path

    def small(self, path: Path) -> Recipe:
        """The recipe at toy size."""
        recipe = load_recipe(path, environ={})
        changes = {**SMALL, "run.root": str(self.root / "runs"), "run.name": "-".join(path.parts[-2:])}
        if recipe.init_from is not None:
            changes["init_from"] = str(self.parent(recipe))
        if recipe.tokenizer is not None:
            changes["tokenizer"] = str(self.tokenizer)
        changes |= {f"model.{key}": SIZES[key] for key in recipe.model or {} if key in SIZES}
        for part in ("train", "validation"):
            changes[f"data.{part}"] = [self.local(m.model_dump()) for m in getattr(recipe.data, part)]
        if recipe.stage.name == "rl":
            tasks = [Method.model_validate(task).model_dump() for task in recipe.stage.options["tasks"]]
            changes |= {**SMALL_RL, "stage.tasks": [self.local(task) for task in tasks]}
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return load_recipe(path, overrides, profile="test", environ={})


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(recipes_dir()).with_suffix("")))
def test_recipe_trains_three_steps(house: House, path: Path) -> None:
    recipe = house.small(path)
    outcome = launch(recipe)
    assert outcome.finished
    metrics = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in metrics if "train/loss" in row]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    trained = load_checkpoint(outcome.run)
    assert trained.model.num_parameters() < 2e6, "a size of this recipe's model is not in SIZES"
    if recipe.init_from is not None and recipe.stage.name != "rl":  # where no answer is right, nothing is learned
        start = load_checkpoint(recipe.init_from).model
        still = [n for n, p in start.named_parameters() if p.equal(trained.model.get_parameter(n))]
        frozen = recipe.stage.name == "medusa"  # which adds heads to a model that stays as it is
        assert still == ([n for n, _ in start.named_parameters()] if frozen else [])
