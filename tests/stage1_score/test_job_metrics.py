"""The lines that a run leaves in score.metrics.jsonl."""

import json
from pathlib import Path

from stage1_score.job_metrics import JobMetrics, metrics_path
from stage1_score.score_shard import ShardReport


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_per_shard_and_a_summary(tmp_path: Path):
    path = metrics_path(tmp_path, None)
    assert path.name == "score.metrics.jsonl"
    metrics = JobMetrics(path)
    metrics.add(ShardReport(3, "1", 10, 2, 1, "row 'a': x", 400, 300, 2.0, 512.5, "cpu"))
    metrics.add(ShardReport(4, "0", 5, 0, 0, None, 100, 60, 1.0, 600.0, "cpu"))
    summary = metrics.summarise()
    first, second, last = lines(path)
    assert (first["kind"], first["shard"], first["worker"], first["num_dropped"]) == ("shard", 3, "1", 2)
    assert (first["tokens_per_second"], first["peak_memory_mebibytes"]) == (200.0, 512.5)
    assert second["shard"] == 4
    assert last == summary
    assert last["kind"] == "summary"
    assert {key: last[key] for key in ("num_shards", "num_rows", "num_dropped", "num_tokens", "num_targets")} == {
        "num_shards": 2, "num_rows": 15, "num_dropped": 2, "num_tokens": 500, "num_targets": 360,
    }  # fmt: skip
    assert last["peak_memory_mebibytes"] == 600.0
    assert last["shards_of_worker"] == {"1": 1, "0": 1}


def test_a_torn_line_of_a_killed_run_is_closed(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "sha')
    JobMetrics(path).summarise()
    torn, whole = path.read_text().splitlines()
    assert torn == '{"kind": "sha'
    assert json.loads(whole)["num_shards"] == 0


def test_each_part_of_an_array_has_a_file_of_its_own(tmp_path: Path):
    assert metrics_path(tmp_path, "2/3").name == "score.metrics.2-of-3.jsonl"
