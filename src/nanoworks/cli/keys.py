"""`nanoworks keys`: creates, lists, limits, rotates and revokes the API keys of a server that runs with --auth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from nanoworks.serve.auth.keys import Key
    from nanoworks.serve.auth.ledger import Usage
    from nanoworks.serve.auth.store import KeyStore
    from nanoworks.serve.caller import Limits

app = typer.Typer(no_args_is_help=True)

DAY = 24 * 3600

KeysDb = Annotated[
    str | None,
    typer.Option(
        envvar="NANOWORKS_KEYS_DB",
        show_envvar=True,
        help="Where keys are kept: a file, or postgresql://USER:PASSWORD@HOST/NAME. Default: a file of yours.",
    ),
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]


def _limit(help_text: str) -> Any:
    return typer.Option(min=1, help=help_text)


RequestsPerMinute = Annotated[int | None, _limit("Default: no limit, here and below.")]
TokensPerMinute = Annotated[int | None, _limit("Prompts and answers together.")]
ConcurrentRequests = Annotated[int | None, _limit("Running at the same time.")]
TokensPerMonth = Annotated[int | None, _limit("The quota: prompts and answers together, in a month of UTC.")]


@app.command("create")
def create_command(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    role: Annotated[Literal["user", "admin"], typer.Option(help="An admin may also read /metrics.")] = "user",
    expires_days: Annotated[float | None, typer.Option(min=0.001, help="Default: never.")] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_requests: ConcurrentRequests = None,
    tokens_per_month: TokensPerMonth = None,
    keys_db: KeysDb = None,
) -> None:
    """Make a key and print it: KEY=$(nanoworks keys create alice). It cannot be shown again."""
    limits = _limits(requests_per_minute, tokens_per_minute, concurrent_requests, tokens_per_month)
    lifetime = None if expires_days is None else expires_days * DAY
    _show_key(_with_store(keys_db, lambda store: store.create(name, role=role, limits=limits, lifetime=lifetime)))


@app.command("list")
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    keys_db: KeysDb = None,
) -> None:
    """Show every key with its limits and what it used this month."""
    import json

    from nanoworks.serve.auth.keys import day
    from nanoworks.serve.auth.ledger import Ledger, Usage

    now = time.time()
    database = _open(keys_db)
    try:
        keys = _store(database).all_keys()
        used = Ledger(database).totals(day(now)[:7])
    finally:
        database.dispose()
    if as_json:
        for key in keys:
            print(json.dumps(_as_json(key, used.get(key.id, Usage()), now)))
    elif keys:
        _show_table(keys, used, now)
    else:
        typer.echo("there are no keys yet; `nanoworks keys create NAME` makes one", err=True)


@app.command("limit")
def limit_command(
    key_id: KeyId,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    concurrent_requests: ConcurrentRequests = None,
    tokens_per_month: TokensPerMonth = None,
    keys_db: KeysDb = None,
) -> None:
    """Give a key other limits: all four of them, so what is not named has none."""
    limits = _limits(requests_per_minute, tokens_per_minute, concurrent_requests, tokens_per_month)
    _with_store(keys_db, lambda store: store.set_limits(key_id, limits))


@app.command("rotate")
def rotate_command(
    key_id: KeyId,
    overlap_hours: Annotated[float, typer.Option(min=0, help="How long the old key still works.")] = 0,
    keys_db: KeysDb = None,
) -> None:
    """Print a new key in place of an old one, with the same name, limits and usage."""
    _show_key(_with_store(keys_db, lambda store: store.rotate(key_id, overlap=overlap_hours * 3600)))


@app.command("revoke")
def revoke_command(key_id: KeyId, keys_db: KeysDb = None) -> None:
    """End a key. Servers that run refuse it within seconds."""
    _with_store(keys_db, lambda store: store.revoke(key_id))
    typer.echo(f"revoked {key_id}", err=True)


def _open(keys_db: str | None) -> Any:
    from nanoworks.common.errors import missing_extra

    try:
        from nanoworks.serve.auth.database import default_url, open_database
    except ImportError:
        raise missing_extra("SQLAlchemy", "server") from None
    return open_database(keys_db or default_url())


def _store(database: Any) -> KeyStore:
    from nanoworks.serve.auth.store import KeyStore

    return KeyStore(database)


def _with_store(keys_db: str | None, action: Callable[[KeyStore], Any]) -> Any:
    database = _open(keys_db)
    try:
        return action(_store(database))
    finally:
        database.dispose()


def _limits(requests: int | None, tokens: int | None, concurrent: int | None, month: int | None) -> Limits:
    from nanoworks.serve.caller import Limits

    return Limits(requests, tokens, concurrent, month)


def _show_key(key: str) -> None:
    print(key)
    typer.echo("keep it now: only its hash is stored, so it cannot be shown again", err=True)


def _as_json(key: Key, used: Usage, now: float) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "role": key.role,
        "status": key.status(now),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "limits": vars(key.limits),
        "used_this_month": vars(used),
    }


def _show_table(keys: list[Key], used: dict[str, Usage], now: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nanoworks.common import human
    from nanoworks.serve.auth.keys import day

    headings = ("id", "name", "role", "status", "expires", "req/min", "tok/min", "at a time", "tok/month", "used")
    table = Table(*headings, box=None)
    for key in keys:
        usage = used.get(key.id)
        table.add_row(
            key.id,
            Text(key.name),  # whatever is in it is no markup
            key.role,
            key.status(now),
            day(key.expires_at) if key.expires_at else "never",
            *("-" if limit is None else human.count(limit) for limit in vars(key.limits).values()),
            human.count(usage.tokens) if usage else "0",
        )
    # A pipe has no width; lines that were cut for one would miss what grep looks for.
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)
