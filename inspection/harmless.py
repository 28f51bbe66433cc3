"""Text of others, made harmless to print on a terminal."""


def harmless(text: str, keep_line_breaks: bool = False) -> str:
    r"""Escape what does not print: control characters (`\x1b`), bidi overrides (`\u202e`), unusual blanks.

    Args:
        keep_line_breaks: leave `\n` as it is.
    """
    return "".join(
        each if each.isprintable() or (keep_line_breaks and each == "\n") else _escaped(each) for each in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()
