"""From files to examples: formats, places in messages, and what is refused."""

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.config import ColumnsConfig, DataConfig
from shared.errors import UserError
from stage1_score.examples import Conversation, Example, PromptCompletion, TokenIds
from stage1_score.raw_rows import expand_paths
from stage1_score.read import detect_format, read_rows, scan_source

PAIRS = [{"id": f"r{n}", "prompt": f"question {n}", "completion": f"answer {n}"} for n in range(5)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(config: DataConfig, rows: range | None = None) -> list[Example]:
    """All examples of a source, by the steps that a run takes."""
    paths = expand_paths(config)
    row_format = detect_format(paths, config)
    source = scan_source(paths, row_format, config.limit, 2)
    return list(read_rows(source, row_format, rows or range(source.num_rows)))


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_gzip(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "jsonl": as_jsonl, "jsonl.gz": as_gzip, "parquet": as_parquet,
}  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_type_gives_the_same_examples(tmp_path: Path, suffix: str):
    path = WRITERS[suffix](tmp_path / f"data.{suffix}", PAIRS)
    examples = read(DataConfig(path=str(path)))
    assert [(each.source_index, each.row_id) for each in examples] == [(n, f"r{n}") for n in range(5)]
    assert examples[3].content == PromptCompletion("question 3", "answer 3")
    assert examples[3].place == f"{path}:4"
    # Any range can be read alone: row groups and files make no difference.
    for start in range(5):
        for stop in range(start, 6):
            assert read(DataConfig(path=str(path)), range(start, stop)) == (examples[start:stop] or examples)


def test_globs_and_lists_keep_their_order(tmp_path: Path):
    as_jsonl(tmp_path / "b.jsonl", PAIRS[2:3])
    as_gzip(tmp_path / "a.jsonl.gz", PAIRS[:2])
    as_parquet(tmp_path / "c.parquet", PAIRS[3:])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "d.jsonl").mkdir()
    globbed = read(DataConfig(path=str(tmp_path / "[abcd].*")))
    assert [each.row_id for each in globbed] == ["r0", "r1", "r2", "r3", "r4"]
    listed = read(DataConfig(path=(str(tmp_path / "c.parquet"), str(tmp_path / "[ab].*"))))
    assert [each.row_id for each in listed] == ["r3", "r4", "r0", "r1", "r2"]
    assert [each.source_index for each in listed] == [0, 1, 2, 3, 4]
    assert listed[4].place == f"{tmp_path}/b.jsonl:1"
    # A range across three files.
    middle = read(DataConfig(path=str(tmp_path / "[abc].*")), range(1, 4))
    assert [each.row_id for each in middle] == ["r1", "r2", "r3"]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + json.dumps(PAIRS[0]) + "\n\n  \n" + json.dumps(PAIRS[1]))
    assert [(each.source_index, each.place) for each in read(DataConfig(path=str(path)))] == [
        (0, f"{path}:2"),
        (1, f"{path}:5"),
    ]


def test_messages_with_tools(tmp_path: Path):
    tools = [{"name": "search"}]
    path = as_jsonl(tmp_path / "data.jsonl", [{"messages": CHAT, "tools": tools}, {"messages": CHAT}])
    first, second = read(DataConfig(path=str(path)))
    assert first.content == Conversation(CHAT, tools)
    assert second.content == Conversation(CHAT, None)


def test_parquet_nulls_inside_messages_are_left_out(tmp_path: Path):
    # Parquet gives every message every key.
    rows = [{"messages": [*CHAT, {"role": "tool", "content": "3", "name": "sum"}], "tools": None}]
    path = as_parquet(tmp_path / "data.parquet", rows)
    assert read(DataConfig(path=str(path)))[0].content == Conversation(rows[0]["messages"], None)


def test_tokens(tmp_path: Path):
    rows = [{"row_id": 7, "input_ids": [1, 2, 3], "target_mask": [0, 1, True]}]
    example = read(DataConfig(path=str(as_jsonl(tmp_path / "data.jsonl", rows))))[0]
    assert example.content == TokenIds([1, 2, 3], [False, True, True])
    assert example.row_id == "7"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"messages": CHAT}, "messages"),
        ({"input_ids": [1], "target_mask": [1]}, "tokens"),
        # Ids that were made once are not made again.
        ({"input_ids": [1], "target_mask": [1], "messages": CHAT, "prompt": "a", "completion": "b"}, "tokens"),
    ],
)
def test_auto_format(tmp_path: Path, row: dict[str, Any], name: str):
    path = as_jsonl(tmp_path / "data.jsonl", [row])
    assert detect_format([path], DataConfig()).name == name


