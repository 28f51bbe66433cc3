"""Fixtures for tests of `prift-inspect`: verbs called in this process, stores of several data files."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.score_store import DataFile


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
