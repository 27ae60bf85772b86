"""`Tokenizer`: text and conversations to token ids and back.

    tokenizer = Tokenizer.load("runs/base/tokenizer")
    tokenizer.decode(tokenizer.encode("Hello"))              # 'Hello'
    tokenizer.render({"messages": [...]}).ids                # a conversation, ready to train on

It joins a backend, which encodes, with a chat format, which renders. Our own vocabularies use tiktoken and
nanochat's format; a directory from elsewhere uses the `tokenizers` library and its chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import files
from nanoworks.tokenizer.backends import Backend, HuggingFaceBackend, TiktokenBackend
from nanoworks.tokenizer.conversation import Conversation, NanochatFormat, Rendered, validate_conversation


class ChatFormat(Protocol):
    def render(self, conversation: Conversation) -> Rendered: ...

    def prompt(self, conversation: Conversation) -> list[int]: ...


class Tokenizer:
    def __init__(self, backend: Backend, chat: ChatFormat | None, *, bos_id: int, eos_id: int) -> None:
        """Use `load`, `from_ranks` or `train_tokenizer`; `chat` is None where no chat template exists."""
        self.backend = backend
        self._chat = chat
        self.bos_id = bos_id
        self.eos_id = eos_id  # ends the assistant's turn
        self.stop_ids = tuple(dict.fromkeys((eos_id, bos_id)))
        self.special_tokens = backend.special_tokens
        self.vocab_size = max(backend.tokens) + 1

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a directory with tokenizer.json: one of ours, or any Hugging Face fast tokenizer.

        Raises:
            UserError: no such directory, a damaged file, or neither bos_token nor eos_token is named.
        """
        directory = Path(path)
        texts = files.read_files(directory)
        document = _parse_json(directory / files.TOKENIZER, texts[files.TOKENIZER])
        parsed = files.parse_nanochat(document)
        if parsed:
            return cls.from_ranks(*parsed)
        config = _parse_json(directory / files.CONFIG, texts.get(files.CONFIG, "{}"))
        return _from_hugging_face(directory, texts, config)

    @classmethod
    def from_ranks(cls, ranks: Mapping[bytes, int], pattern: str) -> Tokenizer:
        """Build our kind of tokenizer from mergeable ranks (see bpe.py) and a split pattern."""
        backend = TiktokenBackend(ranks, pattern)
        special = backend.special_tokens
        chat = NanochatFormat(backend.encode, special)
        return cls(backend, chat, bos_id=special["<|bos|>"], eos_id=special["<|assistant_end|>"])

    def save(self, path: str | Path) -> None:
        """Write the files of `files.py` into the directory `path`, made if it is missing."""
        files.write_files(Path(path), self.backend.files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides ids: tokens, special tokens, split pattern."""
        identity = (
            self.backend.rules,
            sorted(self.backend.tokens.items()),
            sorted(self.special_tokens.items()),
        )
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens spelled out in it stay ordinary text."""
        ids = self.backend.encode(text)
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, threads: int = 1) -> list[list[int]]:
        """Return the ids of each text, computed on `threads` threads outside the GIL."""
        if threads == 1:
            batch = [self.backend.encode(text) for text in texts]
        else:
            with ThreadPoolExecutor(threads) as pool:
                batch = list(pool.map(self.backend.encode, texts))
        return [[self.bos_id, *ids] for ids in batch] if bos else batch

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`: invalid UTF-8 becomes U+FFFD, special tokens their names."""
        self._check(ids)
        return self.backend.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids` joined; UserError for an id outside the vocabulary."""
        self._check(ids)
        return b"".join(self.backend.tokens[i] for i in ids)

    def token_bytes(self) -> list[int]:
        """Return the number of raw bytes of every id, 0 for special tokens: what bits per byte divide by.

        nanochat (Nov 2025) counts 3 for a token that is no valid UTF-8 by itself, so its figures differ.
        """
        special = set(self.special_tokens.values())
        tokens = self.backend.tokens
        return [0 if i in special else len(tokens.get(i, b"")) for i in range(self.vocab_size)]

    def render(self, conversation: Conversation, max_tokens: int | None = None) -> Rendered:
        """Return a conversation's ids and loss mask, cut to the first `max_tokens`.

        Raises:
            UserError: the conversation is invalid (the message's index is named), or there is no template.
        """
        rendered = self._chat_format().render(conversation)
        return Rendered(rendered.ids[:max_tokens], rendered.mask[:max_tokens])

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Return the ids that ask for the next assistant message; a last one already there is dropped."""
        validate_conversation(conversation)
        messages = conversation["messages"]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self._chat_format().prompt({"messages": messages})

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, where conversations are rendered by one."""
        return getattr(self._chat, "source", None)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template has a place for functions, calls and their results (`render_with_tools`)."""
        return getattr(self._chat, "takes_tools", False)

    def render_with_tools(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids that ask for the next message, which may call one of `tools`; both in OpenAI's form.

        Raises:
            UserError: the template takes no tools, or refuses the conversation.
        """
        from nanoworks.tokenizer.template import TemplateFormat  # Jinja, as below

        chat = self._chat_format()
        if not (isinstance(chat, TemplateFormat) and chat.takes_tools):
            raise UserError("this tokenizer's chat template has no place for tools")
        return chat.prompt_with_tools([_with_arguments(message) for message in messages], tools)

    def _chat_format(self) -> ChatFormat:
        if self._chat is None:
            raise UserError(f"this tokenizer has no chat template; add {files.TEMPLATE} to its directory")
        return self._chat

    def _check(self, ids: Sequence[int]) -> None:
        unknown = next((i for i in ids if i not in self.backend.tokens), None)
        if unknown is not None:
            raise UserError(
                f"token id {unknown} is not in this tokenizer's vocabulary of {self.vocab_size}; "
                "is it the tokenizer this model was trained with?"
            )


def _with_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI has the arguments of a call as JSON text; templates want the object."""
    message = dict(message)
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _parse_arguments(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def _parse_arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _from_hugging_face(directory: Path, texts: Mapping[str, str], config: Mapping[str, Any]) -> Tokenizer:
    # Imported here: Jinja is the slowest import of this package, and only these vocabularies need it.
    from nanoworks.tokenizer.template import TemplateFormat

    backend = HuggingFaceBackend(texts)
    names = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(key)
        name = token["content"] if isinstance(token, dict) else token
        if name:
            names[key] = name
    # GPT-2 and Qwen have one token for both purposes.
    bos, eos = names.get("bos_token"), names.get("eos_token")
    if not (bos := bos or eos):
        raise UserError(f"{directory / files.CONFIG} names neither bos_token nor eos_token")
    source = texts.get(files.TEMPLATE) or _inline_template(config)
    chat = TemplateFormat(backend, source, names) if source else None
    return Tokenizer(backend, chat, bos_id=backend.id_of(bos), eos_id=backend.id_of(eos or bos))


def _inline_template(config: Mapping[str, Any]) -> str | None:
    """Older directories keep the template, or several by name, in tokenizer_config.json."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return value
