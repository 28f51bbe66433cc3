"""Trainings as a user starts them: what they write, and what they refuse."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from launching import REPOSITORY, Finished, deepspeed_command, demo_overrides, finish, metrics_of, score
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TrainCases = Callable[..., Finished]
PRIOR = REPOSITORY / "data/demo/prior"


@pytest.fixture(scope="module")
def trained(demo_store: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A short run with the command of the README, evaluated on its own store."""
    output = tmp_path_factory.mktemp("trained") / "run"
    command = deepspeed_command(
        2, f"train.scores={demo_store}", "train.method=prift_prob", "train.batch_size=16", "train.max_steps=4",
        "train.learning_rate=1e-3", f"train.output={output}", f"train.eval_scores={demo_store}",
        "train.deepspeed.zero_optimization.stage=3", pipeline=pipeline,
    )  # fmt: skip
    done = finish(command)
    assert done.code == 0, done.output
    return output, done


def test_outputs_of_a_run(trained: tuple[Path, Finished]):
    output, done = trained
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {
        "step", "loss", "nll", "nll_sampled", "num_nll_targets", "weight_mean", "weight_zero_fraction", "grad_norm",
        "update_applied", "lr", "num_targets", "tokens_per_second", "data_wait_seconds",
    }  # fmt: skip
    assert lines[0]["lr"] == pytest.approx(1e-3)  # one step of warm-up
    resolved = yaml.safe_load((output / "config.yaml").read_text())["train"]
    assert resolved["method"] == "prift_prob"
    assert resolved["batch_size"] == 16
    assert "96 rows x 1 epochs / 16 per step: 4 steps" in done.output
    assert not list((output / "checkpoints").rglob("*.py"))


def test_the_exported_model_loads_and_gives_the_evaluation(trained: tuple[Path, Finished], demo_store: Path):
    """Plain nll and nll of supported targets, computed apart with the exported model."""
    output, _ = trained
    assert sorted(path.suffix for path in (output / "model").iterdir() if path.suffix not in (".json", ".jinja")) == [
        ".safetensors"
    ]
    model = AutoModelForCausalLM.from_pretrained(output / "model").double()
    assert AutoTokenizer.from_pretrained(output / "model").eos_token_id is not None
    before, after = [json.loads(line) for line in (output / "eval.jsonl").read_text().splitlines()]
    assert (before["step"], after["step"]) == (0, 4)
    nll, supported = [], []
    for row in pq.read_table(sorted(demo_store.glob("*.parquet"))).to_pylist():
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
        for i, value in enumerate(row["logprob"]):
            if value is not None:
                nll.append(-float(logprobs[i - 1, ids[i]]))
                supported.append(row["mass_rank"][i] <= 0.5)
    assert after["nll"] == pytest.approx(np.mean(nll), rel=1e-4)
    assert after["nll_supported"] == pytest.approx(np.mean(np.array(nll)[supported]), rel=1e-4)
    assert after["num_supported"] == sum(supported)
    assert after["nll_supported"] < before["nll_supported"]


