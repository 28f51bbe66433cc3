"""Data and stores in an object store: a real S3 server, cut off for 20 seconds, and killed starts in between."""

import gzip
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from launching import demo_overrides, finish, metrics_of, score, start
from test_kill_and_resume import training, wait_for

from shared.score_store import read_manifest
from shared.shards import open_store


def digests(store: Any) -> list[str]:
    from shared.places import place

    return [shard.digest for shard in open_store(place(store))[1]]


def scoring(pipeline: Path, output: str, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "stage1_score.cli",
        str(pipeline),
        *demo_overrides(output),
        "score.shard_rows=8",
        *more,
    ]


def num_shards(object_store: Any, prefix: str) -> int:
    return sum(key.endswith(".parquet") for key in object_store.listed(prefix))


def test_scoring_survives_an_outage_and_a_kill(object_store: Any, pipeline: Path, tmp_path: Path):
    score(pipeline, *demo_overrides(tmp_path / "store"), "score.shard_rows=8")
    data = object_store.put("train.jsonl", Path("data/demo/train.jsonl").read_bytes())
    command = scoring(pipeline, f"{object_store.url}/store", f"data.path={data}")

    process = start(command)
    wait_for(lambda: num_shards(object_store, "store/") >= 2, process)
    with object_store.outage(20):
        assert process.poll() is None
    wait_for(lambda: num_shards(object_store, "store/") >= 5, process)
    object_store.link.down()
    time.sleep(1)  # it is at an upload now
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    object_store.link.up()
    assert "trying again for up to 300 seconds" in output
    assert "answers again after" in output
    done = num_shards(object_store, "store/")
    assert 5 <= done < 12

    rerun = finish(command)
    assert rerun.code == 0, rerun.output
    assert f"{done} of 12 shards done, {12 - done} to score" in rerun.output
    assert digests(f"{object_store.url}/store") == digests(tmp_path / "store")
    names = {key.removeprefix("store/") for key in object_store.listed("store/")}
    assert names == {path.name for path in (tmp_path / "store").iterdir()}
    again = finish(command)
    assert again.code == 0, again.output
    assert "12 of 12 shards done, 0 to score" in again.output


def test_parts_and_workers_share_a_store_there_and_leave_no_copies(object_store: Any, pipeline: Path, tmp_path: Path):
    """Two starts at once begin the store; one of them has two workers, which share its copy of the data."""
    data = object_store.put("train.jsonl", Path("data/demo/train.jsonl").read_bytes())
    url, scratch = f"{object_store.url}/store", tmp_path / "scratch"
    scratch.mkdir()
    both = scoring(pipeline, url, f"data.path={data}")
    environment = {"TMPDIR": str(scratch), "PRIFT_SCRATCH": ""}
    parts = [
        start([*both, "score.part=0/2", "score.workers=2"], **environment),
        start([*both, "score.part=1/2"], **environment),
    ]
    for process in parts:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    score(pipeline, *demo_overrides(tmp_path / "store"), "score.shard_rows=8")
    assert digests(url) == digests(tmp_path / "store")
    assert [path.name for path in scratch.iterdir() if "-prift-" in path.name] == []


def test_a_stop_is_not_kept_waiting_by_an_outage(object_store: Any, pipeline: Path):
    process = start(scoring(pipeline, f"{object_store.url}/store"))
    wait_for(lambda: num_shards(object_store, "store/") >= 1, process)
    object_store.link.down()
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    object_store.link.up()
    assert process.returncode == 75, output


def test_training_survives_an_outage_to_the_same_bits(
    object_store: Any, demo_store: Path, pipeline: Path, tmp_path: Path
):
    url = object_store.copy_in(demo_store, "store")
    local, remote = tmp_path / "local", tmp_path / "remote"
    train = [sys.executable, "stage2_train/train.py", str(pipeline)]
    case = ["train.epochs=1", f"train.eval_scores={demo_store}"]
    done = finish([*train, *training(demo_store, local, 1), *case])
    assert done.code == 0, done.output

    case = ["train.epochs=1", f"train.eval_scores={url}", f"train.cache_dir={tmp_path / 'cache'}"]
    object_store.outage_after(5000, seconds=20)  # some eight requests: it is reading
    process = start([*train, *training(Path("STORE"), remote, 1), *case, f"train.scores={url}"])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "trying again for up to" in output
    assert "answers again after" in output
    assert metrics_of(remote) == metrics_of(local)
    name = "model/model.safetensors"
    assert (remote / name).read_bytes() == (local / name).read_bytes()


