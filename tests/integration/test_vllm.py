"""The vLLM engine: the reference numbers, every architecture, and what it refuses. Each run is a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import ALL_COLUMNS, REPOSITORY, Finished, finish

LARGEST_DIFFERENCE = 1e-4
"""vLLM's attention and norms run in float32, transformers here in float64; another number would differ by about 1."""


@pytest.fixture
def score_golden(reference: Path, pipeline: Path, tmp_path: Path) -> Callable[..., Finished]:
    """`prift-score` on the reference rows, then the reference's own checker."""

    def run(*overrides: str) -> Finished:
        words = [
            f"data.path={reference}/golden/gsm8k_tokens.jsonl", "data.format=tokens", "data.max_length=512",
            f"prior.model={reference}/data/stories260K", "prior.dtype=float32", f"score.output={tmp_path}/store",
            "score.engine=vllm", ALL_COLUMNS, *overrides,
        ]  # fmt: skip
        scored = finish([sys.executable, "-m", "stage1_score.cli", str(pipeline), *words])
        assert scored.code == 0, scored.output
        checker = [reference / "golden/check_scores.py", tmp_path / "store", reference / "golden/gsm8k_scores.parquet"]
        return finish([sys.executable, *map(str, checker)])

    return run


@pytest.mark.parametrize(
    "overrides",
    [[], ["score.batch_tokens=64"], ["score.tensor_parallel=2"], ["score.workers=2", "score.shard_rows=24"]],
    ids=["one shot", "in pieces", "two ranks", "two workers"],
)
def test_the_reference_numbers(score_golden: Callable[..., Finished], tmp_path: Path, overrides: list[str]):
    checked = score_golden(*overrides)
    assert checked.code == 0, checked.output
    assert "entropy_top20" in checked.output
    stored = json.loads((tmp_path / "store" / "store.json").read_text())["identity"]
    assert (stored["engine"], stored["weight_dtype"], stored["compute_dtype"]) == (
        "vllm", "float32", "float64_products",
    )  # fmt: skip


def test_every_architecture_agrees_with_transformers(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "tests/integration/run_vllm_families.py", str(tmp_path)], cwd=REPOSITORY, text=True,
        capture_output=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == ["Gemma", "Gemma2", "Gemma3", "Llama", "Mistral", "Qwen2", "Qwen3"]
    for name, differences in found.items():
        assert differences.pop("spread") > 1.0, name  # far from uniform, or the rest would mean nothing
        assert max(differences.values()) < LARGEST_DIFFERENCE, (name, differences)


@pytest.fixture
def refuse(pipeline: Path, prior: Path, tmp_path: Path) -> Callable[..., str]:
    """`prift-score` that must end with exit code 2; returns its last line."""

    def run(model: Path, *overrides: str) -> str:
        data = tmp_path / "rows.jsonl"
        data.write_text(json.dumps({"input_ids": [1, 2, 3] * 40, "target_mask": [0, 1, 1] * 40}) + "\n")
        words = [f"data.path={data}", f"prior.model={model}", f"score.output={tmp_path}/store", "score.engine=vllm"]
        done = finish([sys.executable, "-m", "stage1_score.cli", str(pipeline), *words, *overrides])
        assert done.code == 2, done.output
        assert "Traceback" not in done.output
        assert not list((tmp_path / "store").glob("*.parquet"))
        return done.output.splitlines()[-1]

    return run


def test_what_vllm_cannot_score_is_one_clear_line(refuse: Callable[..., str], prior: Path, tmp_path: Path):
    def changed(**fields: Any) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in prior.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((prior / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    assert "the prior is OPTForCausalLM; or take score.engine=transformers" in refuse(
        changed(architectures=["OPTForCausalLM"])
    )
    assert "does not divide the prior's 4 attention heads; possible are [1, 2, 4]" in refuse(
        prior, "score.tensor_parallel=3"
    )
    assert "offers weights and float64_products" in refuse(prior, "prior.compute_dtype=float64")
    assert "vLLM cannot go beyond; set data.max_length=100" in refuse(changed(max_position_embeddings=100))
