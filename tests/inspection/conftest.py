"""Fixtures for tests of `prift-inspect`: verbs called in this process, stores of several data files."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.score_store import DataFile

REPOSITORY = Path(__file__).parents[2]
HOSTILE = "<script>window.hurt=1</script><img src=x onerror='window.hurt=1'></script>&amp;\x1b[2J\u202e\x00\u2028]]>"


@pytest.fixture
def call_verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a verb's module with the words of a command line; returns what it prints."""

    def call(module: Any, *words: Any) -> str:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        capsys.readouterr()
        module.run(parser.parse_args([str(word) for word in words]))
        return capsys.readouterr().out

    return call


@pytest.fixture
def data_file() -> Callable[[str, int], DataFile]:
    """A data file of so many rows; its letter stands for its content."""
    return lambda letter, count: DataFile(
        path=f"{letter}.jsonl", size=1, mtime_ns=1, sha256=letter * 64, num_rows=count
    )


@pytest.fixture
def store(tmp_path: Path, manifest_with, scored_row, store_of) -> Callable[..., Path]:
    """Write a store of data files; row n of file `a` is the same wherever the file stands in the source."""

    def make(name: str, files: list[DataFile], shard_rows: int = 3, change: Any = None, user_row_ids: bool = True,
             **identity: Any) -> Path:  # fmt: skip
        manifest = manifest_with(1, shard_rows, user_row_ids, **identity)
        manifest = manifest.model_copy(
            update={"source": manifest.source.model_copy(update={"files": tuple(files)}), "vocab_size": 300}
        )
        places = [(file.sha256[0], row) for file in files for row in range(file.num_rows)]
        rows = []
        for index, (letter, row) in enumerate(places):
            made = scored_row(20 * (ord(letter) - ord("a")) + row, row_id=f"{letter}{row}", source_index=index)
            columns = {name: made.statistics[name] for name in manifest.identity.columns}
            made = dataclasses.replace(made, statistics=columns)
            rows.append(change(made) if change else made)
        return store_of(tmp_path / name, manifest, rows)

    return make


@pytest.fixture(scope="session")
def gsm8k_store(reference: Path, run_cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,500 rows of GSM8K, scored by the 260K-parameter model."""
    store = tmp_path_factory.mktemp("gsm8k") / "store"
    outcome = run_cli(
        "stage1_score.cli", REPOSITORY / "pipeline.yaml", f"prior.model={reference}/data/stories260K",
        f"data.path={reference}/data/gsm8k_train_2500.jsonl.gz", "data.columns.prompt=question",
        "data.columns.completion=answer", "data.template=plain", "data.max_length=512", f"score.output={store}",
        "score.engine=transformers", "score.device=cpu", cwd=REPOSITORY,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    return store


@pytest.fixture(scope="session")
def demo_store(run_cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that `make demo` scores."""
    store = tmp_path_factory.mktemp("demo") / "store"
    outcome = run_cli("stage1_score.cli", REPOSITORY / "pipeline.yaml", f"score.output={store}", cwd=REPOSITORY)
    assert outcome.code == 0, outcome.stderr
    return store


@pytest.fixture
def hostile_store(tmp_path: Path, plain_prior: Path, manifest_with, scored_row, store_of) -> Path:
    """Rows whose ids and texts are markup, control characters and overrides; one of 100 kB."""
    from transformers import AutoTokenizer

    from shared.pretrained import tokenizer_content

    tokenizer = AutoTokenizer.from_pretrained(plain_prior)
    texts = {
        HOSTILE: HOSTILE + HOSTILE,
        "</script><script>window.hurt=1</script>": "a\u2066\u202e\u200b\r\x07 end",
        "long" * 30_000: "<b>" * 10 + "<i>" * 33_000,
    }
    rows = []
    for index, (row_id, text) in enumerate(texts.items()):
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        targets = np.arange(1, len(ids), dtype=np.int32)
        values = np.linspace(0, 1, len(targets), dtype=np.float32)
        statistics = {"logprob": -values - np.float32(index), "mass_rank": values, "entropy": values}
        rows.append(scored_row(index, row_id=row_id, input_ids=ids, target_positions=targets, statistics=statistics))
    manifest = manifest_with(len(rows))
    file = manifest.source.files[0].model_copy(update={"path": f"{HOSTILE}.jsonl"})
    update = {
        "prior_name": str(plain_prior), "vocab_size": 300, "tokenizer": tokenizer_content(tokenizer),
        "source": manifest.source.model_copy(update={"files": (file,)}), "software": {HOSTILE: HOSTILE},
    }  # fmt: skip
    return store_of(tmp_path / f"store {HOSTILE[:8]}", manifest.model_copy(update=update), rows)
