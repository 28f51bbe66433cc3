"""TensorBoard and Weights & Biases hold what metrics.jsonl and eval.jsonl hold, however often the run was stopped."""

import json
import signal
import sys
from pathlib import Path

import pytest
from launching import finish, metrics_of, start
from test_kill_and_resume import training, wait_for
from tracked_runs import lines_as_scalars, tensorboard_scalars, wandb_files, wandb_records, wandb_rows

KEY = "0123456789abcdef" * 2 + "01234567"
# No account and no server: whoever asks for one is refused at once.
OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(demo_store: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 5 and resumed with W&B besides, stopped by a signal, resumed to the end."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    case = [*training(demo_store, run, 1), f"train.eval_scores={{held: {demo_store}}}", "train.eval_steps=6"]
    command = [sys.executable, "stage2_train/train.py", str(pipeline), *case]

    def wait_for_lines(number: int, process) -> None:
        wait_for(lambda: len((run / "metrics.jsonl").read_text().splitlines()) >= number, process)

    process = start([*command, "train.trackers=[tensorboard]"], **OFFLINE)
    wait_for(lambda: (run / "checkpoints" / "step-0000005").is_dir(), process)
    wait_for_lines(7, process)
    process.kill()
    process.communicate()
    both = [*command, "train.trackers=[tensorboard,wandb]", "train.tracking_project=tested"]
    process = start(both, **OFFLINE)
    wait_for_lines(14, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert 14 <= len(metrics_of(run)) < 24
    done = finish(both, **OFFLINE)
    assert done.code == 0, done.output
    assert "WARNING: tracker" not in output + done.output
    return run


def test_tensorboard_has_every_line_once(run: Path):
    metrics, evaluations = lines_of(run / "metrics.jsonl"), lines_of(run / "eval.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 25))
    assert [line["step"] for line in evaluations] == [0, 6, 12, 18, 24]
    assert tensorboard_scalars(run) == lines_as_scalars(metrics) | lines_as_scalars(evaluations, "eval/held/")


def test_wandb_goes_on_with_one_run_offline(run: Path):
    sessions = wandb_files(run)
    assert len(sessions) == 2
    begun = [record.run for path in sessions for record in wandb_records(path) if record.HasField("run")]
    assert {(each.run_id, each.project) for each in begun} == {((run / "tracking/wandb-id").read_text()[:-1], "tested")}
    config = {item.key: json.loads(item.value_json) for item in begun[0].config.update}
    assert config["train"]["learning_rate"] == 1e-3
    rows = [row for path in sessions for row in wandb_rows(path)]
    steps = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in rows]
    assert [{"step": row.pop("_step"), **row} for row in steps] == [
        {name: value for name, value in line.items() if value is not None}
        for line in lines_of(run / "metrics.jsonl")[5:]  # the tracker was not there before
    ]
    evaluations = [{name: row[name] for name in row if name.startswith("eval/")} for row in rows]
    assert [line for line in evaluations if line] == [
        {f"eval/held/{name}": value for name, value in line.items() if name != "name"}
        for line in lines_of(run / "eval.jsonl")[1:]
    ]


def test_no_secret_is_written(run: Path):
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix not in (".pt", ".safetensors")]
    assert len(files) > 5
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_trackers_that_cannot_start_change_no_number(run: Path, demo_store: Path, pipeline: Path, tmp_path: Path):
    broken = tmp_path / "run"
    broken.mkdir()
    (broken / "tracking").write_text("a file where the folder should be")
    command = [sys.executable, "stage2_train/train.py", str(pipeline), *training(demo_store, broken, 1)]
    done = finish([*command, "train.trackers=[wandb,tensorboard]"], **OFFLINE)
    assert done.code == 0, done.output
    assert done.output.count("WARNING: tracker wandb failed") == 1
    assert done.output.count("WARNING: tracker tensorboard failed") == 1
    assert metrics_of(broken) == metrics_of(run)
    assert (broken / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
