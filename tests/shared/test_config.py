"""The config tree: strict, frozen, described, and what it refuses."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from shared.config import Config, ScoreConfig, TrainConfig, WeightingConfig
from shared.rules import METHODS, RULE_PARAMETERS


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def models(model: type[BaseModel] = Config) -> Iterator[type[BaseModel]]:
    """Every section of the tree, those that are off by default too."""
    yield model
    for field in model.model_fields.values():
        for kind in get_args(field.annotation) or [field.annotation]:
            if is_section(kind):
                yield from models(kind)


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as refused:
        Config.model_validate(tree)
    return str(refused.value)


def test_every_field_is_described():
    # A section is described by the docstring of its own class.
    assert all(model.__doc__ for model in models())
    bare = [
        f"{model.__name__}.{name}"
        for model in models()
        for name, field in model.model_fields.items()
        if not (field.description or is_section(field.annotation))
    ]
    assert bare == []


def test_sections_are_strict_and_frozen():
    assert len(list(models())) == 10
    for model in models():
        with pytest.raises(ValidationError, match="Extra inputs"):
            model.model_validate({"no_such_key": 1})
        required = {name: "given" for name, field in model.model_fields.items() if field.is_required()}
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model(**required), next(iter(model.model_fields)), None)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "max_length", 1), ("data", "max_length", "512"), ("data", "max_length", 512.0), ("data", "limit", 0),
        ("data", "format", "csv"), ("data", "template_date", "yesterday"), ("data", "overlong", "cut"),
        ("prior", "dtype", "int8"), ("prior", "trust_remote_code", "yes"), ("score", "batch_tokens", 0),
        ("score", "shard_rows", 0), ("score", "columns", ("mass_rank",)), ("score", "columns", ("logprob", "logprob")),
        ("score", "columns", ("logprob", "rank")), ("train", "learning_rate", 0.0), ("train", "warmup_ratio", 1.0),
        ("train", "batch_size", True), ("train", "method", "prift"), ("train", "normalize_by", "tokens"),
        ("train", "lora", True),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(section: str, key: str, value: Any):
    assert key in refusal({section: {key: value}})


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank", 0), ("rank", 8.0), ("alpha", 0.0), ("dropout", 1.0), ("dropout", -0.1), ("rslora", 1),
     ("target_modules", "q_proj"), ("target_modules", ()), ("export", "bin"), ("modules_to_save", ("lm_head",))],
)  # fmt: skip
def test_bounds_of_lora(key: str, value: Any):
    assert f"train.lora.{key}" in refusal({"train": {"lora": {key: value}}})


def test_an_impossible_template_date_is_refused():
    assert "template_date" in refusal({"data": {"template_date": "2024-02-31"}})


def test_optional_columns_are_accepted():
    columns = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")
    assert ScoreConfig(columns=columns).columns == columns


@pytest.mark.parametrize("rule", sorted(RULE_PARAMETERS))
def test_a_rule_takes_its_own_parameters_only(rule: str):
    values = {"threshold": 0.5, "alpha": 1.5, "min_prob": 0.2, "max_prob": 0.9, "beta": 1.0, "lo": 0.1, "hi": 2.0}
    needed = {name: values[name] for name, default in RULE_PARAMETERS[rule].items() if default is None}
    for name, value in values.items():
        tree = {"train": {"weighting": {"rule": rule, **needed, name: value}}}
        if name in RULE_PARAMETERS[rule]:
            assert getattr(Config.model_validate(tree).train.weighting, name) == value
        else:
            message = refusal(tree)
            assert f"train.weighting.{name}={value}" in message
            assert f"rule {rule}" in message


@pytest.mark.parametrize(("rule", "parameter"), [("prob_power", "alpha"), ("prob_above", "min_prob")])
def test_a_parameter_without_default_must_be_given(rule: str, parameter: str):
    assert f"rule {rule} has no default for train.weighting.{parameter}" in refusal(
        {"train": {"weighting": {"rule": rule}}}
    )


def test_a_parameter_without_a_rule_is_refused():
    assert "train.weighting.threshold=0.5" in refusal({"train": {"weighting": {"threshold": 0.5}}})


@pytest.mark.parametrize(
    "bad", [{"threshold": 0.0}, {"threshold": 1.1}, {"floor": -0.1}, {"floor": 1.1}, {"stop_token_weight": -1.0}]
)
def test_bounds_of_weighting(bad: dict[str, float]):
    assert next(iter(bad)) in refusal({"train": {"weighting": {"rule": "mass", **bad}}})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_method_and_weighting_may_agree_but_not_contradict(method: str):
    rule, source = METHODS[method]
    agreeing = TrainConfig(method=method, weighting=WeightingConfig(rule=rule, source=source))  # pyright: ignore
    assert agreeing.rule_and_source() == (rule, source)
    other = "online" if source == "prior" else "prior"
    message = refusal({"train": {"method": method, "weighting": {"source": other}}})
    assert f"train.method={method} means source {source}" in message
    assert f"train.weighting.source={other}" in message
    message = refusal({"train": {"method": method, "weighting": {"rule": "chord"}}})
    assert "train.weighting.rule=chord" in message


def test_the_source_defaults_to_the_prior():
    assert TrainConfig(weighting=WeightingConfig(rule="chord")).rule_and_source() == ("chord", "prior")


def test_micro_batch_normalisation_needs_its_size():
    assert "train.micro_batch_examples" in refusal({"train": {"normalize_by": "micro_batch"}})
    Config.model_validate({"train": {"normalize_by": "micro_batch", "micro_batch_examples": 4}})


@pytest.mark.parametrize(
    ("key", "instead"),
    [("train_batch_size", "train.batch_size"), ("gradient_clipping", "train.gradient_clipping"),
     ("optimizer", "train.learning_rate"), ("bf16", "train.dtype")],
)  # fmt: skip
def test_deepspeed_keys_of_the_trainer_are_refused(key: str, instead: str):
    message = refusal({"train": {"deepspeed": {key: 1}}})
    assert f"train.deepspeed.{key}" in message
    assert instead in message


def test_zero_stage():
    assert TrainConfig().zero_stage() == 1
    assert TrainConfig(deepspeed={"zero_optimization": {"stage": 3}}).zero_stage() == 3
    for stage in (4, -1, "3"):
        assert "must be 0, 1, 2 or 3" in refusal({"train": {"deepspeed": {"zero_optimization": {"stage": stage}}}})


@pytest.mark.parametrize(
    ("score", "message"),
    [({"vllm": {"quantization": "fp8"}}, "score.vllm.quantization is not one of the arguments that leave the numbers"),
     ({"vllm": {"gpu_memory_utilisation": 0.8}}, "nearest of those is score.vllm.gpu_memory_utilization"),
     ({"vllm": {"dtype": "half"}}, "score.vllm.dtype is set by the engine; set prior.dtype instead"),
     ({"part": "3/3"}, "parts count from 0, so the last is 2/3"), ({"part": "1"}, "expected K/N, such as 0/8"),
     ({"ray_address": "auto"}, "score.launcher is local")],
)  # fmt: skip
def test_scoring_settings_that_cannot_be_meant(score: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"score": score})


def test_logits_are_larger_on_cuda_unless_told():
    config = Config().score
    assert (config.logits_bytes("cpu"), config.logits_bytes("cuda")) == (64 << 20, 1024 << 20)
    assert Config.model_validate({"score": {"logits_mebibytes": 3}}).score.logits_bytes("cuda") == 3 << 20


@pytest.mark.parametrize(
    ("trackers", "message"),
    [(("wandb", "wandb"), "each name once; got"), (("csv",), "'tensorboard' or 'wandb'")],
)
def test_trackers_are_known_and_named_once(trackers: tuple[str, ...], message: str):
    assert message in refusal({"train": {"trackers": trackers}})
