"""Word problems in one or two steps, solved with the calculator tool. Held out are the operands of a calculation."""

from __future__ import annotations

from random import Random

from nanoworks.data.microworld.example import Example, split_of
from nanoworks.data.microworld.world import PEOPLE

ITEMS = ("apples", "coins", "books", "eggs", "shells", "cups", "beads", "cards", "pens", "stones", "keys", "nuts")

ONE_STEP = {
    "+": (
        "{n} has {a} {i} and buys {b} more. How many {i} does {n} have now?",
        "{n} finds {a} {i} on Monday and {b} on Tuesday. How many {i} is that in total?",
        "There are {a} {i} on the table and {b} on the shelf. How many {i} are there together?",
        "{n} gets {b} {i} on top of the {a} {i} from before. How many {i} does {n} have now?",
    ),
    "-": (
        "{n} has {a} {i} and gives away {b}. How many {i} are left?",
        "There were {a} {i} in the basket and {n} took {b}. How many {i} remain?",
        "{n} loses {b} of {a} {i}. How many {i} are left?",
        "{n} needs {a} {i} and has {b}. How many {i} are missing?",
    ),
    "*": (
        "There are {a} boxes with {b} {i} in each. How many {i} are there?",
        "{n} buys {a} bags of {b} {i} each. How many {i} does {n} buy?",
        "{n} collects {b} {i} every day for {a} days. How many {i} does {n} collect?",
        "Each of {a} children brings {b} {i}. How many {i} do they bring?",
    ),
    "//": (
        "{n} shares {a} {i} equally among {b} friends. How many {i} does each friend get?",
        "{a} {i} are packed into boxes of {b}. How many boxes are filled?",
        "{n} puts {a} {i} into {b} equal rows. How many {i} are in each row?",
        "{n} uses {b} {i} a day. For how many days do {a} {i} last?",
    ),
}
TWO_STEPS = {
    "+-": "{n} has {a} {i}, buys {b} more and then gives away {c}. How many {i} are left?",
    "*+": "{n} has {a} bags of {b} {i} each and finds {c} more. How many {i} does {n} have now?",
    "*-": "{n} fills {a} boxes with {b} {i} each and sells {c} {i}. How many {i} are left?",
    "-+": "{n} has {a} {i}, loses {b} and then finds {c} more. How many {i} does {n} have now?",
}
WORDS = {"+": "Add: ", "-": "Subtract: ", "*": "Multiply: ", "//": "Divide: "}


def draw_arithmetic(rng: Random) -> Example:
    """One step in three problems of four. The steps of a problem are of one split, so that no calculation of a test
    problem is a step of a training problem."""
    dress = {"n": rng.choice(PEOPLE), "i": rng.choice(ITEMS)}
    if rng.random() < 0.75:
        op = rng.choice(tuple(ONE_STEP))
        a, b = _operands(rng, op)
        question = rng.choice(ONE_STEP[op]).format(a=a, b=b, **dress)
        steps = [f"{a}{op}{b}"]
    else:
        ops = rng.choice(tuple(TWO_STEPS))
        a, b, steps = 0, 0, ["", ""]
        while not steps[0] or split_of(_key(steps[0])) != split_of(_key(steps[1])):
            a, b = _operands(rng, ops[0])
            middle = _result(f"{a}{ops[0]}{b}")
            c = rng.randint(2, min(99, middle - 1) if ops[1] == "-" else 99)
            steps = [f"{a}{ops[0]}{b}", f"{middle}{ops[1]}{c}"]
        question = TWO_STEPS[ops].format(a=a, b=b, c=c, **dress)
    parts: list[tuple[str, str]] = []
    for step in steps:
        result = _result(step)
        word = WORDS[next(op for op in WORDS if op in step)]
        parts += [("text", word), ("python", step), ("python_output", str(result))]
    parts.append(("text", f"#### {result}"))
    return Example(_key(steps[0]), question, tuple(parts), str(result))


def _key(step: str) -> str:
    return f"arithmetic/{step}"


def _operands(rng: Random, op: str) -> tuple[int, int]:
    """Numbers from 2 to 99, so that a difference stays positive and a division leaves no rest."""
    if op == "-":
        b, a = sorted(rng.sample(range(2, 100), 2))
        return a, b
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    if op == "*":
        return a, b
    if op == "//":
        b, quotient = rng.randint(2, 30), rng.randint(2, 30)
        return b * quotient, b
    return a, b


def _result(step: str) -> int:
    for op, function in (("//", int.__floordiv__), ("+", int.__add__), ("-", int.__sub__), ("*", int.__mul__)):
        if op in step:
            a, b = step.split(op)
            return function(int(a), int(b))
    raise AssertionError(step)
