"""Chromium on the real page of a real server, with models whose every word is known."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from nanoworks.engine import Engine
from nanoworks.models import build_model, config_from_dict
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
expect.set_options(timeout=60_000)  # a busy machine is no failure

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        for item in items:
            if item.path.is_relative_to(__file__.rpartition("/")[0]):
                item.add_marker(pytest.mark.skip(reason="chromium is not installed; run scripts/system_packages.sh"))


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Ends with this package: while Playwright runs, no other event loop can in its thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`new_page(**context_options)` opens an empty page of a new visitor; an error in its scripts fails the test."""
    errors: list[str] = []
    contexts = []

    def new_page(**options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert errors == []


def scripted(followers: dict[str, Sequence[str]], *, context: int = 256) -> Engine:
    """An engine whose tokens are whole strings: after a token comes one of its followers, each as likely.

    It begins with the followers of "<|assistant_start|>", and a token without followers ends the answer.
    """
    words = sorted({word for pair in followers.items() for word in (pair[0], *pair[1])})
    new = [word for word in words if not word.startswith("<|") and len(word.encode()) > 1]
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(new)}
    tokenizer = Tokenizer.from_ranks(ranks, SPLIT_PATTERN)
    ids = {word: tokenizer.special_tokens.get(word, ranks.get(word.encode())) for word in words}
    size = -(-tokenizer.vocab_size // 16) * 16  # the embedding is one-hot
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": size,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
    }
    model = build_model(config_from_dict(config))
    model.init_weights()
    end = tokenizer.special_tokens["<|assistant_end|>"]
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.copy_(torch.eye(*model.embed_tokens.weight.shape))
        model.head.lm_head.weight.zero_()
        for word in words:
            for following in [ids[next_word] for next_word in followers.get(word, ())] or [end]:
                model.head.lm_head.weight[following, ids[word]] = 5.0
    return Engine(model.eval(), tokenizer)


def one_after_another(pieces: Sequence[str]) -> dict[str, Sequence[str]]:
    """The rules of an engine that answers `pieces`, which must be different."""
    assert len(set(pieces)) == len(pieces)
    return {word: [following] for word, following in zip(["<|assistant_start|>", *pieces], pieces, strict=False)}


# ------------------------------------------------------------------------------------------- what the tests do


def send(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def answers(page: Page, *, ended: bool = True) -> Locator:
    """The answers on the page; with `ended`, only those that are complete."""
    return page.locator('.assistant:not([data-state="streaming"])' if ended else ".assistant")


def ask(page: Page, text: str) -> Locator:
    """Send `text`, wait for the end of the answer, and return its element."""
    count = page.locator(".assistant").count()
    send(page, text)
    expect(answers(page)).to_have_count(count + 1)
    return answers(page).last


def text_of(answer: Locator) -> str:
    return answer.locator(".answer").inner_text()
