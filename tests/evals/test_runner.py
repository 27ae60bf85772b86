"""Tasks through the real engine, on a model that knows some answers."""

from __future__ import annotations

import json

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.evals import evaluate
from nanoworks.evals.prompts import prompt_ids, text_of
from nanoworks.nn.context import DenseContext
from nanoworks.tasks import Task, TaskOptions, build_task


class Sums(Task):
    """A generative task whose prompt, reference and score are given."""

    name = "sums"
    Options = TaskOptions

    def __init__(self, prompts: list[str], score) -> None:
        self.prompts, self._score = prompts, score

    def __len__(self) -> int:
        return len(self.prompts)

    def conversation(self, i):
        messages = [{"role": "user", "content": self.prompts[i]}, {"role": "assistant", "content": "4"}]
        return {"messages": messages}

    def score(self, i, completion):
        return self._score(i, completion)


def ask(learner, task, **settings):
    return evaluate(learner.engine, learner.tokenizer, task, **{"max_tokens": 16, **settings})


def test_what_was_learned_is_right(learner, tmp_path):
    result = ask(learner, learner.colours, out=tmp_path, step=7)
    assert (result.value, result.stderr, result.n, result.failed) == (1.0, 0.0, 6, 0)
    summary = json.loads((tmp_path / "colours.json").read_text())
    assert (summary["value"], summary["metric"], summary["step"]) == (1.0, "accuracy", 7)
    lines = [json.loads(line) for line in (tmp_path / "colours.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "index": 0,
        "prompt": "sky?",
        "reference": "blue",
        "samples": [{"completion": "blue", "finish_reason": "stop", "score": 1.0}],
        "score": 1.0,
    }


def test_multiple_choice_compares_the_letters(learner, tmp_path):
    result = ask(learner, learner.choices, out=tmp_path)
    assert result.value == 1.0
    assert result.baseline == pytest.approx((2 * 1 / 3 + 4 * 1 / 2) / 6)
    assert result.centered == 1.0
    example = result.examples[0]
    assert example["prediction"] == example["reference"] == "B"
    # the same figure from one dense forward pass
    ids = learner.tokenizer.render_for_completion(learner.choices.conversation(0))
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = learner.model.head(learner.model(tokens, DenseContext(tokens)))[0, -1].log_softmax(-1)
    for letter, value in example["loglikelihoods"].items():
        assert value == pytest.approx(logits[learner.tokenizer.encode(letter)[0]].item(), abs=1e-4)


def test_max_examples_is_clipped_and_name_is_taken(learner):
    assert ask(learner, learner.colours, max_examples=2).n == 2
    result = ask(learner, learner.colours, max_examples=1000, name="again")
    assert (result.task, result.n) == ("again", 6)


def test_samples_give_pass_at_k_and_repeat_by_seed(learner):
    settings = {"samples": 4, "temperature": 5.0, "max_tokens": 8}
    task = Sums(["sky?", "sun?"], lambda i, text: float(len(text) % 2))
    first, again, other = (ask(learner, task, **settings, seed=seed) for seed in (1, 1, 2))
    texts = [[s["completion"] for e in r.examples for s in e["samples"]] for r in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    scores = [s["score"] for example in first.examples for s in example["samples"]]
    assert first.metric == "pass@1"
    assert first.value == pytest.approx(sum(scores) / 8) == pytest.approx(first.details["pass@1"])
    best = [max(s["score"] for s in example["samples"]) for example in first.examples]
    assert first.details["pass@4"] == pytest.approx(sum(best) / 2)
    assert list(first.details) == ["pass@1", "pass@2", "pass@4"]


def test_an_example_that_fails_counts_as_wrong_and_says_why(learner):
    def score(i, completion):
        if i == 1:
            raise ZeroDivisionError("a bug in the scorer")
        return 1.0

    result = ask(learner, Sums(["sky?", "sun?", "x" * 400, "snow?"], score))
    assert (result.value, result.n, result.failed) == (0.5, 4, 2)
    assert result.examples[1]["error"] == "ZeroDivisionError: a bug in the scorer"
    assert "the context holds 256" in result.examples[2]["error"]
    assert [example["score"] for example in result.examples] == [1.0, 0.0, 0.0, 1.0]


def test_when_every_example_fails_the_evaluation_does(learner):
    with pytest.raises(UserError, match="sums: none of 2 examples could be run; the first: the prompt has"):
        ask(learner, Sums(["x" * 400] * 2, lambda i, text: 1.0))


def test_a_model_that_gives_no_numbers_fails_and_not_silently(learner):
    weight = learner.model.head.lm_head.weight
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(UserError, match="not finite"):
            ask(learner, learner.colours)
        with pytest.raises(UserError, match="not finite"):
            ask(learner, learner.choices)
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def test_humaneval_is_scored_in_its_sandbox(learner, tmp_path):
    row = {"prompt": "sky?", "canonical_solution": "", "entry_point": "sky", "test": "def check(f): assert f"}
    (tmp_path / "h.jsonl").write_text(json.dumps(row) + "\n")
    try:
        task = build_task("humaneval", {"path": str(tmp_path / "h.jsonl")})
    except UserError as error:
        pytest.skip(str(error))
    assert ask(learner, task).value == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 2}, "at temperature 0"),
        ({"samples": 0}, "n=0 must be from 1 to 1024"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_examples": 0}, "max_examples=0"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_settings_are_checked(learner, settings, message):
    with pytest.raises(UserError, match=message):
        ask(learner, learner.colours, **settings)


def test_plain_prompts_are_text(learner):
    conversation = {
        "messages": [
            {"role": "system", "content": "Short answers."},
            {"role": "user", "content": "1+1?"},
            {
                "role": "assistant",
                "content": [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}],
            },
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
        ]
    }
    ids = prompt_ids(learner.tokenizer, conversation, chat=False)
    assert ids[0] == learner.tokenizer.bos_id
    text = "Short answers.\n\nQuestion: 1+1?\nAnswer: <<1+1=2>>\nQuestion: 2+2?\nAnswer:"
    assert learner.tokenizer.decode(ids[1:]) == text
    assert text_of("4") == "4"
    # a base model is asked, and its continuation cut before it asks itself the next question
    assert ask(learner, learner.colours, chat=False).n == 6
    assert ask(learner, learner.choices, chat=False).n == 6
