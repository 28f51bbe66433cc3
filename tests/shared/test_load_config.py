"""From YAML, runs and overrides to one config."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shared.config import Config, LoraConfig
from shared.errors import UserError
from shared.load_config import known_keys, load_config


@pytest.fixture
def pipeline(tmp_path: Path):
    """Write a pipeline file; returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_text(text)
        return path

    return write


def test_an_empty_section_list_gives_the_defaults(pipeline):
    assert load_config(pipeline("data: {}\n")) == Config()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("data.max_lenght", "data.max_length"),
        ("score.batch_token", "score.batch_tokens"),
        ("train.weighting.treshold", "train.weighting.threshold"),
        ("data.columns.promt", "data.columns.prompt"),
        ("prioor", "prior"),
        ("train.lr_schedule", "train.schedule"),
        ("train.lora.rnk", "train.lora.rank"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(pipeline, key: str, nearest: str):
    with pytest.raises(UserError) as refused:
        load_config(pipeline("data: {}\n"), [f"{key}=1"])
    assert str(refused.value).endswith(f"unknown key {key}; the nearest known one is {nearest}")


def test_a_section_that_is_off_is_switched_on_by_any_of_its_keys(pipeline):
    path = pipeline("train: {lora: null}\n")
    assert load_config(path).train.lora is None
    assert load_config(path, ["train.lora={}"]).train.lora == LoraConfig()
    assert load_config(path, ["train.lora.rank=8"]).train.lora == LoraConfig(rank=8)


def test_an_unknown_key_in_the_file_is_refused_too(pipeline):
    with pytest.raises(UserError, match=r"pipeline\.yaml: unknown key data\.paths; .* data\.path$"):
        load_config(pipeline("data:\n  paths: x.jsonl\n"))


def test_all_mistakes_are_named_at_once(pipeline):
    with pytest.raises(UserError) as refused:
        load_config(pipeline("data: {}\n"), ["data.limit=0", "prior.dtype=int8"])
    assert "data.limit=0: " in str(refused.value)
    assert "prior.dtype='int8': " in str(refused.value)


@pytest.mark.parametrize("text", ["data:\n  limit: 3\n  limit: 4\n", "data: {}\nscore: {}\ndata: {limit: 3}\n"])
def test_a_key_given_twice_is_refused(pipeline, text: str):
    with pytest.raises(UserError, match=r"pipeline\.yaml:3: '(limit|data)' twice"):
        load_config(pipeline(text))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E3", 1e3), ("5.e-5", 5e-5), ("+2e-4", 2e-4), ("0.001", 1e-3), ("1.5e-5", 1.5e-5)],
)
def test_exponents_are_numbers(pipeline, text: str, value: float):
    assert load_config(pipeline(f"train:\n  learning_rate: {text}\n")).train.learning_rate == value
    assert load_config(pipeline("data: {}\n"), [f"train.learning_rate={text}"]).train.learning_rate == value


def test_what_only_looks_like_a_number_stays_text(pipeline):
    assert load_config(pipeline("data: {}\n"), ["score.output=runs/1e-3"]).score.output == "runs/1e-3"
    assert load_config(pipeline("data: {}\n"), ["prior.revision=e5"]).prior.revision == "e5"


def test_a_date_stays_text(pipeline):
    # YAML makes a date of it, which no text field takes.
    assert load_config(pipeline("data: {}\n"), ["data.template_date=2025-01-02"]).data.template_date == "2025-01-02"
    assert load_config(pipeline("data:\n  template_date: 2025-01-02\n")).data.template_date == "2025-01-02"


def test_lists_become_tuples(pipeline):
    config = load_config(pipeline("data:\n  path: [a.jsonl, b.jsonl]\n"), ["score.columns=[logprob, collision]"])
    assert config.data.path == ("a.jsonl", "b.jsonl")
    assert config.score.columns == ("logprob", "collision")


