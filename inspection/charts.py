"""Charts as SVG that takes its colours from the page.

Drawn by matplotlib: it is maintained, the project needs it anyway, and it writes plain SVG: no script, no font, no
network, sharp at any width, and text that a screen reader finds. The numbers stand beside each chart as a table.
"""

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inspection.store_numbers import THRESHOLDS, Histogram, PositionBin

_PAGE_COLORS = {
    "#010101": "var(--ink)",
    "#020202": "var(--line)",
    "#030303": "var(--first)",
    "#040404": "var(--second)",
}
_INK, _LINE, _FIRST, _SECOND = _PAGE_COLORS
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "prift", "font.size": 9, "font.family": "sans-serif",
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _LINE, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _LINE,
    "grid.linewidth": 0.4, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def histogram_chart(histogram: Histogram, label: str) -> str:
    """Share of targets in each bin, as bars."""
    total = sum(histogram.counts)
    with rc_context(_STYLE):
        figure, axes = _axes(label, "share of targets, %")
        widths = [right - left for left, right in zip(histogram.edges, histogram.edges[1:], strict=False)]
        shares = [100 * count / total for count in histogram.counts]
        axes.bar(histogram.edges[:-1], shares, widths, align="edge", color=_FIRST, edgecolor=_LINE, linewidth=0.5)
        return _svg(figure, f"Histogram of {label}")


def threshold_chart(kept_by_mass: list[int], kept_by_prob: list[int], num_targets: int) -> str:
    """Share of targets kept, over thresholds."""
    with rc_context(_STYLE):
        figure, axes = _axes("threshold", "targets kept, %")
        for kept, label, color, style in (
            (kept_by_mass, "PriFT-mass (u)", _FIRST, "-"),
            (kept_by_prob, "prob_threshold (p)", _SECOND, "--"),
        ):
            axes.plot(THRESHOLDS, [100 * count / num_targets for count in kept], style, color=color, label=label)
        axes.set_ylim(0, 102)
        axes.legend()
        return _svg(figure, "Share of targets kept over thresholds, for PriFT-mass and prob_threshold")


def position_chart(positions: list[PositionBin]) -> str:
    """Mean weights by place in the completion."""
    with rc_context(_STYLE):
        figure, axes = _axes("target's place in the completion", "mean weight")
        places = [it.first + 1 for it in positions]
        axes.plot(places, [it.mean_mass_weight for it in positions], "o-", color=_FIRST, ms=3, label="PriFT-mass, 0.5")
        axes.plot(places, [it.mean_prob for it in positions], "s--", color=_SECOND, ms=3, label="PriFT-prob")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylim(bottom=0)
        axes.legend()
        return _svg(figure, "Mean weight by place in the completion, for PriFT-mass and PriFT-prob")


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element; `label` is our own text, without markup."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for color, variable in _PAGE_COLORS.items():
        text = text.replace(color, variable)
    # Without its fixed size the drawing takes the width of the column it stands in.
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1
    )
