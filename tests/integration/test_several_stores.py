"""A run that draws from two stores in proportion, killed and resumed; and what it refuses."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launching import REPOSITORY, Finished, deepspeed_command, finish, metrics_of, score, start
from test_kill_and_resume import wait_for

from shared.load_config import load_config
from stage2_train.setup import prepare


@pytest.fixture(scope="module")
def stores(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """50 and 70 rows of the demo, scored by its prior: one of problems, one of the prior's own text."""
    folder = tmp_path_factory.mktemp("stores")
    for name, file, limit in (("problems", "train.jsonl", 50), ("text", "prior_text.jsonl", 70)):
        score(
            pipeline, f"data.path={REPOSITORY}/data/demo/{file}", f"prior.model={REPOSITORY}/data/demo/prior",
            f"data.limit={limit}", "score.shard_rows=32", f"score.output={folder}/{name}",
        )  # fmt: skip
    return [folder / "problems", folder / "text"]


def training(stores: list[Path], output: Path, weights: tuple[float, float] = (0.7, 0.3)) -> list[str]:
    shares = ", ".join(f"{{store: {store}, weight: {weight}}}" for store, weight in zip(stores, weights, strict=True))
    return [
        f"train.scores=[{shares}]", "train.method=prift_prob", "train.batch_size=10", "train.epochs=3",
        "train.learning_rate=1e-3", "train.checkpoint_steps=5", f"train.output={output}",
    ]  # fmt: skip


def test_a_killed_run_over_two_stores_resumes_to_the_same_metrics(stores: list[Path], pipeline: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = finish(deepspeed_command(2, *training(stores, whole), pipeline=pipeline))
    assert done.code == 0, done.output
    assert f"{stores[0]}: 50 rows, drawn 252 times (70.00%), 5.04 epochs" in done.output
    assert f"{stores[1]}: 70 rows, drawn 108 times (30.00%), 1.54 epochs" in done.output
    assert len(metrics_of(whole)) == 36

    command = deepspeed_command(2, *training(stores, killed), pipeline=pipeline)
    process = start(command)
    wait_for(lambda: (killed / "checkpoints" / "step-0000015").is_dir(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    resumed = finish(command)
    assert resumed.code == 0, resumed.output
    assert "resumed from" in resumed.output
    assert metrics_of(killed) == metrics_of(whole)
    weights = "model/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()

    for change, message in (
        (training(stores, killed, (0.6, 0.4)), "train.scores_key"),
        (training(stores[::-1], killed, (0.3, 0.7)), "train.scores_key"),
        ([*training(stores, killed)[1:], f"train.scores={stores[0]}"], "train.scores_key"),
    ):
        other = finish(deepspeed_command(1, *change, pipeline=pipeline))
        assert other.code == 2, other.output
        assert message in other.output


def test_the_targets_of_a_step_are_those_of_the_rows_drawn(
    stores: list[Path], pipeline: Path, tmp_path: Path, train_cases: Callable[..., Finished], read_store
):
    """The share of rows, counted from the log alone: each step's targets are those of the rows that the plan names."""
    case = training(stores, tmp_path / "run")
    done = train_cases([case])
    assert done.code == 0, done.output
    counts = [sum(value is not None for value in row["logprob"]) for store in stores for row in read_store(store)]
    plan = prepare(load_config(pipeline, [*case, f"train.output={tmp_path}/other"])).plan
    drawn = [plan.rows_of_step(step) for step in range(1, 37)]
    assert [line["num_targets"] for line in metrics_of(tmp_path / "run")] == [
        sum(counts[row] for row in rows) for rows in drawn
    ]
    assert abs((np.concatenate(drawn) < 50).mean() - 0.7) < 0.01


def test_without_weights_each_row_is_drawn_once(stores: list[Path], pipeline: Path, tmp_path: Path):
    listed = ", ".join(map(str, stores))
    job = prepare(load_config(pipeline, [
        f"train.scores=[{listed}]", "train.method=prift_prob", "train.batch_size=10", f"train.output={tmp_path}/run",
    ]))  # fmt: skip
    drawn = np.concatenate([job.plan.rows_of_step(step) for step in range(1, job.plan.num_steps + 1)])
    assert sorted(drawn.tolist()) == list(range(120))


def test_stores_of_other_priors(
    stores: list[Path], pipeline: Path, tmp_path: Path, train_cases: Callable[..., Finished]
):
    import shutil

    from shared.score_store import MANIFEST_NAME, read_manifest
    from shared.shards import open_store, read_batches, write_shard
    from stage1_score.cross_check import scored_rows

    # The same rows as another prior would have scored them, its tokenizer being the same.
    manifest = read_manifest(stores[1])
    identity = manifest.identity.model_copy(update={"prior_weights": "0" * 64})
    other = tmp_path / "other"
    other.mkdir()
    changed = manifest.model_copy(update={"identity": identity, "fingerprint": identity.fingerprint()})
    (other / MANIFEST_NAME).write_text(json.dumps(changed.model_dump(mode="json")))
    for shard in open_store(stores[1])[1]:
        rows = [row for table in read_batches(shard) for row in scored_rows(table, manifest.identity.columns)]
        write_shard(other, shard.index, changed, rows, [], {"engine": "transformers"})
    refused = finish(deepspeed_command(1, *training([stores[0], other], tmp_path / "run"), pipeline=pipeline))
    assert refused.code == 2
    assert f"{other} cannot be trained from beside {stores[0]}: they differ in prior" in refused.output
    model = tmp_path / "model"
    shutil.copytree(REPOSITORY / "data" / "demo" / "prior", model)
    allowed = train_cases([
        [*training([stores[0], other], tmp_path / "run"), f"train.model={model}", "train.max_steps=2"]
    ])  # fmt: skip
    assert allowed.code == 0, allowed.output
    assert "WARNING: the stores were scored by different priors" in allowed.output
