"""The page around the conversation: settings, colours, a phone, tools, accessibility, a server that goes away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from nanoworks.engine import Engine
from tests.serve.page.conftest import answers, ask, one_after_another, scripted, send

NewPage = Callable[..., Page]

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DARK, LIGHT = "rgb(23, 24, 26)", "rgb(252, 251, 249)"

RICH = [
    "# Heading\n\nSome **bold**, `code`, a [link](https://example.org) and a list:\n\n",
    "1. one\n2. two\n   - [x] nested\n\n> quoted\n\n",
    "```python\ndef f(x: int) -> str:  # comment\n",
    '    return f"{x}" + str(1.5)\n\n@decorator\nclass C:\n    pass\n```\n\n',
    "```js\nconst x = 'a'; // comment\n```\n\n",
    "```\n" + "a line without a language that is much wider than any telephone " * 3 + "\n```\n\n",
    "| name | " + " | ".join(f"a column {i}" for i in range(9)) + " |\n" + "| --- " * 10 + "|\n" + "| 1 " * 10 + "|\n",
]


@pytest.fixture(scope="module")
def url(serve: Any) -> Iterator[str]:
    with serve(scripted(one_after_another(RICH))) as url:
        yield url


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def settings(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()


# ------------------------------------------------------------------------------------------- markdown


def test_markdown_and_code(new_page: NewPage, url: str) -> None:
    page = new_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(url)
    answer = ask(page, "show me").locator(".answer")
    expect(answer.get_by_role("heading", level=1)).to_have_text("Heading")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("table th")).to_have_count(10)
    expect(answer.locator("figure .language")).to_have_text(["python", "js", "text"])
    expect(answer.locator(".hljs-keyword").first).to_have_text("def")
    assert answer.locator(".hljs-keyword").first.evaluate("e => getComputedStyle(e).color") != "rgb(33, 32, 29)"
    answer.get_by_role("button", name="Copy the code").nth(1).click()
    assert page.evaluate("navigator.clipboard.readText()") == "const x = 'a'; // comment"
    page.get_by_role("button", name="Copy the answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == "".join(RICH).strip()


# ------------------------------------------------------------------------------------------- settings and colours


def test_settings_reach_the_request_and_survive_a_reload(new_page: NewPage, url: str) -> None:
    page = new_page()
    page.goto(url)
    settings(page)
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_role("slider", name="Temperature").fill("1.3")
    page.get_by_label("Top k").fill("")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("7")
    page.get_by_text("Tools and other request fields").click()
    page.get_by_label("More request fields").fill('{"min_p": 0.01}')
    page.reload()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "hi")
    body = json.loads(sent.value.post_data or "")
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": "hi"}
    assert body == {
        "model": "tiny",
        "temperature": 1.3,
        "top_p": 0.9,
        "seed": 7,
        "min_p": 0.01,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    settings(page)
    page.get_by_role("button", name="Reset").click()
    assert page.get_by_label("System message").input_value() == ""


def test_wrong_settings_say_what_is_wrong(new_page: NewPage, url: str) -> None:
    page = new_page()
    page.goto(url)
    settings(page)
    page.get_by_text("Tools and other request fields").click()
    page.get_by_label("More request fields").fill('{"min_p": ')
    expect(page.locator("#more-problem")).to_contain_text("must be a JSON object")
    page.keyboard.press("Escape")
    expect(ask(page, "hi").get_by_role("alert")).to_contain_text("must be a JSON object")
    settings(page)
    page.get_by_label("More request fields").fill('{"max_tockens": 3}')
    page.keyboard.press("Escape")
    expect(ask(page, "hi").get_by_role("alert")).to_contain_text("max_tockens")  # the server's own words


def test_colours_follow_the_system_or_the_reader(new_page: NewPage, url: str) -> None:
    page = new_page(color_scheme="dark")
    page.goto(url)
    assert background(page) == DARK
    settings(page)
    page.get_by_label("Light").check()
    assert background(page) == LIGHT
    page.reload()
    assert background(page) == LIGHT
    settings(page)
    page.get_by_label("System", exact=True).check()
    assert background(page) == DARK


# ------------------------------------------------------------------------------------------- a phone


def test_a_phone(new_page: NewPage, url: str) -> None:
    page = new_page(**PHONE)
    page.goto(url)
    message = page.get_by_role("textbox", name="Message")
    message.tap()
    message.press_sequentially("one")
    message.press("Enter")  # a new line: there is no Shift on the glass
    message.press_sequentially("two")
    page.get_by_role("button", name="Send", exact=True).tap()
    expect(answers(page)).to_have_count(1)
    assert page.locator(".bubble").inner_text() == "one\ntwo"
    expect(page.get_by_role("button", name="Edit the message")).to_be_visible()  # without a pointer to hover
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= 390

    sidebar = page.locator("#sidebar")
    expect(sidebar).to_be_hidden()
    page.get_by_role("button", name="List of conversations").tap()
    expect(sidebar).to_be_visible()
    page.locator("#backdrop").tap(position={"x": 380, "y": 400})
    expect(sidebar).to_be_hidden()
    page.get_by_role("button", name="List of conversations").tap()
    sidebar.get_by_role("button", name="New chat").tap()
    expect(sidebar).to_be_hidden()
    expect(page.get_by_text("What shall we talk about?")).to_be_visible()
    settings(page)
    box = page.locator("#settings").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] <= 844


# ------------------------------------------------------------------------------------------- tools


def test_the_calculator_is_shown_in_its_place(new_page: NewPage, serve: Any, calculating_engine: Engine) -> None:
    with serve(calculating_engine) as url:
        page = new_page()
        page.goto(url)
        answer = ask(page, "how much is 2*3?")
        assert answer.locator(".answer > .block").count() == 1
        expect(answer.locator(".calculator")).to_have_text("calculator2*3= 6")
        expect(answer.locator(".block p")).to_have_text("=calculator2*3= 6!")
        page.reload()
        expect(answers(page).locator(".calculator")).to_have_text("calculator2*3= 6")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "again")
        answered = json.loads(sent.value.post_data or "")["messages"][1]
        assert answered["content"] == "=!"
        assert [part["type"] for part in answered["nanoworks"]["parts"]] == ["text", "python", "python_output", "text"]


def test_a_function_call_and_what_it_returned(new_page: NewPage, serve: Any, make_engine: Any) -> None:
    """The server's grammar forces the call, so that even random weights make one."""
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    with serve(make_engine(context=1024)) as url:
        page = new_page()
        page.goto(url)
        settings(page)
        page.get_by_label("Max tokens").fill("200")
        page.get_by_text("Tools and other request fields").click()
        page.get_by_label("More request fields").fill(json.dumps({"tools": [tool], "tool_choice": "required"}))
        page.keyboard.press("Escape")
        answer = ask(page, "how is the weather?")
        expect(answer.locator(".calls .tool-name")).to_have_text("weather")
        city = json.loads(answer.locator(".calls code").inner_text())["city"]
        assert city in ("Rome", "Oslo")

        settings(page)
        page.get_by_label("More request fields").fill(json.dumps({"tools": [tool], "tool_choice": "none"}))
        page.get_by_label("Max tokens").fill("4")
        page.keyboard.press("Escape")
        answer.get_by_label("What weather returned").fill('{"degrees": 21}')
        with page.expect_request("**/v1/chat/completions") as sent:
            answer.get_by_role("button", name="Send the results").click()
        _, asked, returned = json.loads(sent.value.post_data or "")["messages"]
        assert json.loads(asked["tool_calls"][0]["function"]["arguments"]) == {"city": city}
        assert returned == {
            "role": "tool",
            "tool_call_id": asked["tool_calls"][0]["id"],
            "content": '{"degrees": 21}',
        }
        expect(answers(page)).to_have_count(2)
        assert page.locator(".error:visible").all_inner_texts() == []
        expect(page.locator(".tool code")).to_have_text('{"degrees": 21}')
        expect(page.get_by_role("button", name="Send the results")).to_be_hidden()


