"""Memory and the time to the first new shard on a data set of many rows, fresh and resumed from the middle.

    python benchmarks/many_rows.py --rows 200000

Rows are generated: short problems, so that reading, planning and writing are seen rather than the prior. Peak memory is
measured in processes of their own, at a twentieth of the rows, at half of them and at all.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LARGEST_SHARD = 2048


def main() -> None:
    """Print memory by row count, and the two times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--model", default=str(REPOSITORY / "data/demo/prior"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = make_rows(folder / "rows.jsonl", arguments.rows)
        for rows in (arguments.rows // 20, arguments.rows // 2, arguments.rows):
            seconds, peak = whole_run(folder, data, arguments.model, rows)
            print(f"{rows:>9,} rows: peak resident memory {peak:,.0f} MiB, {seconds:,.0f} s", flush=True)
        fresh, resumed = first_shards(folder, data, arguments.model)
        print(f"first new shard: {fresh:.1f} s after a fresh start, {resumed:.1f} s after a resume from the middle, "
              f"ratio {resumed / fresh:.2f}")  # fmt: skip


def make_rows(path: Path, num_rows: int) -> Path:
    """Sums in words, each with an id."""
    with path.open("w") as file:
        for n in range(num_rows):
            completion = f"{n}+{n % 97}={n + n % 97}"
            file.write(
                json.dumps({"id": f"row-{n}", "prompt": f"What is {n} and {n % 97}? ", "completion": completion})
            )
            file.write("\n")
    return path


def command(data: Path, model: str, store: Path) -> list[str]:
    """`prift-score` in float32, where it is fastest."""
    pipeline = data.with_name("pipeline.yaml")
    pipeline.write_text("data: {}\n")
    words = [f"data.path={data}", f"prior.model={model}", f"score.output={store}", "prior.compute_dtype=weights"]
    return [sys.executable, "-m", "stage1_score.cli", str(pipeline), *words, f"score.shard_rows={LARGEST_SHARD}"]


def whole_run(folder: Path, data: Path, model: str, rows: int) -> tuple[float, float]:
    """Seconds and peak resident memory in MiB of a run over the first rows."""
    started = time.perf_counter()
    words = [*command(data, model, folder / f"store-{rows}"), f"data.limit={rows}"]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def first_shards(folder: Path, data: Path, model: str) -> tuple[float, float]:
    """Seconds from start to the first written shard, fresh and with half of the shards there."""
    store = folder / "store-resumed"
    fresh = until_a_new_shard(command(data, model, store), store)
    done = sorted(max(folder.glob("store-[0-9]*"), key=lambda path: int(path.name[6:])).glob("shard-*"))
    for path in done[: len(done) // 4 * 2]:  # a Parquet file and a list of dropped rows each
        (store / path.name).write_bytes(path.read_bytes())
    return fresh, until_a_new_shard(command(data, model, store), store)


def until_a_new_shard(words: list[str], store: Path) -> float:
    """Seconds until one more shard is there; then the run is killed."""
    before = set(store.glob("shard-*.parquet"))
    started = time.perf_counter()
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while not set(store.glob("shard-*.parquet")) - before:
        assert process.poll() is None, process.returncode
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    process.send_signal(signal.SIGKILL)
    process.wait()
    return seconds


if __name__ == "__main__":
    main()
