"""pipeline.yaml is the reference of every knob: it must hold all of them, explained, and mean what it says."""

import re
from pathlib import Path

import pytest
import yaml

from shared.config import Config, LoraConfig, TrainConfig
from shared.load_config import known_keys, load_config

SET_FOR_THE_DEMO = {
    "data.path", "data.max_length", "prior.model", "score.output", "train.scores", "train.cache_dir",
    "train.batch_size",
    "train.max_steps", "train.learning_rate", "train.epochs",
}  # fmt: skip


SWITCHED_ON = Config(train=TrainConfig(lora=LoraConfig()))
"""Every section that is off by default; in the pipeline its keys stand in comments, below the null."""


def switched_on(text: str) -> str:
    """The pipeline without these nulls and comment signs."""
    section = re.compile(r"^  (\w+): null\n((?:    #.*\n)+)", re.MULTILINE)
    return section.sub(lambda found: f"  {found[1]}:\n" + re.sub(r"(?m)^    # ?", "    ", found[2]), text)


def value_at(tree: dict, dotted: str):
    for part in dotted.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("key", known_keys())
def test_every_knob_stands_there_at_its_default_and_explained(repository: Path, tmp_path: Path, key: str):
    text, defaults = (repository / "pipeline.yaml").read_text(), Config()
    if key.startswith("train.lora."):
        text, defaults = switched_on(text), SWITCHED_ON
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(text)
    found = value_at(load_config(pipeline).model_dump(), key)
    assert value_at(yaml.safe_load(text), key) is not None or found is None
    if key not in SET_FOR_THE_DEMO:
        assert found == value_at(defaults.model_dump(), key)
    name = key.rpartition(".")[2]
    lines = text.splitlines()
    places = [index for index, line in enumerate(lines) if line.strip().startswith(f"{name}:")]
    assert places
    assert any(lines[index - 1].strip().startswith("#") for index in places)


@pytest.mark.parametrize("run", ["sft", "dft", "prift_prob", "prift_mass", "score_heldout", "score_prior_text"])
def test_the_runs_of_the_demo_share_one_store(repository: Path, run: str):
    config = load_config(repository / "pipeline.yaml", [f"run={run}"])
    assert [share.store for share in config.train.scores] == ["runs/demo/scores"]
    if run.startswith("score_"):
        assert config.score.output not in (None, "runs/demo/scores")
    else:
        assert config.train.method == run
        assert config.train.output == f"runs/demo/{run}"
