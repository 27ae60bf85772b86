"""Two programs that people point at an OpenAI endpoint: lm-eval and guidellm, as they are.

python scripts/peers.py lm-eval guidellm        # their pins clash with ours, so each has its own environment
pytest -m slow tests/serve/api/test_clients.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nanoworks.engine import Engine, SamplingParams

PEERS = Path(__file__).parents[3] / ".bench" / "peers"
QUESTIONS = [f"Question {i}: is {i} a prime?" for i in range(6)]
CHOICES = ["yes", "no", "maybe so"]

pytestmark = pytest.mark.slow


def run(name: str, program: str, *arguments: str) -> str:
    """Run a program of a client's environment, offline; skip the test where it is not installed."""
    path = PEERS / name / "bin" / program
    if not path.exists():
        pytest.skip(f"{name} is not installed; python scripts/peers.py {name} does it")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(path), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def engine(make_engine: Any) -> Engine:
    return make_engine(context=512)


@pytest.fixture(scope="module")
def url(serve: Any, engine: Engine) -> Any:
    with serve(engine) as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer_dir(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    engine.tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of lm-eval over six questions: choose an answer by its likelihood, and write one."""
    path = tmp_path_factory.mktemp("tasks")
    documents = [json.dumps({"question": q, "choices": CHOICES, "answer": i % 3}) for i, q in enumerate(QUESTIONS)]
    (path / "test.jsonl").write_text("\n".join(documents))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "test.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choose = {
        **shared,
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    }
    write = {
        **shared,
        "task": "write",
        "output_type": "generate_until",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choose, write):
        (path / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return path


def lm_eval(url: str, model: str, path: str, tokenizer: Path, tasks: Path, names: str, out: Path) -> dict[str, Any]:
    """Return the logged samples of each task."""
    run(
        "lm-eval",
        "lm_eval",
        "--model",
        model,
        "--model_args",
        f"model=tiny,base_url={url}{path},tokenizer={tokenizer},tokenizer_backend=huggingface,num_concurrent=4",
        "--tasks",
        names,
        "--include_path",
        str(tasks),
        "--output_path",
        str(out),
        "--log_samples",
        *(["--apply_chat_template"] if "chat" in model else []),
    )
    found = {}
    for name in names.split(","):
        [file] = out.rglob(f"samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        found[name] = sorted(samples, key=lambda sample: sample["doc_id"])
    return found


def test_lm_eval_on_completions(url: str, engine: Engine, tokenizer_dir: Path, tasks: Path, tmp_path: Path) -> None:
    """Over HTTP it finds the log-likelihoods and the texts that the engine itself does."""
    found = lm_eval(url, "local-completions", "/v1/completions", tokenizer_dir, tasks, "choose,write", tmp_path)
    encode = engine.tokenizer.encode
    for question, sample in zip(QUESTIONS, found["choose"], strict=True):
        expected = engine.loglikelihood([(encode(question), encode(f" {choice}")) for choice in CHOICES])
        for own, [[score, greedy]] in zip(expected, sample["resps"], strict=True):
            assert float(score) == pytest.approx(own.sum, abs=1e-3)
            assert str(greedy) == str(own.greedy)
    params = SamplingParams(max_tokens=8, temperature=0, stop=("\n",))
    for question, sample in zip(QUESTIONS, found["write"], strict=True):
        [[own]] = engine.generate([encode(question)], params)
        assert sample["resps"] == [[own.text]]


def test_lm_eval_on_chat(url: str, engine: Engine, tokenizer_dir: Path, tasks: Path, tmp_path: Path) -> None:
    found = lm_eval(url, "local-chat-completions", "/v1/chat/completions", tokenizer_dir, tasks, "write", tmp_path)
    params = SamplingParams(max_tokens=8, temperature=0, stop=("\n",))
    for question, sample in zip(QUESTIONS, found["write"], strict=True):
        messages = [{"role": "user", "content": question}]
        [[own]] = engine.generate([engine.tokenizer.render_for_completion({"messages": messages})], params)
        [[text]] = sample["resps"]
        assert own.text.startswith(text)  # but for the calculator's marks, which a chat's text is without


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(url: str, tokenizer_dir: Path, tmp_path: Path, path: str) -> None:
    report = tmp_path / "report.json"
    run(
        "guidellm",
        "guidellm",
        "run",
        "--backend",
        f"kind=openai_http,target={url},model=tiny,request_format={path}",
        "--tokenizer",
        f"kind=hf_auto,model={tokenizer_dir}",
        "--data",
        "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
        "--profile",
        "kind=concurrent,streams=2",
        "--constraint",
        "kind=max_requests,count=8",
        "--output",
        f"kind=json,path={report}",
        "--disable-progress",
    )
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert len(requests["successful"]) == 8
    assert not requests["errored"]
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {8}
