"""A training run keeps the rows it began with when its store grows."""

import os
import signal
from pathlib import Path

from launching import deepspeed_command, demo_overrides, finish, metrics_of, score, start
from test_kill_and_resume import training, wait_for

from shared.score_store import read_manifest


def test_a_run_resumes_on_the_rows_it_began_with(demo_store: Path, pipeline: Path, tmp_path: Path):
    store, killed, whole, new = tmp_path / "store", tmp_path / "killed", tmp_path / "whole", tmp_path / "new"
    score(pipeline, *demo_overrides(store))
    num_rows = read_manifest(store).source.num_rows
    done = finish(deepspeed_command(2, *training(store, whole, 2), pipeline=pipeline))
    assert done.code == 0, done.output

    command = deepspeed_command(2, *training(store, killed, 2), pipeline=pipeline)
    process = start(command)
    wait_for(lambda: (killed / "checkpoints" / "step-0000010").is_dir(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # Half of the new rows are there: a run that began with the store now is refused, the old one goes on.
    grown = [*demo_overrides(store), f"data.limit={num_rows + 70}", "score.extend=true"]
    score(pipeline, *grown, "score.part=0/2")
    refused = finish(deepspeed_command(2, *training(store, new, 2), pipeline=pipeline))
    assert refused.code != 0
    assert "is unfinished" in refused.output
    resumed = finish(command)
    assert resumed.code == 0, resumed.output
    assert "resumed from" in resumed.output
    assert metrics_of(killed) == metrics_of(whole)
    name = "model/model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()

    score(pipeline, *grown)
    assert finish(command).code == 0, "finished, and still of the rows it began with"
    case = [*training(store, new, 2), "train.max_steps=1"]
    longer = finish(deepspeed_command(2, *case, pipeline=pipeline))
    assert longer.code == 0, longer.output
    assert f"{num_rows + 70} rows" in longer.output
