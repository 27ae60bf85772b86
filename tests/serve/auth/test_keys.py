from __future__ import annotations

import dataclasses

import pytest

from nanoworks.serve.auth.keys import Key, digest, holds, new_id, new_secret, read_key, redact, write_key
from nanoworks.serve.caller import Limits

SECRET = new_secret()
KEY = Key("0123456789ab", "alice", "user", Limits(), digest(SECRET), created_at=100)


def test_a_key_is_read_as_it_was_written() -> None:
    for _ in range(200):  # the alphabet of a secret has the separators in it
        parts = new_id(), new_secret()
        assert read_key(write_key(*parts)) == parts


@pytest.mark.parametrize("text", ["", "nw_", "sk-abc", write_key("0123456789ab", SECRET)[:-1], "nw_0123456789ab_" * 99])
def test_what_is_no_key(text: str) -> None:
    assert read_key(text) is None


def test_only_the_secret_opens() -> None:
    assert holds(SECRET, KEY, now=200)
    assert not holds(new_secret(), KEY, now=200)
    assert not holds(SECRET, None, now=200)
    assert not holds("", KEY, now=200)


def test_the_old_secret_holds_until_the_overlap_ends() -> None:
    rotated = dataclasses.replace(KEY, digest=digest("new"), old_digest=digest(SECRET), old_until=300)
    assert holds("new", rotated, now=1000)
    assert holds(SECRET, rotated, now=299)
    assert not holds(SECRET, rotated, now=300)


def test_status() -> None:
    assert KEY.status(now=1e12) == "active"
    assert dataclasses.replace(KEY, expires_at=200).status(now=199.9) == "active"
    assert dataclasses.replace(KEY, expires_at=200).status(now=200) == "expired"
    assert dataclasses.replace(KEY, expires_at=200, revoked_at=150).status(now=1000) == "revoked"


def test_nothing_printed_holds_the_secret_or_its_hash() -> None:
    assert digest(SECRET) not in repr(KEY)
    text = f"a {write_key('0123456789ab', SECRET)} and {write_key('ba9876543210', SECRET)}."
    assert redact(text) == "a nw_0123456789ab_... and nw_ba9876543210_...."
