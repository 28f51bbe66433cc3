"""A small store for the modules of stage 2."""

from pathlib import Path

import pytest

from shared.load_config import load_config
from stage1_score.run import run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def scored_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of the demo in three shards."""
    folder = tmp_path_factory.mktemp("stage2")
    (folder / "pipeline.yaml").write_text("data: {}\n")
    overrides = [
        f"data.path={REPOSITORY}/data/demo/train.jsonl", f"prior.model={REPOSITORY}/data/demo/prior", "data.limit=24",
        "score.shard_rows=8", f"score.output={folder}/store",
    ]  # fmt: skip
    run(load_config(folder / "pipeline.yaml", overrides), ["prift-score"])
    return folder / "store"
