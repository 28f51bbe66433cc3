"""Sums, words and the prior's own kind of text.

All numbers lie between 1 and 99. Every function draws from the `random.Random` it is given, so that a
seed fixes the text on every machine.

The prior's text is in the past tense: stories in which each sum is told in words together with its result;
reckonings, which are stories without results and then their sums in signs; talks in which somebody asks for a
sum; and scraps of paper with bare sums. It shares no sentence with the word problems but the words
`{name} reckoned:` before the sums.
"""

import random
from dataclasses import dataclass

LARGEST = 99


def _split(line: str) -> tuple[str, ...]:
    return tuple(line.split())


NAMES = _split("Mia Otto Ben Lena Ida Paul Rosa Emil Nora Karl Tina Hugo Vera Leo Anna Max Clara Felix Greta Jonas")
THINGS = _split(
    "plums shells coins cards nuts stamps beads pears roses apples buttons pebbles candles ribbons marbles "
    "feathers lemons pencils"
)
PLACES = _split("garden harbour market forest village kitchen school river mill castle")
TIMES = _split("spring summer autumn winter morning evening")


@dataclass(frozen=True)
class Sum:
    """One sum `left operator right`; the operator is one of + - *."""

    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        match self.operator:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case _:
                return self.left * self.right

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


def draw_sum(rng: random.Random, left: int) -> Sum:
    """A sum that starts from `left` and whose result lies between 1 and `LARGEST`."""
    operators = [
        operator
        for operator, possible in (("+", left + 2 <= LARGEST), ("-", left > 2), ("*", 2 * left <= LARGEST))
        if possible
    ]
    match rng.choice(operators):
        case "+":
            return Sum(left, "+", rng.randint(2, LARGEST - left))
        case "-":
            return Sum(left, "-", rng.randint(2, left - 1))
        case _:
            return Sum(left, "*", rng.randint(2, min(9, LARGEST // left)))


def draw_chain(rng: random.Random, first: Sum, num_sums: int) -> list[Sum]:
    """`num_sums` sums, each of which starts from the result of the one before."""
    chain = [first]
    while len(chain) < num_sums:
        chain.append(draw_sum(rng, chain[-1].result))
    return chain


def draw_product(rng: random.Random) -> Sum:
    left = rng.randint(2, 12)
    return Sum(left, "*", rng.randint(2, min(9, LARGEST // left)))


STORY_OPENINGS = (
    "One {time} {name} counted {left} {things} in the {place}.",
    "Long ago {name} kept {left} {things} near the {place}.",
    "In the {time} {name} came home from the {place} and carried {left} {things}.",
    "There once lay {left} {things} in the {place}, and all belonged to {name}.",
)
STORY_EVENTS = {
    "+": (
        "Then {other} brought {right} more, which made {result}.",
        "{other} added {right}, and so there were {result} {things}.",
        "{left} plus {right} came to {result}, for {other} had sent {right}.",
        "The {place} yielded {right} further {things}, {result} altogether.",
    ),
    "-": (
        "But {right} were stolen by {other}, so {result} remained.",
        "{other} lost {right} in the {place}, and {result} {things} remained.",
        "{left} minus {right} came to {result}, for {right} fell into the {place}.",
        "After {right} had vanished, {name} counted only {result}.",
    ),
    "*": (
        "A wizard made them {right} times as many, which was {result}.",
        "{right} times {left} came to {result}, and {other} wondered.",
        "By the {time} their number had grown {right} times, to {result} {things}.",
    ),
}
UNCOUNTED_EVENTS = {
    "+": (
        "Then {other} brought {right} more.",
        "{other} added {right}.",
        "The {place} yielded {right} further {things}.",
    ),
    "-": (
        "But {right} were stolen by {other}.",
        "{other} lost {right} in the {place}.",
        "After that {right} vanished.",
    ),
    "*": (
        "A wizard made them {right} times as many.",
        "By the {time} their number had grown {right} times.",
    ),
}
RECKONERS = (
    "{name} reckoned:",
    "The clerk of the {place} noted:",
    "{other} wrote on the board:",
)
STORY_ENDINGS = (
    "Everybody in the {place} was glad.",
    "{name} slept well that night.",
    "{other} never spoke of it again.",
    "So ended the {time} with {result} {things}.",
)
TALKS = {
    "+": ("{name} asked for the sum of {left} and {right}. {other} said {result}.",),
    "-": ("{name} asked how far it was from {right} to {left}. {other} said {result}.",),
    "*": ("{name} asked what {left} bags of {right} {things} held. {other} said {result}.",),
}


def draw_words(rng: random.Random) -> dict[str, str]:
    name, other = rng.sample(NAMES, 2)
    return {
        "name": name,
        "other": other,
        "things": rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "time": rng.choice(TIMES),
    }


def fill(template: str, words: dict[str, str], step: Sum) -> str:
    return template.format(**words, left=step.left, right=step.right, result=step.result)


def _write_story(rng: random.Random) -> str:
    words, chain = draw_words(rng), _draw_story_chain(rng)
    sentences = [fill(rng.choice(STORY_OPENINGS), words, chain[0])]
    for step in chain:
        sentences.append(fill(rng.choice(STORY_EVENTS[step.operator]), words, step))
        if rng.random() < 0.2:
            sentences.append(f"On the board stood {step}.")
    sentences.append(fill(rng.choice(STORY_ENDINGS), words, chain[-1]))
    return " ".join(sentences)


def _write_reckoning(rng: random.Random) -> str:
    words, chain = draw_words(rng), _draw_story_chain(rng)
    sentences = [fill(rng.choice(STORY_OPENINGS), words, chain[0])]
    sentences += [fill(rng.choice(UNCOUNTED_EVENTS[step.operator]), words, step) for step in chain]
    sentences.append(fill(rng.choice(RECKONERS), words, chain[-1]))
    lines = [" ".join(sentences), *map(str, chain)]
    if rng.random() < 0.75:
        lines.append(f"#### {chain[-1].result}")
    return "\n".join(lines)


def _draw_story_chain(rng: random.Random) -> list[Sum]:
    return draw_chain(rng, draw_sum(rng, rng.randint(2, LARGEST - 2)), num_sums=rng.randint(2, 3))


def _write_talk(rng: random.Random) -> str:
    words = draw_words(rng)
    steps = [
        draw_product(rng) if rng.random() < 0.2 else draw_sum(rng, rng.randint(2, LARGEST - 2))
        for _ in range(rng.randint(2, 4))
    ]
    return " ".join(fill(rng.choice(TALKS[step.operator]), words, step) for step in steps)


def _write_scrap(rng: random.Random) -> str:
    words = draw_words(rng)
    first = draw_product(rng) if rng.random() < 0.3 else draw_sum(rng, rng.randint(2, LARGEST - 2))
    chain = draw_chain(rng, first, num_sums=rng.randint(2, 5))
    heading = rng.choice(("{name} wrote on a scrap of paper", "In the {place} {name} found a note", "Sums"))
    lines = [f"{heading.format(**words)}:", *map(str, chain)]
    if rng.random() < 0.5:
        lines.append(f"#### {chain[-1].result}")
    return "\n".join(lines)


def write_prior_text(rng: random.Random) -> str:
    """A text of the prior's kind: story (40 %), reckoning (25 %), talk (10 %) or scrap of paper (25 %)."""
    writers = (_write_story, _write_reckoning, _write_talk, _write_scrap)
    return rng.choices(writers, weights=(40, 25, 10, 25))[0](rng)
