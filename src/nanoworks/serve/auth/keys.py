"""What a key is: `nw_<id>_<secret>`. The id is public; of the secret only the SHA-256 is kept.

The secret is 256 random bits, so a plain hash is enough: there is nothing to guess and no dictionary to try, and a
check costs microseconds instead of the third of a second of a hash for passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Literal

from nanoworks.serve.caller import Caller, Limits, Role

KEY = re.compile(r"nw_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Key:
    """A key without its secret. Times are Unix seconds."""

    id: str
    name: str
    role: Role
    limits: Limits
    digest: str = field(repr=False)
    """SHA-256 of the secret, in hexadecimal."""
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    old_digest: str | None = field(default=None, repr=False)
    """Of the secret before the last rotation, which holds until `old_until`."""
    old_until: int | None = None

    def status(self, now: float) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"

    def caller(self) -> Caller:
        return Caller(self.id, self.name, self.role, self.limits)


def new_id() -> str:
    return secrets.token_hex(6)


def new_secret() -> str:
    return secrets.token_urlsafe(32)


def write_key(key_id: str, secret: str) -> str:
    return f"nw_{key_id}_{secret}"


def read_key(text: str) -> tuple[str, str] | None:
    """Return the id and the secret, or None for what is no key."""
    found = KEY.fullmatch(text)
    return (found[1], found[2]) if found else None


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def holds(secret: str, key: Key | None, now: float) -> bool:
    """Return whether `secret` is that of `key`; it takes as long when it is not, or when there is no such key."""
    given = digest(secret)
    current = hmac.compare_digest(given, key.digest if key else _NO_DIGEST)
    old = hmac.compare_digest(given, (key.old_digest if key else None) or _NO_DIGEST)
    return current or (old and key is not None and now < (key.old_until or 0))


def redact(text: str) -> str:
    """Return `text` with the secret of every key in it left out."""
    return KEY.sub(r"nw_\1_...", text)


def day(seconds: float) -> str:
    """Return the date in UTC: `2026-11-22`."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")
