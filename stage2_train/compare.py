"""`python -m stage2_train.compare RUN ...`: a table of runs, and a picture of their curves."""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunSummary:
    """What is compared of a run."""

    name: str
    num_steps: int
    nll: float
    """Plain nll of the last tenth of the steps, mean, nats."""
    is_nll_sampled: bool
    """Whether some of these steps only estimated it (`train.nll_every`)."""
    loss: float
    """Weighted loss of the same steps, mean."""
    evaluation: dict[str, tuple[float, float]]
    """Name of a measurement to its value before the first and after the last step; nan where there was none before."""
    tokens_per_second: float
    """Median over the steps after the first."""


def main() -> None:
    """Entry point; see the exit codes in `shared/cli.py`."""
    parser = argparse.ArgumentParser(prog="python -m stage2_train.compare", description="Compare training runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.output named")
    parser.add_argument(
        "-o", "--output", type=Path, help="PNG of the curves; default: compare.png beside the first run"
    )
    arguments = parser.parse_args()

    from shared.cli import exit_code_of

    output = arguments.output or arguments.runs[0].parent / "compare.png"
    sys.exit(exit_code_of(lambda: compare(arguments.runs, output), "compare"))


def compare(runs: list[Path], output: Path) -> None:
    """Print the table and write the picture.

    Raises:
        UserError: a folder is not a run.
    """
    from rich.console import Console

    summaries = [summarise(run) for run in runs]
    # A pipe has no width of its own: the table is not to be cut to 80 columns there.
    Console(width=None if sys.stdout.isatty() else 160).print(table_of(summaries))
    plot(runs, output)
    print(f"curves: {output}")


def summarise(run: Path) -> RunSummary:
    """Read what a run wrote about itself.

    Raises:
        UserError: no metrics there.
    """
    metrics = _read_metrics(run)
    last = metrics.tail(max(1, len(metrics) // 10))
    return RunSummary(
        name=run.name,
        num_steps=int(metrics["step"][-1]),
        nll=_mean(last["nll"]),
        is_nll_sampled="nll_sampled" in last.columns and last["nll_sampled"].is_not_null().any(),
        loss=_mean(last["loss"]),
        evaluation=_evaluation(run),
        tokens_per_second=_median(
            metrics["tokens_per_second"][1:] if len(metrics) > 1 else metrics["tokens_per_second"]
        ),
    )


def table_of(summaries: list[RunSummary]):
    """The runs as rows of a rich table, every measurement of any of them as a column; ~ marks a sampled nll."""
    from rich.table import Table

    names = sorted({name for summary in summaries for name in summary.evaluation})
    table = Table("run", "steps", "nll (last 10 %)", "weighted loss", *[_wrapped(name) for name in names], "tokens/s")
    for summary in summaries:
        cells = [_shown(*summary.evaluation[name]) if name in summary.evaluation else "" for name in names]
        nll = f"{'~' if summary.is_nll_sampled else ''}{summary.nll:.4f}"
        table.add_row(
            summary.name, str(summary.num_steps), nll, f"{summary.loss:.4f}", *cells,
            f"{summary.tokens_per_second:,.0f}",
        )  # fmt: skip
    return table


def plot(runs: list[Path], output: Path) -> None:
    """Draw plain nll and weighted loss over the steps, one line a run, into a PNG."""
    # Without a display of its own, matplotlib must not look for one.
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run in runs:
        metrics = _read_metrics(run)
        smooth = max(1, len(metrics) // 50)
        for axis, column in zip(axes, ("nll", "loss"), strict=True):
            axis.plot(metrics["step"], metrics[column].rolling_mean(smooth, min_samples=1), label=run.name)
    for axis, title in zip(axes, ("plain nll, nats per target", "weighted loss"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _read_metrics(run: Path):
    import polars as pl

    from shared.errors import UserError
    from stage2_train.metrics import metrics_path, read_records

    path = metrics_path(run)
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"{run}: expected a training run with {path.name}, found none")
    metrics = pl.DataFrame(read_records(path), infer_schema_length=None)
    if "nll_sampled" in metrics.columns:
        metrics = metrics.with_columns(pl.coalesce("nll", "nll_sampled").cast(pl.Float64).alias("nll"))
    return metrics


def _evaluation(run: Path) -> dict[str, tuple[float, float]]:
    from stage2_train.metrics import eval_path, read_records

    values: dict[str, tuple[float, float]] = {}
    for record in read_records(eval_path(run)) if eval_path(run).is_file() else ():
        for kind in ("nll", "nll_supported"):
            if record[kind] is not None:
                name = f"{record['name']} {kind}"
                first = values[name][0] if name in values else record[kind]
                values[name] = (first if record["step"] else record[kind], record[kind])
    outside = run / "evaluation.json"
    if outside.is_file():
        measured = json.loads(outside.read_text(encoding="utf-8"))
        values |= {name: (float("nan"), value) for name, value in measured.items() if isinstance(value, float)}
    return values


def _shown(before: float, after: float) -> str:
    return f"{after:.4f}" if before != before else f"{before:.3f} → {after:.3f}"


def _wrapped(name: str) -> str:
    return name.replace(" ", "\n").replace("_", " ")


def _mean(series) -> float:
    """Of what there is; NaN where there is nothing."""
    return float(series.mean()) if series.is_not_null().any() else float("nan")


def _median(series) -> float:
    return float(series.median())


if __name__ == "__main__":
    main()
