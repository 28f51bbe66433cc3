"""`prift-inspect stats`: the numbers of a report, in the terminal or as JSON."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from shared.cli import place_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prift-inspect stats`."""
    parser.add_argument("store", type=place_argument)
    parser.add_argument("--json", action="store_true", help="every number of a report, as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Print the numbers.

    Raises:
        UserError: no finished store.
    """
    from inspection.measure import measure

    numbers = measure(arguments.store)
    if arguments.json:
        print(json.dumps(as_json(numbers), indent=2, allow_nan=False))
        return
    print(
        f"{arguments.store}: {numbers.num_rows:,} rows, {numbers.num_targets:,} targets in "
        f"{numbers.num_tokens:,} tokens, "
        f"{numbers.num_shards} shards, {numbers.num_bytes / 1e6:,.1f} MB; "
        f"median nll of a row {numbers.tau:.3f} nats"
    )
    print(f"{'rule':16}{'kept':>9}{'effective':>11}{'mean weight':>13}{'of stop tokens':>16}")
    for weighting, it in numbers.rules:
        stop = "none" if it.stop_mean is None else f"{it.stop_mean:.4g}"
        print(f"{weighting.rule:16}{it.kept_share:9.2%}{it.effective_share:11.2%}{it.mean:13.4f}{stop:>16}")


def as_json(numbers: Any) -> dict[str, Any]:
    """`StoreNumbers` with its rules by name, and the grid of thresholds beside what is kept."""
    from inspection.store_numbers import THRESHOLDS

    rules = {
        weighting.rule: {"parameters": dict(weighting.parameters), **asdict(outlook)}
        for weighting, outlook in numbers.rules
    }
    columns = {name: asdict(it) for name, it in numbers.columns.items()}
    histograms = {name: asdict(it) for name, it in numbers.histograms.items()}
    lists = {"positions": [asdict(it) for it in numbers.positions], "tokens": [asdict(it) for it in numbers.tokens]}
    counts = (
        "num_rows",
        "num_dropped_rows",
        "num_tokens",
        "num_targets",
        "num_shards",
        "num_bytes",
        "longest_row",
        "tau",
    )
    kept = {"thresholds": THRESHOLDS, "kept_by_mass": numbers.kept_by_mass, "kept_by_prob": numbers.kept_by_prob}
    plain = {name: getattr(numbers, name) for name in counts}
    return {**plain, "columns": columns, "histograms": histograms, "rules": rules, **kept, **lists}
