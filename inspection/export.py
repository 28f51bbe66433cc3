"""`prift-inspect export`: the rows of a store with the weights of a rule, for trainers that take a column of weights.

A row has `row_id`, `source_index`, `input_ids`, `labels` (the id of a target, -100 elsewhere) and `weights` (0 where a
token is not a target). All three lists are as long as the row, and stand with their own tokens: label i is token i.
"""

import argparse
from pathlib import Path

from shared.cli import local_argument, place_argument
from shared.rules import METHODS, RULE_COLUMNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("store", type=place_argument, help="folder of a finished score store")
    parser.add_argument(
        "-o", "--output", type=local_argument, required=True, metavar="OUT", help="file or folder (hf) to write"
    )
    parser.add_argument(
        "--format", choices=("jsonl", "parquet", "hf"), required=True,
        help="JSON lines, one Parquet file, or a folder for datasets.load_from_disk",
    )  # fmt: skip
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--method", choices=list(METHODS), help="the rule by the paper's name, as train.method")
    rule.add_argument("--rule", choices=list(RULE_COLUMNS), help="a rule on the prior's statistics")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="parameters",
        help="a number of train.weighting, repeatable: the rule's parameters, floor, stop_token_weight",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Write the rows, row group by row group.

    Raises:
        UserError: no store, a rule whose weights cannot be stored or whose column is not, an output that is there, a
            library that is missing. Nothing is left of it.
    """
    from inspection.export_files import WRITERS
    from inspection.export_rows import ExportedRows, storable_weighting
    from inspection.reading import refuse_existing
    from shared.files import replacing
    from shared.shards import open_store

    output: Path = arguments.output
    refuse_existing(output)
    weighting = storable_weighting(arguments.method, arguments.rule, arguments.parameters)
    manifest, shards = open_store(arguments.store)
    rows = ExportedRows(arguments.store, manifest, shards, weighting)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        WRITERS[arguments.format](rows, temporary)
    given = "".join(f", {name} {value:g}" for name, value in weighting.parameters.items())
    print(
        f"{output}: {rows.num_rows:,} rows, {rows.num_targets:,} targets; rule {weighting.rule}{given}: mean weight "
        f"{rows.weight_sum / max(rows.num_targets, 1):.4f}, {rows.num_zero / max(rows.num_targets, 1):.2%} are zero"
    )
