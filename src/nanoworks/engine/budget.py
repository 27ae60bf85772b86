"""How a step's budget of tokens is dealt out, so that nobody waits long behind long prompts.

Each sequence is sure of one token. Of the rest, the first one that has more to read gets a quarter: it always gets on.
The others' three quarters go to who needs least: short prompts, also those that are about to be admitted, are read in
one step beside long ones. Prompts of one length are read one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence


def deal(wants: Sequence[int], newcomers: Sequence[int], budget: int) -> tuple[list[int], int]:
    """Return the tokens of each sequence, 0 only when the budget ends, and how many are left for the newcomers.

    Args:
        wants: tokens that each sequence could take, at least 1, in the order of service.
        newcomers: the same of those that may be admitted.
    """
    total = sum(wants)
    if total + sum(newcomers) <= budget:
        return list(wants), budget - total
    shares = [1 if i < budget else 0 for i in range(len(wants))]
    left = budget - sum(shares)
    reader = next((i for i, want in enumerate(wants) if want > 1), None)
    if reader is not None:
        sure = min(wants[reader] - 1, -(-left // 4))
        shares[reader] += sure
        left -= sure
    kept = 0
    everybody = [(want, i) for i, want in enumerate(wants)] + [(want, len(wants)) for want in newcomers]
    for want, i in sorted(everybody, key=lambda each: each[0]):  # of equals who comes first, newcomers last
        if i == len(wants):
            share = min(want, left)
            kept += share
        else:
            share = min(want - shares[i], left)
            shares[i] += share
        left -= share
    return shares, kept + left