# ------------------------------------------------------------------------------------------- the server goes away


def test_a_server_that_goes_away_and_comes_back(new_page: NewPage, url: str) -> None:
    page = new_page()
    page.goto(url)
    expect(page.locator("#model")).to_be_visible()
    page.context.set_offline(True)
    answer = ask(page, "hello?")
    expect(answer.get_by_role("alert")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page).get_by_role("heading", level=1)).to_have_text("Heading")

    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#trouble")).to_contain_text("cannot be reached")
    page.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#model")).to_have_value("tiny")


# ------------------------------------------------------------------------------------------- accessibility


@pytest.mark.parametrize(("colours", "phone"), [("light", False), ("dark", True)], ids=["light desk", "dark phone"])
def test_accessibility(new_page: NewPage, url: str, colours: str, phone: bool) -> None:
    page = new_page(color_scheme=colours, **(PHONE if phone else {}))
    page.goto(url)
    expect(page.locator("#model")).to_be_visible()
    check(page, "an empty conversation")
    ask(page, "show me")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".assistant .versions output")).to_have_text("2 / 2")
    expect(answers(page)).to_have_count(1)
    check(page, "a conversation")
    page.get_by_role("button", name="Edit the message").first.click()
    check(page, "an editor")
    page.keyboard.press("Escape")
    settings(page)
    for summary in page.locator("#settings summary").all():
        summary.click()
    check(page, "settings")
    page.keyboard.press("Escape")
    if phone:
        page.get_by_role("button", name="List of conversations").click()
        check(page, "the drawer")
    page.route("**/v1/models", lambda route: route.fulfill(status=401, json={"error": {"message": "no key"}}))
    page.reload()
    expect(page.get_by_role("dialog")).to_be_visible()
    check(page, "the question for a key")


def check(page: Page, what: str) -> None:
    # What fades in and out has no colour that could be judged.
    page.evaluate("Promise.all(document.getAnimations().map(animation => animation.finished.catch(() => {})))")
    found = Axe().run(page).response["violations"]
    assert [(rule["id"], rule["impact"], [node["html"] for node in rule["nodes"]]) for rule in found] == [], what


def test_all_of_it_by_keyboard(new_page: NewPage, url: str) -> None:
    page = new_page()
    page.goto(url)
    message = page.get_by_role("textbox", name="Message")
    expect(message).to_be_focused()
    page.keyboard.type("hi")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(1)
    expect(message).to_be_focused()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.name"))
    assert {
        "Model",
        "Settings",
        "Edit the message",
        "Copy the code",
        "Copy the answer",
        "Answer again",
        "Message",
        "Rename “hi”",
        "Delete “hi”",
    } <= reached
    page.locator("body").click(position={"x": 700, "y": 5})
    page.keyboard.press("/")
    expect(message).to_be_focused()
    send(page, "more")
