"""Train, but kill the whole run, launcher included, in a named phase: `killed_in.py PHASE PIPELINE key=value ...`.

A phase is a call of a function of the trainer, counted on one rank; the kill comes before it, after it or, where the
function writes, half-way.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_FILES, _SAVE = "stage2_train.checkpoint_files", "stage2_train.checkpoint"
_TRAINER = "stage2_train.trainer"


@dataclass(frozen=True)
class Phase:
    function: str
    """module:attribute"""
    call: int = 1
    """The fatal one, from 1."""
    when: str = "before"
    """before, half or after."""
    rank: int = 0
    argument_ends: str = ""
    """Only calls whose last argument ends so are counted."""


PHASES = {
    "model loaded": Phase(f"{_TRAINER}:build_engine", when="after"),
    "first alignment check": Phase(f"{_TRAINER}:refuse_misaligned", rank=1),
    "forward of step 5": Phase(f"{_TRAINER}:accumulate_gradients", 5, rank=1),
    "after backward of step 5": Phase(f"{_TRAINER}:accumulate_gradients", 5, "after"),
    "update of step 7, on one rank": Phase("deepspeed.runtime.engine:DeepSpeedEngine.step", 7, "after", rank=1),
    "line of step 8 half-written": Phase("stage2_train.metrics:append_line", 9, "half"),
    "second save begun": Phase(f"{_SAVE}:_begun", 2, "after"),
    "second save, file half-written by rank 1": Phase(f"{_SAVE}:_SafeCheckpointEngine.save", 2, "half", rank=1),
    "second save, before a manifest": Phase(f"{_SAVE}:write_manifest", 2, rank=1),
    "second save, all written": Phase(f"{_SAVE}:commit", 2),
    "second save, before its flush": Phase(f"{_FILES}:sync_tree", 2),
    "second save, before its rename": Phase("pathlib:Path.replace", 1, argument_ends="step-0000006"),
    "second save, after its rename": Phase("pathlib:Path.replace", 1, "after", argument_ends="step-0000006"),
    "second save, before LATEST": Phase(f"{_FILES}:replacing", 2),
    "third save, before pruning": Phase(f"{_TRAINER}:prune_checkpoints", 3),
    "third save, old one half removed": Phase("shared.files:shutil.rmtree", 1, "half", argument_ends="step-0000003"),
    "evaluation after step 6": Phase(f"{_TRAINER}:evaluate", 2, rank=1),
    "export": Phase(f"{_TRAINER}:export_model"),
    "export, before its rename": Phase("pathlib:Path.replace", 1, argument_ends="/model"),
    "export done": Phase(f"{_TRAINER}:export_model", when="after"),
    "load": Phase("deepspeed.runtime.engine:DeepSpeedEngine.load_checkpoint", rank=1),
    "lines cut": Phase(f"{_TRAINER}:cut_after", 1, "after"),
}


def arm(name: str) -> None:
    """Make the phase fatal on the rank that it names."""
    phase = PHASES[name]
    if os.environ["RANK"] != str(phase.rank):
        return
    module, path = phase.function.split(":")
    *parents, attribute = path.split(".")
    holder: Any = importlib.import_module(module)
    for parent in parents:
        holder = getattr(holder, parent)
    original, calls = getattr(holder, attribute), 0

    def fatal(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += str(arguments[-1] if arguments else "").endswith(phase.argument_ends)
        if calls != phase.call:
            return original(*arguments, **options)
        if phase.when == "half":
            _HALF[attribute](*arguments)
        if phase.when == "after":
            original(*arguments, **options)
        return _die(name)

    setattr(holder, attribute, fatal)


def _die(name: str) -> NoReturn:
    print(f"killed in: {name}", flush=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _half_a_line(path: Path, record: dict) -> None:
    with path.open("a") as file:
        file.write('{"step": 8, "loss": 0.')


def _half_a_file(engine: Any, state: Any, path: str) -> None:
    import torch

    torch.save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)


def _half_removed(folder: Path) -> None:
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file())[:1]:
        path.unlink()


_HALF: dict[str, Callable[..., None]] = {
    "append_line": _half_a_line, "save": _half_a_file, "rmtree": _half_removed,
}  # fmt: skip


def main() -> None:
    name, pipeline, *overrides = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    from shared.cli import exit_code_of
    from stage2_train.distributed import choose_accelerator
    from stage2_train.train import train

    choose_accelerator()
    arm(name)
    os._exit(exit_code_of(lambda: train(pipeline, overrides), "train.py"))


if __name__ == "__main__":
    # Not where a test imports the phases: the first entry is then pytest's.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    main()
