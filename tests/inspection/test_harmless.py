"""Text of others on a terminal."""

import pytest

from inspection.harmless import harmless


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢 🙂", "plain ü 漢 🙂"), ("\x1b[2J", r"\x1b[2J"), ("\x9b31m", r"\x9b31m"), ("a\rb\x08", r"a\rb\x08"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"), ("\u200b\ufeff", r"\u200b\ufeff"), ("\u2028", r"\u2028"),
        ("\ud800", r"\ud800"), ("\U000e0041", r"\U000e0041"), ("[red]", "[red]"), ("a\nb", r"a\nb"),
    ],
)  # fmt: skip
def test_what_does_not_print_is_escaped(text: str, shown: str):
    assert harmless(text) == shown


def test_line_breaks_may_stay():
    assert harmless("a\n\x1b", keep_line_breaks=True) == "a\n\\x1b"
