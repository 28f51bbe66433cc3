"""The trained model as safetensors with its tokenizer: all of its weights, or what LoRA added to them."""

from typing import Any

import torch
from safetensors import SafetensorError

from shared.errors import UserError
from shared.files import remove, replacing
from stage2_train.lora import adapter_tensors, merged_model, save_adapter
from stage2_train.setup import Job, resolve_dtype


def export_model(engine: Any, model: Any, job: Job) -> None:
    """Write the folder `model` of a run, with the tokenizer; called by all ranks.

    It is for `AutoModelForCausalLM`, or, where `train.lora.export` is `adapter`, for `PeftModel.from_pretrained`.
    """
    tensors = _state_dict(engine) if job.config.lora is None else adapter_tensors(model)
    if engine.global_rank != 0:
        return
    folder = job.output / "model"
    try:
        with replacing(folder) as temporary:
            if job.config.lora is None:
                model.save_pretrained(temporary, state_dict=tensors)
            else:
                save_adapter(model, tensors, temporary)
            if job.config.lora is not None and job.config.lora.export == "merged":
                merged = merged_model(job.files, temporary, getattr(torch, resolve_dtype(job.config)))
                remove(temporary)
                merged.save_pretrained(temporary)
            job.tokenizer.save_pretrained(temporary)
            remove(folder)
    except SafetensorError as error:
        raise UserError(f"{folder}: the model cannot be written ({error}); a rerun writes it again") from None


def _state_dict(engine: Any) -> dict[str, Any]:
    """All weights of the model on rank 0, by its own names; called by all ranks."""
    if engine.zero_optimization_partition_weights():
        state_dict = engine._zero3_consolidated_16bit_state_dict() or {}
    else:
        state_dict = engine.module.state_dict()
    return {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
