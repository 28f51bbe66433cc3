"""LoRA through peft: low-rank matrices beside some weights of a model, and the files that they become.

peft is an optional dependency (the extra `lora`) and imported only where LoRA is asked for.
"""

import copy
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import LoraConfig
from shared.errors import UserError, first_line
from shared.pretrained import PretrainedFiles, load_causal_lm

_ADAPTER = "default"
"""peft's name for the only adapter of a model."""


def require_peft() -> None:
    """
    Raises:
        UserError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("train.lora needs peft, which is not installed: pip install 'prift[lora]', or train.lora=null")


def add_lora(model: Any, config: LoraConfig, files: PretrainedFiles, seed: int) -> None:
    """Freeze a transformers model and add LoRA's matrices to it, in place; they alone require a gradient.

    A is random and B is zero, so the model gives what it gave. They have the dtype of the weights beside them, and are
    the same in every process that loads the model. Weights that ZeRO-3 has partitioned may stay so.

    Args:
        model: its head is prepared (`shared.head.prepare_head`).
        files: of the model, named in the files of the adapter.
        seed: of A.

    Raises:
        UserError: a target module is not a linear module of the model, or peft cannot serve it.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM", r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,  # pyright: ignore
        use_rslora=config.rslora, target_modules=_target_modules(model, config.target_modules),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # Its float32 copies of bfloat16 adapters are not wanted: the master weights are the optimizer's.
            get_peft_model(model, peft_config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UserError(f"train.lora: peft cannot add to {files.name}: {first_line(error)}") from error
    # A folder is found from anywhere, a hub id at the very commit.
    is_folder = Path(files.name).is_dir()
    peft_config.base_model_name_or_path = str(Path(files.name).resolve()) if is_folder else files.name
    peft_config.revision = files.revision
    # peft keeps them as a set, whose order differs from process to process.
    peft_config.target_modules = sorted(peft_config.target_modules or ())


def _target_modules(model: Any, wanted: str | tuple[str, ...]) -> list[str]:
    """The modules to add to, by their last names where those mean no others, else by their whole names."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    chosen = linear if wanted == "all-linear" else [name for name in linear if _is_named(name, wanted)]
    if wanted != "all-linear":
        unknown = [target for target in wanted if not any(_is_named(name, [target]) for name in linear)]
        if unknown:
            raise UserError(
                f"train.lora.target_modules: {', '.join(unknown)}: {type(model).__name__} has no such linear module "
                f"(the head stays as it is); it has {', '.join(sorted({_last(name) for name in linear}))}"
            )
    last_names = {_last(name) for name in chosen}
    if {name for name, _ in model.named_modules() if _last(name) in last_names} == set(chosen):
        return sorted(last_names)
    return chosen


def _is_named(name: str, targets: Iterable[str]) -> bool:
    """As peft matches: the whole name, or whole parts at its end."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def count_parameters(model: Any) -> tuple[int, int]:
    """How many parameters of a model are trained, and how many there are; whole ones, also under ZeRO-3."""
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)


def target_names(model: Any) -> list[str]:
    """Last names of the modules that `add_lora` has added to."""
    return sorted({_last(name) for name in model.peft_config[_ADAPTER].target_modules})


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """What is trained of a model that `add_lora` has added to, whole and on the host; called by all ranks."""
    import deepspeed

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}


def save_adapter(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, for `PeftModel.from_pretrained`; by one process.

    Args:
        tensors: of `adapter_tensors`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Left to "auto", it asks the hub whether the vocabulary has grown.
    selected = get_peft_model_state_dict(model, tensors, _ADAPTER, save_embedding_layers=False)
    assert len(selected) == len(tensors), f"of {len(tensors)} trained parameters peft knows {len(selected)}"
    # The names that they have in a PeftModel.
    saved = {f"base_model.model.{name}": tensor for name, tensor in selected.items()}
    folder.mkdir()
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config = copy.copy(model.peft_config[_ADAPTER])
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))


def merged_model(files: PretrainedFiles, folder: Path, dtype: torch.dtype) -> Any:
    """The model of `files` with a saved adapter added to its weights, on the host; by one process.

    The weights are read from the disk again, whatever ZeRO has made of those in training. Each sum is made in float32
    and rounded to `dtype` once.

    Args:
        folder: what `save_adapter` wrote.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_causal_lm(files, dtype), str(folder), torch_device="cpu")
    return model.merge_and_unload()  # pyright: ignore[reportCallIssue]