def test_other_trainers_read_a_store_there(object_store: Any, demo_store: Path, tmp_path: Path):
    from stage2_train.hf import ScoreStore

    url = object_store.copy_in(demo_store, "store")
    here, there = (ScoreStore(store, method="prift_prob", cache_dir=str(tmp_path)) for store in (demo_store, url))
    assert len(here.dataset) == 96
    assert str(there.dataset[5]) == str(here.dataset[5])


def test_a_worker_elsewhere_is_given_urls_as_they_are(object_store: Any, pipeline: Path):
    from shared.load_config import load_config
    from shared.places import place
    from stage1_score.worker import Task

    data = object_store.put("train.jsonl", Path("data/demo/train.jsonl").read_bytes())
    words = [*demo_overrides(f"{object_store.url}/store"), f"data.path={data}", "data.limit=8"]
    score(pipeline, *words)
    manifest = read_manifest(place(f"{object_store.url}/store"))
    given = Task(load_config(pipeline, words), manifest).with_absolute_paths()
    assert given.config.score.output == f"{object_store.url}/store"
    assert [file.path for file in given.manifest.source.files] == [data]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_data_is_read_from_an_object_store(object_store: Any, pipeline: Path, tmp_path: Path, ending: str):
    rows = [json.loads(line) for line in Path("data/demo/train.jsonl").read_text().splitlines()[:24]]
    parts = [rows[:10], rows[10:]]
    for number, part in enumerate(parts):
        path = tmp_path / f"part-{number}.{ending}"
        text = "".join(json.dumps(row) + "\n" for row in part).encode()
        if ending == "parquet":
            pl.DataFrame(part).write_parquet(path, row_group_size=4)
        else:
            path.write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)
        object_store.put(f"data/{path.name}", path.read_bytes())
    local, remote = tmp_path / "local", tmp_path / "remote"
    for store, where in ((local, tmp_path), (remote, f"{object_store.url}/data")):
        score(pipeline, *demo_overrides(store), f"data.path={where}/part-?.{ending}", "data.limit=null")
    assert digests(local) == digests(remote)
    mine, theirs = read_manifest(local).source.files, read_manifest(remote).source.files
    assert [it.path for it in theirs] == [f"{object_store.url}/data/part-{number}.{ending}" for number in (0, 1)]
    assert [(it.sha256, it.size, it.num_rows) for it in theirs] == [(it.sha256, it.size, it.num_rows) for it in mine]


