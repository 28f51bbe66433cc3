"""`prift-inspect diff`: streamed comparisons against plain numpy over whole stores."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inspection import alignment, diff, merge
from shared.errors import UserError

ROWS = [
    {"id": f"r{n}", "prompt": f"question {n} " + "x" * n, "completion": f"answer {n * n} " + "y" * (7 * n % 23)}
    for n in range(24)
]


@pytest.fixture
def compared(call_verb) -> Callable[..., str]:
    """What `prift-inspect diff WORD ...` prints."""
    return lambda *words: call_verb(diff, *words)


def table_of(stdout: str) -> dict[str, list[str]]:
    """First word (or threshold) of each line of the printed tables, and the numbers after it."""
    lines = re.findall(r"^(threshold \S+|\w+) +([-\d.,e+% ]+)$", stdout, flags=re.MULTILINE)
    return {name: numbers.replace(",", "").split() for name, numbers in lines}


@pytest.fixture
def two_dtypes(prift_score, tmp_path: Path, plain_prior: Path, write_jsonl) -> tuple[Path, Path]:
    """The same rows scored in float32 and in bfloat16."""
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    folders = tmp_path / "float32", tmp_path / "bfloat16"
    for folder in folders:
        outcome = prift_score(
            f"data.path={data}", f"prior.model={plain_prior}", f"score.output={folder}", f"prior.dtype={folder.name}",
            "prior.compute_dtype=weights", "score.engine=transformers", "score.device=cpu", "score.shard_rows=10",
        )  # fmt: skip
        assert outcome.code == 0, outcome.stderr
    return folders


def test_two_dtypes_by_plain_numpy(two_dtypes: tuple[Path, Path], compared, read_store):
    stdout = compared(*two_dtypes, "--threshold", "0.5", "--threshold", "0.9")
    for name in ("weight_dtype", "compute_dtype"):
        assert re.search(rf'identity\.{name} +"float32" +"bfloat16"', stdout)
    assert "24 rows correspond, by row of the data file; without a counterpart: 0 of A, 0 of B" in stdout
    left, right = (read_store(store) for store in two_dtypes)
    table = table_of(stdout)
    for column in ("logprob", "mass_rank", "entropy"):
        ours, theirs = (np.array([v for row in rows for v in row[column] if v is not None]) for rows in (left, right))
        sizes = np.abs(theirs - ours)
        # Nearest rank, as the histogram has it; the printed numbers have three digits.
        expected = [*np.quantile(sizes, [0.5, 0.9, 0.99], method="inverted_cdf"), sizes.max(), (theirs - ours).mean()]
        assert int(table[column][0]) == len(sizes)
        assert [float(value) for value in table[column][1:]] == pytest.approx(expected, rel=6e-3, abs=1e-12)
        assert sizes.max() > 0
        if column == "mass_rank":
            for threshold in (0.5, 0.9):
                kept, kept_too = ours <= 1 - threshold, theirs <= 1 - threshold
                count, rate = int((kept != kept_too).sum()), float((kept != kept_too).mean())
                assert table[f"threshold {threshold:g}"] == [str(len(ours)), str(kept.sum()), str(count), f"{rate:.4%}"]
            assert (ours <= 0.5).tolist() != (theirs <= 0.5).tolist()  # or the case would show no flip


def test_a_store_and_itself(store, data_file, compared):
    folder = store("one", [data_file("a", 5)])
    stdout = compared(folder, folder)
    assert "no difference: a store compared with itself" in stdout
    assert table_of(stdout)["logprob"] == ["15"] + ["0.00e+00"] * 5
    assert table_of(stdout)["threshold 0.5"][2:] == ["0", "0.0000%"]


def test_one_changed_number_is_found(store, data_file, compared):
    def change(row: Any) -> Any:
        if row.row_id == "a4":
            row.statistics["entropy"][1] += np.float32(0.125)
        return row

    left = store("left", [data_file("a", 5)])
    stdout = compared(left, store("right", [data_file("a", 5)], 2, change=change))
    assert "no difference" not in stdout
    entropy = table_of(stdout)["entropy"]
    assert (entropy[0], entropy[1], float(entropy[4]), float(entropy[5])) == (
        "15", "0.00e+00", 0.125, pytest.approx(0.125 / 15, rel=1e-2))  # fmt: skip
    assert table_of(stdout)["logprob"][4] == "0.00e+00"


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_files_in_another_order(store, data_file, compared, order: str):
    left = store("left", [data_file("a", 5), data_file("b", 4)])
    counts = {"a": 5, "b": 4}
    stdout = compared(left, store("right", [data_file("c", 2), *(data_file(it, counts[it]) for it in order)], 4))
    assert "9 rows correspond, by row of the data file; without a counterpart: 0 of A, 2 of B" in stdout
    assert table_of(stdout)["logprob"] == ["27"] + ["0.00e+00"] * 5
    assert "source.files" in stdout


@pytest.mark.parametrize("longer", ["A", "B"])
def test_a_file_of_one_store_between_those_of_both(store, data_file, compared, longer: str):
    stores = [store(f"shorter than {longer}", [data_file("a", 3), data_file("b", 4)]),
              store(f"longer {longer}", [data_file("a", 3), data_file("c", 2), data_file("b", 4)])]  # fmt: skip
    stdout = compared(*(stores if longer == "B" else stores[::-1]))
    alone = "2 of A, 0 of B" if longer == "A" else "0 of A, 2 of B"
    assert f"7 rows correspond, by row of the data file; without a counterpart: {alone}" in stdout
    assert table_of(stdout)["logprob"] == ["21"] + ["0.00e+00"] * 5


def test_a_limit_leaves_rows_out(store, data_file, compared, tmp_path: Path, manifest_with, scored_row, store_of):
    whole = store("whole", [data_file("a", 5), data_file("b", 4)], user_row_ids=False)
    manifest = manifest_with(1, 3, False)
    source = manifest.source.model_copy(update={"files": (data_file("a", 5), data_file("b", 4)), "limit": 6})
    rows = [scored_row(n if n < 5 else 20, source_index=n) for n in range(6)]
    limited = store_of(tmp_path / "limited", manifest.model_copy(update={"source": source, "vocab_size": 300}), rows)
    stdout = compared(limited, whole)
    assert "6 rows correspond, by row of the data file; without a counterpart: 0 of A, 3 of B" in stdout
    assert re.search(r"source\.limit +6 +null", stdout)
    assert table_of(stdout)["logprob"] == ["18"] + ["0.00e+00"] * 5


@pytest.mark.parametrize("cut", ["A", "B"])
def test_a_file_that_one_store_took_fewer_rows_of_stands_before_another(
    store, data_file, compared, call_verb, tmp_path: Path, cut: str
):
    """The numbers that the rows left out would have are those of the next file's rows."""
    parts = [store(it, [data_file(it, count)], user_row_ids=False) for it, count in (("a", 2), ("b", 4))]
    call_verb(merge, *parts, "-o", tmp_path / "few")
    stores = [tmp_path / "few", store("all", [data_file("a", 6), data_file("b", 4)], user_row_ids=False)]
    stdout = compared(*(stores if cut == "A" else stores[::-1]))
    alone = "0 of A, 4 of B" if cut == "A" else "4 of A, 0 of B"
    assert f"6 rows correspond, by row of the data file; without a counterpart: {alone}" in stdout
    assert "differ in ids or targets" not in stdout
    assert table_of(stdout)["logprob"] == ["18"] + ["0.00e+00"] * 5


