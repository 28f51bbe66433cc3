"""Stores to train from, and a way to run many small trainings."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from launching import ALL_COLUMNS, Finished, demo_overrides, finish, free_port, score


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty pipeline: the tests say everything by overrides."""
    path = tmp_path_factory.mktemp("pipeline") / "pipeline.yaml"
    path.write_text(f"train: {{cache_dir: {path.parent / 'cache'}}}\n")
    return path


@pytest.fixture(scope="session")
def demo_store(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 rows of the demo, scored by its prior, in three shards."""
    store = tmp_path_factory.mktemp("demo") / "store"
    score(pipeline, *demo_overrides(store))
    return store


@pytest.fixture(scope="session")
def golden_store(reference: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 16 rows of GSM8K that the golden numbers are about, scored by the 260K-parameter model."""
    store = tmp_path_factory.mktemp("golden") / "store"
    score(
        pipeline, f"data.path={reference}/golden/gsm8k_tokens.jsonl", f"prior.model={reference}/data/stories260K",
        "prior.dtype=float32", "data.max_length=512", "data.limit=16", f"score.output={store}", ALL_COLUMNS,
    )  # fmt: skip
    return store


@pytest.fixture
def train_cases(pipeline: Path, tmp_path: Path) -> Callable[..., Finished]:
    """Run trainings one after the other in one process group of so many ranks, started by torchrun."""

    def run(cases: Sequence[Sequence[str]], ranks: int = 1) -> Finished:
        listed = tmp_path / f"cases-{free_port()}.json"
        listed.write_text(json.dumps(cases))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return finish([sys.executable, *launcher, "tests/integration/run_cases.py", str(pipeline), str(listed)])

    return run
