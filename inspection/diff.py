"""`prift-inspect diff`: how two score stores differ, in what they are and in their numbers."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from shared.cli import place_argument
from shared.errors import UserError
from shared.places import Place

if TYPE_CHECKING:
    from inspection.comparison import Comparison

_THRESHOLD = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("left", type=place_argument, metavar="A", help="folder of a finished score store")
    parser.add_argument("right", type=place_argument, metavar="B", help="another; differences are B - A")
    parser.add_argument(
        "--threshold", type=float, action="append", metavar="U",
        help=f"threshold at which the decisions of PriFT-mass are compared, repeatable; default: {_THRESHOLD}",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(arguments: argparse.Namespace) -> None:
    """Print how two stores differ; that they do is no error.

    Raises:
        UserError: a store is missing, unfinished or damaged, or a threshold is none.
    """
    thresholds = arguments.threshold or [_THRESHOLD]
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise UserError(f"--threshold {threshold:g}: expected a probability above 0, at most 1")

    from inspection.alignment import OpenStore
    from inspection.comparison import compare_stores
    from shared.shards import open_store

    left, right = (OpenStore(*open_store(store)) for store in (arguments.left, arguments.right))
    comparison = compare_stores(left, right, thresholds)
    if arguments.json:
        print(json.dumps(asdict(comparison), indent=2, default=lambda it: it.model_dump()))
    else:
        _print(comparison, arguments.left, arguments.right)


def _print(found: "Comparison", left: Place, right: Place) -> None:
    from inspection.provenance import field_table
    from stage1_score.compare_scores import print_differences, print_flips

    print(f"A: {left}, {found.num_rows[0]:,} rows\nB: {right}, {found.num_rows[1]:,} rows")
    if found.is_empty:
        itself = "a store compared with itself" if left.resolve() == right.resolve() else "the stores are the same"
        print(f"no difference: {itself}: the same identity, source, rows and numbers")
    if found.fields:
        print(f"fields that differ:\n{field_table(found.fields, 'A', 'B')}")
    for store, names in zip("AB", found.columns_of_one, strict=True):
        if names:
            print(f"only {store} has the columns {', '.join(names)}")
    if found.matched_by is None:
        print("no row is compared: the stores share no data file, and not both have row ids of the user's own")
        return
    alone = [f"{num:,} of {store}" for store, num in zip("AB", found.num_alone, strict=True)]
    print(f"{found.num_matched:,} rows correspond, by {found.matched_by}; without a counterpart: {', '.join(alone)}")
    if num_others := found.num_matched - found.num_compared:
        named = "".join(f"\n  {it}" for it in found.not_compared)
        print(f"{num_others:,} of them differ in ids or targets and are not compared, the first:{named}")
    if not found.num_compared:
        return
    print("B - A, quantiles to within 0.03 %, the rest exact:")
    print_differences(found.differences)
    if found.flips:
        print_flips(found.flips)
    else:
        print("decisions of PriFT-mass are not compared: mass_rank is not stored in both")
