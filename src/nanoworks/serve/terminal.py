"""The terminal side of `nanoworks chat`: reads lines, runs /commands, prints answers as they stream.

Works without a terminal too: lines come from a pipe, no prompt and no colour is printed.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event

import typer

from nanoworks.common.errors import UserError, nearest
from nanoworks.serve.parts import Piece
from nanoworks.serve.session import ChatSession

HELP = """\
/edit [TEXT]     change your last message and send it again
/regenerate, /r  another answer to your last message
/clear           begin a new conversation
/system [TEXT]   show or set the system message (/system - removes it)
/save FILE       write the conversation as one JSON line
/quit            leave (Ctrl-D does too; Ctrl-C stops an answer)"""

ENDINGS = {
    "length": "reached the token limit",
    "error": "the model computed values that are not finite",
    None: "stopped",
}


class Terminal:
    """One conversation on standard input and output."""

    def __init__(self, session: ChatSession) -> None:
        self._session = session
        self._interactive = sys.stdin.isatty()
        self._commands = {
            "edit": self._edit,
            "regenerate": self._regenerate,
            "r": self._regenerate,
            "clear": self._clear,
            "system": self._system,
            "save": self._save,
            "help": self._help,
            "quit": self._quit,
        }

    def run(self) -> None:
        """Talk until the input ends or /quit."""
        if self._interactive:
            _note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        while (line := self._read()) is not None:
            try:
                self.handle(line)
            except UserError as error:
                _note(str(error), colour="red")
            except EOFError:
                return

    def handle(self, line: str) -> None:
        """Run one line: a command or a message. EOFError means leave."""
        if not line.startswith("/"):
            show(self._session.ask(line), self._session)
            return
        name, _, argument = line[1:].partition(" ")
        command = self._commands.get(name)
        if command is None:
            raise UserError(f"unknown command /{name}{nearest(name, self._commands)}; /help lists them")
        command(argument.strip())

    def _read(self, text: str = "") -> str | None:
        """Return the next line that is not empty, or None at the end of the input; `text` can be edited."""
        prompt = "\n> " if self._interactive else ""
        while True:
            try:
                line = _input(prompt, text).strip()
            except EOFError:
                if self._interactive:
                    print()
                return None
            except KeyboardInterrupt:
                # As in a shell: drop the line, stay in the program.
                text = ""
                continue
            if line:
                return line

    # ------------------------------------------------------------------------------------------ commands

    def _edit(self, text: str) -> None:
        last = self._last()
        if not text and self._interactive:
            text = self._read(last) or ""
        if not text:
            raise UserError("/edit needs the new text here: /edit TEXT")
        self._session.drop_last_exchange()
        show(self._session.ask(text), self._session)

    def _regenerate(self, _: str) -> None:
        text = self._last()
        self._session.drop_last_exchange()
        show(self._session.ask(text), self._session)

    def _clear(self, _: str) -> None:
        self._session.clear()
        _note("new conversation")

    def _system(self, text: str) -> None:
        if text:
            self._session.system = "" if text == "-" else text
        _note(f"system message: {self._session.system or 'none'}")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file name: /save FILE")
        try:
            line = json.dumps(self._session.conversation(), ensure_ascii=False)
            Path(name).expanduser().write_text(line + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {name}: {error.strerror}") from None
        _note(f"saved to {name}")

    def _help(self, _: str) -> None:
        _note(HELP)

    def _quit(self, _: str) -> None:
        raise EOFError

    def _last(self) -> str:
        text = self._session.last_user_text
        if text is None:
            raise UserError("there is no message yet")
        return text


def show(pieces: Generator[Piece, None, None], session: ChatSession) -> bool:
    """Print an answer as it comes; return False if Ctrl-C stopped it."""
    opening = {"text": "", "python": "[calculator: ", "python_output": " = "}
    inside = "text"
    with closing(pieces), interrupted() as stop:
        for piece in pieces:
            kind = piece["type"]
            if kind != inside:
                if kind == "text" or (kind == "python" and inside == "python_output"):
                    _write("] ", dim=True)
                _write(opening[kind], dim=True)
                inside = kind
            _write(piece["text"], dim=kind != "text")
            if stop.is_set():
                break
    _write("]\n" if inside != "text" else "\n", dim=inside != "text")
    if session.finish_reason in ENDINGS:
        _note(f"({ENDINGS[session.finish_reason]})")
    return not stop.is_set()


@contextmanager
def interrupted() -> Iterator[Event]:
    """Within, Ctrl-C sets the event instead of raising: no step of the engine is torn in the middle."""
    event = Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _input(prompt: str, text: str) -> str:
    """`input` with line editing and history, `text` already written."""
    try:
        import readline  # absent on Windows
    except ImportError:
        return input(prompt)
    readline.set_startup_hook((lambda: readline.insert_text(text)) if text else None)
    try:
        return input(prompt)
    finally:
        readline.set_startup_hook(None)


def _write(text: str, *, dim: bool = False) -> None:
    typer.secho(text, dim=dim or None, nl=False)
    sys.stdout.flush()


def _note(text: str, *, colour: str | None = None) -> None:
    """A line of ours, not of the model: on standard error, so that a pipe gets answers only."""
    typer.secho(text, err=True, dim=colour is None or None, fg=colour)
