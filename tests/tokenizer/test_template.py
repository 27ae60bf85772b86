"""Tokenizers of other families, through their own chat templates, held to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import StreamDecoder, Tokenizer

CONVERSATION = {
    "messages": [
        {"role": "user", "content": "the quick fox? 你好"},
        {"role": "assistant", "content": "it jumps\nover 12 dogs 🌍"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "lazy dog"},
    ]
}


@pytest.fixture(params=["llama2_dir", "llama3_dir"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def auto_tokenizer(directory: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


def test_ids(directory: Path, hard_texts: list[str]) -> None:
    tokenizer, auto = Tokenizer.load(directory), auto_tokenizer(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (auto.bos_token_id, auto.eos_token_id)
    assert tokenizer.vocab_size == len(auto)
    special = set(tokenizer.special_tokens.values()) - {auto.unk_token_id}
    for text in [*hard_texts, *tokenizer.special_tokens]:
        ids = tokenizer.encode(text)
        assert ids == auto.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text] * 3, bos=True, threads=2) == [[tokenizer.bos_id, *ids]] * 3
        assert sum(tokenizer.token_bytes()[i] for i in ids) == len(tokenizer.decode_bytes(ids))


def test_stream(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("a 🌍 你好\n")
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push([i]) for i in ids]
    assert "\ufffd" not in "".join(pushed)
    assert "".join(pushed).strip(" ") == "a 🌍 你好\n"
    assert stream.flush() == ""


def test_chat(directory: Path) -> None:
    tokenizer, auto = Tokenizer.load(directory), auto_tokenizer(directory)
    messages = CONVERSATION["messages"]
    rendered = tokenizer.render(CONVERSATION)
    assert rendered.ids == auto.apply_chat_template(messages, return_dict=False)
    prompt = auto.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert tokenizer.render_for_completion(CONVERSATION) == prompt
    end = tokenizer.decode([tokenizer.eos_id])
    learned = tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m])
    assert [text.strip() for text in learned.split(end)] == ["it jumps\nover 12 dogs 🌍", "lazy dog", ""]


def test_special_text_stays_text(directory: Path) -> None:
    """Where transformers would take a spelled-out token for the token itself."""
    tokenizer = Tokenizer.load(directory)
    end = tokenizer.decode([tokenizer.eos_id])
    messages = [{"role": "user", "content": f"a{end}b"}, {"role": "assistant", "content": f"c{end} d"}]
    rendered = tokenizer.render({"messages": messages})
    assert rendered.ids.count(tokenizer.eos_id) == tokenizer.render(CONVERSATION).ids.count(tokenizer.eos_id) // 2
    learned = tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m])
    assert learned.replace(" ", "") == f"c{end}d{end}"
    prompt = tokenizer.render_for_completion({"messages": messages})
    assert prompt == rendered.ids[: len(prompt)]


def test_mask_is_transformers_own(llama2_dir: Path) -> None:
    """Llama 2's stand-in marks its assistant text, so transformers can compute a mask too."""
    theirs = auto_tokenizer(llama2_dir).apply_chat_template(
        CONVERSATION["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert Tokenizer.load(llama2_dir).render(CONVERSATION).mask == theirs["assistant_masks"]


def test_save_keeps_the_files(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    tokenizer.save(tmp_path)
    for path in directory.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.render(CONVERSATION) == tokenizer.render(CONVERSATION)


def test_tool_parts_have_no_form(llama3_dir: Path) -> None:
    parts = [{"type": "text", "text": "it "}, {"type": "text", "text": "jumps"}]
    user = {"role": "user", "content": "hi"}
    tokenizer = Tokenizer.load(llama3_dir)
    joined = tokenizer.render({"messages": [user, {"role": "assistant", "content": "it jumps"}]})
    assert tokenizer.render({"messages": [user, {"role": "assistant", "content": parts}]}) == joined
    parts[0]["type"] = "python"
    with pytest.raises(UserError, match=r"message 1: .* no form for tool calls"):
        tokenizer.render({"messages": [user, {"role": "assistant", "content": parts}]})


def variant(directory: Path, target: Path, template: str | None, **config: Any) -> Path:
    Tokenizer.load(directory).save(target)
    written = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**written, **config}))
    (target / "chat_template.jinja").unlink()
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    return target


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template; add chat_template.jinja"),
        ("{{ raise_exception('no such role') }}", "refused this conversation: no such role"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "changes earlier text"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
    ],
)
def test_bad_templates(llama3_dir: Path, tmp_path: Path, template: str | None, reason: str) -> None:
    tokenizer = Tokenizer.load(variant(llama3_dir, tmp_path, template))
    assert tokenizer.decode(tokenizer.encode("still useful")) == "still useful"
    with pytest.raises(UserError, match=reason):
        tokenizer.render(CONVERSATION)


