"""Places in an object store: what pathlib does for a folder, and that an object is whole or not there."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared import places, retrying
from shared.errors import UserError
from shared.files import create_json, probe_writable, replacing, scratch_folder, sha256_of_file
from shared.local_copies import kept_copy, local_copy
from shared.places import RemotePath, local_place, matching_files, place
from shared.score_store import create_or_match, read_manifest, replace_manifest
from shared.shards import open_store, shard_path, write_shard


def remote(url: str) -> RemotePath:
    found = place(url)
    assert isinstance(found, RemotePath)
    return found


@pytest.mark.parametrize("text", ["rows.jsonl", "/a/b", "s3:/a", "a://", "runs/x=1?y"])
def test_a_path_is_a_path(text: str):
    if "://" in text:
        with pytest.raises(UserError, match="expected a path, or a URL"):
            place(text)
    else:
        assert place(text) == Path(text)
        assert local_place(text, "train.output") == Path(text)


@pytest.mark.parametrize(
    "text",
    ["s3://me:secret@bucket/a", "s3://secret@bucket/a", "gs://bucket/a?key=secret", "https://me:secret@host/x",
     "s3://bucket/a?x=1&key=secret"],
)  # fmt: skip
def test_credentials_in_an_url_are_refused_and_not_repeated(text: str):
    with pytest.raises(UserError, match="come from the environment") as raised:
        place(text)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("text", ["ftp://host/a", "file:///a", "s3:///a", "memory://a"])
def test_other_schemes_are_refused(text: str):
    with pytest.raises(UserError, match="expected a path, or a URL such as s3://"):
        place(text)


def test_parts_of_an_url():
    where = remote("s3://bucket/a@b/rows.jsonl.gz/")
    assert (str(where), where.name, where.suffix) == ("s3://bucket/a@b/rows.jsonl.gz", "rows.jsonl.gz", ".gz")
    assert where.parent / "x" == remote("s3://bucket/a@b/x")
    with pytest.raises(UserError, match=r"train.output=s3://bucket/x: expected a local folder"):
        local_place("s3://bucket/x", "train.output")


def test_no_client_is_imported_for_local_paths(repository: Path):
    code = (
        "import sys, shared.shards, inspection.cli, stage1_score.read; from shared.places import *;"
        "place('README.md').is_file(); matching_files('*.md'); kept_copy(place('README.md'));"
        "print({'fsspec', 's3fs', 'aiohttp', 'botocore'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_files_there(object_store: Any):
    where = remote(object_store.put("a/rows-1.jsonl", b"one\n"))
    object_store.put("a/rows-2.jsonl", b"two\n")
    object_store.put("a/rows-3.jsonl/inner", b"")
    assert where.is_file()
    assert not where.parent.is_file()
    assert not (where / "x").exists()
    assert where.read_text() == "one\n"
    assert where.parent.names() == {"rows-1.jsonl", "rows-2.jsonl", "rows-3.jsonl"}
    assert (where / "x").names() == set()
    with pytest.raises(FileNotFoundError):
        (where / "x").read_bytes()
    for pattern in ("rows-?.jsonl", "*.jsonl", "rows-[12].jsonl"):
        found = matching_files(f"{object_store.url}/a/{pattern}")
        assert list(map(str, found)) == [f"{object_store.url}/a/rows-{number}.jsonl" for number in (1, 2)]
    assert matching_files(f"{object_store.url}/a/none") == []


def test_what_says_that_an_object_changed(object_store: Any):
    where = remote(object_store.put("key", b"one"))
    first = where.stat()
    object_store.put("key", b"one")
    assert where.stat() == first
    object_store.put("key", b"two")
    assert where.stat().st_size == first.st_size
    assert where.stat().st_mtime_ns != first.st_mtime_ns


def test_a_kept_copy_stays_as_it_was(object_store: Any):
    where = remote(object_store.put("key", b"one"))
    before = where.stat()
    copy = kept_copy(where)
    object_store.put("key", b"other")
    assert kept_copy(where) == copy
    assert copy.read_bytes() == b"one"
    assert where.stat() == before, "what is recorded is what was read"
    assert sha256_of_file(where) == sha256_of_file(copy)
    with where.open(encoding="utf-8") as file:
        assert file.read() == "one"


def test_a_copy_to_read_is_removed(object_store: Any):
    where = remote(object_store.put("key", b"one"))
    with local_copy(where) as first, local_copy(where) as second:
        assert first != second
        assert first.read_bytes() == second.read_bytes() == b"one"
    assert not first.exists()
    assert not second.exists()


def test_an_object_in_pieces(object_store: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(places, "_CHUNK", 1000)
    content = os.urandom(9999)
    assert kept_copy(remote(object_store.put("key", content))).read_bytes() == content
    assert kept_copy(remote(object_store.put("empty", b""))).read_bytes() == b""


def test_an_object_that_changes_under_the_reader_is_refused(object_store: Any, monkeypatch: pytest.MonkeyPatch):
    where = remote(object_store.put("key", b"a" * 10))
    read = RemotePath._read_range

    def changing(self: RemotePath, start: int, stop: int) -> bytes:
        object_store.put("key", b"b" * 10)
        return read(self, start, stop)

    monkeypatch.setattr(RemotePath, "_read_range", changing)
    with pytest.raises(UserError, match="changed while it was read"):
        kept_copy(where)


def test_no_room_for_a_copy(object_store: Any, monkeypatch: pytest.MonkeyPatch):
    where = remote(object_store.put("key", b"a" * 10))
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: _Usage())
    with pytest.raises(UserError, match="TMPDIR names another folder"):
        kept_copy(where)


class _Usage:
    free = 5


def test_the_scratch_folder_goes_with_its_process(tmp_path: Path, repository: Path):
    code = "from shared.files import scratch_folder; print(scratch_folder()); {}"
    environment = {name: value for name, value in os.environ.items() if name != "PRIFT_SCRATCH"}

    def run(more: str) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", code.format(more)], cwd=repository, text=True, stdout=subprocess.PIPE, check=False,
            env={**environment, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        return Path(done.stdout.strip())

    assert run("").parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    killed = run("import os, sys; sys.stdout.flush(); os.kill(os.getpid(), 9)")
    assert killed.is_dir()
    inner = "from shared.files import scratch_folder; scratch_folder()"
    run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])")
    assert list(tmp_path.iterdir()) == [], "what the killed one left is gone too"


def test_the_footer_of_a_file_with_many_row_groups(object_store: Any, tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": list(range(5000))}), path, row_group_size=2)
    where = remote(object_store.put("rows.parquet", path.read_bytes()))
    footer = where.read_footer()
    assert 64 << 10 < len(footer) < path.stat().st_size
    assert pq.ParquetFile(pa.BufferReader(footer)).metadata.num_row_groups == 2500


def test_one_of_many_starters_creates(object_store: Any):
    where = remote(f"{object_store.url}/store/store.json")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: create_json(where, {"number": number}), range(8)))
    assert created.count(True) == 1
    assert where.read_text() == f'{{\n  "number": {created.index(True)}\n}}\n'


def test_starters_of_one_store_go_on_and_others_are_refused(object_store: Any, manifest_with: Callable[..., Any]):
    store = remote(f"{object_store.url}/store")

    def begin(max_length: int) -> Any:
        try:
            return create_or_match(store, manifest_with(max_length=max_length), ["prift-score"])
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(begin, [64, 65] * 4))
    winner = read_manifest(store)
    for length, outcome in zip([64, 65] * 4, outcomes, strict=True):
        if length == winner.identity.max_length:
            assert outcome == winner
        else:
            assert "identity.max_length" in outcome


def losing_answers(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """The server does what it is asked, and its first answers to writes do not arrive."""
    files = places._filesystem("s3")
    write, left = files.pipe_file, [lost]

    def pipe_file(*arguments: Any, **options: Any) -> Any:
        answer = write(*arguments, **options)
        if left[0]:
            left[0] -= 1
            raise ConnectionResetError("the answer was lost")
        return answer

    monkeypatch.setattr(files, "pipe_file", pipe_file)
    monkeypatch.setattr(retrying, "_FIRST_WAIT", 0.01)


def test_a_lost_answer_does_not_refuse_the_starter_itself(
    object_store: Any, manifest_with: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    store, manifest = remote(f"{object_store.url}/store"), manifest_with()
    losing_answers(monkeypatch, 1)
    assert create_or_match(store, manifest, ["prift-score"]) == manifest
    grown = manifest.model_copy(update={"source": manifest.source.model_copy(update={"limit": 3})})
    losing_answers(monkeypatch, 1)
    replace_manifest(store, manifest, grown)
    assert read_manifest(store) == grown


def test_two_starters_do_not_extend_over_each_other(
    object_store: Any, manifest_with: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    store, manifest = remote(f"{object_store.url}/store"), manifest_with()
    create_or_match(store, manifest, [])
    mine, theirs = (
        manifest.model_copy(update={"source": manifest.source.model_copy(update={"limit": limit})}) for limit in (2, 3)
    )
    read = RemotePath.read_bytes
    calls = []

    def read_and_lose(self: RemotePath) -> bytes:
        content = read(self)
        calls.append(self)
        if len(calls) == 3:  # right before the write
            object_store.put("store/store.json", theirs.model_dump_json().encode())
        return content

    monkeypatch.setattr(RemotePath, "read_bytes", read_and_lose)
    with pytest.raises(UserError, match="another start extended it meanwhile"):
        replace_manifest(store, manifest, mine)
    assert read_manifest(store) == theirs


def test_a_folder_is_probed(object_store: Any):
    probe_writable(remote(f"{object_store.url}/store"))
    assert object_store.listed() == []
    with pytest.raises(UserError, match=r"no-such-bucket/x/\.tmp-probe: the bucket does not exist"):
        probe_writable(remote("s3://no-such-bucket/x"))
    with pytest.raises(UserError, match="cannot be written under hf://"):
        probe_writable(remote("hf://datasets/me/scores"))


def test_what_fails_before_its_end_is_not_uploaded(object_store: Any):
    where = remote(f"{object_store.url}/key")

    def fail_halfway() -> None:
        with replacing(where) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert object_store.listed() == []
    assert not [path for path in scratch_folder().iterdir() if path.name.endswith("-key")]


def test_a_torn_upload_leaves_no_object_and_is_done_again(object_store: Any, tmp_path: Path):
    """130 MB go in three parts; the link is cut in the second or third, for two seconds."""
    content = os.urandom(1 << 20) * 130
    where = remote(f"{object_store.url}/shard-00000.parquet")
    object_store.link.cut_after = 90 << 20
    finished = threading.Event()

    def upload() -> None:
        with replacing(where) as temporary:
            temporary.write_bytes(content)
        finished.set()

    worker = threading.Thread(target=upload)
    worker.start()
    while object_store.link.cut_after is not None:
        assert worker.is_alive()
        worker.join(0.05)
    worker.join(2)
    begun = object_store.client.list_multipart_uploads(Bucket=object_store.bucket)["Uploads"]
    assert len(begun) == 1, "parts are there"
    assert object_store.listed() == [], "and no object"
    object_store.link.up()
    assert not where.is_file()
    assert finished.wait(60)
    assert object_store.get("shard-00000.parquet") == content


def test_shards_of_a_store_that_is_unfinished(
    object_store: Any, manifest_with: Callable[..., Any], scored_row: Callable[..., Any]
):
    store, manifest = remote(f"{object_store.url}/store"), manifest_with(num_rows=4, shard_rows=2)
    create_or_match(store, manifest, [])
    written = write_shard(store, 1, manifest, [scored_row(2), scored_row(3)], [], {"engine": "none"})
    assert object_store.listed("store/shard") == ["store/shard-00001.dropped.jsonl", "store/shard-00001.parquet"]
    with pytest.raises(UserError, match="1 of 2 shards are missing, the first is shard 0"):
        open_store(store)
    write_shard(store, 0, manifest, [scored_row(0), scored_row(1)], [], {"engine": "none"})
    assert open_store(store)[1][1] == written
    object_store.put("store/shard-00000.parquet", object_store.get("store/shard-00001.parquet"))
    with pytest.raises(UserError, match=f"{shard_path(store, 0)}: its footer says shard=1, expected 0"):
        open_store(store)


@pytest.mark.parametrize(
    ("denied", "action"),
    [
        ("s3:GetObject", lambda where: where.read_bytes()),
        ("s3:PutObject", lambda where: where.upload(Path(__file__))),
        ("s3:PutObject", lambda where: probe_writable(where.parent)),
    ],
)
def test_rights_that_lack_are_said_at_once(object_store: Any, denied: str, action: Callable[[RemotePath], Any]):
    where = remote(object_store.put("a/key", b"one"))
    bucket = f"arn:aws:s3:::{object_store.bucket}"
    statement = {"Effect": "Deny", "Principal": "*", "Action": denied, "Resource": [bucket, f"{bucket}/*"]}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    object_store.client.put_bucket_policy(Bucket=object_store.bucket, Policy=json.dumps(policy))
    with pytest.raises(UserError, match=rf"s3://{object_store.bucket}/a.*permission refused .*credentials"):
        action(where)


def test_no_credentials_are_said_at_once(object_store: Any, repository: Path, tmp_path: Path):
    code = "from shared.places import place; print(place('s3://bucket/key').is_file())"
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in keys}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False,
        env={**environment, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert "UserError: s3://bucket/key: no credentials" in done.stderr
