"""Offline inference from Python."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import nanoworks
from nanoworks import LLM, SamplingParams
from nanoworks.checkpoint import save_checkpoint
from nanoworks.cli.chat import chat_command
from nanoworks.cli.eval import eval_command
from nanoworks.cli.serve import serve_command
from nanoworks.common.errors import UserError
from nanoworks.llm import Output
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer
from tests.models.families import make

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 64 tokens of context, with a byte tokenizer."""
    directory = tmp_path_factory.mktemp("llm") / "model"
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, SPLIT_PATTERN)
    with save_checkpoint(directory, make("llama", vocab_size=272, intermediate_size=128), tokenizer, metadata={}):
        pass
    return directory


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(path, device="cpu", max_num_seqs=8)


def ids(outputs: list[Output]) -> list[tuple[list[int], list[int]]]:
    """What must be the same whatever else is in a batch; log-probabilities are so up to rounding."""
    return [(output.prompt_ids, output.completions[0].token_ids) for output in outputs]


def test_one_prompt_and_many_as_text_and_as_ids(llm: LLM, path: Path) -> None:
    [one] = llm.generate("the cat", GREEDY)
    assert llm.tokenizer is not None
    assert one.prompt_ids == llm.tokenizer.encode("the cat", bos=True)
    [completion] = one.completions
    assert len(completion.token_ids) == len(completion.logprobs) == 8
    assert completion.finish_reason == "length"
    assert one.text == completion.text == llm.tokenizer.decode(completion.token_ids)
    many = llm.generate(["the cat", "a dog"], GREEDY)
    assert [output.prompt_ids for output in many] == [llm.tokenizer.encode(t, bos=True) for t in ("the cat", "a dog")]
    assert ids(many)[0] == ids([one])[0]
    assert ids(llm.generate(one.prompt_ids, GREEDY)) == ids([one])
    assert ids(llm.generate([one.prompt_ids, "a dog"], GREEDY)) == ids(many)
    assert llm.generate([]) == []
    # What `nanoworks.load` gives, which chat, serve and eval use.
    assert nanoworks.load(path, device="cpu").generate("the cat", max_tokens=8, temperature=0) == one.text


def test_params_for_all_or_one_for_each_and_samples(llm: LLM) -> None:
    short, long = llm.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5)])
    assert len(short.completions[0].token_ids) <= 2 < len(long.completions[0].token_ids) <= 5
    [output] = llm.generate("a", SamplingParams(max_tokens=4, n=3, seed=1))
    assert len({tuple(c.token_ids) for c in output.completions}) == 3
    assert len(llm.generate("a")[0].completions) == 1


def test_chat_renders_as_the_other_ways_to_chat_do(llm: LLM) -> None:
    question = [{"role": "user", "content": "Who?"}]
    [output] = llm.chat(question, GREEDY)
    assert llm.tokenizer is not None
    assert output.prompt_ids == llm.tokenizer.render_for_completion({"messages": question})
    assert ids(llm.chat("Who?", GREEDY)) == ids([output])
    other = [{"role": "system", "content": "Be brief."}, *question]
    both = llm.chat([question, other], GREEDY)
    assert ids(both)[0] == ids([output])[0]
    assert both[1].prompt_ids == llm.tokenizer.render_for_completion({"messages": other}) != output.prompt_ids


def test_score_is_the_log_likelihood_that_generation_reports(llm: LLM) -> None:
    [output] = llm.generate("the cat", GREEDY)
    [likely] = llm.score(output.prompt_ids, [output.completions[0].token_ids])
    assert likely.greedy
    assert likely.tokens == pytest.approx(output.completions[0].logprobs, abs=1e-5)
    choices = llm.score("the cat", [" sat", " ran away"])
    assert [len(choice.tokens) for choice in choices] == [4, 9]
    assert llm.score(["the cat", "the cat"], [" sat", " ran away"])[1].sum == pytest.approx(choices[1].sum, abs=1e-5)


def test_bad_input_is_named(llm: LLM, path: Path) -> None:
    for call, message in (
        (lambda: llm.generate(["a"], [GREEDY, GREEDY]), "2 params for 1 prompts"),
        (lambda: llm.generate(["a", [1, 999]]), "prompt 1: token id 999 is outside the model's vocabulary of 272"),
        (lambda: llm.generate(["a", []]), "prompt 1: a prompt and a continuation have at least one token"),
        (lambda: llm.generate(["a", [1, "b"]]), "a list of token ids, 'b' is neither"),
        (lambda: llm.generate([1.5]), "prompt 0 is a text or a list of token ids, not 1.5"),
        (lambda: llm.generate(7), "not int"),
        (lambda: llm.chat([]), None),
        (lambda: llm.chat([[]]), "conversation 0 is no list of"),
        (lambda: llm.chat(["hello"]), "conversation 0 is no list of"),
        (lambda: llm.score(["a", "b"], ["c"]), "2 prompts for 1 continuations"),
        (lambda: llm.score("a", [""]), "continuation 0 is empty"),
        (lambda: LLM(path, max_num_sequences=4), "unknown key .did you mean 'max_num_seqs'"),
        (lambda: LLM(path, block_size=-1), "block_size: Input should be greater than or equal to 0"),
        (lambda: LLM(path, tensor_parallel=0), "tensor_parallel: Input should be greater than 0"),
        (lambda: LLM(path, tensor_parallel=3, device="cpu"), r"tensor_parallel=3 must divide .*; use 1 or 2"),
        (lambda: LLM(llm.model, dtype="bfloat16"), "chosen when a model is loaded"),
        (lambda: LLM(path / "absent"), "neither a directory nor a hub id"),
    ):
        if message is None:
            assert call() == []
            continue
        with pytest.raises(UserError, match=message):
            call()


