"""What saving a checkpoint costs: as a share of training at the default interval, and beside DeepSpeed's own save.

    python benchmarks/checkpoint.py                       # random weights, one rank; a minute on a CPU
    python benchmarks/checkpoint.py --shape qwen2.5-1.5b --rounds 3 --json out.json train.batch_size=256

A round is some steps, a save as a run makes it (recorded loss, files flushed and hashed, renamed) and DeepSpeed's
save of the same state (neither flushed nor hashed); ratios are of one round. The share is save / (save + interval
steps). Both leave their files in the same folder, so `TMPDIR` says which disk is measured.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPOSITORY)

from benchmarks.train import SHAPES, config_of, prepare  # noqa: E402

MOST_SHARE = 0.05


def main() -> None:
    """Print a table, and write all figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch_size=256")
    arguments = parser.parse_intermixed_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        arguments.folder = Path(scratch)
        figures = measure(arguments)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.stdout.flush()
    # The collectives' threads may abort an interpreter that shuts down in order.
    os._exit(0)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, of a save and of DeepSpeed's, round by round."""
    from stage2_train.distributed import choose_accelerator, meet

    choose_accelerator()
    about = prepare(arguments)
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from stage2_train.setup import prepare as prepare_job
    from stage2_train.trainer import Trainer

    config = config_of(arguments, "prift_mass")
    trainer: Any = Trainer(prepare_job(config), meet())
    own = trainer.engine.checkpoint_engine
    rounds, done = [], 0
    for number in range(arguments.rounds + 1):
        step_seconds = 0.0
        for _ in range(arguments.steps):
            done += 1
            step_seconds += seconds_of(partial(trainer._step, done)) / arguments.steps
        save_seconds = seconds_of(partial(trainer._save, done))
        trainer.engine.checkpoint_engine = TorchCheckpointEngine()
        plain = seconds_of(lambda: trainer.engine.save_checkpoint(str(arguments.folder / "plain"), save_latest=False))
        trainer.engine.checkpoint_engine = own
        if number:  # the first round warms up
            rounds.append({"step": step_seconds, "save": save_seconds, "plain": plain})
    newest = arguments.folder / f"runs/prift_mass/checkpoints/step-{done:07d}"
    num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {**about, "interval": config.train.checkpoint_steps, "bytes": num_bytes, "rounds": rounds}


def seconds_of(action: Callable[[], Any]) -> float:
    """How long an action takes, the device's work included."""
    import torch

    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def show(figures: dict[str, Any]) -> None:
    """Print medians, with the lowest and highest of a round."""
    rounds, interval = figures["rounds"], figures["interval"]
    shares = [part["save"] / (part["save"] + interval * part["step"]) for part in rounds]
    against_plain = [part["save"] / part["plain"] for part in rounds]
    print(
        f"{figures['device']}, {figures['parameters'] / 1e6:,.1f} M parameters, checkpoint of "
        f"{figures['bytes'] / 2**20:,.0f} MiB every {interval} steps of {figures['batch_size']} rows"
    )
    for name in ("step", "save", "plain"):
        print(f"  {name:<28} {statistics.median(part[name] for part in rounds):.3f} s")
    print(f"  {'save / DeepSpeed save':<28} {_spread(against_plain)}")
    print(f"  {'share of run time':<28} {_spread(shares)}; goal at most {MOST_SHARE}: {_verdict(shares)}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _verdict(shares: list[float]) -> str:
    return "met" if statistics.median(shares) <= MOST_SHARE else "MISSED"


if __name__ == "__main__":
    main()
