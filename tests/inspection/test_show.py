"""`prift-inspect show`: the right row, its text as the tokenizer has it, and nothing that the terminal would obey."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inspection import show
from shared.errors import UserError
from shared.shards import shard_path

HOSTILE = "\x1b[2J [red]danger[/red] \u202eevil\u202c \r\x07 :smile: ü"
ROWS = [
    {"id": "first", "prompt": "question ", "completion": "answer\nthe end"},
    {"id": "long", "prompt": "p" * 120, "completion": "x"},
    {"id": "hostile \x1b[31m", "prompt": HOSTILE, "completion": HOSTILE},
    {"id": "#1", "prompt": "a", "completion": "b"},
]
SGR = re.compile(r"\x1b\[([0-9;]*)m")
"""What sets a colour: the only escape sequence that may come out."""


@pytest.fixture
def store(prift_score, tmp_path: Path, plain_prior: Path, write_jsonl) -> Path:
    """Four rows in shards of two, one of them dropped."""
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    outcome = prift_score(
        f"data.path={data}", f"prior.model={plain_prior}", f"score.output={tmp_path / 'store'}", "score.shard_rows=2",
        "score.engine=transformers", "score.device=cpu", "data.max_length=110",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    return tmp_path / "store"


@pytest.fixture
def shown(call_verb, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `prift-inspect show WORD ...` prints into a file."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return lambda *words: call_verb(show, *words)


@pytest.fixture
def coloured(shown, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What it prints on a terminal of 256 colours."""

    def run(*words: Any) -> str:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLORTERM", "")
        return shown(*words)

    return run


def test_a_row_by_its_id(store: Path, shown):
    stdout = shown(store, "first")
    assert "row first (#0), row 0 of" in stdout
    # "the" is one token; the line break is a target too, and so is the end of the text.
    assert "<s>question ⟦answer↵\nthe end</s>⟧\n" in stdout
    assert "no colours here" in stdout


@pytest.mark.parametrize(("index", "text"), [(0, "⟦answer"), (3, "<s>a⟦b</s>⟧")])
def test_a_row_by_its_source_index(store: Path, shown, index: int, text: str):
    stdout = shown(store, f"#{index}")
    assert f"(#{index}), row {index} of" in stdout
    assert text in stdout


def test_the_numbers(store: Path, shown, read_store):
    row = next(row for row in read_store(store) if row["row_id"] == "first")
    lines = shown(store, "first", "--numbers").split("⟧\n", 1)[1].splitlines()
    table = [line.split() for line in lines if line.strip()]
    assert table[0] == ["position", "id", "logprob", "p", "u", "entropy", "token"]
    assert len(table) == 1 + len(row["input_ids"])
    for position, (cells, token) in enumerate(zip(table[1:], row["input_ids"], strict=True)):
        assert cells[:2] == [str(position), str(token)]
        logprob = row["logprob"][position]
        if logprob is None:
            assert len(cells) == 3
        else:
            values = [logprob, np.exp(logprob), 1 - row["mass_rank"][position], row["entropy"][position]]
            assert [float(cell) for cell in cells[2:6]] == pytest.approx(values, rel=1e-5)
    assert table[-1][-1] == "</s>"
    assert any(cells[-1] == "␣" for cells in table)  # a blank is seen
    assert any(cells[-1] == r"\n" for cells in table)


def test_colours_are_the_prior_support(tmp_path: Path, manifest_with, scored_row, store_of, coloured):
    """u of 0.95, 0.7, 0.4, 0.2 and 0.05, from the token after the first on."""
    ranks = np.array([0.05, 0.3, 0.6, 0.8, 0.95], np.float32)
    statistics = {"logprob": np.full(5, -1, np.float32), "mass_rank": ranks, "entropy": np.ones(5, np.float32)}
    row = scored_row(0, input_ids=np.array([7, 11, 12, 13, 14, 15], np.int32),
                     target_positions=np.arange(1, 6, dtype=np.int32), statistics=statistics)  # fmt: skip
    stdout = coloured(store_of(tmp_path / "store", manifest_with(1, 1), [row]), "row-0")
    text = stdout.splitlines()[-1]
    found = {int(token): style for style, token in re.findall(r"\x1b\[([0-9;]*)m(\d+) ", text)}
    assert set(found) == {7, 11, 12, 13, 14, 15}
    assert found[7] == "2"
    assert len({found[token] for token in range(11, 16)}) == 5
    legend = next(line for line in stdout.splitlines() if "below 0.1" in line)
    names = dict(re.findall(r"\x1b\[([0-9;]*)m ([^\x1b]+) \x1b\[0m", legend))
    assert [names[found[token]] for token in range(11, 16)] == [
        "0.9 or more", "below 0.9", "below 0.5", "below 0.3", "below 0.1"]  # fmt: skip


