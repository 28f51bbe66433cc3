"""The DeepSpeed config and the learning-rate schedule of a run. Imports neither torch nor deepspeed."""

import math
from typing import Any

from shared.config import TrainConfig


def build_deepspeed_config(config: TrainConfig, dtype: str, world_size: int, hidden_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: the user's `train.deepspeed` and the keys that the trainer owns.

    Args:
        dtype: float32 or bfloat16.
        hidden_size: of the model; sizes the buffers of ZeRO-3 unless the user does.
    """
    stage = max(1, config.zero_stage())
    zero: dict[str, Any] = {
        # Reductions that overlap the backward pass have a history of races; a user may switch it on.
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        **config.deepspeed.get("zero_optimization", {}),
        "stage": stage,
    }
    return {
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "data_types": {"grad_accum_dtype": "fp32"},
        **config.deepspeed,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        # Always written: left out, DeepSpeed clips to a norm of 1.
        "gradient_clipping": config.gradient_clipping,
        # The trainer runs any number of backward passes and says itself when a step is whole.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
    }


def learning_rate_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """Learning rate of a step, steps counted from 1: linear warm-up, then half a cosine to 0, constant, or wsd.

    The first of w warm-up steps gets 1/w of the peak, the last of them the peak; the last step of a cosine is the
    one before 0, and so is that of wsd's straight line: its d steps get d/(d+1) to 1/(d+1) of the peak.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        decay = math.ceil(config.decay_ratio * num_steps)
        return config.learning_rate * min(1.0, (num_steps + 1 - step) / (decay + 1))
    progress = (step - 1 - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