def test_world_size_stage_and_micro_batches_do_not_change_the_curve(
    demo_store: Path, train_cases: TrainCases, tmp_path: Path
):
    """Same examples in the same steps, and the same losses to rounding."""

    def case(name: str, *more: str) -> list[str]:
        return [f"train.scores={demo_store}", "train.method=prift_mass", "train.batch_size=12", "train.epochs=2",
                "train.learning_rate=1e-3", f"train.eval_scores={demo_store}", f"train.output={tmp_path}/{name}",
                *more]  # fmt: skip

    one = [case("one"), case("small", "train.micro_batch_tokens=200", "train.micro_batch_examples=2")]
    two = [case("two-1"), case("two-2", "train.deepspeed.zero_optimization.stage=2", "train.micro_batch_tokens=300"),
           case("two-3", "train.deepspeed.zero_optimization.stage=3"),
           case("checkpointing", "train.gradient_checkpointing=true"), case("padded", "train.padding_free=false"),
           case("sequence", "train.sequence_parallel=2", "train.gradient_checkpointing=offload"),
           case("sequence-3", "train.sequence_parallel=2", "train.deepspeed.zero_optimization.stage=3",
                "train.micro_batch_tokens=100"),
           case("zero-0", "train.deepspeed.zero_optimization.stage=0")]  # fmt: skip
    for cases, ranks in ((one, 1), (two, 2)):
        done = train_cases(cases, ranks)
        assert done.code == 0, done.output
    assert "stage 0 runs as stage 1" in done.output
    reference = metrics_of(tmp_path / "one")
    assert len(reference) == 16
    evaluation = read_evaluation(tmp_path / "one")
    for name in ("small", "two-1", "two-2", "two-3", "checkpointing", "padded", "sequence", "sequence-3", "zero-0"):
        for ours, theirs in zip(read_evaluation(tmp_path / name), evaluation, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)
        for ours, theirs in zip(metrics_of(tmp_path / name), reference, strict=True):
            assert ours["num_targets"] == theirs["num_targets"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4), (name, ours["step"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), (name, ours["step"])


def read_evaluation(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    return [(line["nll"], line["nll_supported"]) for line in lines]


def test_the_plain_nll_is_exact_or_sampled_and_changes_nothing(
    demo_store: Path, train_cases: TrainCases, tmp_path: Path
):
    """Which targets of weight zero are looked at is the log's affair alone."""
    cases = {
        name: [f"train.scores={demo_store}", "train.batch_size=24", "train.max_steps=3", "train.learning_rate=1e-3",
               f"train.method={method}", f"train.nll_every={every}", f"train.output={tmp_path}/{name}"]
        for name, method, every in (("all", "prift_mass", 1), ("some", "prift_mass", 4), ("sft", "sft", 4))
    }  # fmt: skip
    done = train_cases(list(cases.values()), 2)
    assert done.code == 0, done.output
    every, some, sft = (metrics_of(tmp_path / name) for name in cases)
    for exact, sampled in zip(every, some, strict=True):
        assert (exact["nll_sampled"], sampled["nll"]) == (None, None)
        assert exact["num_nll_targets"] == exact["num_targets"]
        num_kept = round((1 - exact["weight_zero_fraction"]) * exact["num_targets"])
        num_sampled = sampled["num_nll_targets"] - num_kept
        assert 0.15 < num_sampled / (exact["num_targets"] - num_kept) < 0.35
        assert sampled["nll_sampled"] == pytest.approx(exact["nll"], rel=0.2)
        for name in ("loss", "grad_norm", "weight_mean"):
            assert exact[name] == sampled[name]
    assert sft[0]["nll"] == pytest.approx(every[0]["nll"], rel=1e-5)
    assert sft[0]["nll_sampled"] is None


def test_a_store_scored_in_bfloat16_trains_in_float32(pipeline: Path, train_cases: TrainCases, tmp_path: Path):
    """What differs is rounding, and is taken for it."""
    score(pipeline, *demo_overrides(tmp_path / "store"), "prior.dtype=bfloat16", "data.limit=32")
    case = [f"train.scores={tmp_path}/store", "train.method=prift_prob", "train.batch_size=32", "train.max_steps=1"]
    done = train_cases([[*case, f"train.output={tmp_path}/run"]])
    assert done.code == 0, done.output


def test_bfloat16_follows_float32(demo_store: Path, train_cases: TrainCases, tmp_path: Path):
    """At a learning rate whose first update is larger than the spacing of bfloat16 weights."""
    cases = [
        [f"train.scores={demo_store}", "train.method=sft", "train.batch_size=24", "train.max_steps=3",
         "train.learning_rate=1e-3", f"train.dtype={dtype}", f"train.output={tmp_path}/{dtype}-{stage}",
         f"train.deepspeed.zero_optimization.stage={stage}"]
        for dtype, stage in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 3))
    ]  # fmt: skip
    done = train_cases(cases, 2)
    assert done.code == 0, done.output
    reference = metrics_of(tmp_path / "float32-1")
    for stage in (1, 2, 3):
        for ours, theirs in zip(metrics_of(tmp_path / f"bfloat16-{stage}"), reference, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
            if ours["step"] == 1:
                assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
        exported = load_file(tmp_path / f"bfloat16-{stage}" / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_of_zero_weights_leaves_the_model_alone(
    demo_store: Path, train_cases: TrainCases, tmp_path: Path, ranks: int
):
    case = [f"train.scores={demo_store}", "train.weighting.rule=prob_threshold", "train.weighting.min_prob=1",
            "train.batch_size=8", "train.max_steps=2", "train.weight_decay=0", "train.learning_rate=1e-2"]  # fmt: skip
    cases = [
        [*case, f"train.normalize_by={by}", f"train.output={tmp_path}/{by}",
         f"train.deepspeed.zero_optimization.stage={stage}"]
        for by, stage in (("targets", 1), ("kept", 2), ("weights", 3))
    ]  # fmt: skip
    done = train_cases(cases, ranks)
    assert done.code == 0, done.output
    before = load_file(PRIOR / "model.safetensors")
    for by in ("targets", "kept", "weights"):
        for line in metrics_of(tmp_path / by):
            assert (line["loss"], line["grad_norm"], line["weight_zero_fraction"]) == (0.0, 0.0, 1.0)
            assert line["nll"] is None
            assert 0 < line["num_nll_targets"] < line["num_targets"]
            assert math.isfinite(line["nll_sampled"])
        after = load_file(tmp_path / by / "model" / "model.safetensors")
        assert all(torch.equal(after[name].float(), before[name].float()) for name in before)


def test_a_loss_that_is_not_finite_stops_before_the_step(demo_store: Path, pipeline: Path, tmp_path: Path):
    """The embedding of one token is broken: the rows that hold it are named, and nothing is saved."""
    model = tmp_path / "model"
    shutil.copytree(PRIOR, model)
    rows = pq.read_table(sorted(demo_store.glob("*.parquet"))).to_pylist()
    counts = np.bincount([token for row in rows for token in set(row["input_ids"])])
    token = int(np.argmin(np.where(counts > 0, counts, 1000)))
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    if "lm_head.weight" not in weights:  # tied: give the head a weight of its own, so that only these rows break
        weights["lm_head.weight"] = load_file(PRIOR / "model.safetensors")["model.embed_tokens.weight"]
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"train.scores={demo_store}", "train.method=sft", "train.batch_size=96", f"train.model={model}"]
    done = finish(deepspeed_command(2, *overrides, f"train.output={tmp_path}/run", pipeline=pipeline))
    assert done.code == 2
    concerned = [row["row_id"] for row in rows if token in row["input_ids"]]
    assert 0 < len(concerned) < 9
    assert "step 1: the loss is not finite before the update" in done.output
    for row_id in concerned:
        assert repr(row_id) in done.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


BAD_INPUT = {
    "unknown key": (["train.learning_rat=1"], "nearest known one is train.learning_rate"),
    "no rule": (["train.method=null"], "expected train.method or train.weighting.rule"),
    "no store": (["train.scores=/nowhere"], "expected a score store"),
    "missing column": (
        ["train.method=null", "train.weighting.rule=deft"],
        "score.columns=[logprob,mass_rank,collision]",
    ),
    "batch too large": (["train.batch_size=1000"], "the store has 32 rows"),
    "ranks that cannot share": (["train.sequence_parallel=2"], "expected a number of ranks that it divides, got 1"),
    "shared but padded": (["train.sequence_parallel=2", "train.padding_free=false"], "needs packed micro-batches"),
    "a checkpoint that is none": (["train.resume=/nowhere"], "expected a checkpoint in"),
    "a DeepSpeed key of ours": (["train.deepspeed.gradient_clipping=1"], "set train.gradient_clipping instead"),
    "a misspelt DeepSpeed key": (
        ["train.deepspeed.zero_optimzation.stage=3"],
        "nearest known one is train.deepspeed.zero_optimization",
    ),
    "another model": (["train.model=/nowhere/model"], "neither a folder nor a model that the hub gives"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line(
    small_store: Path, pipeline: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    """In this process: what is refused is refused before the processes meet."""
    from shared.cli import exit_code_of
    from stage2_train.train import train

    overrides, expected = BAD_INPUT[name]
    defaults = [f"train.scores={small_store}", "train.method=sft", "train.batch_size=8", f"train.output={tmp_path}/run"]
    code = exit_code_of(lambda: train(str(pipeline), [*defaults, *overrides]), "train.py")
    error = capsys.readouterr().err
    assert code == 2
    assert expected in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_launcher_passes_the_exit_code_on(small_store: Path, pipeline: Path, tmp_path: Path):
    """One line from all ranks together, also for what DeepSpeed itself refuses after they met."""
    overrides = [f"train.scores={small_store}", "train.method=sft", "train.batch_size=8", f"train.output={tmp_path}/r"]
    for wrong, expected in (
        ("train.method=sfd", "train.py: "),
        ("train.deepspeed.zero_optimization.stge=1", "train.deepspeed: DeepSpeedZeroConfig: stge: extra inputs"),
    ):
        done = finish(deepspeed_command(2, *overrides, wrong, pipeline=pipeline))
        assert done.code == 2, done.output
        assert sum(line.startswith("train.py: ") for line in done.output.splitlines()) == 1
        assert expected in done.output
        assert "Traceback" not in done.output


@pytest.fixture(scope="module")
def small_store(demo_store: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows with three columns."""
    store = tmp_path_factory.mktemp("small") / "store"
    columns = "score.columns=[logprob,mass_rank]"
    score(pipeline, *demo_overrides(store), "data.limit=32", columns)
    return store


@pytest.mark.parametrize("damage", ["page", "unfinished", "schema"])
def test_a_damaged_store_is_refused(
    small_store: Path, pipeline: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
):
    from shared.cli import exit_code_of
    from stage2_train.train import train

    store = tmp_path / "store"
    shutil.copytree(small_store, store)
    shard = store / "shard-00000.parquet"
    if damage == "page":
        content = bytearray(shard.read_bytes())
        start = pq.ParquetFile(shard).metadata.row_group(0).column(2).data_page_offset
        content[start + 60] ^= 0xFF
        shard.write_bytes(content)
    elif damage == "unfinished":
        shard.unlink()
    else:
        manifest = json.loads((store / "store.json").read_text())
        (store / "store.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    overrides = [f"train.scores={store}", "train.method=sft", f"train.cache_dir={tmp_path}/cache"]
    code = exit_code_of(lambda: train(str(pipeline), [*overrides, f"train.output={tmp_path}/run"]), "train.py")
    error = capsys.readouterr().err
    assert code == 2
    assert {"page": "a page is corrupted", "unfinished": "is unfinished", "schema": "version from 1 to 3, found 99"}[
        damage
    ] in error
    assert len(error.strip().splitlines()) == 1
