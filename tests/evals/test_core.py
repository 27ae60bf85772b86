"""CORE over a small bundle in the official layout."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from nanoworks.common.errors import UserError
from nanoworks.evals.core import evaluate_core, item_pairs, item_texts
from nanoworks.evals.core_bundle import CoreTask, load_bundle
from nanoworks.nn.context import DenseContext
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer

MC = [
    {"query": f"Question {i}: hot or cold?", "choices": ["hot", "hotter by far", "cold"], "gold": i % 3}
    for i in range(9)
]
SCHEMA = [
    {"context_options": [f"Ann {i} fell", f"The dog {i} fell"], "continuation": "and she cried", "gold": i % 2}
    for i in range(5)
]
LM = [{"context": f"  one two three {i} ", "continuation": "four five"} for i in range(4)]
BASELINES = {"mc": 33.0, "schema": 50.0, "lm": 0.0}


def task(kind: str, *, shots: int = 0, delimiter: str = " ") -> CoreTask:
    return CoreTask(kind, kind, shots, delimiter, 0.0, Path("unused"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "eval_bundle"
    (root / "eval_data" / "world").mkdir(parents=True)
    for name, items in (("mc", MC), ("schema", SCHEMA), ("lm", LM)):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (root / "eval_data" / "world" / f"{name}.jsonl").write_text(lines)
    entry = {"num_fewshot": [2], "batch_size": 4}
    entries = [
        {"label": "mc", "dataset_uri": "world/mc.jsonl", "icl_task_type": "multiple_choice", **entry},
        {
            "label": "schema",
            "dataset_uri": "world/schema.jsonl",
            "icl_task_type": "schema",
            "continuation_delimiter": ", ",
            "num_fewshot": [0],
        },
        {"label": "lm", "dataset_uri": "world/lm.jsonl", "icl_task_type": "language_modeling", **entry},
    ]
    (root / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    rows = "".join(f"{name},somewhere,{value}\n" for name, value in BASELINES.items())
    (root / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\n" + rows)
    return root


def test_texts_of_the_three_kinds():
    shots = [MC[1], MC[2]]
    assert item_texts(task("multiple_choice", delimiter="\nAnswer: "), MC[0], shots)[1] == (
        "Question 1: hot or cold?\nAnswer: hotter by far\n\nQuestion 2: hot or cold?\nAnswer: cold\n\n"
        "Question 0: hot or cold?\nAnswer: hotter by far"
    )
    assert item_texts(task("schema"), SCHEMA[0], [SCHEMA[1]]) == [
        "The dog 1 fell and she cried\n\nAnn 0 fell and she cried",
        "The dog 1 fell and she cried\n\nThe dog 0 fell and she cried",
    ]
    assert item_texts(task("language_modeling"), LM[0], [LM[1]]) == [
        "one two three 1 four five\n\none two three 0",
        "one two three 1 four five\n\none two three 0 four five",
    ]


def test_pairs_are_cut_where_the_tokens_agree():
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, SPLIT_PATTERN)

    def pairs(kind, items, longest=256):
        made = item_pairs(tokenizer, task(kind), items, 0, longest=longest)
        return [(tokenizer.decode(c), tokenizer.decode(t)) for c, t in made]

    # "hot" is the beginning of "hotter": one token of each is left to be scored
    choices = pairs("multiple_choice", [{"query": "q", "choices": ["hot", "hotter", "warm"], "gold": 0}])
    assert choices == [("<|bos|>q ", "hot"), ("<|bos|>q ", "hotter"), ("<|bos|>q ", "warm")]
    nested = pairs("multiple_choice", [{"query": "q", "choices": ["hot", "hotter"], "gold": 0}])
    assert nested == [("<|bos|>q ho", "t"), ("<|bos|>q hot", "ter")]
    assert pairs("schema", SCHEMA) == [
        ("<|bos|>Ann", " 0 fell and she cried"),
        ("<|bos|>The dog", " 0 fell and she cried"),
    ]
    assert pairs("language_modeling", LM) == [("<|bos|>one two three 0", " four five")]
    # a long context loses its beginning
    short = pairs("language_modeling", LM, longest=14)
    assert short == [("ee 0", " four five")]


def test_few_shot_examples_are_those_nanochat_draws(learner):
    made = task("multiple_choice", shots=3)
    for i in (0, 4, 8):
        others = [j for j in range(len(MC)) if j != i]
        shots = [MC[j] for j in random.Random(1234 + i).sample(others, 3)]
        text = item_texts(made, MC[i], shots)[0]
        context, continuation = item_pairs(learner.tokenizer, made, MC, i, longest=10_000)[0]
        assert learner.tokenizer.decode(context + continuation) == "<|bos|>" + text


def test_scores_are_those_of_a_dense_forward_pass(learner, bundle, tmp_path):
    result = evaluate_core(learner.engine, learner.tokenizer, str(bundle), out=tmp_path / "out", step=3)
    assert result.error is None
    predictions = {(e["task"], e["index"]): e for e in result.examples}
    assert len(predictions) == len(MC) + len(SCHEMA) + len(LM) == result.n
    centered = []
    for made in load_bundle(str(bundle)):
        items = made.items()
        right = 0
        for i, item in enumerate(items):
            pairs = item_pairs(learner.tokenizer, made, items, i, longest=256)
            means, greedy = zip(*[dense(learner, *pair) for pair in pairs], strict=True)
            if made.kind == "language_modeling":
                right += greedy[0]
            else:
                assert predictions[made.label, i]["mean_loglikelihoods"] == pytest.approx(means, abs=1e-4)
                right += max(range(len(means)), key=means.__getitem__) == item["gold"]
        accuracy = right / len(items)
        assert result.details[made.label]["accuracy"] == pytest.approx(accuracy)
        baseline = BASELINES[made.label] / 100
        centered.append((accuracy - baseline) / (1 - baseline))
        assert result.details[made.label]["centered"] == pytest.approx(centered[-1])
    assert result.value == pytest.approx(sum(centered) / 3)
    assert json.loads((tmp_path / "out" / "core.json").read_text())["step"] == 3


def dense(learner, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logprobs = learner.model.head(learner.model(tokens, DenseContext(tokens)))[0].log_softmax(-1)
    rows = logprobs[len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return rows.gather(1, target[:, None]).mean().item(), bool((rows.argmax(1) == target).all())


def test_a_zip_gives_the_same_as_the_directory(learner, bundle):
    archive = shutil.make_archive(str(bundle), "zip", bundle.parent, "eval_bundle")
    found = [evaluate_core(learner.engine, learner.tokenizer, path).details for path in (str(bundle), archive)]
    assert found[0] == found[1]


def test_a_limit_takes_fewer_items_but_few_shots_from_all(learner, bundle):
    whole = evaluate_core(learner.engine, learner.tokenizer, str(bundle))
    few = evaluate_core(learner.engine, learner.tokenizer, str(bundle), max_examples=2)
    assert few.n == 6
    for before, now in zip([e for e in whole.examples if e["index"] < 2], few.examples, strict=True):
        for key in before:
            assert now[key] == (pytest.approx(before[key], abs=1e-4) if "likelihood" in key else before[key])


def test_a_task_that_fails_is_recorded_and_the_others_go_on(learner, bundle):
    (bundle / "eval_data" / "world" / "mc.jsonl").write_text('{"query": "q", "choices": ["a", "b"]}\n')
    result = evaluate_core(learner.engine, learner.tokenizer, str(bundle))
    assert math.isnan(result.value)
    assert "mc.jsonl:1: no field 'gold'" in result.details["mc"]["error"]
    assert "mc.jsonl:1" in result.error
    assert result.details["lm"]["n"] == 4


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("eval_meta_data.csv", "Eval Task,Random baseline\nmc,25\n", "no random baseline for 'schema'"),
        ("eval_meta_data.csv", "Task,Baseline\nmc,25\n", "needs the columns Eval Task"),
        ("core.yaml", "tasks: []\n", "no list icl_tasks"),
        ("core.yaml", "icl_tasks: [{label: x, dataset_uri: y, icl_task_type: z, num_fewshot: [0]}]", "icl_task_type"),
    ],
)
def test_a_broken_bundle_is_named(bundle, file, content, message):
    (bundle / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_bundle(str(bundle))


def test_no_bundle(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_bundle(str(tmp_path / "none.zip"))
    with pytest.raises(UserError, match=r"no core.yaml"):
        load_bundle(str(tmp_path))
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match=r"not a \.zip"):
        load_bundle(str(tmp_path / "bad.zip"))
