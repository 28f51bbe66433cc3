"""What the verbs that read whole stores have in common. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from shared.errors import UserError
from shared.score_store import Manifest
from shared.shards import Shard, read_batches
from shared.verify import row_problems


def sound_tables(manifest: Manifest, shard: Shard) -> Iterator[pa.Table]:
    """The row groups of a shard, every one verified: what is made of them says nothing of damage any more.

    Raises:
        UserError: a page's checksum, the digest or an invariant of a row does not hold.
    """
    for table in read_batches(shard):
        problems = row_problems(table, manifest, shard)
        if problems:
            raise UserError(f"{problems[0]}; prift-inspect verify lists more")
        yield table


def refuse_existing(output: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: something is there.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: expected nothing there yet; remove it or name another")
