"""`nanoworks tokenizer train FILES...` and `nanoworks tokenizer eval DIRECTORY`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nanoworks.data import Source

app = typer.Typer(no_args_is_help=True)

_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl"}


@app.command("train")
def train_command(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA...", help="Text, .jsonl or .parquet files, or a data source by name: stdlib, ..."),
    ],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, the 9 special ones included.")] = 32768,
    trainer: Annotated[str, typer.Option(help="rustbpe, or hf for Hugging Face's.")] = "rustbpe",
    max_chars: Annotated[int | None, typer.Option(min=1, help="Stop after so many characters.")] = None,
    document_chars: Annotated[int | None, typer.Option(min=1, help="Cut each document to so many.")] = None,
) -> None:
    """Train a byte-level BPE vocabulary and save it in the form that AutoTokenizer loads."""
    import time

    from rich.console import Console

    from nanoworks.common import human
    from nanoworks.tokenizer import train_tokenizer

    sources = [_source(name) for name in data]
    started = time.monotonic()
    characters = 0

    def texts() -> Iterator[str]:
        nonlocal characters
        for text in _progress(sources):
            text = text[:document_chars]
            if max_chars is not None:
                text = text[: max_chars - characters]
            characters += len(text)
            yield text
            if characters == max_chars:
                return

    tokenizer = train_tokenizer(texts(), vocab_size, trainer=trainer)
    tokenizer.save(out)
    console = Console()
    if tokenizer.vocab_size < vocab_size:
        console.print(f"the text ran out of pairs to merge before {vocab_size:,} tokens")
    console.print(
        f"{tokenizer.vocab_size:,} tokens from {human.count(characters)} characters "
        f"in {human.duration(time.monotonic() - started)}: {out}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("eval")
def eval_command(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer's directory, or a run's step.")],
    against: Annotated[list[Path] | None, typer.Option(help="Another tokenizer; may be repeated.")] = None,
) -> None:
    """Compare compression (bytes per token, higher is better) by kind of text, also with GPT-2 and GPT-4."""
    from rich.console import Console
    from rich.table import Table

    from nanoworks.tokenizer import Tokenizer
    from nanoworks.tokenizer.compression import PUBLISHED, SAMPLES, bytes_per_token, published_encoding

    console = Console()
    columns: list[tuple[str, Callable[[str], list[int]]]] = []
    for path in [tokenizer, *(against or [])]:
        loaded = Tokenizer.load(path)
        columns.append((f"{path}\n{loaded.vocab_size:,}", loaded.encode))
    for title, name in PUBLISHED.items():
        encoding = published_encoding(name)
        if encoding is None:
            console.print(f"{title} left out: {name} is not in tiktoken's cache; nothing is downloaded here")
        else:
            columns.append((f"{title}\n{encoding.n_vocab:,}", encoding.encode_ordinary))
    table = Table("bytes per token", *(title for title, _ in columns))
    for domain, text in {**SAMPLES, "all": "".join(SAMPLES.values())}.items():
        table.add_row(domain, *(f"{bytes_per_token(encode, text):.2f}" for _, encode in columns))
    console.print(table)


def _source(name: str) -> Source:
    """A file or folder becomes the source that reads its kind; anything else is a source's name."""
    from nanoworks.data import SOURCES, build_source

    if name in SOURCES:
        return build_source(name, {"split": "train"})
    kind = _SUFFIXES.get(Path(name).suffix, "text")
    return build_source(kind, {"path": name, "split": "all", "shuffle": False})


def _progress(sources: list[Source]) -> Iterator[str]:
    """Yield the texts of every document, a conversation's messages one by one, under a progress bar."""
    from rich.progress import Progress

    from nanoworks.tokenizer import message_text

    with Progress(transient=True) as bar:
        task = bar.add_task("reading", total=sum(len(source) for source in sources))
        for source in sources:
            for page in range(len(source)):
                for document in source.read(page):
                    if isinstance(document, str):
                        yield document
                    elif document is not None:
                        yield from map(message_text, document["messages"])
                bar.advance(task)