def test_a_store_there_grows_with_data_there(
    object_store: Any, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from shared.files import remove_scratch
    from shared.places import place

    lines = Path("data/demo/train.jsonl").read_bytes().splitlines(keepends=True)
    data = object_store.put("rows.jsonl", b"".join(lines[:20]))
    store = f"{object_store.url}/store"
    words = [*demo_overrides(store), f"data.path={data}", "data.limit=null"]
    score(pipeline, *words)
    before = {key: object_store.get(key) for key in object_store.listed("store/") if key.endswith(".parquet")}
    remove_scratch()  # each start reads anew
    object_store.put("rows.jsonl", b"".join(lines[:50]))
    score(pipeline, *words, "score.extend=true")
    assert "30 rows are new" in capsys.readouterr().out
    assert read_manifest(place(store)).source.extended_at == (20,)
    assert all(object_store.get(key) == content for key, content in before.items())
    (tmp_path / "rows.jsonl").write_bytes(b"".join(lines[:50]))
    whole = [*demo_overrides(tmp_path / "whole"), f"data.path={tmp_path}/rows.jsonl", "data.limit=null"]
    score(pipeline, *whole)
    assert scored(store) == scored(tmp_path / "whole")
    remove_scratch()
    object_store.put("rows.jsonl", b"".join(lines[1:60]))
    with pytest.raises(ValueError, match="bytes are not those that were scored"):
        score(pipeline, *words, "score.extend=true")


def scored(store: Any) -> list[dict[str, Any]]:
    from shared.places import place
    from shared.shards import read_batches

    return [row for shard in open_store(place(store))[1] for table in read_batches(shard) for row in table.to_pylist()]


def test_the_verbs_read_stores_there(
    object_store: Any, demo_store: Path, tmp_path: Path, prift_inspect: Callable[..., Any]
):
    url = object_store.copy_in(demo_store, "store")
    for words in (["verify"], ["stats"], ["stats", "--json"], ["show", "#3"], ["show", "nothing"], ["cross-check"]):
        verb, *more = words
        more = ["rows=4", "engine=transformers"] if verb == "cross-check" else more
        here, there = prift_inspect(verb, demo_store, *more), prift_inspect(verb, url, *more)
        assert here.code == there.code
        assert there.stdout.replace(url, str(demo_store)) == here.stdout
        assert there.stderr.replace(url, str(demo_store)) == here.stderr
    same = prift_inspect("diff", demo_store, url)
    assert same.code == 0, same.stderr
    assert prift_inspect("diff", url, url).code == 0
    for store, name in ((demo_store, "here"), (url, "there")):
        arguments = ["--rule", "mass", "--format", "jsonl", "-o", tmp_path / name]
        assert prift_inspect("export", store, *arguments).code == 0
        assert prift_inspect("report", store, "-o", tmp_path / f"{name}.html").code == 0
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    pages = [(tmp_path / f"{name}.html").read_text() for name in ("here", "there")]
    assert pages[1].replace(url, str(demo_store)) == pages[0]
    refused = prift_inspect("merge", url, url, "-o", f"{object_store.url}/merged")
    assert refused.code == 2
    assert "cannot lie in an object store" in refused.stderr


def test_a_shard_that_was_edited_there_is_found(
    object_store: Any, demo_store: Path, prift_inspect: Callable[..., Any], rewrite: Callable[..., None], tmp_path: Path
):
    url = object_store.copy_in(demo_store, "store")
    shard = tmp_path / "shard-00001.parquet"
    shard.write_bytes((demo_store / shard.name).read_bytes())
    rewrite(shard, lambda table: table.set_column(3, "logprob", table.column("logprob").take(list(range(31, -1, -1)))))
    object_store.put(f"store/{shard.name}", shard.read_bytes())
    found = prift_inspect("verify", url)
    assert found.code == 3
    assert f"{url}/shard-00001.parquet" in found.stderr
    torn = (demo_store / "shard-00002.parquet").read_bytes()[:-9]
    object_store.put("store/shard-00002.parquet", torn)
    found = prift_inspect("verify", url)
    assert found.code == 3
    assert f"{url}/shard-00002.parquet: not a whole Parquet file" in found.stderr


def test_another_source_is_refused_and_no_key_is_told(object_store: Any, pipeline: Path):
    url = f"{object_store.url}/store"
    first = finish(scoring(pipeline, url, "data.limit=16"))
    assert first.code == 0, first.output
    other = finish(scoring(pipeline, url, "data.limit=8"))
    assert other.code == 2
    assert f"remove all under {url}/, then" in other.output
    for text in (
        first.output,
        other.output,
        *(object_store.get(key).decode("latin-1") for key in object_store.listed()),
    ):
        assert "testing" not in text  # the key, and how the secret begins


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("score.output=hf://datasets/me/scores", "cannot be written under hf://"),
        ("score.output=s3://no-such-bucket/scores", "the bucket does not exist"),
        ("score.output=s3://me:secret@bucket/scores", "must not hold a user, a password"),
        ("data.path=s3://no-such-bucket/rows.jsonl", "the bucket does not exist"),
        ("data.path=ftp://host/rows.jsonl", "expected a path, or a URL such as s3://"),
    ],
)
def test_what_will_not_pass_is_said_at_once(
    object_store: Any, prift_score: Callable[..., Any], override: str, message: str
):
    started = time.monotonic()
    refused = prift_score(*demo_overrides(f"{object_store.url}/store"), "data.limit=8", override)
    assert refused.code == 2
    assert message in refused.stderr
    assert "secret" not in refused.stderr
    assert time.monotonic() - started < 10


def test_a_run_does_not_train_into_an_object_store(pipeline: Path, demo_store: Path):
    words = [*training(demo_store, Path("RUN"), 1), "train.output=s3://bucket/run"]
    refused = finish([sys.executable, "stage2_train/train.py", str(pipeline), *words])
    assert refused.code == 2
    assert "train.output=s3://bucket/run: expected a local folder" in refused.output