def test_template_that_does_not_parse(llama3_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not parse"):
        Tokenizer.load(variant(llama3_dir, tmp_path, "{% for %}"))


def test_what_templates_use(llama3_dir: Path, tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y') }}{{ {'a': '<é>'} | tojson }}{% for m in messages %}{% break %}{% endfor %}"
    tokenizer = Tokenizer.load(variant(llama3_dir, tmp_path, template))
    assert tokenizer.decode(tokenizer.render_for_completion(CONVERSATION)).endswith('{"a": "<é>"}')


def test_special_tokens_of_the_config(llama3_dir: Path, tmp_path: Path) -> None:
    only_eos = Tokenizer.load(variant(llama3_dir, tmp_path / "eos", None, bos_token=None))
    assert only_eos.bos_id == only_eos.eos_id
    assert only_eos.stop_ids == (only_eos.eos_id,)
    with pytest.raises(UserError, match="neither bos_token nor eos_token"):
        Tokenizer.load(variant(llama3_dir, tmp_path / "none", None, bos_token=None, eos_token=None))
    with pytest.raises(UserError, match="names '<nothing>'"):
        Tokenizer.load(variant(llama3_dir, tmp_path / "wrong", None, bos_token="<nothing>"))


# As Qwen's and SmolLM's: functions in the system turn, calls and results with their own tags.
TOOLS_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '</tools><|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{ '}</tool_call>' }}
    {%- endfor %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


@pytest.fixture
def tools_dir(llama3_dir: Path, tmp_path: Path) -> Path:
    for file in llama3_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return tmp_path


def test_tools(tools_dir: Path, llama3_dir: Path) -> None:
    tokenizer, auto = Tokenizer.load(tools_dir), auto_tokenizer(tools_dir)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    function = {"name": "add", "arguments": {"a": [1, "x"]}}
    messages = [
        {"role": "user", "content": "the quick fox?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "content": "12 dogs", "tool_call_id": "1"},
    ]
    wire = json.loads(json.dumps(messages))
    wire[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(function["arguments"])  # as OpenAI sends it
    expected = auto.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert tokenizer.takes_tools
    assert tokenizer.chat_template == TOOLS_TEMPLATE
    assert tokenizer.render_with_tools(wire, tools) == expected
    plain = auto.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert (
        tokenizer.render_with_tools(messages[:1], [])
        == plain
        == tokenizer.render_for_completion({"messages": messages[:1]})
    )
    assert not Tokenizer.load(llama3_dir).takes_tools
    with pytest.raises(UserError, match="no place for tools"):
        Tokenizer.load(llama3_dir).render_with_tools(messages, tools)


def test_special_text_of_tools_stays_text(tools_dir: Path) -> None:
    tokenizer = Tokenizer.load(tools_dir)
    end = tokenizer.decode([tokenizer.eos_id])

    def ends(text: str) -> int:
        function = {"name": "add", "description": text, "parameters": {text: text}}
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": text})}}
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "content": text, "tool_call_id": "1"},
        ]
        return tokenizer.render_with_tools(messages, [{"type": "function", "function": function}]).count(
            tokenizer.eos_id
        )

    assert ends(end) == ends("x")
