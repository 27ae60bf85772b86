from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from nanoworks.common.errors import UserError
from nanoworks.serve.auth.database import VERSION, metadata, open_database, schema
from nanoworks.serve.auth.keys import holds, read_key
from nanoworks.serve.auth.store import KeyStore
from nanoworks.serve.caller import Limits


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(keys_db: str) -> Iterator[sa.Engine]:
    engine = open_database(keys_db)
    yield engine
    engine.dispose()


@pytest.fixture
def store(database: sa.Engine) -> KeyStore:
    return KeyStore(database, clock=Clock())


def parts_of(key: str) -> tuple[str, str]:
    parts = read_key(key)
    assert parts is not None
    return parts


def test_a_key_comes_back_as_it_was_made(store: KeyStore) -> None:
    limits = Limits(60, 10_000, 4, 2**40)
    key_id, secret = parts_of(store.create(" Zoë [b] ", role="admin", limits=limits, lifetime=60))
    store.create("bob")
    alice, bob = sorted(store.all_keys(), key=lambda key: key.role)
    assert (alice.id, alice.name, alice.role, alice.limits) == (key_id, "Zoë [b]", "admin", limits)
    assert (alice.created_at, alice.expires_at, alice.revoked_at) == (1_000_000, 1_000_060, None)
    assert (bob.limits, bob.expires_at, bob.role) == (Limits(), None, "user")
    assert holds(secret, alice, now=0)
    assert not holds(secret, bob, now=0)


def test_revoked_keys_stay_in_the_list_with_their_first_date(store: KeyStore, database: sa.Engine) -> None:
    key_id, _ = parts_of(store.create("alice"))
    store.revoke(key_id)
    later = Clock()
    later.now += 100
    KeyStore(database, clock=later).revoke(key_id)
    assert [(key.status(0), key.revoked_at) for key in store.all_keys()] == [("revoked", 1_000_000)]
    with pytest.raises(UserError, match="revoked; create a new one"):
        store.rotate(key_id)


def test_rotation_keeps_all_but_the_secret(store: KeyStore) -> None:
    key_id, old = parts_of(store.create("alice", limits=Limits(5)))
    new_id, new = parts_of(store.rotate(key_id, overlap=60))
    (key,) = store.all_keys()
    assert (new_id, key.name, key.limits) == (key_id, "alice", Limits(5))
    assert holds(new, key, now=1_000_000)
    assert holds(old, key, now=1_000_059)
    assert not holds(old, key, now=1_000_060)
    store.rotate(key_id)
    (key,) = store.all_keys()
    assert not holds(new, key, now=1_000_000), "without an overlap the old secret ends at once"
    assert not holds(old, key, now=1_000_000)


def test_other_limits(store: KeyStore) -> None:
    key_id, _ = parts_of(store.create("alice", limits=Limits(5, 6, 7, 8)))
    store.set_limits(key_id, Limits(tokens_per_minute=9))
    assert store.all_keys()[0].limits == Limits(tokens_per_minute=9)


def test_an_id_that_is_none(store: KeyStore) -> None:
    for action in (store.revoke, store.rotate, lambda key_id: store.set_limits(key_id, Limits())):
        with pytest.raises(UserError, match=r"no key 000000000000; .*keys list"):
            action("000000000000")
    whole = store.create("alice")
    with pytest.raises(UserError, match=f"id alone, which is {whole[3:15]}") as caught:
        store.revoke(whole)
    assert whole not in str(caught.value)


@pytest.mark.parametrize("name", ["", "   ", "x" * 101])
def test_a_key_needs_a_name(store: KeyStore, name: str) -> None:
    with pytest.raises(UserError, match="needs a name"):
        store.create(name)


def test_no_secret_is_in_the_database(store: KeyStore, database: sa.Engine, keys_db: str) -> None:
    whole = [store.create("alice"), store.create("bob")]
    whole.append(store.rotate(parts_of(whole[0])[0], overlap=60))
    with database.connect() as connection:
        rows = [str(row) for table in metadata.sorted_tables for row in connection.execute(table.select())]
    files = [path.read_bytes() for path in Path(keys_db).parent.glob("keys.db*")] if "://" not in keys_db else []
    assert rows
    for key in whole:
        secret = parts_of(key)[1]
        assert not any(secret in row for row in rows)
        assert not any(secret.encode() in content for content in files)


def test_many_servers_may_start_at_once(keys_db: str) -> None:
    failed: list[Exception] = []

    def start() -> None:
        try:
            engine = open_database(keys_db)
            KeyStore(engine).create("alice")
            engine.dispose()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    engine = open_database(keys_db)
    assert len(KeyStore(engine).all_keys()) == 6
    engine.dispose()


def test_tables_of_a_newer_version_are_left_alone(database: sa.Engine, keys_db: str) -> None:
    with database.begin() as connection:
        assert connection.execute(schema.select()).scalars().all() == [VERSION]
        connection.execute(schema.insert().values(version=VERSION + 1))
    with pytest.raises(UserError, match=f"version {VERSION + 1}, this one knows {VERSION}"):
        open_database(keys_db)


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "keys.db"
    engine = open_database(f"sqlite:///{path}")
    KeyStore(engine).create("alice")
    modes = {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    engine.dispose()
    assert modes == {0o600}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://bob:hunter2@db/x", "not kept in mysql"),
        ("postgresql://bob:hunter2@127.0.0.1:1/x", "cannot use the database .*Connection refused"),
        ("postgresql://bob:hunter2@127.0.0.1:port/x", "no database URL"),
        ("://bob:hunter2", "no database URL"),
        ("sqlite://", "a database in memory"),
        ("sqlite:///:memory:", "a database in memory"),
        ("/proc/no/keys.db", "cannot write"),
        (__file__, "cannot use the database .*not a database"),
    ],
)
def test_a_database_that_cannot_be_used(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)
