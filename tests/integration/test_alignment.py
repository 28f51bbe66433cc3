"""A weight that belongs to another token is found, whether a writer was careless or thorough."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from launching import REPOSITORY, deepspeed_command, finish, score
from transformers import AutoTokenizer

from shared.score_store import read_manifest
from shared.shards import ScoredRow, read_footer, shard_path, write_shard

Change = Callable[[list[ScoredRow]], list[ScoredRow]]


def shift_columns_by_one(rows: list[ScoredRow]) -> list[ScoredRow]:
    return [
        ScoredRow(row.row_id, row.source_index, row.input_ids, row.target_positions - 1, row.statistics) for row in rows
    ]


def swap_two_rows(rows: list[ScoredRow]) -> list[ScoredRow]:
    """The statistics of two rows with as many targets change places."""
    counts = [len(row.target_positions) for row in rows]
    first, second = next((i, j) for i in range(len(rows)) for j in range(i) if counts[i] == counts[j])
    swapped = list(rows)
    for here, there in ((first, second), (second, first)):
        row = rows[here]
        swapped[here] = ScoredRow(
            row.row_id, row.source_index, row.input_ids, row.target_positions, rows[there].statistics
        )
    return swapped


def rows_of(store: Path, index: int) -> list[ScoredRow]:
    names = read_manifest(store).identity.columns
    rows = []
    for record in pq.read_table(shard_path(store, index)).to_pylist():
        positions = np.array([i for i, value in enumerate(record["logprob"]) if value is not None], np.int32)
        statistics = {name: np.array(record[name], dtype=np.float32)[positions] for name in names}
        ids = np.array(record["input_ids"], np.int32)
        rows.append(ScoredRow(record["row_id"], record["source_index"], ids, positions, statistics))
    return rows


def training(store: Path, pipeline: Path, output: Path, *more: str) -> list[str]:
    overrides = [
        f"train.scores={store}", "train.method=prift_prob", "train.batch_size=96", f"train.output={output}",
        # The footers are those of the sound store: a copy that another test made of it would be taken.
        f"train.cache_dir={output.parent}/cache",
    ]  # fmt: skip
    return deepspeed_command(1, *overrides, *more, pipeline=pipeline)


@pytest.mark.parametrize("change", [shift_columns_by_one, swap_two_rows])
def test_columns_that_were_edited_fail_by_their_digest(
    demo_store: Path, pipeline: Path, tmp_path: Path, change: Change
):
    """Somebody rewrote the values and kept the footer."""
    store = tmp_path / "store"
    shutil.copytree(demo_store, store)
    footer = pq.read_schema(shard_path(store, 1)).metadata
    write_shard(store, 1, read_manifest(store), change(rows_of(store, 1)), [], {})
    table = pq.read_table(shard_path(store, 1))
    pq.write_table(table.replace_schema_metadata(footer), shard_path(store, 1), write_page_checksum=True)
    done = finish(training(store, pipeline, tmp_path / "run"))
    assert done.code == 2
    assert "digest differs" in done.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("change", [shift_columns_by_one, swap_two_rows])
def test_columns_that_were_wrong_from_the_start_fail_at_the_first_step(
    demo_store: Path, pipeline: Path, tmp_path: Path, change: Change
):
    """The digest fits, as if the writer had a defect; the model itself tells."""
    store = tmp_path / "store"
    shutil.copytree(demo_store, store)
    for index in range(3):
        write_shard(store, index, read_manifest(store), change(rows_of(store, index)), [], {})
        read_footer(shard_path(store, index), read_manifest(store), index)
    done = finish(training(store, pipeline, tmp_path / "run"))
    assert done.code == 2
    assert "the scores belong to other tokens" in done.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_another_tokenizer_is_refused(demo_store: Path, pipeline: Path, tmp_path: Path):
    """Two tokens of the map change places: same size, same special tokens, other ids."""
    other = tmp_path / "other"
    shutil.copytree(REPOSITORY / "data/demo/prior", other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = [token for token in vocabulary if token.isalpha() and token.isascii()][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(other).eos_token_id == AutoTokenizer.from_pretrained(
        REPOSITORY / "data/demo/prior"
    ).eos_token_id  # fmt: skip
    done = finish(training(demo_store, pipeline, tmp_path / "run", f"train.model={other}"))
    assert done.code == 2
    assert "not the one that" in done.output
    assert "token_map" in done.output


def test_the_prior_is_not_needed_for_training_another_model(pipeline: Path, tmp_path: Path):
    """With the prior gone from the disk, another model with its tokenizer trains: no second model is loaded."""
    prior, store, student = tmp_path / "prior", tmp_path / "store", tmp_path / "student"
    shutil.copytree(REPOSITORY / "data/demo/prior", prior)
    score(
        pipeline, f"data.path={REPOSITORY}/data/demo/train.jsonl", f"prior.model={prior}", "data.limit=96",
        f"score.output={store}",
    )  # fmt: skip
    prior.rename(student)
    done = finish(training(store, pipeline, tmp_path / "run", f"train.model={student}"))
    assert done.code == 0, done.output
    missing = finish(training(store, pipeline, tmp_path / "run2"))
    assert missing.code == 2
    assert str(prior) in missing.output


COUNTING = """
import gc, sys
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
loaded = []
original = AutoModelForCausalLM.from_pretrained.__func__
def counting(cls, *args, **kwargs):
    model = original(cls, *args, **kwargs)
    loaded.append(model)
    return model
AutoModelForCausalLM.from_pretrained = classmethod(counting)
from shared.load_config import load_config
from stage2_train.setup import prepare
from stage2_train.distributed import meet
from stage2_train.trainer import Trainer
Trainer(prepare(load_config(sys.argv[1], sys.argv[2:])), meet()).run()
heads = [o for o in gc.get_objects() if isinstance(o, PreTrainedModel) and hasattr(o, "lm_head")]
print("models", len(loaded), len(heads))
"""


def test_training_holds_one_model(demo_store: Path, pipeline: Path, tmp_path: Path):
    import sys

    overrides = [f"train.scores={demo_store}", "train.method=prift_mass", "train.batch_size=8", "train.max_steps=3"]
    done = finish([sys.executable, "-c", COUNTING, str(pipeline), *overrides, f"train.output={tmp_path}/run"])
    assert done.code == 0, done.output
    assert "models 1 1" in done.output
