"""What DeepSpeed is told, and the learning rate as a function of the step."""

import math

import pytest

from shared.config import TrainConfig
from stage2_train.deepspeed_config import build_deepspeed_config, learning_rate_at


def test_clipping_is_always_written_and_the_boundary_is_ours():
    config = build_deepspeed_config(TrainConfig(gradient_clipping=0.0), "float32", 4, 64)
    assert config["gradient_clipping"] == 0.0
    assert config["managed_gradient_accumulation"] is False
    assert config["train_batch_size"] == 4
    assert config["bf16"] == {"enabled": False}


def test_the_users_keys_are_passed_on_and_stage_0_becomes_1():
    zero = {"stage": 0, "overlap_comm": True, "reduce_bucket_size": 1000}
    given = {"zero_optimization": zero, "comms_logger": {"enabled": True}}
    config = build_deepspeed_config(TrainConfig(deepspeed=given), "bfloat16", 1, 64)
    assert config["zero_optimization"]["stage"] == 1
    assert config["zero_optimization"]["overlap_comm"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["comms_logger"] == {"enabled": True}
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_cosine_with_warm_up():
    config = TrainConfig(learning_rate=2.0, warmup_ratio=0.25, schedule="cosine")
    rates = [learning_rate_at(step, 8, config) for step in range(1, 9)]
    expected = [1.0, 2.0] + [1.0 + math.cos(math.pi * i / 6) for i in range(6)]
    assert rates == pytest.approx(expected)


def test_constant_without_warm_up():
    config = TrainConfig(learning_rate=0.5, warmup_ratio=0.0, schedule="constant")
    assert [learning_rate_at(step, 3, config) for step in (1, 2, 3)] == [0.5, 0.5, 0.5]


def test_a_single_step_gets_the_peak():
    assert learning_rate_at(1, 1, TrainConfig(learning_rate=3e-4)) == 3e-4


def test_wsd_is_stable_then_falls_to_one_step_before_zero():
    config = TrainConfig(learning_rate=2.0, warmup_ratio=0.2, schedule="wsd", decay_ratio=0.3)
    rates = [learning_rate_at(step, 10, config) for step in range(1, 11)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize("decay_ratio", [0.0, 1.0])
def test_wsd_without_decay_and_without_a_stable_part(decay_ratio: float):
    config = TrainConfig(learning_rate=5.0, warmup_ratio=0.0, schedule="wsd", decay_ratio=decay_ratio)
    rates = [learning_rate_at(step, 4, config) for step in range(1, 5)]
    assert rates == pytest.approx([4.0, 3.0, 2.0, 1.0] if decay_ratio else [5.0] * 4)


def test_warm_up_and_decay_must_fit_into_the_run():
    with pytest.raises(ValueError, match=r"warmup_ratio=0.6 and train.decay_ratio=0.5 make more than 1"):
        TrainConfig(schedule="wsd", warmup_ratio=0.6, decay_ratio=0.5)
