"""The trained model as safetensors with its tokenizer."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shared.errors import UserError
from shared.files import remove, replacing


def export_model(engine: Any, model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as safetensors with its tokenizer, for `AutoModelForCausalLM`; called by all ranks."""
    if engine.zero_optimization_partition_weights():
        state_dict = engine._zero3_consolidated_16bit_state_dict()
    else:
        state_dict = engine.module.state_dict()
    if engine.global_rank != 0:
        return
    prefix = "model."
    state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    try:
        with replacing(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state_dict)
            tokenizer.save_pretrained(temporary)
            remove(folder)
    except SafetensorError as error:
        raise UserError(f"{folder}: the model cannot be written ({error}); a rerun writes it again") from None
