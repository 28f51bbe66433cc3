"""`prift-inspect migrate`: a store of an older schema version lifted to this one, without scoring.

The values of every shard stay what they are, and so do their digests; the identity says in addition what was always so
of the older version, the fingerprint changes with it, and it stands in every footer. A store that is not finished stays
so: what is missing can be scored into the new one.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cli import local_argument, place_argument
from shared.errors import UserError

if TYPE_CHECKING:
    from shared.places import Place
    from shared.score_store import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "store", type=place_argument, metavar="STORE", help="folder of a store of schema version 1 or 2"
    )
    parser.add_argument(
        "-o", "--output", type=local_argument, required=True, metavar="NEW", help="folder to write; not there yet"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the store anew; the old one is left as it is.

    Raises:
        UserError: a store of this version, or a damaged one; an output that is there. Nothing is left of it.
    """
    store: Place = arguments.store
    output: Path = arguments.output

    from inspection.merge_rows import software_of
    from inspection.reading import refuse_existing, sound_tables
    from shared.files import create_json, replacing
    from shared.score_store import MANIFEST_NAME, SCHEMA_VERSION, read_manifest
    from shared.shards import read_dropped, write_shard
    from stage1_score.cross_check import finished_shards, scored_rows

    refuse_existing(output)
    old = read_manifest(store)
    if old.schema_version == SCHEMA_VERSION:
        raise UserError(f"{store} is of schema version {SCHEMA_VERSION} already")
    new = _lifted(old)
    output.parent.mkdir(parents=True, exist_ok=True)
    shards = finished_shards(store, old)
    with replacing(output) as folder:
        folder.mkdir()
        create_json(folder / MANIFEST_NAME, new.model_dump(mode="json"))
        for shard in shards:
            tables = sound_tables(old, shard)
            rows = [row for table in tables for row in scored_rows(table, old.identity.columns)]
            written = write_shard(folder, shard.index, new, rows, read_dropped(shard), software_of(shard))
            if written.digest != shard.digest:
                raise AssertionError(f"{shard.path}: the digest {shard.digest} became {written.digest}")
    print(
        f"{output}: schema version {old.schema_version} lifted to {SCHEMA_VERSION}, {len(shards)} of "
        f"{new.source.num_shards} shards, every digest as it was; fingerprint {old.fingerprint[:12]} is now "
        f"{new.fingerprint[:12]}"
    )


def _lifted(old: "Manifest") -> "Manifest":
    from shared.score_store import SCHEMA_VERSION

    # Versions 1 and 2 dropped a conversation whose turns are not rendered as prefixes of the whole.
    identity = old.identity.model_copy(update={"split_turns": False})
    update = {"schema_version": SCHEMA_VERSION, "identity": identity, "fingerprint": identity.fingerprint()}
    return old.model_copy(update=update)
