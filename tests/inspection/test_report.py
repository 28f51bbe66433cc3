"""`prift-inspect report`: its numbers against polars, and data that would like to be more than text."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from inspection import example_rows, report
from inspection.report import report_page
from shared.errors import UserError

P = pl.col("logprob").cast(pl.Float64).exp()
U = 1 - pl.col("mass_rank").cast(pl.Float64)
KEPT = pl.col("mass_rank") <= 0.5


class Numbers(HTMLParser):
    """Values that a page gives by key, and the elements in it."""

    def __init__(self, page: str):
        super().__init__()
        self.by_key: dict[str, float] = {}
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        if "data-key" in given:
            assert given["data-key"] not in self.by_key
            self.by_key[str(given["data-key"])] = float(str(given["data-value"]))


def targets_of(store: Path) -> pl.DataFrame:
    """One line a target, by polars alone: its row, place among the row's targets, id and statistics."""
    rows = pl.read_parquet(sorted(store.glob("*.parquet")))
    lists = [name for name, dtype in rows.schema.items() if dtype == pl.List]
    flat = rows.drop("row_id").explode(lists).filter(pl.col("logprob").is_not_null())
    return flat.with_columns(pl.int_range(pl.len()).over("source_index").alias("place"))


def weights_by_hand(tau: float) -> dict[str, pl.Expr]:
    """The table of rules in docs/design.md, written again."""
    logprob = pl.col("logprob").cast(pl.Float64)
    exponent = (-(logprob + pl.col("entropy")) / 1.0).exp().clip(0.1, 2.0)
    logit = (P / (1 - P)).log()
    return {
        "sft": pl.lit(1.0), "prob": P, "mass": KEPT.cast(pl.Float64), "prob_power": P.sqrt(),
        "prob_threshold": (P >= 0.1).cast(pl.Float64), "prob_above": pl.when(P >= 0.1).then(P).otherwise(0.0),
        "talr": (logprob / tau).exp().clip(lower_bound=0.01),
        "infosft": P * (1 - logit / math.log(0.93 / 0.07)).clip(lower_bound=0.0), "chord": P * (1 - P),
        "idft": (exponent * logprob).exp(),
    }  # fmt: skip


def rules_apart(targets: pl.DataFrame, tau: float, stop_ids: list[int]) -> dict[str, float]:
    found = {}
    for rule, weight in weights_by_hand(tau).items():
        weights = targets.select(weight.alias("w"), pl.col("input_ids").is_in(stop_ids).alias("stop"))
        w = weights["w"]
        effective = w.sum() ** 2 / (w**2).sum()
        found |= {
            f"rule.{rule}.kept_share": (w > 0).mean(), f"rule.{rule}.effective_share": effective / len(w),
            f"rule.{rule}.effective_targets": effective, f"rule.{rule}.mean": w.mean(),
            f"rule.{rule}.stop_mean": weights.filter("stop")["w"].mean(),
        }  # fmt: skip
    return found


def tokens_apart(targets: pl.DataFrame, special: set[int]) -> dict[str, float]:
    groups = targets.group_by("input_ids").agg(
        pl.len().alias("targets"), P.mean().alias("prob"), U.mean().alias("u"), (~KEPT).sum().alias("dropped")
    )
    most = groups.sort(["dropped", "input_ids"], descending=[True, False]).head(25).filter(pl.col("dropped") > 0)
    found = {}
    for key, lines in (("special", groups.filter(pl.col("input_ids").is_in(list(special)))), ("dropped", most)):
        for line in lines.iter_rows(named=True):
            token = line.pop("input_ids")
            found |= {f"{key}.{token}.{name}": value for name, value in line.items()}
            found[f"{key}.{token}.dropped_share"] = line["dropped"] / line["targets"]
    return found


def bins_apart(targets: pl.DataFrame, vocab_size: int) -> dict[str, float]:
    """Bins as the page states them: from an edge to below the next, the last one closed."""
    found = {}
    for key, values, edges in (
        ("prob", P, [n / 20 for n in range(21)]), ("u", U, [n / 20 for n in range(21)]),
        ("entropy", pl.col("entropy"), [math.log(vocab_size) * n / 24 for n in range(25)]),
    ):  # fmt: skip
        values = targets.select(values.alias("x"))["x"]
        for n, (low, high) in enumerate(pairwise(edges)):
            below = values <= high + 1e-4 if n == len(edges) - 2 else values < high
            found[f"histogram.{key}.{n}"] = ((values >= low) & below).sum()
    for n in range(101):
        found[f"kept.mass.{n / 100:.2f}"] = (
            targets["mass_rank"] <= pl.Series([1 - n / 100], dtype=pl.Float32)[0]
        ).sum()
        found[f"kept.prob.{n / 100:.2f}"] = (targets.select(pl.col("logprob").exp())["logprob"] >= n / 100).sum()
    first = 0
    while first <= targets["place"].max():
        inside = targets.filter(pl.col("place").is_between(first, 2 * first))
        found |= {f"position.{first}.targets": len(inside), f"position.{first}.prob": inside.select(P.mean()).item(),
                  f"position.{first}.mass": inside.select(KEPT.mean()).item()}  # fmt: skip
        first = 2 * first + 1
    return found


