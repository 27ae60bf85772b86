"""A conversation on the page: send, stream, stop, edit, answer again, versions; and what a reload keeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from nanoworks.engine import Engine
from tests.serve.page.conftest import answers, ask, scripted, send, text_of

WORDS = [f"{a}{b} " for a in "bdfgklmnprst" for b in "aeiou"]

NewPage = Callable[..., Page]


@pytest.fixture(scope="module")
def url(serve: Any) -> Iterator[str]:
    """Answers six to a hundred random syllables, so that no two answers are the same."""
    with serve(scripted({"<|assistant_start|>": WORDS} | dict.fromkeys(WORDS, WORDS))) as url:
        yield url


@pytest.fixture(scope="module")
def endless_url(serve: Any, endless_engine: Engine) -> Iterator[str]:
    with serve(endless_engine) as url:
        yield url


@pytest.fixture
def page(new_page: NewPage, url: str) -> Page:
    page = new_page()
    page.goto(url)
    six_tokens(page)
    return page


def six_tokens(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("6")
    page.keyboard.press("Escape")


# ------------------------------------------------------------------------------------------- one answer


def test_an_answer_with_its_figures(page: Page) -> None:
    message = page.get_by_role("textbox", name="Message")
    message.fill("first line")
    message.press("Shift+Enter")
    message.press_sequentially("second")
    message.press("Enter")
    expect(answers(page)).to_have_count(1)
    assert page.locator(".bubble").inner_text() == "first line\nsecond"
    assert len(text_of(answers(page).first).split()) == 6
    figures = answers(page).first.locator(".figures").inner_text()
    assert re.fullmatch(r"6 tokens · \d+\.\d\d s to the first · [\d.]+ tokens/s · reached the token limit", figures)
    expect(message).to_be_focused()
    expect(message).to_have_value("")


def test_a_stream_grows_and_stops(new_page: NewPage, endless_url: str) -> None:
    page = new_page()
    page.goto(endless_url)
    send(page, "hi")
    answer = answers(page, ended=False).locator(".answer")
    expect(answer).to_contain_text("abab")
    before = len(answer.inner_text())
    page.wait_for_function("before => document.querySelector('.answer').innerText.length > before + 20", arg=before)
    page.get_by_role("button", name="Stop").click()
    expect(answers(page)).to_have_count(1)
    stopped = answer.inner_text()
    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.locator(".figures")).to_contain_text("about")  # the server had no chance to count
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()

    send(page, "and again")
    expect(answers(page, ended=False).last.locator(".answer")).to_contain_text("abab")
    page.keyboard.press("Escape")
    expect(answers(page)).to_have_count(2)
    assert answers(page).first.locator(".answer").inner_text() == stopped


def test_an_answer_goes_on_while_another_conversation_is_open(new_page: NewPage, endless_url: str) -> None:
    page = new_page()
    page.goto(endless_url)
    send(page, "first")
    answer = answers(page, ended=False).locator(".answer")
    expect(answer).to_contain_text("abab")
    left = len(answer.inner_text())
    page.keyboard.press("Control+Shift+O")
    expect(page.get_by_text("What shall we talk about?")).to_be_visible()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    page.get_by_role("button", name="first", exact=True).click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.wait_for_function("left => document.querySelector('.answer').innerText.length > left + 20", arg=left)

    page.reload()  # leaves the server's side to itself; what came so far is there
    expect(page.locator(".figures")).to_contain_text("cut by a reload")
    assert len(answer.inner_text()) > left


def test_the_page_follows_the_end_only_while_the_reader_is_there(new_page: NewPage, endless_url: str) -> None:
    page = new_page(viewport={"width": 800, "height": 500})
    page.goto(endless_url)
    send(page, "hi")
    end = "document.querySelector('#scroller').scrollHeight - document.querySelector('#scroller').clientHeight"
    page.wait_for_function(f"() => {end} > 200")
    expect(page.get_by_role("button", name="Jump to the end")).to_be_hidden()
    page.locator("#scroller").evaluate("scroller => (scroller.scrollTop = 0)")
    expect(page.get_by_role("button", name="Jump to the end")).to_be_visible()
    page.wait_for_function(f"before => {end} > before + 100", arg=page.evaluate(end))
    assert page.locator("#scroller").evaluate("scroller => scroller.scrollTop") == 0
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Jump to the end").click()
    expect(page.get_by_role("button", name="Jump to the end")).to_be_hidden()
    assert page.locator("#scroller").evaluate("scroller => scroller.scrollTop") > 200


# ------------------------------------------------------------------------------------------- versions


def test_answer_again_and_switch_between_versions(page: Page) -> None:
    first = text_of(ask(page, "hi"))
    expect(page.locator(".versions output").last).to_be_hidden()
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".assistant .versions output")).to_have_text("2 / 2")
    expect(answers(page)).to_have_count(1)
    second = text_of(answers(page).first)
    assert first != second

    back, forth = page.get_by_role("button", name="Version before"), page.get_by_role("button", name="Version after")
    expect(forth).to_be_disabled()
    back.click()
    expect(page.locator(".assistant .versions output")).to_have_text("1 / 2")
    assert text_of(answers(page).first) == first
    expect(forth).to_be_focused()  # the button that was pressed has nothing more to do
    forth.click()
    assert text_of(answers(page).first) == second


def test_an_edited_message_keeps_what_it_replaces(page: Page) -> None:
    ask(page, "one")
    old = text_of(ask(page, "two"))
    page.get_by_role("button", name="Edit the message").first.click()
    editor = page.get_by_role("textbox", name="Edit the message")
    expect(editor).to_have_value("one")
    editor.fill("uno")
    editor.press("Enter")
    expect(page.locator(".user .versions output")).to_have_text("2 / 2")
    expect(answers(page)).to_have_count(1)
    expect(page.locator(".bubble")).to_have_text(["uno"])

    page.locator(".user").get_by_role("button", name="Version before").click()
    expect(page.locator(".bubble")).to_have_text(["one", "two"])
    assert text_of(answers(page).last) == old


def test_a_cancelled_edit_changes_nothing(page: Page) -> None:
    ask(page, "one")
    page.get_by_role("textbox", name="Message").press("ArrowUp")
    editor = page.get_by_role("textbox", name="Edit the message")
    editor.fill("uno")
    editor.press("Escape")
    expect(page.locator(".bubble")).to_have_text(["one"])
    expect(page.locator(".user .versions output")).to_be_hidden()
    expect(page.get_by_role("button", name="Edit the message")).to_be_focused()


# ------------------------------------------------------------------------------------------- what is kept


def test_a_reload_keeps_the_conversation_and_its_versions(page: Page) -> None:
    first = text_of(ask(page, "hi"))
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".assistant .versions output")).to_have_text("2 / 2")
    expect(answers(page)).to_have_count(1)
    second = text_of(answers(page).first)
    figures = page.locator(".figures").inner_text()
    page.reload()
    expect(answers(page)).to_have_count(1)
    assert text_of(answers(page).first) == second
    assert page.locator(".figures").inner_text() == figures
    page.get_by_role("button", name="Version before").click()
    assert text_of(answers(page).first) == first
    assert len(text_of(ask(page, "and then?"))) > 0  # the conversation goes on from there
    page.reload()
    expect(answers(page)).to_have_count(2)
    assert text_of(answers(page).first) == first


def test_several_conversations(page: Page, url: str) -> None:
    ask(page, "about cats")
    page.get_by_role("button", name="New chat").first.click()
    expect(page.get_by_text("What shall we talk about?")).to_be_visible()
    ask(page, "about dogs")
    titles = page.locator("#conversations .title")
    expect(titles).to_have_text(["about dogs", "about cats"])

    titles.last.click()
    expect(page.locator(".bubble")).to_have_text(["about cats"])
    expect(page).to_have_title("about cats · nanoworks")
    page.go_back()
    expect(page.locator(".bubble")).to_have_text(["about dogs"])

    page.locator("#conversations li").last.hover()
    page.get_by_role("button", name="Rename “about cats”").click()
    page.get_by_role("textbox", name="Title of the conversation").fill("felines")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["about dogs", "felines"])

    page.locator("#conversations li").first.hover()
    page.get_by_role("button", name="Delete “about dogs”").click()
    expect(titles).to_have_text(["felines"])
    expect(page.get_by_text("What shall we talk about?")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".bubble")).to_have_text(["about dogs"])
    page.reload()
    expect(titles).to_have_text(["about dogs", "felines"])


def test_another_visitor_sees_none_of_it(page: Page, new_page: NewPage, url: str) -> None:
    ask(page, "mine")
    other = new_page()
    other.goto(url)
    expect(other.locator("#model")).to_be_visible()
    expect(other.locator("#conversations .title")).to_have_count(0)


def test_a_browser_that_keeps_nothing_still_chats(new_page: NewPage, url: str) -> None:
    page = new_page()
    forbidden = "get() { throw new DOMException('no', 'SecurityError') }"
    for name in ("indexedDB", "localStorage", "sessionStorage"):
        page.add_init_script(f"Object.defineProperty(window, '{name}', {{ {forbidden} }})")
    page.goto(url)
    expect(page.get_by_role("status")).to_contain_text("keeps no data")
    six_tokens(page)
    first = text_of(ask(page, "one"))
    page.get_by_role("button", name="New chat").first.click()
    ask(page, "two")
    page.locator("#conversations .title").last.click()
    expect(page.locator(".bubble")).to_have_text(["one"])
    assert text_of(answers(page).first) == first


def test_copying_without_the_clipboard_of_a_secure_page(new_page: NewPage, url: str) -> None:
    """Plain HTTP from another machine has no navigator.clipboard."""
    page = new_page()
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.goto(url)
    six_tokens(page)
    answer = text_of(ask(page, "hi"))
    page.get_by_role("button", name="Copy the answer").click()
    expect(page.get_by_role("status")).to_contain_text("Copied")
    message = page.get_by_role("textbox", name="Message")
    message.press("Control+v")
    expect(message).to_have_value(answer.strip())
