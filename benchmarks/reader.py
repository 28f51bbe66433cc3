"""What reading a score store for training costs: opening it, reading rows in random order, and memory.

    python benchmarks/reader.py                                  # 10^8 tokens: 3 GB of scratch space
    python benchmarks/reader.py --small                          # 10^7 tokens
    python benchmarks/reader.py --tokens 300000000 --scratch /mnt/fast --json out.json

Two stores of random rows (200 tokens each on average, three quarters of them targets; three columns) are made with the
writer of stage 1, the second a tenth of the size of the first, and every figure is given for both with its ratio.
Each measurement runs in a process of its own. Modules are imported before the clock starts.

first opening    conversion to memory-mapped files, with every page, digest and row verified; the store was just
                 written, so that its pages are in the page cache as far as they fit
second opening   the converted files are there
row views        `cache.row` alone, rows drawn at random
row values       `cache.row` and a copy of all it refers to; the files are in the page cache
cold row values  the same with the converted files dropped from the page cache first
RssAnon          memory that belongs to the process alone, of /proc/self/status
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)
COLUMNS = ("logprob", "mass_rank", "entropy")
TOKENS_PER_ROW = 200
SHARD_ROWS = 2048
VOCAB_SIZE = 32_000
SCRATCH_BYTES_PER_TOKEN = 32
"""Parquet and converted files of both stores take 28."""
NUM_READS = 100_000
NUM_COLD_READS = 2_000
TABLE = [
    ("tokens", "tokens", 1, ",.0f"),
    ("targets", "targets", 1, ",.0f"),
    ("rows", "rows", 1, ",.0f"),
    ("shards", "shards", 1, ",.0f"),
    ("store_bytes", "store, MB", 1e-6, ",.1f"),
    ("converted_bytes", "converted files, MB", 1e-6, ",.1f"),
    ("making_seconds", "making the store, s", 1, ".2f"),
    ("first_opening_seconds", "first opening, s", 1, ".2f"),
    ("first_opening_tokens_per_second", "first opening, Mtoken/s", 1e-6, ".2f"),
    ("first_opening_peak_bytes", "first opening, peak resident, KiB", 1 / 1024, ",.0f"),
    ("second_opening_seconds", "second opening, s", 1, ".3f"),
    ("view_seconds", "row views, us/row", 1e6, ".2f"),
    ("value_seconds", "row values, us/row", 1e6, ".2f"),
    ("value_tokens_per_second", "row values, Mtoken/s", 1e-6, ".2f"),
    ("cold_value_seconds", "cold row values, us/row", 1e6, ".1f"),
    ("cold_value_tokens_per_second", "cold row values, Mtoken/s", 1e-6, ".3f"),
    ("anonymous_bytes_before", "RssAnon before opening, KiB", 1 / 1024, ",.0f"),
    ("anonymous_bytes_opened", "RssAnon after opening, KiB", 1 / 1024, ",.0f"),
    ("anonymous_bytes_after", "RssAnon after reading, KiB", 1 / 1024, ",.0f"),
    ("anonymous_bytes_growth", "RssAnon growth, KiB", 1 / 1024, ",.0f"),
    ("order_bytes", "order of an epoch, KiB", 1 / 1024, ",.0f"),
    ("order_seconds", "drawing that order, ms", 1e3, ".1f"),
]
"""Name of a figure, its label, what is shown per unit measured, format. `..._seconds` of rows are per row."""


def main() -> None:
    """Print the table, and write its figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of the larger store, about")
    parser.add_argument("--small", dest="tokens", action="store_const", const=10_000_000, help="10^7 tokens")
    parser.add_argument("--scratch", type=Path, help="folder for the stores; default: the system's temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--in-process", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        import stage2_train.cache  # noqa: F401, before any clock starts

        what, folder = arguments.in_process
        print(json.dumps(MEASUREMENTS[what](Path(folder))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        needed, free = SCRATCH_BYTES_PER_TOKEN * arguments.tokens, shutil.disk_usage(scratch).free
        if needed > free:
            parser.error(f"expected {needed / 1e9:.1f} GB free under {scratch}, found {free / 1e9:.1f}: use --scratch")
        figures = [figures_of(Path(scratch) / str(n), n) for n in (arguments.tokens // 10, arguments.tokens)]
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def figures_of(folder: Path, num_tokens: int) -> dict[str, float]:
    """All figures of a store of about so many tokens, by the names of TABLE."""
    started = time.perf_counter()
    figures = make_store(folder / "store", num_tokens)
    figures["making_seconds"] = time.perf_counter() - started
    figures["store_bytes"] = size_of(folder / "store")
    for what in MEASUREMENTS:
        words = [sys.executable, __file__, "--in-process", what, str(folder)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        figures |= json.loads(done.stdout)
    figures["first_opening_tokens_per_second"] = figures["tokens"] / figures["first_opening_seconds"]
    figures["converted_bytes"] = size_of(folder / "cache")
    return figures


def make_store(store: Path, num_tokens: int) -> dict[str, float]:
    """A finished store of random rows; its tokens, targets, rows and shards."""
    from shared.files import create_json
    from shared.score_store import MANIFEST_NAME
    from shared.shards import write_shard

    store.mkdir(parents=True)
    manifest = make_manifest(num_tokens // TOKENS_PER_ROW)
    create_json(store / MANIFEST_NAME, manifest.model_dump(mode="json"))
    shards = [
        write_shard(store, index, manifest, list(random_rows(manifest.source.rows_of_shard(index))), [], {})
        for index in range(manifest.source.num_shards)
    ]
    return {
        "tokens": sum(shard.num_tokens for shard in shards), "targets": sum(shard.num_targets for shard in shards),
        "rows": sum(shard.num_rows for shard in shards), "shards": len(shards),
    }  # fmt: skip


def make_manifest(num_rows: int) -> Any:
    """What store.json says; the prior and the data it names never were."""
    from shared.pretrained import TokenizerContent
    from shared.score_store import SCHEMA_VERSION, DataFile, Identity, Manifest, Source

    digest = "0" * 64
    identity = Identity(
        prior_weights=digest, prior_config=digest, quantization=None, tokenizer_files=digest, chat_template=None,
        template_arguments=None, template="tokens", targets="all", split_turns=False, max_length=4096, overlong="drop",
        special_tokens="as given", weight_dtype="float32", compute_dtype="float32", head_dtype="float32",
        engine="transformers", statistics_version=1, columns=COLUMNS,
    )  # fmt: skip
    file = DataFile(path="rows.jsonl", size=1, mtime_ns=1, sha256=digest, num_rows=num_rows)
    columns: dict[str, str | None] = {"id": "row_id", "input_ids": "input_ids", "target_mask": "target_mask"}
    source = Source(format="tokens", columns=columns, limit=None, files=(file,), shard_rows=SHARD_ROWS)
    return Manifest(
        schema_version=SCHEMA_VERSION, fingerprint=identity.fingerprint(), identity=identity, source=source,
        prior_name="prior", prior_revision=None, vocab_size=VOCAB_SIZE,
        tokenizer=TokenizerContent(token_map=digest, merges=digest, special_ids={"bos": 1, "eos": 2, "unk": None}),
        stop_token_ids=(2,), user_row_ids=True, software={},
    )  # fmt: skip


def random_rows(places: range) -> Iterator[Any]:
    """Scored rows of a shard: the first quarter of each is the prompt, and the prior ranks 70 % of targets first."""
    from shared.shards import ScoredRow

    generator = np.random.default_rng(places.start)
    lengths = np.maximum(np.ceil(generator.gamma(4, TOKENS_PER_ROW / 4, len(places))).astype(np.int64), 8)
    num_targets = lengths - lengths // 4
    total = int(num_targets.sum())
    ids = np.split(generator.integers(0, VOCAB_SIZE, lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1])
    mass_rank = generator.random(total, np.float32) * (generator.random(total, np.float32) < 0.3)
    flat = {
        "logprob": np.log1p(-mass_rank) - generator.standard_exponential(total, np.float32),
        "mass_rank": mass_rank,
        "entropy": 2 * generator.standard_exponential(total, np.float32),
    }
    ends = np.cumsum(num_targets).tolist()
    for row, (place, length, count) in enumerate(zip(places, lengths.tolist(), num_targets.tolist(), strict=True)):
        statistics = {name: values[ends[row] - count : ends[row]] for name, values in flat.items()}
        yield ScoredRow(f"row-{place}", place, ids[row], np.arange(length - count, length, dtype=np.int32), statistics)


def opened(folder: Path) -> Any:
    """The store's cache."""
    from stage2_train.cache import open_cache

    return open_cache(folder / "store", COLUMNS, folder / "cache")


def first_opening(folder: Path) -> dict[str, float]:
    """Seconds to verify and convert, and the most memory that the process held."""
    seconds, _ = seconds_of(lambda: opened(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first_opening_seconds": seconds, "first_opening_peak_bytes": peak}


def second_opening(folder: Path) -> dict[str, float]:
    """Seconds to open what is converted."""
    return {"second_opening_seconds": seconds_of(lambda: opened(folder))[0]}


def memory(folder: Path) -> dict[str, float]:
    """Bytes that belong to the process alone, before and after."""
    before = anonymous_bytes()
    cache = opened(folder)
    after_opening = anonymous_bytes()
    read_values(cache, NUM_READS)
    after = anonymous_bytes()
    return {
        "anonymous_bytes_before": before, "anonymous_bytes_opened": after_opening,
        "anonymous_bytes_after": after, "anonymous_bytes_growth": after - before,
    }  # fmt: skip


def reading(folder: Path) -> dict[str, float]:
    """Rates of reading rows whose pages are in memory."""
    cache = opened(folder)
    read_values(cache, NUM_READS)
    rows = random_places(cache, NUM_READS)
    views, _ = seconds_of(lambda: [cache.row(row) and None for row in rows])
    seconds, num_tokens = seconds_of(lambda: read_values(cache, NUM_READS))
    return {
        "view_seconds": views / NUM_READS, "value_seconds": seconds / NUM_READS,
        "value_tokens_per_second": num_tokens / seconds,
    }  # fmt: skip


def cold_reading(folder: Path) -> dict[str, float]:
    """Rates of reading rows from the disk."""
    cache = opened(folder)
    for path in (folder / "cache").rglob("*.bin"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seconds, num_tokens = seconds_of(lambda: read_values(cache, NUM_COLD_READS))
    return {
        "cold_value_seconds": seconds / NUM_COLD_READS, "cold_value_tokens_per_second": num_tokens / seconds
    }  # fmt: skip


def order(folder: Path) -> dict[str, float]:
    """Bytes and seconds of the order of an epoch's rows."""
    from stage2_train.plan import make_plan

    plan = make_plan(len(opened(folder)), batch_size=1, epochs=1, max_steps=None, seed=0)
    seconds, rows = seconds_of(lambda: plan.rows_of_step(1))
    return {"order_bytes": rows.base.nbytes, "order_seconds": seconds}


MEASUREMENTS: dict[str, Callable[[Path], dict[str, float]]] = {
    "first opening": first_opening, "second opening": second_opening, "memory": memory, "reading": reading,
    "cold reading": cold_reading, "order": order,
}  # fmt: skip


def read_values(cache: Any, num_rows: int) -> int:
    """Copy what random rows refer to; how many tokens they have."""
    num_tokens = 0
    for place in random_places(cache, num_rows):
        row = cache.row(place)
        num_tokens += len(row.input_ids.copy())
        for values in (row.target_positions, *row.statistics.values()):
            values.copy()
    return num_tokens


def random_places(cache: Any, count: int) -> list[int]:
    """Places of rows, drawn with replacement: the same memory for any store."""
    return np.random.default_rng(0).integers(0, len(cache), count).tolist()


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long it took, and what it gave."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1]) * 1024


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(figures: list[dict[str, float]]) -> None:
    """A line per figure: at a tenth, at all, ratio."""
    print(f"{'':<34} {'a tenth':>14} {'all':>14} {'ratio':>8}")
    for name, label, factor, form in TABLE:
        tenth, whole = (found[name] for found in figures)
        print(f"{label:<34} {tenth * factor:>14{form}} {whole * factor:>14{form}} {whole / tenth:>8.2f}")


if __name__ == "__main__":
    main()
