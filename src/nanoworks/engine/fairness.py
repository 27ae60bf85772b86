"""In which order waiting sequences get their turn: by priority with ageing, and fairly between clients.

Two rules, neither of which lets anyone starve:

- Within a client the order is by `Rank`: who came first, where a level of priority counts as having come `AGEING` steps
  earlier. So whoever waits overtakes every newcomer in the end, whatever the newcomers' priority.
- Between clients the highest level goes first: the priority of the client's first sequence, and one more for every
  `AGEING` steps that the client waited without being served. On one level the client goes first for which the fewest
  tokens were computed. A client that comes, or comes back, begins with the least count of those that are there, so that
  nobody saves up turns (the virtual token counter of https://arxiv.org/abs/2401.00588).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from nanoworks.engine.sequence import Rank, Sequence

AGEING = 100
"""Steps of waiting that count as one level of priority."""


def rank_of(sequence: Sequence) -> Rank:
    return sequence.rank


class FairQueue:
    """The sequences that wait, and what each client got so far."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Sequence]] = {}  # by rank; no queue is empty
        self._length = 0
        self._members: dict[str, set[Sequence]] = {}  # of each client, also those that run
        self._served: dict[str, int] = {}
        self._served_at: dict[str, int] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return iter(sorted((s for queue in self._queues.values() for s in queue), key=rank_of))

    def enroll(self, sequence: Sequence, now: int) -> None:
        """Give a new sequence, and its forks, a rank; `now` counts steps."""
        request = sequence.request
        for member in (sequence, *sequence.forks):
            member.rank = Rank(now - request.priority * AGEING, self._arrivals, member.index)
            if request.client not in self._members:
                self._members[request.client] = set()
                self._served[request.client] = min(self._served.values(), default=0)
                self._served_at[request.client] = now
            self._members[request.client].add(member)
        self._arrivals += 1

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, whether it waited, ran or never came this far."""
        client = sequence.request.client
        members = self._members.get(client, set())
        if sequence not in members:
            return
        self.discard(sequence)
        members.remove(sequence)
        if not members:
            del self._members[client], self._served[client], self._served_at[client]

    def push(self, sequence: Sequence) -> None:
        insort(self._queues.setdefault(sequence.request.client, []), sequence, key=rank_of)
        self._length += 1

    def discard(self, sequence: Sequence) -> bool:
        """Take a sequence out of the queue; returns whether it was in it."""
        queue = self._queues.get(sequence.request.client, [])
        at = bisect_left(queue, sequence.rank, key=rank_of)
        if at == len(queue) or queue[at] is not sequence:
            return False
        del queue[at]
        if not queue:
            del self._queues[sequence.request.client]
        self._length -= 1
        return True

    def serve(self, sequence: Sequence, tokens: int, now: int) -> None:
        """Charge the client of `sequence` with `tokens` computed for it."""
        client = sequence.request.client
        self._served[client] += tokens
        self._served_at[client] = now

    def in_turn(self, now: int) -> Iterator[Sequence]:
        """Yield who should be admitted, one after the other; those may be taken out in the meantime."""
        skipped = dict.fromkeys(self._queues, 0)
        while skipped:
            client = min(skipped, key=lambda client: self._order(client, skipped[client], now))
            queue, at = self._queues[client], skipped[client]
            yield (sequence := queue[at])
            if at < len(queue) and queue[at] is sequence:
                skipped[client] = at + 1
            if skipped[client] == len(queue):
                del skipped[client]

    def _order(self, client: str, at: int, now: int) -> tuple[int, int, Rank]:
        first = self._queues[client][at]
        rank, priority = first.rank, first.request.priority
        waited = now - max(self._served_at[client], rank.due + priority * AGEING)
        return -(priority + waited // AGEING), self._served[client], rank
