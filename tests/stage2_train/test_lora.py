"""What LoRA adds to a model, and what it leaves as it was."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.config import LoraConfig
from shared.errors import UserError
from shared.head import prepare_head
from shared.pretrained import PretrainedFiles
from stage2_train.lora import (
    adapter_tensors,
    add_lora,
    count_parameters,
    merged_model,
    require_peft,
    save_adapter,
    target_names,
)

IDS = torch.arange(20)[None]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=3, n_positions=32)).eval()


def files_of(folder: Path, model: Any = None) -> PretrainedFiles:
    if model is not None:
        model.save_pretrained(folder)
    return PretrainedFiles(str(folder), None, folder, False)


def adapted(model: Any, tmp_path: Path, seed: int = 0, **settings: Any) -> Any:
    prepare_head(model)
    add_lora(model, LoraConfig(**settings), files_of(tmp_path), seed)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_model_gives_what_it_gave_and_only_what_was_added_is_trained(make, tmp_path: Path):
    model = make()
    before, names = logits(model), {name for name, _ in model.named_parameters()}
    adapted(model, tmp_path, rank=4)
    assert torch.equal(logits(model), before)
    assert {name.replace(".base_layer", "") for name, p in model.named_parameters() if not p.requires_grad} == names
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(model))
    num_modules = {llama: 2 * 7, gpt2: 2 * 4}[make]
    assert len(trained(model)) == 2 * num_modules
    assert count_parameters(model)[0] == sum(tensor.numel() for tensor in trained(model).values())
    assert count_parameters(model)[1] == sum(p.numel() for p in model.parameters())


def test_what_is_added_is_a_function_of_the_seed_alone(tmp_path: Path):
    first = trained(adapted(llama(), tmp_path, seed=3))
    torch.manual_seed(11)
    model = llama()
    torch.manual_seed(12)
    expected = torch.rand(1)
    torch.manual_seed(12)
    again = trained(adapted(model, tmp_path, seed=3))
    # The generator that others draw from is where it was.
    assert torch.rand(1) == expected
    other = trained(adapted(llama(), tmp_path, seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)


def test_it_has_the_dtype_of_the_weights(tmp_path: Path):
    assert {tensor.dtype for tensor in trained(adapted(llama().bfloat16(), tmp_path)).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (("q_proj", "mlp.up_proj"), {"q_proj", "up_proj"}),
        (("model.layers.1.self_attn.q_proj",), {"q_proj"}),
    ],
)
def test_the_head_is_never_a_target(tmp_path: Path, wanted: Any, expected: set[str]):
    model = adapted(llama(), tmp_path, target_modules=wanted)
    modules = {name.split(".lora_")[0] for name in trained(model)}
    assert {name.rpartition(".")[2] for name in modules} == expected
    assert len(modules) == (1 if "layers.1" in wanted[0] else 2 * len(expected))
    assert target_names(model) == sorted(expected)


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "proj", "mlp"])
def test_what_is_no_linear_module_is_refused_with_those_that_are(tmp_path: Path, target: str):
    listed = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(UserError, match=rf"target_modules: {target}: LlamaForCausalLM has no such .* it has {listed}$"):
        adapted(llama(), tmp_path, target_modules=("q_proj", target))


@pytest.mark.parametrize(("rslora", "factor"), [(False, 6.0 / 4), (True, 6.0 / 2)])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_is_saved_is_loaded_and_merged(make, tmp_path: Path, rslora: bool, factor: float):
    """By peft, from the folder alone; and merging adds factor * B A to each weight."""
    files = files_of(tmp_path / "base", make())
    model = make()
    prepare_head(model)
    add_lora(model, LoraConfig(rank=4, alpha=6.0, rslora=rslora), files, seed=0)
    for tensor in trained(model).values():
        tensor.normal_(std=0.1)
    save_adapter(model, adapter_tensors(model), tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model))
    merged = merged_model(files, tmp_path / "adapter", torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    name, transpose = {
        llama: ("model.layers.1.mlp.up_proj", False), gpt2: ("transformer.h.1.mlp.c_fc", True)
    }[make]  # fmt: skip
    added = trained(model)[f"{name}.lora_B.default.weight"] @ trained(model)[f"{name}.lora_A.default.weight"] * factor
    before = make().get_parameter(f"{name}.weight")
    expected = before + (added.t() if transpose else added)
    torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected)


def test_the_adapter_names_its_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder by its whole path, a hub id with its commit; the file is the same whenever it is written."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    sources = {
        "folder": PretrainedFiles("base", None, Path("base"), False),
        "hub": PretrainedFiles("someone/model", "c0ffee", tmp_path / "snapshots" / "c0ffee", False),
    }
    named = {}
    for name, files in sources.items():
        model = llama()
        prepare_head(model)
        add_lora(model, LoraConfig(), files, seed=0)
        save_adapter(model, adapter_tensors(model), tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        named[name] = (config["base_model_name_or_path"], config["revision"])
        assert config["target_modules"] == sorted(config["target_modules"])
        assert config["inference_mode"]
    assert named == {"folder": (str(tmp_path / "base"), None), "hub": ("someone/model", "c0ffee")}


def test_a_missing_peft_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    require_peft()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'prift\[lora\]'"):
        require_peft()
