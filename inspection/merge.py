"""`prift-inspect merge`: several score stores of the same identity made into one, an ordinary finished store.

Its data files are those of the stores in the order given, and its rows are numbered through. A store that `data.limit`
cut records the rows that it used of each file and no limit, so that every row of the new source was scored or dropped.
Rows are duplicates where they are the same row of the same data file; repeated content is not.
"""

import argparse
from pathlib import Path

from shared.cli import local_argument, place_argument
from shared.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "stores", type=place_argument, nargs="+", metavar="STORE", help="folders of two or more finished stores"
    )
    parser.add_argument(
        "-o", "--output", type=local_argument, required=True, metavar="OUT", help="folder to write; not there yet"
    )
    parser.add_argument(
        "--duplicates", choices=("refuse", "keep-first"), default="refuse",
        help="a row of a data file that several stores hold: refuse (the default), or keep it from the first store and "
        "list the others in .dropped.jsonl",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Merge the stores, shard by shard.

    Raises:
        UserError: stores that do not belong together, hold the same rows or ids, or are damaged; an output that is
            there. Nothing is left of it.
    """
    output: Path = arguments.output
    if len(arguments.stores) < 2:
        raise UserError(f"expected two or more stores, got {arguments.stores[0]} alone")

    from inspection.merge_plan import merged_manifest, open_parts, refuse_what_cannot_be_one
    from inspection.merge_rows import write_merged
    from inspection.reading import refuse_existing
    from shared.files import create_json, replacing
    from shared.score_store import MANIFEST_NAME

    refuse_existing(output)
    parts = open_parts(arguments.stores)
    refuse_what_cannot_be_one(parts, arguments.duplicates == "keep-first")
    output.parent.mkdir(parents=True, exist_ok=True)
    manifest = merged_manifest([part.manifest for part in parts])
    with replacing(output) as folder:
        folder.mkdir()
        create_json(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
        num_rows, num_targets = write_merged(folder, manifest, parts)
        if not num_rows:
            raise UserError("the stores have no row: all were dropped, see their .dropped.jsonl files")
    print(
        f"{output}: {num_rows:,} rows of {len(parts)} stores, {manifest.source.num_rows - num_rows:,} dropped, "
        f"{num_targets:,} targets in {manifest.source.num_shards:,} shards, fingerprint {manifest.fingerprint[:12]}"
    )
