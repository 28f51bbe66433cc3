"""The files that rows with weights are exported to."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from inspection.export_rows import SCHEMA, ExportedRows
from shared.errors import UserError


def write_jsonl(rows: ExportedRows, path: Path) -> None:
    """JSON lines; a weight is the shortest number that is the same float32."""
    with path.open("wb") as file:
        for table in rows.tables():
            frame = pl.from_arrow(table)
            assert isinstance(frame, pl.DataFrame)
            frame.write_ndjson(file)


def write_parquet(rows: ExportedRows, path: Path) -> None:
    """One Parquet file, the row groups of the store."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for table in rows.tables():
            writer.write_table(table)


def write_hf(rows: ExportedRows, path: Path) -> None:
    """A folder for `datasets.load_from_disk`.

    Raises:
        UserError: the library `datasets` is not installed.
    """
    try:
        import datasets
        from datasets.arrow_writer import ArrowWriter
    except ImportError:
        raise UserError("--format hf needs the library datasets: pip install datasets") from None

    features = datasets.Features.from_arrow_schema(SCHEMA)
    # Beside the folder, on its disk: the library cuts what it saves into files anew.
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        stream = str(Path(folder) / "rows.arrow")
        with ArrowWriter(path=stream, features=features) as writer:
            for table in rows.tables():
                writer.write_table(table)
            writer.finalize()
        datasets.disable_progress_bars()
        datasets.Dataset.from_file(stream).save_to_disk(path)


WRITERS: dict[str, Callable[[ExportedRows, Path], None]] = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "hf": write_hf,
}
