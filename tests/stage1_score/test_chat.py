"""Conversations whose turns a template renders otherwise once others follow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import DataConfig
from shared.score_store import read_manifest
from shared.shards import open_store, read_batches
from shared.verify import verify_store
from stage1_score.examples import Conversation, Example
from stage1_score.tokenization import DroppedRow, RowTokenizer, TokenizedExample

EOS = 257
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% if loop.last %}{{ m.thought }}{% endif %}"
    "{% else %}U:{% endif %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
"""As reasoning models do: an assistant turn loses its thought once another message follows."""


def turn(thought: str, said: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "thought": thought, "content": said, **more}]


TWO_TURNS = [*turn("[1+1]", "2"), *turn("[2+1]", "3")]


def tokenize(
    tokenizer: Any, messages: list[dict[str, Any]], weights: tuple[float, ...] | None = None, **data: Any
) -> list[TokenizedExample | DroppedRow]:
    row_tokenizer = RowTokenizer(tokenizer, DataConfig(**data), "chat", frozenset([EOS]), 300)
    return row_tokenizer.tokenize(Example(3, "data.jsonl:4", "row", Conversation(messages, None, weights)))


def shown(rows: list[TokenizedExample | DroppedRow]) -> list[tuple[str, str, str]]:
    """Row id, text and targets of each; the reason of those that were dropped."""
    found = []
    for row in rows:
        if isinstance(row, DroppedRow):
            found.append((row.row_id, "dropped", row.reason))
            continue
        letters = ["$" if token == EOS else chr(token) for token in row.input_ids]
        marks = ["_" if place in row.target_positions else " " for place in range(len(letters))]
        assert row.source_index == 3
        assert (row.turn is None) == ("#" not in row.row_id)
        found.append((row.row_id, "".join(letters), "".join(marks)))
    return found


def test_each_turn_is_trained_on_as_it_is_generated(tokenizer_with):
    assert shown(tokenize(tokenizer_with(FORGETFUL), TWO_TURNS)) == [
        ("row#1", "U:q$A:[1+1]2$", "      _______"),
        ("row#3", "U:q$A:2$U:q$A:[2+1]3$", "              _______"),
    ]


def test_a_conversation_that_is_stable_stays_one_row(tokenizer_with):
    tokenizer = tokenizer_with(FORGETFUL)
    without = [*turn("", "2"), *turn("[2+1]", "3")]
    assert shown(tokenize(tokenizer, without)) == [("row", "U:q$A:2$U:q$A:[2+1]3$", "      __      _______")]
    assert shown(tokenize(tokenizer, TWO_TURNS[:2])) == [("row", "U:q$A:[1+1]2$", "      _______")]
    last = shown(tokenize(tokenizer, TWO_TURNS, targets="last_turn"))
    assert last == [("row", "U:q$A:2$U:q$A:[2+1]3$", "              _______")]
    # An earlier turn that is context needs no rendering of its own.
    assert shown(tokenize(tokenizer, TWO_TURNS, (0, 0, 0, 1))) == last
    everything = shown(tokenize(tokenizer, TWO_TURNS, targets="all"))
    assert everything == [("row", "U:q$A:2$U:q$A:[2+1]3$", " " + "_" * 20)]


def test_a_message_after_the_last_turn_is_left_out_of_split_rows(tokenizer_with):
    followed = [*TWO_TURNS[:2], {"role": "user", "content": "thanks"}]
    assert shown(tokenize(tokenizer_with(FORGETFUL), followed)) == [("row#1", "U:q$A:[1+1]2$", "      _______")]


def test_weights_of_split_turns(tokenizer_with):
    rows = tokenize(tokenizer_with(FORGETFUL), TWO_TURNS, (0, 0.5, 0, 2))
    assert [set(row.target_weights.tolist()) for row in rows if isinstance(row, TokenizedExample)] == [{0.5}, {2.0}]
    assert [row.turn for row in rows if isinstance(row, TokenizedExample)] == [1, 3]
    assert [row.row_id for row in tokenize(tokenizer_with(FORGETFUL), TWO_TURNS, (0, 2, 0, 0))] == ["row#1"]


def test_turns_that_cannot_be_kept_are_listed_beside_those_that_can(tokenizer_with):
    long = shown(tokenize(tokenizer_with(FORGETFUL), TWO_TURNS, max_length=15))
    assert long == [
        ("row#1", "U:q$A:[1+1]2$", "      _______"),
        ("row#3", "dropped", "21 tokens, data.max_length is 15"),
    ]
    # A turn of the second kind begins otherwise than what the model is prompted with.
    odd = FORGETFUL.replace(
        "A:{% if loop.last %}", "{% if m.content == '3' %}B:{% else %}A:{% endif %}{% if loop.last %}"
    )
    mixed = shown(tokenize(tokenizer_with(odd), TWO_TURNS))
    assert mixed[0] == ("row#1", "U:q$A:[1+1]2$", "      _______")
    assert mixed[1][:2] == ("row#3", "dropped")
    assert "the prompt for turn 3 has 'A:' where the turn as the template renders it has 'B:[2+1]3</s>'" in mixed[1][2]


def test_where_no_turn_can_be_found_the_conversation_is_dropped_once(tokenizer_with):
    odd = FORGETFUL.replace("{% if add_generation_prompt %}A:", "{% if add_generation_prompt %}C:")
    ((row_id, what, reason),) = shown(tokenize(tokenizer_with(odd), TWO_TURNS))
    assert (row_id, what) == ("row", "dropped")
    assert "the prompt for turn 1 has 'C:' where the turn as the template renders it has 'A:[1+1]2</s>'" in reason
    assert "data.template=chat_prompt" in reason


ARGUMENTS = {"a": 1, "b": "zwei"}


@pytest.mark.parametrize("given", [ARGUMENTS, json.dumps(ARGUMENTS), '{"a":1,"b":"zwei"}'], ids=repr)
@pytest.mark.parametrize(
    "expression", ["call.function.arguments | tojson", "'(' + call.function.arguments + ')'"], ids=["object", "text"]
)
def test_arguments_of_tool_calls_are_quoted_once(tokenizer_with, given: Any, expression: str):
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ " + expression + " }}"
        "{% endfor %}</s>{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": given}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (row,) = tokenize(tokenizer, messages)
    assert isinstance(row, TokenizedExample)
    said = bytes(row.input_ids[row.target_positions[:-1]].tolist()).decode()
    if "tojson" in expression:
        assert json.loads(said) == ARGUMENTS
    else:
        # The template wants text: the user's own, or that of the object.
        assert said == f"({given if isinstance(given, str) else json.dumps(ARGUMENTS)})"
    assert call["function"]["arguments"] == given, "the data is left as it is"


@pytest.fixture
def split_store(prior_with, tmp_path: Path, write_jsonl, prift_score) -> Path:
    """Six conversations of one, two and three turns in shards of two; the second turn of the fifth is too long."""
    rows = [
        {
            "id": f"c{n}",
            "messages": [m for k in range(n % 3 + 1) for m in turn(f"[{n}{k}]", "x" * (90 if (n, k) == (4, 1) else 2))],
        }
        for n in range(6)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    prior = prior_with(tmp_path / "prior", FORGETFUL)
    outcome = prift_score(
        f"data.path={data}", f"prior.model={prior}", f"score.output={tmp_path}/store", "score.shard_rows=2",
        "data.max_length=60",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert "11 rows kept, 1 dropped" in outcome.stdout
    return tmp_path / "store"


def test_a_conversation_counts_once_towards_the_share_that_may_be_dropped(
    prior_with, tmp_path: Path, write_jsonl, prift_score
):
    # Two of its three turns begin otherwise than what the model is prompted with; 2 of 150 would be too many.
    odd = FORGETFUL.replace("A:{% if loop.last %}", "{{ 'B:' if m.content == '3' else 'A:' }}{% if loop.last %}")
    misfit = [*turn("", "2"), *turn("", "3"), *turn("", "3")]
    rows = [{"messages": misfit if n == 7 else turn("", f"x{n}")} for n in range(150)]
    data, prior = write_jsonl(tmp_path / "data.jsonl", rows), prior_with(tmp_path / "prior", odd)
    words = (f"data.path={data}", f"prior.model={prior}", f"score.output={tmp_path}/store", "score.batch_tokens=2000")
    outcome = prift_score(*words)
    assert outcome.code == 0, outcome.stderr
    assert "150 rows kept, 2 dropped" in outcome.stdout
    # What is listed already counts as it did.
    write_jsonl(data, [*rows, *({"messages": turn("", f"y{n}")} for n in range(10))])
    outcome = prift_score(*words, "score.extend=true")
    assert outcome.code == 0, outcome.stderr


def test_split_rows_in_a_store(split_store: Path, read_store, prift_inspect, tmp_path: Path):
    rows = read_store(split_store)
    assert [(row["row_id"], row["source_index"], row["turn"]) for row in rows] == [
        ("c0", 0, None), ("c1#1", 1, 1), ("c1#3", 1, 3), ("c2#1", 2, 1), ("c2#3", 2, 3), ("c2#5", 2, 5),
        ("c3", 3, None), ("c4#1", 4, 1), ("c5#1", 5, 1), ("c5#3", 5, 3), ("c5#5", 5, 5),
    ]  # fmt: skip
    (line,) = (split_store / "shard-00002.dropped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"row_id": "c4#3", "source_index": 4, "reason": "110 tokens, data.max_length is 60"}
    assert verify_store(split_store).problems == []
    assert read_manifest(split_store).schema_version == 3
    # Each is what the prior sees when it is asked for that turn, and what it is trained on.
    for row in rows:
        text = "".join("$" if token == EOS else chr(token) for token in row["input_ids"])
        targets = [place for place, value in enumerate(row["logprob"]) if value is not None]
        assert text[targets[0] : targets[-1] + 1] == text[text.rindex("A:") + 2 :]
        assert len(targets) == targets[-1] - targets[0] + 1


def test_a_vanished_row_is_found_in_a_split_store(split_store: Path, rewrite):
    (split_store / "shard-00001.dropped.jsonl").write_text("")
    rewrite(split_store / "shard-00001.parquet", lambda table: table.slice(1, table.num_rows - 1))
    assert any("its footer says num_rows" in problem for problem in verify_store(split_store).problems)


def test_rows_out_of_order_are_found_in_a_split_store(split_store: Path, rewrite):
    import pyarrow as pa

    rewrite(split_store / "shard-00001.parquet", lambda table: table.take(pa.array([1, 0, 2, 3])))
    assert any("source_index is not ascending" in problem for problem in verify_store(split_store).problems)


def test_the_verbs_on_a_split_store(split_store: Path, prift_inspect, tmp_path: Path, read_store):
    for words in (["show", split_store, "c2#3"], ["show", split_store, "c2"], ["show", split_store, "#2"]):
        outcome = prift_inspect(*words)
        assert outcome.code == 0, outcome.stderr
        assert f"row {'c2#3' if words[-1] == 'c2#3' else 'c2#1'} (#2)" in outcome.stdout
        assert ("3 rows have this id" in outcome.stdout) == (words[-1] != "c2#3")
    dropped = prift_inspect("show", split_store, "c4#3")
    assert dropped.code == 2
    assert "was dropped, not scored: 110 tokens" in dropped.stderr
    assert prift_inspect("stats", split_store).code == 0
    outcome = prift_inspect("report", split_store, "-o", tmp_path / "report.html")
    assert outcome.code == 0, outcome.stderr
    outcome = prift_inspect(
        "export", split_store, "--method", "sft", "--format", "parquet", "-o", tmp_path / "out.parquet"
    )
    assert outcome.code == 0, outcome.stderr
    outcome = prift_inspect("cross-check", split_store, "engine=transformers")
    assert outcome.code == 0, outcome.stderr
    outcome = prift_inspect("diff", split_store, split_store)
    assert outcome.code == 0, outcome.stderr
    assert "11 rows" in outcome.stdout


def test_split_stores_merge_to_the_whole(split_store: Path, tmp_path: Path, prift_score, prift_inspect, read_store):
    parts = []
    for name, lines in (("a", slice(0, 3)), ("b", slice(3, 6))):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join((tmp_path / "data.jsonl").read_text().splitlines(keepends=True)[lines]))
        parts.append(tmp_path / f"part-{name}")
        outcome = prift_score(
            f"data.path={data}", f"prior.model={tmp_path}/prior", f"score.output={parts[-1]}", "score.shard_rows=2",
            "data.max_length=60",
        )  # fmt: skip
        assert outcome.code == 0, outcome.stderr
    outcome = prift_inspect("merge", *parts, "-o", tmp_path / "both")
    assert outcome.code == 0, outcome.stderr
    assert read_store(tmp_path / "both") == read_store(split_store)
    assert verify_store(tmp_path / "both").problems == []


def test_a_split_store_extends(split_store: Path, tmp_path: Path, prift_score, read_store):
    before = read_store(split_store)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "messages": TWO_TURNS}) + "\n")
    outcome = prift_score(
        f"data.path={tmp_path}/data.jsonl", f"prior.model={tmp_path}/prior", f"score.output={split_store}",
        "score.shard_rows=2", "data.max_length=60", "score.extend=true",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    after = read_store(split_store)
    assert after[: len(before)] == before
    assert [row["row_id"] for row in after[len(before) :]] == ["new#1", "new#3"]
    assert verify_store(split_store).problems == []


def test_digests_cover_the_turn(split_store: Path, rewrite):
    import pyarrow as pa

    def other_turn(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index("turn")
        turns = pa.array(
            [None if value is None else value + 2 for value in table.column("turn").to_pylist()], pa.int32()
        )
        return table.set_column(place, "turn", turns)

    rewrite(split_store / "shard-00001.parquet", other_turn)
    assert any("the digest differs" in problem for problem in verify_store(split_store).problems)
    _, shards = open_store(split_store)
    assert np.concatenate([t.column("turn").to_numpy() for t in read_batches(shards[0], ["turn"])]).shape == (3,)
