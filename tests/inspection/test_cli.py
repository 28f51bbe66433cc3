"""`prift-inspect`."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shared.shards import shard_path


@pytest.fixture
def store(tmp_path: Path, manifest_with, scored_row, store_of) -> Path:
    return store_of(tmp_path / "store", manifest_with(4, 2), [scored_row(index) for index in range(4)])


def test_a_sound_store_verifies(prift_inspect, store: Path):
    outcome = prift_inspect("verify", store)
    assert outcome.code == 0
    assert outcome.stdout == f"{store}: 4 rows, 12 targets, all pages and invariants hold\n"


def test_a_flipped_byte_is_exit_3(prift_inspect, store: Path):
    path = shard_path(store, 1)
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(0).column(3)
    content = bytearray(path.read_bytes())
    # The last byte of a column chunk is data of its last page.
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    outcome = prift_inspect("verify", store)
    assert outcome.code == 3
    assert outcome.stdout == ""
    assert outcome.stderr.splitlines()[0] == f"prift-inspect: {store} does not hold:"
    assert "shard-00001.parquet: a page is corrupted" in outcome.stderr


def test_an_unfinished_store_is_exit_3(prift_inspect, store: Path):
    shard_path(store, 1).unlink()
    outcome = prift_inspect("verify", store)
    assert outcome.code == 3
    assert "is unfinished: 1 of 2 shards are missing" in outcome.stderr


def test_no_store_is_exit_2(prift_inspect, tmp_path: Path):
    outcome = prift_inspect("verify", tmp_path / "nowhere")
    assert outcome.code == 2
    assert "expected a score store" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_another_schema_version_is_exit_2(prift_inspect, store: Path):
    path = store / "store.json"
    path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 7'))
    outcome = prift_inspect("verify", store)
    assert outcome.code == 2
    assert "expected a schema version from 1 to 3, found 7" in outcome.stderr


def test_a_reader_that_has_seen_enough_is_no_mistake(store: Path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "inspection.cli", "stats", str(store)],
        stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_unknown_verb_is_exit_2(prift_inspect):
    assert prift_inspect("frobnicate").code == 2
    assert prift_inspect().code == 2


def test_the_help_lists_every_option(prift_inspect):
    from stage1_score.cross_check import CrossCheckOptions

    outcome = prift_inspect("cross-check", "--help")
    assert outcome.code == 0
    for name in CrossCheckOptions.model_fields:
        assert f"\n  {name}=" in outcome.stdout


def test_a_wrong_option_is_exit_2(prift_inspect, store: Path):
    outcome = prift_inspect("cross-check", store, "row=8")
    assert outcome.code == 2
    assert outcome.stderr == "prift-inspect: unknown key row; the nearest known one is rows\n"
    assert outcome.stdout == ""


def test_no_store_to_cross_check_is_exit_2(prift_inspect, tmp_path: Path):
    outcome = prift_inspect("cross-check", tmp_path / "nowhere")
    assert outcome.code == 2
    assert "expected a score store" in outcome.stderr
