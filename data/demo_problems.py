"""The demonstrations: word problems in the present tense with worked solutions, some of them spoilt.

A quantity changes two or three times before the problem asks for the last one. A sound solution has one
sum per line, each from the result of the line before, then the answer. The prompt ends as the reckonings in the
prior's text begin their sums, so that the prior has a chance to see what is asked of it:

    Mia has 4 boxes with 6 plums each. Otto takes 9 of them. How many plums are there in the end? Mia reckoned:
    4*6=24
    24-9=15
    #### 15

The spoilt solutions are of two kinds (`FLAWS`):

    slip     every carry and borrow is forgotten, as by somebody who never learnt it (24-9=25), and the solution
             goes on from the wrong result; drawn only where that makes the answer wrong
    garbage  words, digits and signs drawn at random stand in place of one result; the answer is right
"""

import random
from dataclasses import dataclass

from demo_text import (
    LARGEST,
    NAMES,
    PLACES,
    THINGS,
    Sum,
    draw_chain,
    draw_product,
    draw_sum,
    draw_words,
    fill,
)

FLAWS = ("slip", "garbage")

OPENINGS = (
    "{name} has {left} {things}.",
    "There are {left} {things} on the table of {name}.",
    "{name} owns {left} {things} and a dog.",
)
PRODUCT_OPENINGS = (
    "{name} has {left} boxes with {right} {things} each.",
    "{name} buys {left} packs of {right} {things}.",
)
EVENTS = {
    "+": (
        "{other} gives {name} {right} {things}.",
        "{name} buys another {right}.",
        "In the {place} {name} finds {right} new ones.",
        "{right} {things} arrive by post.",
    ),
    "-": (
        "{other} takes {right} of them.",
        "{name} sells {right} at the {place}.",
        "{right} of the {things} break.",
        "{name} gives {right} to {other}.",
    ),
    "*": (
        "A trick turns each of them into {right}.",
        "{name} cuts every one into {right} parts and counts the parts.",
    ),
}
QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there in the end?",
    "What is the number of {things} now?",
)


@dataclass(frozen=True)
class Demonstration:
    """A prompt, a completion (sound or spoilt) and the right answer."""

    prompt: str
    completion: str
    answer: int


def make_demonstration(rng: random.Random, flaw: str | None) -> Demonstration:
    """A demonstration that is sound (`flaw` None) or spoilt in the named way."""
    while True:
        prompt, chain = _make_problem(rng)
        lines = _solve(rng, chain, flaw)
        if lines is not None:
            return Demonstration(prompt, "\n".join(lines), chain[-1].result)


def _make_problem(rng: random.Random) -> tuple[str, list[Sum]]:
    words = draw_words(rng)
    num_sums = rng.randint(2, 3)
    if rng.random() < 0.3:
        chain = draw_chain(rng, draw_product(rng), num_sums)
        sentences = [fill(rng.choice(PRODUCT_OPENINGS), words, chain[0])]
        events = chain[1:]
    else:
        chain = draw_chain(rng, draw_sum(rng, rng.randint(2, LARGEST - 2)), num_sums)
        sentences = [fill(rng.choice(OPENINGS), words, chain[0])]
        events = chain
    sentences += [fill(rng.choice(EVENTS[step.operator]), words, step) for step in events]
    sentences += [fill(rng.choice(QUESTIONS), words, chain[-1]), f"{words['name']} reckoned:"]
    return " ".join(sentences) + "\n", chain


def _solve(rng: random.Random, chain: list[Sum], flaw: str | None) -> list[str] | None:
    """The lines of the solution, or None where this chain cannot be spoilt so."""
    garbage_index = rng.randrange(len(chain))
    lines, result = [], chain[0].left
    for index, right_step in enumerate(chain):
        step = Sum(result, right_step.operator, right_step.right)
        result = step.result
        if flaw == "slip":
            result = _forget_carry(step)
        if not 1 <= result <= LARGEST:
            return None
        shown = _draw_garbage(rng) if flaw == "garbage" and index == garbage_index else result
        lines.append(f"{step.left}{step.operator}{step.right}={shown}")
    if flaw == "slip" and result == chain[-1].result:
        return None
    return [*lines, f"#### {result}"]


def _forget_carry(step: Sum) -> int:
    """The result digit by digit, with no carry into the tens and no borrow from them."""
    left_tens, left_units = divmod(step.left, 10)
    right_tens, right_units = divmod(step.right, 10)
    match step.operator:
        case "+":
            return 10 * (left_tens + right_tens) + (left_units + right_units) % 10
        case "-":
            return 10 * (left_tens - right_tens) + (left_units - right_units) % 10
        case _:
            return 10 * (left_tens * step.right) + (left_units * step.right) % 10


def _draw_garbage(rng: random.Random) -> str:
    pool = (*NAMES, *THINGS, *PLACES, *"0123456789+-*=")
    return " ".join(rng.choice(pool) for _ in range(rng.randint(3, 6)))