RUNS = """
train: {scores: runs/store, learning_rate: 1e-4}
runs:
  mass: {train.method: prift_mass, train.learning_rate: 2e-4}
  nested: {train: {method: sft, seed: 3}}
  named: {train.method: dft, train.output: elsewhere}
"""


def test_a_run_is_a_set_of_overrides(pipeline):
    config = load_config(pipeline(RUNS), ["run=mass"])
    assert (config.train.method, config.train.learning_rate) == ("prift_mass", 2e-4)
    assert (config.train.scores[0].store, config.train.output) == ("runs/store", "runs/mass")
    config = load_config(pipeline(RUNS), ["run=nested"])
    # A mapping is merged into the section: what it does not name stays.
    assert (config.train.method, config.train.seed, config.train.learning_rate) == ("sft", 3, 1e-4)
    assert load_config(pipeline(RUNS), ["run=named"]).train.output == "elsewhere"


def test_overrides_win_over_the_run_wherever_they_stand(pipeline):
    for overrides in (["train.learning_rate=5e-4", "run=mass"], ["run=mass", "train.learning_rate=5e-4"]):
        assert load_config(pipeline(RUNS), overrides).train.learning_rate == 5e-4
    assert load_config(pipeline(RUNS), ["data.limit=1", "data.limit=2"]).data.limit == 2


def test_an_unknown_run_lists_the_known_ones(pipeline):
    with pytest.raises(UserError, match=r"run=mas: .* no such run; it has mass, named, nested"):
        load_config(pipeline(RUNS), ["run=mas"])


@pytest.mark.parametrize("text", ["runs: {x: 3}\n", "runs: [x]\n", "runs: x\n"])
def test_runs_that_are_no_mappings_are_refused(pipeline, text: str):
    with pytest.raises(UserError, match="run"):
        load_config(pipeline(text), ["run=x"])


def test_a_dotted_override_keeps_its_neighbours(pipeline):
    text = "train:\n  deepspeed: {zero_optimization: {stage: 2, overlap_comm: true}}\n"
    config = load_config(pipeline(text), ["train.deepspeed.zero_optimization.stage=3"])
    assert config.train.deepspeed == {"zero_optimization": {"stage": 3, "overlap_comm": True}}


@pytest.mark.parametrize("override", ["data.limit", "=3"])
def test_an_override_without_key_or_value_is_refused(pipeline, override: str):
    with pytest.raises(UserError, match="expected key=value"):
        load_config(pipeline("data: {}\n"), [override])


@pytest.mark.parametrize(
    ("text", "message"), [("data: [", "not YAML"), ("- data\n", "expected a mapping"), ("", "expected a mapping")]
)
def test_what_is_no_pipeline_is_refused(pipeline, text: str, message: str):
    with pytest.raises(UserError, match=message):
        load_config(pipeline(text))


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such pipeline file"):
        load_config(tmp_path / "nowhere.yaml")


def test_known_keys_reach_into_every_section():
    keys = set(known_keys())
    assert {"data.columns.prompt", "train.weighting.stop_token_weight", "score.output"} <= keys
    assert not {"data", "data.columns", "train.weighting"} & keys


def pipelines(repository: Path) -> list[Path]:
    """The pipelines that are part of the repository: not hidden files, not outputs, not installed packages."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.yaml", "*.yml"],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = tracked.stdout.splitlines() or [str(path.relative_to(repository)) for path in repository.glob("*.yaml")]
    return [repository / name for name in names if not any(part.startswith(".") for part in Path(name).parts)]


def test_every_pipeline_of_the_repository_loads_with_each_of_its_runs(repository: Path):
    found = pipelines(repository)
    assert repository / "pipeline.yaml" in found
    for path in found:
        load_config(path)
        for name in yaml.safe_load(path.read_text()).get("runs") or ():
            load_config(path, [f"run={name}"])


def test_loading_a_config_imports_no_torch(repository: Path):
    code = (
        "import sys; from shared.load_config import load_config\n"
        "load_config('pipeline.yaml'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