@pytest.mark.parametrize("words", [[], ["--numbers"]])
@pytest.mark.parametrize("on", ["file", "terminal"])
def test_hostile_text_is_harmless(store: Path, shown, coloured, on: str, words: list[str]):
    stdout = (coloured if on == "terminal" else shown)(store, "#2", *words)
    plain = SGR.sub("", stdout)
    assert (plain != stdout) == (on == "terminal")
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain)
    # Markup and emoji codes are text; what was taken out is visible.
    assert r"\x1b[2J [red]danger[/red] \u202eevil\u202c \r\x07 :smile: ü" in plain
    assert r"row hostile \x1b[31m (#2)" in plain


def test_a_terminal_without_colours_gets_brackets(store: Path, coloured, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦answer" in SGR.sub("", coloured(store, "first"))


def test_what_a_tokenizer_returns_is_not_trusted(store: Path, shown, coloured, monkeypatch):
    monkeypatch.setattr("inspection.decoded.token_texts", lambda _, ids: ["\x1b[2J[red]\u202e"] * len(ids))
    for stdout in (shown(store, "first", "--numbers"), coloured(store, "first", "--numbers")):
        assert not re.findall("[\x1b\u202e]", SGR.sub("", stdout))
        assert r"\x1b[2J[red]\u202e" in stdout


def test_hostile_text_of_a_reason_and_of_a_name(store: Path, shown):
    path = store / "shard-00000.dropped.jsonl"
    path.write_text('{"row_id": "long", "source_index": 1, "reason": "\\u001b[2J"}\n')
    with pytest.raises(UserError, match=r"\\x1b\[2J") as refused:
        shown(store, "#1")
    assert "\x1b" not in str(refused.value)
    with pytest.raises(UserError) as refused:
        shown(store, "\x1b[2J")
    assert "\x1b" not in str(refused.value)


def test_repeated_ids(tmp_path: Path, manifest_with, scored_row, store_of, shown):
    rows = [scored_row(n, row_id="hash" if n % 3 == 1 else f"other {n}") for n in range(40)]
    store = store_of(tmp_path / "store", manifest_with(40, 4, False), rows)
    stdout = shown(store, "hash")
    assert "row hash (#1)" in stdout
    others = ", ".join(f"'#{n}'" for n in range(4, 34, 3))
    assert f"13 rows have this id, this is the first; the others: {others} and 2 more" in stdout
    assert "row hash (#37)" in shown(store, "#37")
    assert "have this id" not in shown(store, "#37")


def test_without_the_tokenizer_there_are_ids(tmp_path: Path, manifest_with, scored_row, store_of, shown):
    store = store_of(tmp_path / "store", manifest_with(1, 1), [scored_row(0)])
    stdout = shown(store, "#0", "--numbers")
    assert "the prior's tokenizer is not at prior: ids for text" in stdout
    assert "1 10 ⟦20 30 2 ⟧" in stdout
    assert "token" not in stdout.split("⟧", 1)[1]


def test_the_tokenizer_from_elsewhere(store: Path, shown, prior: Path, plain_prior: Path, tmp_path: Path):
    assert "question ⟦answer" in shown(store, "first", "--tokenizer", plain_prior)
    with pytest.raises(UserError, match="--tokenizer"):
        shown(store, "first", "--tokenizer", tmp_path)


def test_a_dropped_row_says_why(store: Path, shown):
    for name in ("long", "#1"):
        with pytest.raises(UserError, match=r"row 'long' \(#1\) was dropped, not scored: 123 tokens"):
            shown(store, name)


def test_no_such_row(store: Path, shown):
    with pytest.raises(UserError, match="no row has the id 'nobody'; the first has 'first'"):
        shown(store, "nobody")
    with pytest.raises(UserError, match="#4: expected a source_index below 4"):
        shown(store, "#4")


def test_an_unfinished_store_shows_what_is_there(store: Path, shown):
    shard_path(store, 1).unlink()
    assert "row first (#0)" in shown(store, "first")
    with pytest.raises(UserError, match="#3: the shard that holds this row is not scored yet"):
        shown(store, "#3")
    with pytest.raises(UserError, match="no row in the 1 of 2 shards that are scored yet has the id 'nobody'"):
        shown(store, "nobody")
