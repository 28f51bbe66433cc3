"""A scored row as coloured text and as a table.

All text goes through `harmless` and into `rich.text.Text`: what stands in the data is never markup and never controls
the terminal.
"""

from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from inspection.harmless import harmless
from shared.shards import ScoredRow

_SHADES = (
    (0.1, "black on red", "below 0.1"),
    (0.3, "black on dark_orange", "below 0.3"),
    (0.5, "black on yellow", "below 0.5"),
    (0.9, "black on green_yellow", "below 0.9"),
    (np.inf, "black on green", "0.9 or more"),
)
"""Upper end (exclusive), style and name of each shade of support."""


def support(row: ScoredRow) -> tuple[str, np.ndarray]:
    """What the colours show, in words, and its value in [0, 1] for each target, float64 (N,)."""
    if "mass_rank" in row.statistics:
        return "u = 1 - mass_rank", 1.0 - row.statistics["mass_rank"].astype(np.float64)
    return "p", np.exp(row.statistics["logprob"].astype(np.float64))


def legend() -> Text:
    """The shades of support, lowest first."""
    pieces = [piece for _, style, name in _SHADES for piece in ((f" {name} ", style), " ")]
    return Text.assemble(*pieces, ("no target", "dim"))


def coloured(row: ScoredRow, texts: Sequence[str], special_ids: frozenset[int]) -> Text:
    """The row's text: targets by their support, the rest dim, special tokens in italics."""
    styles = dict(zip(row.target_positions.tolist(), map(_style, support(row)[1].tolist()), strict=True))
    result = Text()
    for position, (token, text) in enumerate(zip(row.input_ids.tolist(), texts, strict=True)):
        style = styles.get(position, "dim") + (" italic" if token in special_ids else "")
        result.append(_shown(text, position in styles), style)
    return result


def bracketed(row: ScoredRow, texts: Sequence[str]) -> Text:
    """The row's text where there are no colours: runs of targets stand between ⟦ and ⟧."""
    targets, pieces = set(row.target_positions.tolist()), []
    for position, text in enumerate(texts):
        is_target = position in targets
        starts, ends = is_target and position - 1 not in targets, is_target and position + 1 not in targets
        pieces.append("⟦" * starts + _shown(text, is_target) + "⟧" * ends)
    return Text("".join(pieces))


def numbers(row: ScoredRow, texts: Sequence[str] | None) -> Table:
    """One line for each token; those that are no target have no numbers.

    Args:
        texts: of the tokens; None leaves them out.
    """
    columns = _columns(row)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("position", "id", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    if texts is not None:
        table.add_column("token", overflow="fold")
    place_of = {position: place for place, position in enumerate(row.target_positions.tolist())}
    supports = support(row)[1].tolist()
    for position, token in enumerate(row.input_ids.tolist()):
        place = place_of.get(position)
        cells = [str(position), str(token)]
        cells += ["" if place is None else f"{values[place]:.6g}" for values in columns.values()]
        style = "dim" if place is None else _style(supports[place])
        shown = [] if texts is None else [Text(harmless(texts[position]).replace(" ", "␣"), style)]
        table.add_row(*map(Text, cells), *shown, style="dim" if place is None else None)
    return table


def _columns(row: ScoredRow) -> dict[str, np.ndarray]:
    """float64 (N,) by name: what is stored, with p and u beside what they are made of."""
    columns: dict[str, np.ndarray] = {}
    for name, values in row.statistics.items():
        if name == "mass_rank":
            columns["u"] = 1.0 - values.astype(np.float64)
        else:
            columns[name] = values.astype(np.float64)
        if name == "logprob":
            columns["p"] = np.exp(columns[name])
    return columns


def _style(value: float) -> str:
    return next(style for stop, style, _ in _SHADES if value < stop)


def _shown(text: str, is_target: bool) -> str:
    """A token's text; a line break that is a target is marked, for it has no colour of its own."""
    text = harmless(text, keep_line_breaks=True)
    return text.replace("\n", "↵\n") if is_target else text
