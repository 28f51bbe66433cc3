"""Every file of a real checkpoint flipped, cut and removed in turn, and a pickle planted in each."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import Finished, deepspeed_command, finish, metrics_of

from shared.files import sha256_of_json
from stage2_train.checkpoint_files import entry_of


def training(store: Path, output: Path, stage: int) -> list[str]:
    return [
        f"train.scores={store}", "train.method=prift_prob", "train.batch_size=8", "train.max_steps=2",
        "train.checkpoint_steps=1", "train.learning_rate=1e-3", f"train.output={output}",
        f"train.deepspeed.zero_optimization.stage={stage}",
    ]  # fmt: skip


def flip(path: Path) -> None:
    """One bit, somewhere in the middle."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "remove": Path.unlink}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_damage_of_each_file_falls_back_to_the_older_one(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path, stage: int
):
    whole = tmp_path / "whole"
    done = train_cases([training(demo_store, whole, stage)], 2)
    assert done.code == 0, done.output
    newest = whole / "checkpoints" / "step-0000002"
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert len(names) == {1: 4, 2: 4, 3: 5}[stage], names
    runs = []
    for name in names:
        for damage in DAMAGES:
            run = tmp_path / f"{damage}-{name.replace('/', '-')}"
            shutil.copytree(whole, run)
            shutil.rmtree(run / "model")
            DAMAGES[damage](run / "checkpoints" / newest.name / name)
            runs.append(run)
    done = train_cases([training(demo_store, run, stage) for run in runs], 2)
    assert done.code == 0, done.output
    model = (whole / "model" / "model.safetensors").read_bytes()
    for run in runs:
        assert f"resumed from {run}/checkpoints/step-0000001, after step 1" in done.output, run
        warnings = [line for line in done.output.splitlines() if "WARNING" in line and f"{run}/checkpoints" in line]
        assert len(warnings) == 1, run
        assert metrics_of(run) == metrics_of(whole)
        assert (run / "model" / "model.safetensors").read_bytes() == model


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant(run: Path, name: str, marker: Path) -> None:
    """As who can write to the folder and knows the format would: the manifest agrees."""
    folder = run / "checkpoints" / "step-0000002"
    (folder / name).write_bytes(pickle.dumps(Planted(marker), protocol=2))
    record = json.loads((folder / "trainer.json").read_text())
    del record["digest"]
    if name != "trainer.json":
        record["files"][name] = entry_of(folder / name)
        (folder / "trainer.json").write_text(json.dumps({**record, "digest": sha256_of_json(record)}))


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_a_planted_pickle_is_refused_by_name_and_nothing_of_it_runs(
    demo_store: Path, train_cases: Callable[..., Finished], pipeline: Path, tmp_path: Path, stage: int, ranks: int
):
    """In each file that one rank saved; loaded by one rank, and converted for two."""
    whole = tmp_path / "whole"
    assert train_cases([training(demo_store, whole, stage)], 1).code == 0
    folder = whole / "checkpoints" / "step-0000002"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pt"))
    assert len(names) == 2
    for name in names:
        run, marker = tmp_path / name.replace("/", "-"), tmp_path / f"ran-{name.replace('/', '-')}"
        shutil.copytree(whole, run)
        plant(run, name, marker)
        done = finish(deepspeed_command(ranks, *training(demo_store, run, stage), pipeline=pipeline))
        assert done.code == 2, done.output
        assert "refused, it holds more than tensors" in done.output
        assert "Traceback" not in done.output
        assert not marker.exists()


def test_a_planted_pickle_in_place_of_the_record_is_no_checkpoint(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path
):
    run, marker = tmp_path / "run", tmp_path / "ran"
    assert train_cases([training(demo_store, run, 1)], 1).code == 0
    plant_record = run / "checkpoints" / "step-0000002" / "trainer.json"
    plant_record.write_bytes(pickle.dumps(Planted(marker), protocol=2))
    done = train_cases([training(demo_store, run, 1)], 1)
    assert done.code == 0, done.output
    assert "step-0000001, after step 1" in done.output
    assert not marker.exists()


def test_a_checkpoint_that_loads_as_another_model_is_refused(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path
):
    """A hundredth of a percent off the recorded loss is not rounding."""
    run = tmp_path / "run"
    assert train_cases([training(demo_store, run, 1)], 1).code == 0
    path = run / "checkpoints" / "step-0000002" / "trainer.json"
    record = json.loads(path.read_text())
    del record["digest"]
    record["probe_nll"] *= 1.0001
    path.write_text(json.dumps({**record, "digest": sha256_of_json(record)}))
    done = train_cases([training(demo_store, run, 1)], 1)
    assert done.code != 0
    assert "of the batch recorded with it" in done.output


@pytest.mark.parametrize("beside", [False, True], ids=["instead", "beside"])
def test_an_exported_model_with_a_bin_runs_nothing(
    demo_store: Path, train_cases: Callable[..., Finished], pipeline: Path, tmp_path: Path, beside: bool
):
    """A pickle in place of the weights is refused; beside them it is never opened."""
    run, marker = tmp_path / "run", tmp_path / "ran"
    assert train_cases([training(demo_store, run, 1)], 1).code == 0
    model = run / "model"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(marker), protocol=2))
    if not beside:
        (model / "model.safetensors").unlink()
    again = [*training(demo_store, tmp_path / "again", 1), f"train.model={model}"]
    done = finish([sys.executable, "stage2_train/train.py", str(pipeline), *again])
    assert done.code == (0 if beside else 2), done.output
    assert beside or "safetensors" in done.output
    assert not marker.exists()
