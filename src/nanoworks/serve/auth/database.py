"""The database of keys and usage: SQLite in one file, or PostgreSQL by URL. Times are Unix seconds."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from nanoworks.common.errors import UserError

metadata = sa.MetaData()

keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("role", sa.String(5), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("revoked_at", sa.BigInteger),
    sa.Column("old_digest", sa.String(64)),
    sa.Column("old_until", sa.BigInteger),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("concurrent_requests", sa.BigInteger),
    sa.Column("tokens_per_month", sa.BigInteger),
)

usage = sa.Table(
    "api_usage",
    metadata,
    sa.Column("key_id", sa.String(12), primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),  # of UTC
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
)

schema = sa.Table("api_schema", metadata, sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
VERSION = 1
"""Of the tables above. Whoever changes one raises this and says in `_create_tables` how to come from the one before."""


def default_url() -> str:
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(base) / "nanoworks" / "keys.db")


def open_database(url: str) -> sa.Engine:
    """Return the database at `url`, with its tables.

    Args:
        url: a file's path (or `sqlite:///PATH`), or `postgresql://USER:PASSWORD@HOST/NAME`.

    Raises:
        UserError: it is no such URL, or cannot be reached or written.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        engine = _sqlite(Path(parsed.database or ""), parsed)
    else:
        engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args={"connect_timeout": 5})
    try:
        _create_tables(engine)
    except UserError:
        engine.dispose()
        raise
    except SQLAlchemyError as error:
        engine.dispose()
        reason = str(getattr(error, "orig", error)).strip()
        shown = parsed.render_as_string(hide_password=True)
        raise UserError(f"cannot use the database {shown}: {reason}") from None
    return engine


def _parse(url: str) -> sa.URL:
    if "://" not in url:
        return sa.URL.create("sqlite", database=str(Path(url).expanduser()))
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):  # its message would repeat the password
        raise UserError("this is no database URL; give a file's path or postgresql://USER:PASSWORD@HOST/NAME") from None
    backend = parsed.get_backend_name()
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise UserError(f"keys are not kept in {backend}; give a file's path (SQLite) or a postgresql:// URL")
    return parsed


def _sqlite(path: Path, url: sa.URL) -> sa.Engine:
    if str(path) in ("", ".", ":memory:"):
        raise UserError("a database in memory would be empty in every other process; give a file's path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # who may read the digests is the owner's business
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "connect")
    def _(connection: sa.PoolProxiedConnection, _: object) -> None:
        # Readers and the writer do not wait for each other; a writer waits for another for 5 s, the driver's default.
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    return engine


def _create_tables(engine: sa.Engine) -> None:
    for missing in reversed(range(len(metadata.tables) + 1)):
        try:
            metadata.create_all(engine)
            break
        except DBAPIError:  # another server created one of them at the same moment
            if not missing:
                raise
    with engine.connect() as connection:
        found = connection.execute(sa.select(sa.func.max(schema.c.version))).scalar_one()
    if found is None:
        with contextlib.suppress(IntegrityError), engine.begin() as connection:  # another server was quicker
            connection.execute(schema.insert().values(version=VERSION))
    elif found > VERSION:
        raise UserError(
            f"the database of keys is of a newer nanoworks (its tables have version {found}, this one knows "
            f"{VERSION}); run that one, or give another --keys-db"
        )