def test_a_format_given_wins_over_what_else_fits(tmp_path: Path):
    row = {"messages": CHAT, "prompt": "a", "completion": "b"}
    path = as_jsonl(tmp_path / "data.jsonl", [row])
    assert read(DataConfig(path=str(path), format="prompt_completion"))[0].content == PromptCompletion("a", "b")


def test_columns_of_other_names(tmp_path: Path):
    path = as_jsonl(tmp_path / "data.jsonl", [{"key": "k", "id": "x", "question": "a", "answer": "b"}])
    columns = ColumnsConfig(id="key", prompt="question", completion="answer")
    example = read(DataConfig(path=str(path), columns=columns))[0]
    assert (example.row_id, example.content) == ("k", PromptCompletion("a", "b"))


def test_row_id_goes_before_id(tmp_path: Path):
    path = as_jsonl(tmp_path / "data.jsonl", [{"id": "second", "row_id": "first", "prompt": "a", "completion": "b"}])
    assert read(DataConfig(path=str(path)))[0].row_id == "first"


def test_without_ids_equal_content_has_an_equal_hash(tmp_path: Path):
    texts = [("a", "b"), ("a", "c"), ("a", "b"), ("ab", "")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    ids = [each.row_id for each in read(DataConfig(path=str(as_jsonl(tmp_path / "data.jsonl", rows))))]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    # Written out: the same in every process and version.
    assert ids[0] == hashlib.sha256(b'{"completion":"b","prompt":"a"}').hexdigest()[:32]


def test_limit_takes_the_first_rows_and_parses_no_more(tmp_path: Path):
    first = as_jsonl(tmp_path / "a.jsonl", PAIRS[:3])
    second = tmp_path / "b.jsonl"
    second.write_text(json.dumps(PAIRS[3]) + "\n{malformed\n")
    config = DataConfig(path=(str(first), str(second)), limit=4)
    assert [each.row_id for each in read(config)] == ["r0", "r1", "r2", "r3"]
    with pytest.raises(UserError, match=r"b\.jsonl:2: malformed JSON"):
        read(config.model_copy(update={"limit": 5}))


def test_the_source_records_files_and_columns(tmp_path: Path):
    path = as_gzip(tmp_path / "data.jsonl.gz", PAIRS)
    config = DataConfig(path=str(path), limit=3)
    source = scan_source([path], detect_format([path], config), 3, 2)
    assert source.columns == {"id": "id", "prompt": "prompt", "completion": "completion"}
    assert (source.format, source.limit, source.num_rows, source.num_shards) == ("prompt_completion", 3, 3, 2)
    file = source.files[0]
    assert (file.path, file.num_rows, file.size) == (str(path), 5, path.stat().st_size)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


GOOD = json.dumps(PAIRS[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "malformed JSON"),
        ("not json", "malformed JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"id": "x", "prompt": "a"}', "expected str as 'completion', got None"),
        ('{"id": "x", "prompt": 3, "completion": "b"}', "expected str as 'prompt', got 3"),
        ('{"prompt": "a", "completion": "b"}', "expected a string or number as 'id', got None"),
        ('{"id": [1], "prompt": "a", "completion": "b"}', "expected a string or number as 'id'"),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path: Path, line: str, message: str):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError) as refused:
        read(DataConfig(path=str(path)))
    assert str(refused.value).startswith(f"{path}:3: {message}")


def test_bytes_that_are_no_text_name_file_and_line(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: malformed JSON"):
        read(DataConfig(path=str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2], "target_mask": [1]}, "input_ids has 2 tokens, target_mask has 1"),
        ({"input_ids": [1, 2.5], "target_mask": [0, 1]}, "expected integers"),
        ({"input_ids": [1, True], "target_mask": [0, 1]}, "expected integers"),
        ({"input_ids": [1, 2], "target_mask": [0, 2]}, "expected integers as input_ids and 0 or 1 as target_mask"),
        ({"input_ids": "12", "target_mask": [0, 1]}, "expected list as 'input_ids'"),
    ],
)
def test_malformed_tokens(tmp_path: Path, row: dict[str, Any], message: str):
    path = as_jsonl(tmp_path / "data.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read(DataConfig(path=str(path)))


@pytest.mark.parametrize(
    "messages", [[], [3], [{"content": "no role"}], [{"role": 1}], "hi", None], ids=lambda messages: repr(messages)
)
def test_malformed_messages(tmp_path: Path, messages: Any):
    path = as_jsonl(tmp_path / "data.jsonl", [{"messages": CHAT}, {"messages": messages}])
    with pytest.raises(UserError, match=r"data\.jsonl:2: expected"):
        read(DataConfig(path=str(path)))


@pytest.mark.parametrize("tools", ["[", '{"name": "search"}', {"name": "search"}, 3, ["search"]], ids=repr)
def test_malformed_tools(tmp_path: Path, tools: Any):
    path = as_jsonl(tmp_path / "data.jsonl", [{"messages": CHAT}, {"messages": CHAT, "tools": tools}])
    with pytest.raises(UserError, match=r"data\.jsonl:2: expected .*'tools'"):
        read(DataConfig(path=str(path)))


def test_an_id_that_is_no_unicode_is_refused(tmp_path: Path):
    # Half a surrogate pair cannot be stored as text: better said before the scoring than after it.
    path = as_jsonl(tmp_path / "data.jsonl", [{"id": "\ud800", "prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=r"data\.jsonl:1: "):
        read(DataConfig(path=str(path)))


def test_missing_columns_are_named(tmp_path: Path):
    path = as_jsonl(tmp_path / "data.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError) as refused:
        read(DataConfig(path=str(path)))
    assert str(refused.value) == (
        f"{path}: expected the columns input_ids+target_mask or messages or prompt+completion or "
        "instruction+output or text, "
        "found 'question', 'answer'; name yours with data.columns.*"
    )
    with pytest.raises(UserError, match=r"expected the columns messages, found"):
        read(DataConfig(path=str(path), format="messages"))


def test_repeated_row_ids_name_both_places(tmp_path: Path):
    first = as_jsonl(tmp_path / "a.jsonl", PAIRS)
    second = as_jsonl(tmp_path / "b.jsonl", [{**PAIRS[0], "id": "new"}, {**PAIRS[0], "id": "r3"}])
    with pytest.raises(UserError) as refused:
        read(DataConfig(path=(str(first), str(second))))
    assert str(refused.value).startswith(f"{second}:2: row id 'r3' is already at {first}:4; row ids in 'id' must be")


def test_a_repeated_id_beyond_the_limit_is_no_matter(tmp_path: Path):
    path = as_jsonl(tmp_path / "data.jsonl", [*PAIRS, PAIRS[0]])
    assert len(read(DataConfig(path=str(path), limit=5))) == 5
    with pytest.raises(UserError, match="must be unique"):
        read(DataConfig(path=str(path), limit=6))


@pytest.mark.parametrize("suffix", WRITERS)
def test_no_row_at_all(tmp_path: Path, suffix: str):
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    else:
        WRITERS[suffix](path, [])
    with pytest.raises(UserError, match="no row in it"):
        read(DataConfig(path=str(path)))


def test_an_empty_file_among_others(tmp_path: Path):
    paths = (str(as_jsonl(tmp_path / "a.jsonl", [])), str(as_jsonl(tmp_path / "b.jsonl", PAIRS)))
    assert [each.source_index for each in read(DataConfig(path=paths))] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("path", "message"),
    [(None, "expected data.path"), ("nowhere.jsonl", "nowhere.jsonl: no such file"), ("no*.jsonl", "no such file")],
)
def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None, message: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        expand_paths(DataConfig(path=path))


def test_a_file_type_that_is_not_read(tmp_path: Path):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"data\.csv: expected \.jsonl, \.jsonl\.gz or \.parquet"):
        expand_paths(DataConfig(path=str(tmp_path / "data.csv")))


@pytest.mark.parametrize("damage", ["torn", "not gzip", "flipped"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage: str):
    path = as_gzip(tmp_path / "data.jsonl.gz", [{**row, "prompt": row["prompt"] * 200} for row in PAIRS])
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"torn": content[:-20], "not gzip": GOOD.encode(), "flipped": content}[damage])
    with pytest.raises(UserError, match=r"data\.jsonl\.gz"):
        read(DataConfig(path=str(path)))


@pytest.mark.parametrize("damage", ["torn", "not parquet", "flipped"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: str):
    path = as_parquet(tmp_path / "data.parquet", PAIRS)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[4:60] = b"\xff" * 56
    path.write_bytes({"torn": content[:-20], "not parquet": GOOD.encode(), "flipped": content}[damage])
    with pytest.raises(UserError, match=r"data\.parquet: not a readable Parquet file"):
        read(DataConfig(path=str(path)))
