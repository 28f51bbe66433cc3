"""Older schema versions lifted to this one: the values stay, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shared.shards as shards_module
from inspection import migrate
from shared.errors import UserError
from shared.score_store import MANIFEST_NAME, Manifest, read_manifest
from shared.shards import open_store, write_shard
from shared.verify import verify_store


def of_version(manifest: Manifest, version: int) -> Manifest:
    """The manifest as an older version wrote it."""
    identity = manifest.identity.model_copy(update={"split_turns": None})
    update: dict[str, Any] = {
        "schema_version": version, "identity": identity, "fingerprint": identity.fingerprint(),
    }  # fmt: skip
    if version == 2:
        update["source"] = manifest.source.model_copy(update={"extended_at": (3,)})
    return manifest.model_copy(update=update)


@pytest.fixture
def old_store(tmp_path: Path, manifest_with, scored_row) -> Callable[..., Path]:
    """A store of version 1 or 2: seven source rows in shards of two, one of them dropped."""

    def make(version: int, missing: tuple[int, ...] = ()) -> Path:
        store = tmp_path / f"version-{version}"
        store.mkdir()
        manifest = of_version(manifest_with(7, 2, template="chat"), version)
        (store / MANIFEST_NAME).write_text(json.dumps(manifest.model_dump(mode="json")))
        for index in range(manifest.source.num_shards):
            rows = [scored_row(n) for n in manifest.source.rows_of_shard(index) if n != 4]
            dropped = [{"row_id": "row-4", "source_index": 4, "reason": "no target token"}]
            if index not in missing:
                held = dropped if 4 in manifest.source.rows_of_shard(index) else []
                write_shard(store, index, manifest, rows, held, {"engine": "none", "torch": "1"})
        return store

    return make


@pytest.mark.parametrize("version", [1, 2])
def test_values_and_digests_stay(old_store, tmp_path: Path, call_verb, read_store, version: int):
    store, new = old_store(version), tmp_path / "new"
    assert verify_store(store).problems == [], "an older store is read as it is"
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    printed = call_verb(migrate, store, "-o", new)
    assert f"schema version {version} lifted to 3" in printed
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert verify_store(new).problems == []
    assert read_store(new) == read_store(store)
    (old_manifest, old_shards), (manifest, shards) = open_store(store), open_store(new)
    assert [shard.digest for shard in shards] == [shard.digest for shard in old_shards]
    assert (manifest.schema_version, manifest.identity.split_turns) == (3, False)
    assert manifest.source == old_manifest.source
    assert manifest.fingerprint != old_manifest.fingerprint
    for index in range(manifest.source.num_shards):
        name = f"shard-{index:05d}.dropped.jsonl"
        assert (new / name).read_bytes() == (store / name).read_bytes()
    assert sorted(path.name for path in new.iterdir()) == sorted(before)


def test_an_unfinished_store_stays_unfinished(old_store, tmp_path: Path, call_verb):
    printed = call_verb(migrate, old_store(1, missing=(1,)), "-o", tmp_path / "new")
    assert "3 of 4 shards" in printed
    assert not (tmp_path / "new" / "shard-00001.parquet").exists()
    with pytest.raises(UserError, match="1 of 4 shards are missing, the first is shard 1"):
        open_store(tmp_path / "new")


def test_a_store_of_this_version_is_refused(tmp_path: Path, call_verb, manifest_with, store_of, scored_row):
    store = store_of(tmp_path / "store", manifest_with(), [scored_row(n) for n in range(4)])
    with pytest.raises(UserError, match="is of schema version 3 already"):
        call_verb(migrate, store, "-o", tmp_path / "new")


@pytest.mark.parametrize("at", range(4))
def test_stopped_at_any_shard_it_leaves_nothing_and_goes_again(
    old_store, tmp_path: Path, call_verb, monkeypatch: pytest.MonkeyPatch, at: int
):
    store, new = old_store(1), tmp_path / "new"
    original = shards_module.write_shard

    def stopping(folder: Path, index: int, *more: Any) -> Any:
        if index == at:
            raise KeyboardInterrupt
        return original(folder, index, *more)

    with monkeypatch.context() as patched:
        patched.setattr(shards_module, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            call_verb(migrate, store, "-o", new)
    assert [path.name for path in tmp_path.iterdir()] == ["version-1"]
    call_verb(migrate, store, "-o", new)
    assert verify_store(new).problems == []


def test_a_damaged_store_is_not_lifted(old_store, tmp_path: Path, call_verb, rewrite):
    store = old_store(1)
    rewrite(store / "shard-00002.parquet", lambda table: table.set_column(0, "row_id", [["other"] * table.num_rows]))
    with pytest.raises(UserError, match="the digest differs"):
        call_verb(migrate, store, "-o", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_lifted_store_of_conversations_names_how_to_go_on(tmp_path: Path, manifest_with):
    from shared.score_store import create_or_match

    create_or_match(tmp_path, manifest_with(template="chat"), ["prift-score"])
    with pytest.raises(UserError) as refused:
        create_or_match(tmp_path, manifest_with(template="chat", split_turns=True), ["prift-score", "p.yaml"])
    assert "A lifted store goes on with:  prift-score p.yaml data.split_turns=false" in str(refused.value)


def test_scoring_goes_on_in_the_lifted_store(
    prift_score, prift_inspect, plain_prior: Path, tmp_path: Path, write_jsonl, read_store
):
    rows = [{"id": n, "prompt": f"q{n}", "completion": "a" * (n + 1)} for n in range(6)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    words = [f"data.path={data}", f"prior.model={plain_prior}", "score.shard_rows=2"]
    assert prift_score(*words, f"score.output={tmp_path}/whole").code == 0
    # What version 1 would have left behind when it was killed after two shards.
    old = tmp_path / "old"
    old.mkdir()
    manifest = of_version(read_manifest(tmp_path / "whole"), 1)
    (old / MANIFEST_NAME).write_text(json.dumps(manifest.model_dump(mode="json")))
    from stage1_score.cross_check import scored_rows

    _, shards = open_store(tmp_path / "whole")
    for shard in shards[:2]:
        kept = [
            row for table in shards_module.read_batches(shard) for row in scored_rows(table, manifest.identity.columns)
        ]
        write_shard(old, shard.index, manifest, kept, [], {"engine": "transformers"})
    outcome = prift_score(*words, f"score.output={old}")
    assert outcome.code == 2
    assert "prift-inspect migrate" in outcome.stderr
    assert prift_inspect("migrate", old, "-o", tmp_path / "new").code == 0
    outcome = prift_score(*words, f"score.output={tmp_path}/new")
    assert outcome.code == 0, outcome.stderr
    assert "2 of 3 shards done, 1 to score" in outcome.stdout
    assert read_store(tmp_path / "new") == read_store(tmp_path / "whole")
