"""The model in training, built by all processes together: loaded, switched to packed batches, wrapped by DeepSpeed."""

from typing import Any

import torch
from pydantic import ValidationError

from shared.config import TrainConfig
from shared.errors import UserError
from shared.head import head_difference, prepare_head, refuse_unknown_head, vocab_rows
from shared.packed_attention import packing_obstacle, use_packed_attention
from shared.pretrained import load_causal_lm
from stage2_train.batch import BatchForm
from stage2_train.checkpoint import use_safe_loading
from stage2_train.deepspeed_config import build_deepspeed_config
from stage2_train.distributed import World
from stage2_train.lora import add_lora
from stage2_train.loss import WeightedLM
from stage2_train.preflight import refuse_small_vocabulary
from stage2_train.sequence_parallel import make_group, sequence_parallel_obstacle, use_sequence_parallel_attention
from stage2_train.setup import Job, resolve_dtype


def build_engine(job: Job, world: World) -> tuple[Any, Any, BatchForm]:
    """Load the model and wrap it with DeepSpeed; called by all ranks.

    Returns:
        The engine, around a `WeightedLM`; the model in it; and the form of the micro-batches that it takes.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = job.config
    dtype = resolve_dtype(config)
    hidden_size = int(job.files.config().get("hidden_size", 1024))
    ds_config = build_deepspeed_config(config, dtype, world.size, hidden_size)
    _refuse_unknown_keys(ds_config)
    # Kept alive while the model loads: with it transformers partitions the weights as it reads them.
    partitioner = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    model = load_causal_lm(job.files, getattr(torch, dtype))
    del partitioner
    refuse_small_vocabulary(vocab_rows(model), job.cache.manifest, job.files.name)
    prepare_head(model)
    if config.lora is not None:
        add_lora(model, config.lora, job.files, config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = WeightedLM(model, config.logits_bytes(world.device.type), config.gradient_checkpointing == "offload")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon, weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
    use_safe_loading(engine)
    probe = torch.arange(8, device=world.device).remainder(vocab_rows(model))[None]
    refuse_unknown_head(model, float(head_difference(model, probe)))
    return engine, model, choose_form(model, config, world)


def choose_form(model: Any, config: TrainConfig, world: World) -> BatchForm:
    """How micro-batches are laid out for a model, which is switched to an attention that takes them; by all ranks.

    Raises:
        UserError: packed micro-batches or sequence parallelism were asked for, and the model cannot take them.
    """
    num_parts = config.sequence_parallel
    if config.padding_free is False:
        return BatchForm()
    obstacle = packing_obstacle(model, with_gradient=True)
    if obstacle and config.padding_free == "auto" and num_parts == 1:
        return BatchForm()
    if obstacle:
        raise UserError(f"expected a model that takes packed micro-batches, but {obstacle}: set "
                        "train.padding_free=false (and train.sequence_parallel=1), which pads instead")  # fmt: skip
    if num_parts == 1:
        use_packed_attention(model)
        return BatchForm(packed=True)
    if obstacle := sequence_parallel_obstacle(model, num_parts):
        raise UserError(f"train.sequence_parallel={num_parts}: {obstacle}")
    use_sequence_parallel_attention(model, make_group(num_parts))
    return BatchForm(True, world.rank % num_parts, num_parts)


def _refuse_unknown_keys(ds_config: dict[str, Any]) -> None:
    """Let DeepSpeed look at its config before anything is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(ds_config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"train.deepspeed: {error.title}: {key}: {first['msg'].lower()}") from None
    except (DeepSpeedConfigError, ValueError) as error:
        raise UserError(f"train.deepspeed: {error}") from None
