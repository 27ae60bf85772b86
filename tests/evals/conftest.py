"""A tiny model that has learned six questions by heart, so that evaluations have something right to find."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from nanoworks.engine import Engine, EngineConfig
from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.tasks import Task, build_task
from nanoworks.tokenizer import Tokenizer, train_tokenizer

FACTS = [
    {"thing": "sky", "colour": "blue", "options": ["red", "blue", "green"]},
    {"thing": "grass", "colour": "green", "options": ["red", "blue", "green"]},
    {"thing": "blood", "colour": "red", "options": ["red", "blue"]},
    {"thing": "snow", "colour": "white", "options": ["black", "white"]},
    {"thing": "coal", "colour": "black", "options": ["black", "white"]},
    {"thing": "sun", "colour": "yellow", "options": ["white", "yellow"]},
]


@dataclass(frozen=True)
class Learner:
    model: Decoder
    tokenizer: Tokenizer
    engine: Engine
    colours: Task
    """Generative: what colour a thing has."""
    choices: Task
    """The same as multiple choice."""
    directory: Path
    """With colours.yaml and choices.yaml."""


@pytest.fixture(scope="session")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    directory = tmp_path_factory.mktemp("evals")
    (directory / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    common = {"path": "facts.jsonl", "prompt": "{{ thing }}?", "answer": "colour"}
    files = {
        "colours": {**common, "name": "colours"},
        "choices": {**common, "name": "choices", "choices": "options", "scorer": "choice"},
    }
    for name, values in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(values))
    colours, choices = (build_task("custom", {"path": str(directory / f"{name}.yaml")}) for name in files)
    texts = [m["content"] for t in (colours, choices) for i in range(len(t)) for m in t.conversation(i)["messages"]]
    tokenizer = train_tokenizer(texts, 340)
    torch.manual_seed(0)
    model = build_model(
        config_from_dict(
            {
                "model_type": "llama",
                "vocab_size": tokenizer.vocab_size,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
            }
        )
    )
    model.init_weights()
    _learn_by_heart(model, tokenizer, [colours, choices])
    engine = Engine(model, tokenizer, EngineConfig(max_num_seqs=8))
    return Learner(model, tokenizer, engine, colours, choices, directory)


def _learn_by_heart(model: Decoder, tokenizer: Tokenizer, tasks: list[Task]) -> None:
    rendered = [tokenizer.render(task.conversation(i)) for task in tasks for i in range(len(task))]
    length = max(len(r.ids) for r in rendered)
    ids = torch.tensor([r.ids + [tokenizer.bos_id] * (length - len(r.ids)) for r in rendered])
    mask = torch.tensor([r.mask + [0] * (length - len(r.mask)) for r in rendered], dtype=torch.float32)
    tokens, targets, weights = ids[:, :-1], ids[:, 1:], mask[:, 1:]
    # Adam by hand: torch.optim takes seconds to import
    parameters = list(model.parameters())
    means = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    for step in range(1, 301):
        loss = model.head.loss(model(tokens, DenseContext(tokens)), targets, weights) / weights.sum()
        if loss.item() < 0.01:
            break
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g, mean, square in zip(parameters, gradients, means, squares, strict=True):
                mean.lerp_(g, 0.1)
                square.lerp_(g * g, 0.01)
                scale = (square / (1 - 0.99**step)).sqrt_().add_(1e-8)
                p.sub_(mean / (1 - 0.9**step) / scale, alpha=3e-3)
    model.eval()
    assert loss.item() < 0.05, "the fixture did not learn"
