from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nanoworks.serve.auth.database import open_database
from nanoworks.serve.auth.guard import Guard
from nanoworks.serve.auth.keys import Key, new_id, new_secret, write_key
from nanoworks.serve.auth.store import KeyStore
from nanoworks.serve.caller import Caller, Limits
from nanoworks.serve.errors import ApiError


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class CountingStore(KeyStore):
    reads = 0
    broken = False

    def all_keys(self) -> list[Key]:
        self.reads += 1
        if self.broken:
            raise OSError("the database is gone")
        return super().all_keys()


class Setup:
    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.store = CountingStore(open_database(str(folder / "keys.db")), clock=self.clock)
        self.guard = Guard(self.store, max_age=2, max_outage=60, clock=self.clock)

    def caller(self, key: str | None) -> Caller:
        return asyncio.run(self.guard.caller(key))

    def refusal(self, key: str | None) -> tuple[int, str]:
        with pytest.raises(ApiError) as caught:
            self.caller(key)
        assert not key or key not in str(caught.value)
        return caught.value.status, str(caught.value)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_a_holder_is_known(setup: Setup) -> None:
    key = setup.store.create("alice", role="admin", limits=Limits(5))
    caller = setup.caller(key)
    assert caller == Caller(key[3:15], "alice", "admin", Limits(5))


def test_what_is_not_let_in(setup: Setup) -> None:
    key = setup.store.create("alice", lifetime=60)
    key_id = key[3:15]
    assert setup.refusal(None)[0] == 401
    assert setup.refusal("") == setup.refusal(None)
    assert "looks like nw_" in setup.refusal("sk-123")[1]
    wrong = setup.refusal(write_key(key_id, new_secret()))
    assert wrong == setup.refusal(write_key(new_id(), new_secret())), (
        "an id that exists must look like one that does not"
    )
    assert wrong[0] == 401
    setup.clock.now += 60
    assert setup.refusal(key) == (401, f"the key {key_id} expired on 1970-01-12 (UTC); ask for a new one")
    setup.store.revoke(key_id)
    setup.clock.now += 3
    assert setup.refusal(key) == (401, f"the key {key_id} was revoked; ask for a new one")


def test_a_revoked_key_ends_within_seconds_or_at_once(setup: Setup) -> None:
    first, second = setup.store.create("alice"), setup.store.create("bob")
    for key in (first, second):
        setup.caller(key)
        setup.store.revoke(key[3:15])
    assert setup.caller(second).name == "bob", "known for two seconds"
    setup.clock.now += 2.1
    assert setup.refusal(second)[0] == 401
    third = setup.store.create("carol")
    asyncio.run(setup.guard.refresh())
    assert setup.caller(third).name == "carol"
    setup.store.revoke(third[3:15])
    asyncio.run(setup.guard.refresh())
    assert setup.refusal(third)[0] == 401


def test_a_rotated_key_ends_when_its_overlap_does(setup: Setup) -> None:
    old = setup.store.create("alice")
    new = setup.store.rotate(old[3:15], overlap=30)
    assert setup.caller(old) == setup.caller(new)
    setup.clock.now += 30
    assert setup.refusal(old)[0] == 401
    assert setup.caller(new).name == "alice"


def test_guessing_costs_no_queries(setup: Setup) -> None:
    async def guess() -> None:
        results = await asyncio.gather(
            *(setup.guard.caller(write_key(new_id(), new_secret())) for _ in range(1000)), return_exceptions=True
        )
        assert all(isinstance(result, ApiError) for result in results)

    asyncio.run(guess())
    assert setup.store.reads == 1


def test_the_first_requests_wait_for_the_first_reading(setup: Setup) -> None:
    key = setup.store.create("alice")

    async def ask() -> list[Caller]:
        return await asyncio.gather(*(setup.guard.caller(key) for _ in range(20)))

    assert {caller.name for caller in asyncio.run(ask())} == {"alice"}
    assert setup.store.reads == 1


def test_an_outage_of_the_database(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    key = setup.store.create("alice")
    setup.caller(key)
    setup.store.broken = True
    setup.clock.now += 50
    assert setup.caller(key).name == "alice", "for a minute the keys known last go on working"
    assert "cannot be read (OSError)" in caplog.text
    setup.clock.now += 13
    assert setup.refusal(key)[0] == 503
    setup.store.broken = False
    setup.clock.now += 3
    assert setup.caller(key).name == "alice"


def test_nobody_gets_in_before_the_keys_were_read(setup: Setup) -> None:
    setup.store.broken = True
    assert setup.refusal(setup.store.create("alice"))[0] == 503


def test_a_clock_that_is_set_back(setup: Setup) -> None:
    key = setup.store.create("alice")
    setup.caller(key)
    setup.store.revoke(key[3:15])
    setup.clock.now -= 3600
    assert setup.refusal(key)[0] == 401
