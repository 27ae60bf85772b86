"""Creates, lists, revokes and rotates keys in a database."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa

from nanoworks.common.errors import UserError
from nanoworks.serve.auth import database as db
from nanoworks.serve.auth.keys import Key, digest, new_id, new_secret, read_key, redact, write_key
from nanoworks.serve.caller import Limits, Role


class KeyStore:
    """The keys in `database`. Blocking: a server calls it in a thread."""

    def __init__(self, database: sa.Engine, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def create(
        self, name: str, *, role: Role = "user", limits: Limits | None = None, lifetime: float | None = None
    ) -> str:
        """Return a new key, which cannot be had a second time.

        Args:
            name: whose it is, at most 100 characters.
            role: an admin may also read what concerns everybody, such as /metrics.
            limits: none by default.
            lifetime: seconds until it expires; None: never.
        """
        name = name.strip()
        if not 0 < len(name) <= 100:
            raise UserError("a key needs a name of 1 to 100 characters that says whose it is")
        key_id, secret, now = new_id(), new_secret(), self._clock()
        row: dict[str, Any] = {
            "id": key_id,
            "name": name,
            "role": role,
            "digest": digest(secret),
            "created_at": int(now),
            "expires_at": None if lifetime is None else int(now + lifetime),
            **asdict(limits or Limits()),
        }
        with self._database.begin() as connection:
            connection.execute(db.keys.insert().values(row))
        return write_key(key_id, secret)

    def all_keys(self) -> list[Key]:
        """Return every key, revoked ones included, the oldest first."""
        query = db.keys.select().order_by(db.keys.c.created_at, db.keys.c.id)
        with self._database.connect() as connection:
            return [_key(row) for row in connection.execute(query).mappings()]

    def revoke(self, key_id: str) -> None:
        """End a key for good. UserError when there is none of this id; once more does nothing."""
        revoked_at = sa.func.coalesce(db.keys.c.revoked_at, int(self._clock()))
        self._update(key_id, {"revoked_at": revoked_at, "old_digest": None, "old_until": None})

    def rotate(self, key_id: str, *, overlap: float = 0) -> str:
        """Return the same key with a new secret; the old one holds for `overlap` more seconds.

        Raises:
            UserError: there is no such key, or it is revoked or expired.
        """
        now = self._clock()
        with self._database.begin() as connection:
            row = connection.execute(db.keys.select().where(db.keys.c.id == key_id).with_for_update()).mappings()
            key = next((_key(each) for each in row), None)
            if key is None:
                raise _unknown(key_id)
            if (status := key.status(now)) != "active":
                raise UserError(f"the key {key_id} is {status}; create a new one")
            secret = new_secret()
            change = {"digest": digest(secret), "old_digest": key.digest, "old_until": int(now + overlap)}
            connection.execute(db.keys.update().where(db.keys.c.id == key_id).values(change))
        return write_key(key_id, secret)

    def set_limits(self, key_id: str, limits: Limits) -> None:
        """Give a key other limits. UserError when there is none of this id."""
        self._update(key_id, asdict(limits))

    def _update(self, key_id: str, change: dict[str, Any]) -> None:
        with self._database.begin() as connection:
            done = connection.execute(db.keys.update().where(db.keys.c.id == key_id).values(change))
        if not done.rowcount:
            raise _unknown(key_id)


def _unknown(key_id: str) -> UserError:
    if (parts := read_key(key_id)) is not None:  # pasted whole; it must not be said back
        return UserError(f"this takes the key's id alone, which is {parts[0]}")
    return UserError(f"there is no key {redact(key_id)}; `nanoworks keys list` shows the ids")


def _key(row: sa.RowMapping) -> Key:
    limits = Limits(**{each.name: row[each.name] for each in fields(Limits)})
    return Key(limits=limits, **{each.name: row[each.name] for each in fields(Key) if each.name != "limits"})