@pytest.mark.parametrize("block_tokens", [1, 12, 2**24])
def test_other_files_are_matched_by_the_users_ids(store, data_file, compared, monkeypatch, block_tokens: int):
    monkeypatch.setattr(alignment, "_BLOCK_TOKENS", block_tokens)

    def renamed(row: Any) -> Any:
        return dataclasses.replace(row, row_id=f"a{3 - row.source_index}")  # other files, the order turned round

    left = store("left", [data_file("a", 4)], 2)
    stdout = compared(left, store("right", [data_file("d", 4)], 2, change=renamed))
    assert "4 rows correspond, by row_id" in stdout
    assert "4 of them differ in ids or targets and are not compared" in stdout
    assert "A: 'a0' (source_index 0), B: 'a0' (source_index 3): other ids" in stdout


def test_an_edited_file_beside_one_of_both(store, data_file, compared):
    def renamed(row: Any) -> Any:
        return dataclasses.replace(row, row_id=row.row_id.replace("d", "b"))

    left = store("left", [data_file("a", 3), data_file("b", 4)])
    edited = [data_file("a", 3), data_file("d", 4)]
    assert "7 rows correspond, by row_id" in compared(left, store("right", edited, change=renamed))
    hashes = [store(f"hashes {files[1].sha256[0]}", files, user_row_ids=False)
              for files in ([data_file("a", 3), data_file("b", 4)], edited)]  # fmt: skip
    stdout = compared(*hashes)
    assert "3 rows correspond, by row of the data file; without a counterpart: 4 of A, 4 of B" in stdout


