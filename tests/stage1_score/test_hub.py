"""Data sets of the hub: the real `datasets` and `huggingface_hub` against a hub on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

from shared.score_store import read_manifest
from shared.shards import open_store
from shared.verify import verify_store

FIRST, SECOND = "a" * 40, "b" * 40


def as_lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [{"id": n, "prompt": f"question {n}", "completion": "answer" * (n + 1)} for n in range(5)]


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub that holds one data set, o/d, at two commits."""

    commits: dict[str, dict[str, bytes]] = {
        FIRST: {"data/train.jsonl": as_lines(*ROWS[:4]), "data/test.jsonl": as_lines(ROWS[4])},
        SECOND: {"data/train.jsonl": as_lines(*ROWS)},
    }
    branches: dict[str, str] = {}

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        found = re.fullmatch(r"/(api/)?datasets/o/d(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        if found is None:
            return self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"}, with_body)
        commit = self.branches.get(found[3] or "main", found[3])
        files = self.commits.get(commit)
        if files is None:
            return self._send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"}, with_body)
        if found[2] == "resolve":
            return self._send_file(files.get(found[4]), commit, with_body)
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        folder = {"type": "directory", "path": "data", "oid": "0" * 40}
        about = {"id": "o/d", "sha": commit, "private": False, "downloads": 0, "likes": 0, "tags": [],
                 "siblings": [{"rfilename": name} for name in files]}  # fmt: skip
        content = about if found[2] != "tree" else entries if found[4] else [folder]
        return self._send(json.dumps(content).encode(), 200, {"Content-Type": "application/json"}, with_body)

    def _send_file(self, content: bytes | None, commit: str, with_body: bool) -> None:
        if content is None:
            return self._send(b"", 404, {"X-Error-Code": "EntryNotFound"}, with_body)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._send(content, 200, {"ETag": etag, "X-Repo-Commit": commit}, with_body)

    def _send(self, content: bytes, status: int, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub whose main branch stands at the first commit."""
    Hub.branches = {"main": FIRST}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def score(hub: str, tmp_path: Path, plain_prior: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`prift-score` of the data set, in a process with caches of its own."""
    (tmp_path / "pipeline.yaml").write_text("data: {}\n")

    def run(*overrides: str, cache: str = "cache", **environment: str) -> subprocess.CompletedProcess[str]:
        words = [
            "data.hub.id=o/d",
            f"prior.model={plain_prior}",
            f"score.output={tmp_path}/store",
            "score.shard_rows=2",
        ]
        names = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        names |= {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": f"{tmp_path}/{cache}/hf",
                  "XDG_CACHE_HOME": f"{tmp_path}/{cache}", "OMP_NUM_THREADS": "1", **environment}  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "stage1_score.cli", str(tmp_path / "pipeline.yaml"), *words, *overrides],
            capture_output=True, text=True, timeout=300, check=False, env=names,
        )  # fmt: skip

    return run


def test_a_data_set_is_scored_at_the_commit_that_is_recorded(score, tmp_path: Path, read_store):
    outcome = score()
    assert outcome.returncode == 0, outcome.stderr
    source = read_manifest(tmp_path / "store").source
    assert source.hub is not None
    assert source.hub.model_dump() == {"id": "o/d", "config": None, "split": "train", "revision": FIRST}
    assert [row["row_id"] for row in read_store(tmp_path / "store")] == ["0", "1", "2", "3"]
    assert verify_store(tmp_path / "store").problems == []
    # The branch has moved on; the store has not, also where nothing is in a cache any more.
    Hub.branches = {"main": SECOND}
    (tmp_path / "store" / "shard-00001.parquet").unlink()
    outcome = score(cache="another")
    assert outcome.returncode == 0, outcome.stderr
    assert "1 of 2 shards done, 1 to score" in outcome.stdout
    assert [row["row_id"] for row in read_store(tmp_path / "store")] == ["0", "1", "2", "3"]


def test_the_same_rows_from_a_file_have_the_same_numbers(score, tmp_path: Path, prift_score, plain_prior: Path):
    assert score().returncode == 0
    (tmp_path / "rows.jsonl").write_bytes(as_lines(*ROWS[:4]))
    outcome = prift_score(
        f"data.path={tmp_path}/rows.jsonl", f"prior.model={plain_prior}", f"score.output={tmp_path}/file",
        "score.shard_rows=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    digests = [[shard.digest for shard in open_store(tmp_path / name)[1]] for name in ("store", "file")]
    assert digests[0] == digests[1]


def test_another_revision_or_split_is_another_source(score, tmp_path: Path, read_store):
    assert score().returncode == 0
    for words, field in ((["data.hub.revision=" + SECOND], SECOND[:8]), (["data.hub.split=test"], "o/d test at")):
        outcome = score(*words)
        assert outcome.returncode == 2
        assert "source.hub" in outcome.stderr
        assert field in outcome.stderr
    outcome = score("data.hub.split=test", f"score.output={tmp_path}/test")
    assert outcome.returncode == 0, outcome.stderr
    assert [row["row_id"] for row in read_store(tmp_path / "test")] == ["4"]
    outcome = score("data.hub.revision=" + SECOND, "score.extend=true")
    assert outcome.returncode == 2
    assert "which rows of a data set of the hub are new is not known" in outcome.stderr


def test_without_a_network_a_commit_is_taken_from_the_cache(score, tmp_path: Path, read_store):
    assert score().returncode == 0
    outcome = score(f"score.output={tmp_path}/again", f"data.hub.revision={FIRST}", HF_ENDPOINT="http://127.0.0.1:9")
    assert outcome.returncode == 0, outcome.stderr
    assert read_store(tmp_path / "again") == read_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.hub.id=o/other"], "data.hub.id=o/other: the hub gives no such data set (404"),
        (["data.hub.revision=nowhere"], "data.hub.id=o/d at revision nowhere: the hub gives no such data set (404"),
        (["data.hub.id=../../etc"], "data.hub.id=../../etc: the hub gives no such data set"),
        (["data.hub.split=other"], 'data.hub: o/d other at aaaaaaaaaaaa: Unknown split "other"'),
        (["data.hub.config=other"], "data.hub: o/d other train at aaaaaaaaaaaa: BuilderConfig 'other' not found"),
        (["data.path=rows.jsonl"], "data.path=rows.jsonl and data.hub.id=o/d are given: expected one of them"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(score, tmp_path: Path, words: list[str], message: str):
    outcome = score(*words)
    assert outcome.returncode == 2, outcome.stderr
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "store").exists()
