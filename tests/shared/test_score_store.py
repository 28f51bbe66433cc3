"""store.json: identity, plan of shards, and who may write into a store."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from shared.score_store import (
    MANIFEST_NAME,
    DataFile,
    Identity,
    Manifest,
    create_or_match,
    differing_fields,
    read_manifest,
)

COMMAND = ["prift-score", "my pipeline.yaml", "score.output=runs/my store", "data.limit=16"]


def with_source(manifest: Manifest, **fields: Any) -> Manifest:
    return manifest.model_copy(update={"source": manifest.source.model_copy(update=fields)})


def test_the_fingerprint_covers_every_field_of_the_identity(manifest_with):
    base = manifest_with().identity
    seen = {base.fingerprint()}
    for name in Identity.model_fields:
        value = getattr(base, name)
        other = (
            not value
            if isinstance(value, bool)
            else value + 1
            if isinstance(value, int)
            else ("logprob",)
            if name == "columns"
            else f"{value}x"
        )
        seen.add(base.model_copy(update={name: other}).fingerprint())
    assert len(seen) == 1 + len(Identity.model_fields)


def test_the_fingerprint_is_the_same_in_every_process(manifest_with):
    # Written out: a salted or version-dependent hash would not give it again.
    assert manifest_with().fingerprint == "c6b4b1fb557d1df83eb33d6aef0f1566519340d39bef5ad9578d448ac0269034"


def test_nothing_but_the_identity_is_hashed(manifest_with):
    manifest = manifest_with()
    other = manifest.model_copy(update={"prior_name": "elsewhere", "prior_revision": "abc", "software": {}})
    assert other.identity.fingerprint() == manifest.fingerprint
    assert not {"output", "batch_tokens", "device", "path", "shard_rows"} & set(Identity.model_fields)


def test_plan_of_shards(manifest_with):
    source = manifest_with(num_rows=10, shard_rows=4).source
    assert (source.num_rows, source.num_shards) == (10, 3)
    assert [source.rows_of_shard(index) for index in range(3)] == [range(4), range(4, 8), range(8, 10)]
    limited = source.model_copy(update={"limit": 5})
    assert (limited.num_rows, limited.num_shards, limited.rows_of_shard(1)) == (5, 2, range(4, 5))
    assert source.model_copy(update={"limit": 99}).num_rows == 10


def test_a_store_that_grew_begins_another_shard(manifest_with):
    source = manifest_with(num_rows=10, shard_rows=4).source.model_copy(update={"extended_at": (3, 8)})
    assert source.shard_counts == (1, 3, 4)
    assert [source.rows_of_shard(index) for index in range(4)] == [range(3), range(3, 7), range(7, 8), range(8, 10)]


@pytest.mark.parametrize("extended_at", [(0,), (3, 3), (5, 2), (10,), (-1,)])
def test_growth_out_of_order_is_refused(tmp_path: Path, manifest_with, extended_at: tuple[int, ...]):
    manifest = manifest_with(num_rows=10)
    source = {**manifest.source.model_dump(mode="json"), "extended_at": extended_at}
    with pytest.raises(UserError, match="expected ascending, below the 10 rows"):
        read_manifest(damaged(tmp_path, manifest, schema_version=2, source=source))


def test_only_a_store_that_grew_says_so(tmp_path: Path, manifest_with):
    manifest = manifest_with(num_rows=10)
    assert "extended_at" not in manifest.source.model_dump(mode="json")
    grown = manifest.source.model_copy(update={"extended_at": (4,)})
    assert grown.model_dump(mode="json")["extended_at"] == [4]


def test_created_then_matched(tmp_path: Path, manifest_with):
    wanted = manifest_with()
    assert create_or_match(tmp_path, wanted, COMMAND) == wanted
    assert read_manifest(tmp_path) == wanted
    assert create_or_match(tmp_path, wanted, COMMAND) == wanted
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_more_columns_than_asked_for_satisfy(tmp_path: Path, manifest_with):
    rich = manifest_with(columns=("logprob", "mass_rank", "entropy", "collision"))
    create_or_match(tmp_path, rich, COMMAND)
    # What comes back is the store's own: further shards get all of its columns.
    assert create_or_match(tmp_path, manifest_with(columns=("logprob", "collision")), COMMAND) == rich
    with pytest.raises(UserError, match=r"identity\.columns"):
        create_or_match(tmp_path, manifest_with(columns=("logprob", "entropy_top20")), COMMAND)


NOT_TEXT = {"columns", "max_length", "statistics_version", "split_turns"}


@pytest.mark.parametrize("field", sorted(set(Identity.model_fields) - NOT_TEXT))
def test_every_differing_field_is_refused_by_name(tmp_path: Path, manifest_with, field: str):
    create_or_match(tmp_path, manifest_with(), COMMAND)
    with pytest.raises(UserError) as refused:
        create_or_match(tmp_path, manifest_with(**{field: "other"}), COMMAND)
    lines = [line for line in str(refused.value).splitlines() if line.startswith("  identity.")]
    assert len(lines) == 1
    assert lines[0].split()[0] == f"identity.{field}"
    assert '"other"' in lines[0]


def test_the_refusal_shows_a_table_and_both_ways_out(tmp_path: Path, manifest_with):
    store = tmp_path / "my store"
    store.mkdir()
    create_or_match(store, manifest_with(), COMMAND)
    wanted = with_source(manifest_with(max_length=32, template="plain"), limit=16)
    command = ["prift-score", "my pipeline.yaml", f"score.output={store}", "data.limit=16"]
    with pytest.raises(UserError) as refused:
        create_or_match(store, wanted, command)
    lines = str(refused.value).splitlines()
    assert lines[1].split() == ["field", "in", "the", "store", "asked", "for"]
    assert [line.split() for line in lines[2:5]] == [
        ["identity.template", '"tokens"', '"plain"'],
        ["identity.max_length", "64", "32"],
        ["source.limit", "null", "16"],
    ]
    elsewhere, replace = (line.split(":  ", 1)[1] for line in lines[5:])
    # Both are commands that a shell takes as they stand, spaces in names and all.
    assert shlex.split(elsewhere) == [*command[:2], "data.limit=16", f"score.output={store}-2"]
    assert shlex.split(replace) == ["rm", "-r", str(store), "&&", *command]


def test_another_source_is_refused(manifest_with):
    found = manifest_with()
    changed = DataFile(path="rows.jsonl", size=1, mtime_ns=1, sha256="0" * 64, num_rows=4)
    for fields in ({"files": (changed,)}, {"format": "messages"}, {"limit": 3}, {"shard_rows": 2}, {"columns": {}}):
        names = [name for name, _, _ in differing_fields(found, with_source(found, **fields))]
        assert names == [f"source.{next(iter(fields))}"]


def test_a_file_of_the_same_content_is_the_same_source(manifest_with):
    found = manifest_with()
    moved = found.source.files[0].model_copy(update={"path": "elsewhere.jsonl", "mtime_ns": 99})
    assert differing_fields(found, with_source(found, files=(moved,))) == []


def test_the_order_of_files_matters(manifest_with):
    one = manifest_with().source.files[0]
    two = one.model_copy(update={"sha256": "0" * 64})
    found = with_source(manifest_with(), files=(one, two))
    assert differing_fields(found, with_source(found, files=(two, one))) != []


def damaged(store: Path, manifest: Manifest, **fields: Any) -> Path:
    content = {**manifest.model_dump(mode="json"), **fields}
    (store / MANIFEST_NAME).write_text(json.dumps(content))
    return store


def test_another_schema_version_is_refused(tmp_path: Path, manifest_with):
    for version in (0, 4, "3", True, None, 3.5):
        with pytest.raises(UserError, match=r"expected a schema version from 1 to 3, found .*score again"):
            read_manifest(damaged(tmp_path, manifest_with(), schema_version=version))


VERSION_1 = json.loads("""
{
    "schema_version": 1,
    "fingerprint": "7d736cc7698626165ac2c228c243ab9dce72d1adae4d3035548bf8eec33f7428",
    "identity": {
        "prior_weights": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "prior_config": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
        "quantization": null,
        "tokenizer_files": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
        "chat_template": "1111111111111111111111111111111111111111111111111111111111111111",
        "template_arguments": "2222222222222222222222222222222222222222222222222222222222222222",
        "template": "chat",
        "targets": "completion",
        "max_length": 64,
        "overlong": "drop",
        "special_tokens": "as given",
        "weight_dtype": "float32",
        "compute_dtype": "float64",
        "head_dtype": "float32",
        "engine": "transformers",
        "statistics_version": 1,
        "columns": [
            "logprob",
            "mass_rank",
            "entropy"
        ]
    },
    "source": {
        "format": "tokens",
        "columns": {
            "id": "row_id",
            "input_ids": "input_ids",
            "target_mask": "target_mask"
        },
        "limit": null,
        "files": [
            {
                "path": "rows.jsonl",
                "size": 1,
                "mtime_ns": 1,
                "sha256": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd",
                "num_rows": 4
            }
        ],
        "shard_rows": 4
    },
    "prior_name": "prior",
    "prior_revision": null,
    "vocab_size": 100,
    "tokenizer": {
        "token_map": "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee",
        "merges": "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
        "special_ids": {
            "bos": 1,
            "eos": 2
        }
    },
    "stop_token_ids": [
        2
    ],
    "user_row_ids": true,
    "software": {
        "torch": "0"
    }
}
""")
"""A store.json as version 0.1.0 wrote it before schema version 3: its fingerprint is of then."""


def test_older_versions_are_read_as_they_are(tmp_path: Path):
    for version, source in ((1, {}), (2, {"extended_at": [2]})):
        content = {**VERSION_1, "schema_version": version, "source": {**VERSION_1["source"], **source}}
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
        manifest = read_manifest(tmp_path)
        assert manifest.identity.split_turns is None
        assert manifest.model_dump(mode="json") == content


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (1, {"source": {**VERSION_1["source"], "extended_at": [2]}}, "but the store grew"),
        (2, {"source": {**VERSION_1["source"], "weighted": True}}, "but source.weighted=True"),
        (2, {"identity": {**VERSION_1["identity"], "split_turns": True}}, "but identity.split_turns=True"),
        (3, {}, "but identity.split_turns=None"),
    ],
)
def test_a_version_holds_what_it_knows(tmp_path: Path, version: int, change: dict[str, Any], message: str):
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**VERSION_1, "schema_version": version, **change}))
    with pytest.raises(UserError, match=f"schema_version={version}, {message}"):
        read_manifest(tmp_path)


def test_scoring_into_an_older_store_names_the_way(tmp_path: Path, manifest_with):
    store = tmp_path / "my store"
    store.mkdir()
    (store / MANIFEST_NAME).write_text(json.dumps(VERSION_1))
    with pytest.raises(UserError) as refused:
        create_or_match(store, manifest_with(), COMMAND)
    assert f"`prift-inspect migrate '{store}' -o NEW`" in str(refused.value)


def test_an_edited_identity_is_refused(tmp_path: Path, manifest_with):
    manifest = manifest_with()
    identity = {**manifest.identity.model_dump(mode="json"), "max_length": 128}
    with pytest.raises(UserError, match="the file was edited"):
        read_manifest(damaged(tmp_path, manifest, identity=identity))


def test_unknown_and_missing_fields_are_refused(tmp_path: Path, manifest_with):
    with pytest.raises(UserError, match="extra_field"):
        read_manifest(damaged(tmp_path, manifest_with(), extra_field=1))
    content = manifest_with().model_dump(mode="json")
    del content["vocab_size"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match="vocab_size"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(UserError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_no_store_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"expected a score store, found no store\.json"):
        read_manifest(tmp_path)
