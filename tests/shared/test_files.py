"""Durable files: whole or not there."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.files import (
    create_json,
    probe_writable,
    remove_stale_temporaries,
    replacing,
    sha256_of_file,
    sha256_of_json,
    temporary_path,
)


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_replacing_shows_nothing_before_the_end(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a rename across file systems would be a copy
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_replacement_leaves_all_as_it_was(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_replacing_a_folder(tmp_path: Path):
    with replacing(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "file").write_text("x")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "x"

    def fail_halfway() -> None:
        with replacing(tmp_path / "other") as temporary:
            temporary.mkdir()
            raise ValueError

    with pytest.raises(ValueError):
        fail_halfway()
    assert os.listdir(tmp_path) == ["folder"]


def test_only_what_dead_processes_of_this_host_left_is_removed(tmp_path: Path, dead_pid: int):
    host = socket.gethostname()
    stale = tmp_path / f".tmp-{host}-{dead_pid}-shard-00000.parquet"
    stale_folder = tmp_path / f".tmp-{host}-{dead_pid}-checkpoint"
    mine = temporary_path(tmp_path / "shard-00001.parquet")
    elsewhere = tmp_path / f".tmp-another-{host}-{dead_pid}-shard-00002.parquet"
    final = tmp_path / "shard-00003.parquet"
    for path in (stale, mine, elsewhere, final):
        path.write_text("x")
    stale_folder.mkdir()
    (stale_folder / "file").write_text("x")
    remove_stale_temporaries(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, final}
    remove_stale_temporaries(tmp_path / "no such folder")


def test_temporary_names_of_two_processes_differ(tmp_path: Path, repository: Path):
    code = "from pathlib import Path; from shared.files import temporary_path; print(temporary_path(Path('x')))"
    other = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert other.stdout.strip() != str(temporary_path(Path("x")))


def test_of_several_starters_one_creates_the_file(tmp_path: Path, repository: Path):
    path = tmp_path / "store.json"
    code = (
        "import sys, time; from pathlib import Path; from shared.files import create_json\n"
        "time.sleep(max(0.0, float(sys.argv[2]) - time.time()))\n"
        "print(create_json(Path(sys.argv[1]), {'maker': sys.argv[3] * 10000}))"
    )
    start = str(time.time() + 0.7)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, path, start, str(n)], cwd=repository, stdout=subprocess.PIPE)
        for n in range(4)
    ]
    created = [process.communicate()[0].decode().strip() for process in processes]
    assert sorted(created) == ["False", "False", "False", "True"]
    winner = str(created.index("True"))
    assert json.loads(path.read_text()) == {"maker": winner * 10000}
    assert os.listdir(tmp_path) == ["store.json"]


def test_create_json_keeps_what_is_there(tmp_path: Path):
    path = tmp_path / "store.json"
    assert create_json(path, {"a": 1})
    assert not create_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["store.json"]


def test_digest_of_json_is_canonical():
    # Written out, so that neither the process (salted hashes) nor a new version of this code may change it.
    expected = "5ddd266d13a5e8cdcca4c2007bb2032c5c319ab15de36c670f395fe8765fc949"
    assert sha256_of_json({"b": [1, None], "a": "ü"}) == sha256_of_json({"a": "ü", "b": [1, None]}) == expected
    assert sha256_of_json({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert sha256_of_json([1, 2]) != sha256_of_json([2, 1])
    assert sha256_of_json("\ud800") != sha256_of_json("?")


def test_digest_of_a_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "file") == expected


def test_probe_makes_the_folder_and_leaves_nothing(tmp_path: Path):
    probe_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_probe_below_a_file_fails(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        probe_writable(tmp_path / "file" / "store")