def test_options_reach_the_engine(llm: LLM) -> None:
    rounded = LLM(llm.model, quantize="int8", max_num_seqs=3)
    assert (rounded.engine.config.quantize, rounded.engine.config.max_num_seqs) == ("int8", 3)
    [ours], [theirs] = rounded.score("the cat", [" sat"]), llm.score("the cat", [" sat"])
    assert ours.sum != theirs.sum
    assert ours.sum == pytest.approx(theirs.sum, abs=0.1)
    with pytest.raises(UserError, match=r"quantize: Input should be 'int8' or 'int4'"):
        LLM(llm.model, quantize="int3")


def test_memory_for_less_than_a_block_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"kv_memory=1e-07 GiB holds no block of \d+ bytes; give more memory"):
        LLM(path, device="cpu", kv_memory=1e-7)


def test_a_prompt_beyond_the_context_or_the_whole_cache_is_refused_with_both_numbers(llm: LLM, path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt 1: the prompt has 64 tokens .* but the context holds 64; shorten"):
        llm.generate([[1] * 63, [1] * 64])
    small = LLM(llm.model, num_blocks=2, block_size=8)
    with pytest.raises(UserError, match=r"prompt 0: the prompt has 16 tokens .* but the KV cache holds 16; shorten"):
        small.generate([[1] * 16])
    [output] = small.generate([[1] * 15], GREEDY)  # one more fits
    assert len(output.completions[0].token_ids) == 1


def test_a_checkpoint_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    with save_checkpoint(tmp_path / "model", make("llama", intermediate_size=128), None, metadata={}):
        pass
    llm = LLM(tmp_path / "model", device="cpu")
    [output] = llm.generate([1, 2, 3], GREEDY)
    assert (len(output.completions[0].token_ids), output.text) == (8, "")
    with pytest.raises(UserError, match="has no tokenizer; give token ids instead of text"):
        llm.generate("text")
    with pytest.raises(UserError, match="has no tokenizer, so it cannot chat"):
        llm.chat("text")


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_progress_is_drawn_on_a_terminal_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for terminal, asked, drawn in ((True, True, True), (True, False, False), (False, True, False)):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", screen)
        llm.generate(["a", "b"], GREEDY, progress=asked)
        llm.score("a", ["b"], progress=asked)
        assert ("tok/s" in screen.getvalue() and "2/2" in screen.getvalue()) == drawn
        assert bool(screen.getvalue()) == drawn


def test_two_processes_give_the_outputs_of_one(llm: LLM, path: Path) -> None:
    prompts = ["the cat", "a dog ran", [5] * 30]
    with LLM(path, device="cpu", tensor_parallel=2, max_num_seqs=2) as both:
        ours, theirs = both.generate(prompts, GREEDY), llm.generate(prompts, GREEDY)
        assert [o.completions[0].token_ids for o in ours] == [o.completions[0].token_ids for o in theirs]
        assert [o.text for o in ours] == [o.text for o in theirs]
        assert both.score("a", ["b"])[0].sum == pytest.approx(llm.score("a", ["b"])[0].sum, abs=1e-5)
        with pytest.raises(UserError, match="logits needs the whole model here"):
            both.model.logits([[1]])
        again = LLM(both.model)  # another engine over the same processes
        assert again.generate(prompts, GREEDY)[1].text == theirs[1].text
        again.close()
        assert both.generate(prompts, GREEDY)[0].text == theirs[0].text
    with pytest.raises(UserError, match="this LLM was closed"):
        both.generate("a")


@pytest.mark.parametrize(
    ("command", "options"),
    [(chat_command, ["--prompt", "hi"]), (serve_command, ["--port", "0"]), (eval_command, ["--tasks", "spelling_bee"])],
)
def test_the_command_line_hands_the_number_of_processes_on(
    path: Path, command: Callable[..., None], options: list[str]
) -> None:
    app = typer.Typer()
    app.command()(command)
    arguments = [str(path), *options, "--device", "cpu", "--tensor-parallel", "3"]
    with pytest.raises(UserError, match="tensor_parallel=3 must divide"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_a_model_given_away_serves_its_engine_alone(path: Path) -> None:
    kept, given = nanoworks.load(path, device="cpu"), nanoworks.load(path, device="cpu")
    engine = given.engine(consume=True)
    expected = kept.engine().generate([[5, 6, 7]], GREEDY)[0][0].token_ids
    assert engine.generate([[5, 6, 7]], GREEDY)[0][0].token_ids == expected
    assert engine.generate([[5, 6, 7]], GREEDY)[0][0].token_ids == expected
    for call in (given.engine, lambda: given.logits([[1, 2]])):
        with pytest.raises(UserError, match="given away to an engine; load it again"):
            call()
