"""Who looks on while the engine answers: limits, usage accounting, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from nanoworks.engine import Delta

if TYPE_CHECKING:
    from nanoworks.serve.generation import Generation


class Observer(Protocol):
    """Inherit from it and write only the methods that are needed."""

    async def admit(self, job: Generation) -> None:
        """Let `job` begin, or raise ApiError (429 with `retry_after`)."""
        return

    def delta(self, job: Generation, delta: Delta) -> None:
        """See what a step added. Called for every token of every stream: it must cost next to nothing."""
        return

    async def finished(self, job: Generation) -> None:
        """Called exactly once for every job that this observer admitted, also when the client left."""
        return
