"""Time, memory and size of a report on a large store, against one scan of the store by polars.

    python benchmarks/report.py --targets 10000000

The store is generated, as by `reader.py`: ids and statistics at random, three quarters of the tokens targets. Each
command runs in a process of its own; the scan sums every statistic with polars' streaming engine.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from reader import make_store

_SCAN = """
import sys, polars as pl
names = ["logprob", "mass_rank", "entropy"]
sums = [pl.col(name).list.sum().sum() for name in names] + [pl.col("input_ids").list.sum().sum()]
print(pl.scan_parquet(sys.argv[1] + "/*.parquet").select(sums).collect(engine="streaming"))
"""


def main() -> None:
    """Print seconds, peak memory and the page's size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=10_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store, page = Path(scratch) / "store", Path(scratch) / "report.html"
        figures = make_store(store, round(arguments.targets / 0.75))
        size = sum(path.stat().st_size for path in store.iterdir())
        print(f"{figures['targets']:,.0f} targets in {figures['rows']:,.0f} rows, {size / 1e6:,.0f} MB")
        report = [sys.executable, "-m", "inspection.cli", "report", str(store), "-o", str(page)]
        scan = [sys.executable, "-c", _SCAN, str(store)]
        measured(scan)  # the store is in the page cache for all that is measured
        seconds = {"scan": [], "report": []}
        peaks = {}
        for _ in range(3):
            for name, command in (("scan", scan), ("report", report)):
                taken, peaks[name] = measured(command)
                seconds[name].append(taken)
        ratios = [ours / scan for ours, scan in zip(seconds["report"], seconds["scan"], strict=True)]
        for name, taken in seconds.items():
            print(f"{name}: {min(taken):.1f} to {max(taken):.1f} s, peak resident memory {peaks[name]:,.0f} MiB")
        print(f"ratio {sorted(ratios)[1]:.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
        print(f"page: {page.stat().st_size / 1e6:.2f} MB")


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory in MiB of a command, by looking at it every 10 ms."""
    start, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parents[1])
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.01)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, peak / 2**20


if __name__ == "__main__":
    main()
