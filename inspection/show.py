"""`prift-inspect show`: one row of a store, its text coloured by how well the prior supports each target."""

import argparse
import sys
from typing import TYPE_CHECKING

from shared.cli import place_argument

if TYPE_CHECKING:
    from inspection.find_row import FoundRow
    from shared.score_store import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("store", type=place_argument, help="folder of the score store, finished or not")
    parser.add_argument(
        "row", metavar="ROW",
        help="a row id, or '#N' (in quotes) for the row at source_index N, counted from 0 over all data files",
    )  # fmt: skip
    parser.add_argument("--numbers", action="store_true", help="print the statistics of each token as a table, too")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="folder of the prior's tokenizer; default: where the store says"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a row.

    Raises:
        UserError: no such row, or the tokenizer is not the store's.
    """
    from rich.console import Console

    from inspection.decoded import load_store_tokenizer, token_texts
    from inspection.find_row import find_row
    from inspection.harmless import harmless
    from inspection.row_text import bracketed, coloured, legend, numbers, support
    from shared.score_store import read_manifest
    from stage1_score.cross_check import finished_shards

    manifest = read_manifest(arguments.store)
    found = find_row(arguments.store, manifest, finished_shards(arguments.store, manifest), arguments.row)
    tokenizer = load_store_tokenizer(manifest, arguments.tokenizer)
    ids = found.row.input_ids.tolist()
    texts = [f"{token} " for token in ids] if tokenizer is None else token_texts(tokenizer, ids)
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
    for line in _headline(found, manifest):
        console.print(harmless(line), soft_wrap=True)
    if tokenizer is None:
        name = harmless(manifest.prior_name)
        console.print(f"the prior's tokenizer is not at {name}: ids for text; --tokenizer PATH says where it lies",
                      soft_wrap=True)  # fmt: skip
    if console.color_system is None or console.no_color:
        console.print("no colours here: targets stand between ⟦ and ⟧; --numbers prints their support\n")
        console.print(bracketed(found.row, texts), soft_wrap=True)
    else:
        console.print(f"targets by their support, {support(found.row)[0]}:")
        console.print(legend())
        console.print()
        special_ids = frozenset(getattr(tokenizer, "all_special_ids", ()))
        console.print(coloured(found.row, texts, special_ids), soft_wrap=True)
    if arguments.numbers:
        console.print()
        console.print(numbers(found.row, None if tokenizer is None else texts))


def _headline(found: "FoundRow", manifest: "Manifest") -> list[str]:
    from inspection.provenance import place_of

    row = found.row
    span, place = place_of(manifest.source, row.source_index)
    lines = [
        f"row {row.row_id} (#{row.source_index}), row {place} of {span.file.path}: {len(row.input_ids):,} tokens, "
        f"{len(row.target_positions):,} targets, mean logprob {row.statistics['logprob'].mean():.4f} nats"
    ]
    if found.num_found > 1:
        others = ", ".join(f"'{name}'" for name in found.others)
        rest = found.num_found - 1 - len(found.others)
        more = f" and {rest:,} more" if rest else ""
        lines.append(f"{found.num_found:,} rows have this id, this is the first; the others: {others}{more}")
    return lines
