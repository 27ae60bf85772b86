"""The Python face, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanoworks
from nanoworks.common.errors import UserError
from nanoworks.engine import SamplingParams
from nanoworks.train.launch import launch
from tests.train.tiny import recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("api")
    model = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return launch(recipe(root, model=model, train={"length": "6 steps"})).run


def test_import_is_light() -> None:
    code = "import sys, nanoworks, nanoworks.cli.main; print('torch' in sys.modules or 'pydantic_core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_training_on_one_device_starts_without_what_many_need() -> None:
    code = (
        "import sys, nanoworks.train.launch; heavy = {'torch._dynamo', 'torch.distributed.fsdp', 'deepspeed'}; "
        "print(heavy & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_server_leaves_torch_to_its_engine() -> None:
    modules = "nanoworks.cli.serve, nanoworks.serve.app, nanoworks.serve.supervisor"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_logits_generate_and_chat(run: Path) -> None:
    m = nanoworks.load(run, device="cpu")
    assert m.config.model_type == "llama"
    assert m.logits([[1, 2, 3], [4, 5, 6]]).shape == (2, 3, m.config.vocab_size)
    assert m.logits(torch.tensor([[1]])).dtype == torch.float32
    text = m.generate("the cat", max_tokens=8, temperature=0.0)
    assert isinstance(text, str)
    assert m.generate(["the cat", "a dog"], max_tokens=8, temperature=0.0)[0] == text
    assert len(m.generate("the", n=3, max_tokens=4, seed=1)) == 3
    assert isinstance(m.chat("hello", max_tokens=4, seed=1), str)
    assert isinstance(m.chat([{"role": "user", "content": "hello"}], max_tokens=4), str)


def test_dtype_and_bad_input(run: Path) -> None:
    m = nanoworks.load(run, device="cpu", dtype="bfloat16")
    assert m.model.embed_tokens.weight.dtype == torch.bfloat16
    assert isinstance(m.generate("the cat", max_tokens=4), str)
    with pytest.raises(UserError, match="unknown dtype"):
        nanoworks.load(run, dtype="floaty")
    with pytest.raises(UserError, match=r"must be \(batch, tokens\)"):
        m.logits(torch.tensor([1, 2]))
    with pytest.raises(UserError, match="neither a directory nor a hub id"):
        nanoworks.load(run / "absent")


def test_transformers_loads_a_run_as_it_is(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    m = nanoworks.load(run, device="cpu")
    step = m.checkpoint.path
    reference = AutoModelForCausalLM.from_pretrained(step)
    tokens = torch.randint(0, m.config.vocab_size, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(m.logits(tokens), reference(tokens).logits, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(step)
    text = "the cat sat on 12 mats, né à Paris 🐈\n  and\tran"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == m.tokenizer.encode(text)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A cat."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert rendered == m.tokenizer.render({"messages": messages}).ids
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == m.tokenizer.render_for_completion({"messages": messages[:2]})
    generated = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    answer = generated[0, len(prompt) :].tolist()
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    assert answer
    assert m.engine().generate([prompt], greedy)[0][0].token_ids[: len(answer)] == answer