def numbers_apart(store: Path, special: set[int]) -> dict[str, float]:
    """Every number that a page on the store should hold."""
    manifest = json.loads((store / "store.json").read_text())
    targets = targets_of(store)
    rows = pl.read_parquet(sorted(store.glob("*.parquet"))).select(
        "source_index", pl.col("input_ids").list.len().alias("tokens")
    )
    by_row = targets.group_by("source_index").agg(
        pl.len().alias("targets"), pl.col("logprob").cast(pl.Float64).mean().alias("mean_logprob")
    )
    rows = rows.join(by_row, "source_index").sort(["mean_logprob", "source_index"], descending=[True, False])
    tau = -rows["mean_logprob"].median()
    dropped = sum(len(path.read_text().splitlines()) for path in store.glob("*.dropped.jsonl"))
    found = {
        "num_rows": len(rows), "num_dropped_rows": dropped, "num_tokens": rows["tokens"].sum(),
        "num_targets": len(targets), "longest_row": rows["tokens"].max(), "tau": tau,
        "num_shards": len(list(store.glob("*.parquet"))),
        "num_bytes": sum(path.stat().st_size for path in store.glob("*.parquet")),
    }  # fmt: skip
    for name in manifest["identity"]["columns"]:
        values = targets[name].cast(pl.Float64)
        found |= {f"column.{name}.mean": values.mean(), f"column.{name}.smallest": values.min(),
                  f"column.{name}.largest": values.max()}  # fmt: skip
    middle = (len(rows) - 5) // 2
    for row in pl.concat([rows.head(5), rows[middle : middle + 5], rows.tail(5)]).iter_rows(named=True):
        index = row.pop("source_index")
        found |= {f"row.{index}.{name}": value for name, value in row.items()}
    stop_ids = manifest["stop_token_ids"]
    found |= rules_apart(targets, tau, stop_ids) | tokens_apart(targets, set(stop_ids) | special)
    return found | bins_apart(targets, manifest["vocab_size"])


@pytest.mark.parametrize("which", ["demo_store", "gsm8k_store"])
def test_every_number_equals_one_computed_apart(which: str, request: pytest.FixtureRequest):
    from transformers import AutoTokenizer

    store = request.getfixturevalue(which)
    prior = json.loads((store / "store.json").read_text())["prior_name"]
    wanted = numbers_apart(store, set(AutoTokenizer.from_pretrained(prior).all_special_ids))
    page = report_page(store)
    assert len(page.encode()) < 5e6
    found = Numbers(page).by_key
    assert found.keys() == wanted.keys()
    wrong = {key: (found[key], wanted[key]) for key in wanted if found[key] != pytest.approx(wanted[key], rel=2e-5)}
    # Weights are float32, as in training: what is as small as its rounding is compared by size.
    assert {key: pair for key, pair in wrong.items() if abs(pair[0] - pair[1]) > 1e-9} == {}
    counted = [key for key in wanted if isinstance(wanted[key], int)]
    assert len(counted) > 250
    assert {key: (found[key], wanted[key]) for key in counted if found[key] != wanted[key]} == {}


def test_hostile_text_stays_text(hostile_store: Path):
    page = report_page(hostile_store)
    assert len(page.encode()) < 1e6
    tags = Numbers(page).tags
    assert tags.count("script") == 2
    assert not {"img", "i", "b"} & set(tags)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    data = page.split('id="data">')[1].split("</script>")[0]
    shown = {row["source_index"]: "".join(row["texts"]).replace("‥", "") for row in json.loads(data)["rows"]}
    assert "<script>window.hurt=1</script><img src=x onerror=" in shown[0]
    assert r"\x1b[2J\u202e\x00\u2028" in shown[0]


def test_nothing_is_fetched(demo_store: Path):
    page = report_page(demo_store)
    assert "default-src 'none'" in page
    policy = re.search(r"script-src '(sha256-[^']+)'", page)
    assert policy
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", page)
    assert not re.findall(r"url\((?!#)", page)


def test_a_row_that_is_asked_for(demo_store: Path, call_verb: Callable[..., str], tmp_path: Path):
    rows = pl.read_parquet(sorted(demo_store.glob("*.parquet")))
    row_id = rows["row_id"][7]
    assert call_verb(report, demo_store, "-o", tmp_path / "r.html", "--row", row_id).startswith(f"{tmp_path}/r.html: ")
    data = (tmp_path / "r.html").read_text().split('id="data">')[1].split("</script>")[0]
    first = json.loads(data)["rows"][0]
    assert (first["row_id"], first["kind"], first["ids"]) == (row_id, "asked", rows["input_ids"][7].to_list())
    with pytest.raises(UserError, match="no row has the id 'nowhere'"):
        call_verb(report, demo_store, "--row", "nowhere")


def test_rows_that_a_page_has_no_room_for_are_told_of(store, data_file, monkeypatch: pytest.MonkeyPatch):
    """A row that does not fit takes no room from the shorter ones after it."""

    def change(row: Any) -> Any:
        return dataclasses.replace(row, input_ids=np.resize(row.input_ids, 9 if row.row_id == "a1" else 5))

    folder = store("s", [data_file("a", 20)], change=change)
    monkeypatch.setattr(example_rows, "_MOST_TOKENS", 27)
    page = report_page(folder, ["a7", "a1", "a9"])
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["rows"]
    assert [row["kind"] for row in shown] == ["asked"] * 3 + ["best"]
    assert len({row["row_id"] for row in shown} & {"a1", "a7", "a9"}) == 3
    assert "The page has no room for 11 of the rows to show" in page
    monkeypatch.setattr(example_rows, "_MOST_TOKENS", 8)
    page = report_page(folder, ["a1", "a7"])
    shown = json.loads(page.split('id="data">')[1].split("</script>")[0])["rows"]
    assert [row["row_id"] for row in shown] == ["a7"]
    monkeypatch.undo()
    assert "no room" not in report_page(folder)


def test_without_the_tokenizer_tokens_are_ids(store, data_file):
    page = report_page(store("s", [data_file("a", 4)]))
    assert "The prior&#39;s tokenizer is not at prior" in page
    assert '"texts":["#1","#10","#20","#30","#2"]' in page