def test_a_damaged_store_is_refused(store, data_file, compared):
    def change(row: Any) -> Any:
        row.statistics["entropy"][1] = np.nan
        return row

    with pytest.raises(UserError, match="entropy is not finite"):
        compared(store("left", [data_file("a", 4)]), store("right", [data_file("a", 4)], change=change))


def test_files_apart_without_ids_of_the_user(store, data_file, compared):
    stores = [store(it, [data_file(it, 4)], user_row_ids=False) for it in "ab"]
    assert "no row is compared: the stores share no data file" in compared(*stores)


def test_rows_of_other_content_are_named_and_left_out(store, data_file, compared):
    def change(row: Any) -> Any:
        if row.row_id == "a1":
            return dataclasses.replace(row, input_ids=row.input_ids + 1)
        if row.row_id == "a2":
            return dataclasses.replace(row, target_positions=np.array([1, 3, 4], np.int32))
        if row.row_id == "a3":
            return dataclasses.replace(row, row_id="\x1b[2J", input_ids=np.append(row.input_ids, 7).astype(np.int32))
        return row

    left = store("left", [data_file("a", 5)])
    stdout = compared(left, store("right", [data_file("a", 5)], change=change))
    assert "3 of them differ in ids or targets and are not compared, the first:" in stdout
    assert "A: 'a1' (source_index 1), B: 'a1' (source_index 1): other ids" in stdout
    assert "A: 'a2' (source_index 2), B: 'a2' (source_index 2): the same ids, other targets" in stdout
    assert r"B: '\x1b[2J' (source_index 3): other ids" in stdout
    assert table_of(stdout)["logprob"] == ["6"] + ["0.00e+00"] * 5


def test_columns_of_one_store_are_named(store, data_file, compared):
    left = store("left", [data_file("a", 4)])
    stdout = compared(left, store("right", [data_file("a", 4)], columns=("logprob", "entropy")))
    assert "only A has the columns mass_rank" in stdout
    assert "decisions of PriFT-mass are not compared" in stdout
    assert set(table_of(stdout)) == {"logprob", "entropy"}


def test_a_file_twice_in_one_store(store, data_file, compared):
    twice = store("twice", [data_file("a", 4), data_file("a", 4)], user_row_ids=False)
    once = store("once", [data_file("a", 4)], user_row_ids=False)
    assert "8 rows correspond, by row of the data file; without a counterpart: 0 of A, 0 of B" in compared(twice, once)
    assert "no difference" in compared(twice, twice)
    assert "8 rows correspond" in compared(twice, twice)


def test_json(store, data_file, compared):
    left, right = store("left", [data_file("a", 4)]), store("right", [data_file("a", 4)], 2, max_length=32)
    found = json.loads(compared(left, right, "--json", "--threshold", "0.3"))
    assert ["identity.max_length", 64, 32] in found["fields"]
    assert found["flips"] == [{"threshold": 0.3, "num_targets": 12, "num_kept": 8, "num_flipped": 0}]
    assert (found["num_rows"], found["num_compared"]) == ([4, 4], 4)


@pytest.mark.parametrize("threshold", ["0", "-0.5", "1.5", "nan"])
def test_a_threshold_that_is_none(store, data_file, compared, threshold: str):
    folder = store("one", [data_file("a", 4)])
    with pytest.raises(UserError, match="--threshold"):
        compared(folder, folder, f"--threshold={threshold}")
