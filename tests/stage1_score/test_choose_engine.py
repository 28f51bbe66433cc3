"""Every `auto` of the engine resolved, and what vLLM is refused for. No vLLM is started."""

from typing import Any

import pytest
import torch

import stage1_score.vllm_engine as vllm_module
from shared.config import Config
from shared.errors import UserError
from stage1_score.choose_engine import choose_dtypes, choose_engine
from stage1_score.vllm_engine import obstacle

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4}


def config_with(prior: dict[str, Any] | None = None, **score: Any) -> Config:
    return Config.model_validate({"prior": prior or {}, "score": score})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device, as far as anybody asks, and a vLLM that was built for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm_module, "_is_cpu_build", lambda found: False)


def test_auto_on_a_cpu_is_transformers():
    assert choose_engine(config_with(), LLAMA, None) == "transformers"


@pytest.mark.usefixtures("cuda")
def test_auto_on_cuda_is_vllm_where_it_knows_the_model():
    assert choose_engine(config_with(), LLAMA, None) == "vllm"
    assert choose_engine(config_with(), LLAMA | {"architectures": ["OPTForCausalLM"]}, None) == "transformers"
    assert choose_engine(config_with(device="cpu"), LLAMA, None) == "transformers"


@pytest.mark.usefixtures("cuda")
def test_auto_goes_on_with_what_the_store_began_with():
    assert choose_engine(config_with(), LLAMA, "transformers") == "transformers"
    assert choose_engine(config_with(engine="vllm"), LLAMA, "transformers") == "vllm"


def test_tensor_parallel_needs_vllm():
    with pytest.raises(UserError, match=r"score\.tensor_parallel=2 needs score\.engine=vllm"):
        choose_engine(config_with(tensor_parallel=2), LLAMA, None)
    assert choose_engine(config_with(tensor_parallel=2, engine="vllm"), LLAMA, None) == "vllm"


def test_dtypes_follow_device_and_engine(monkeypatch: pytest.MonkeyPatch):
    assert choose_dtypes(config_with(), "transformers") == ("float32", "float64")
    assert choose_dtypes(config_with(), "vllm") == ("float32", "float64_products")
    assert choose_dtypes(config_with({"compute_dtype": "weights"}), "vllm") == ("float32", "float32")
    assert choose_dtypes(config_with({"dtype": "bfloat16"}), "vllm") == ("bfloat16", "bfloat16")
    with pytest.raises(UserError, match="offers weights and float64"):
        choose_dtypes(config_with({"compute_dtype": "float64_products"}), "transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_dtypes(config_with(), "vllm") == ("bfloat16", "bfloat16")
    assert choose_dtypes(config_with({"dtype": "float32"}), "transformers") == ("float32", "float32")


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "not installed"), ("0.31.2", "0.31.2 is installed; 0.32 to 0.33 are supported"), ("0.34.0", "0.34.0 is"),
     ("1.0", "1.0 is installed")],
)  # fmt: skip
def test_a_vllm_outside_the_range_is_named(monkeypatch: pytest.MonkeyPatch, found: str | None, words: str):
    monkeypatch.setattr(vllm_module, "vllm_version", lambda: found)
    assert words in (obstacle(LLAMA, "cpu") or "")


@pytest.mark.parametrize("found", ["0.32.0", "0.33.0", "0.33.1rc2"])
def test_both_ends_of_the_range_are_taken(monkeypatch: pytest.MonkeyPatch, found: str):
    monkeypatch.setattr(vllm_module, "vllm_version", lambda: found)
    assert obstacle(LLAMA, "cpu") is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"architectures": ["MambaForCausalLM"]}, "the prior is MambaForCausalLM"), ({"architectures": None}, "is none"),
     ({"rope_scaling": {"type": "dynamic"}}, "rotary frequencies"),
     ({"architectures": ["Qwen2ForCausalLM"], "head_dim": 32}, "ignores head_dim=32")],
)  # fmt: skip
def test_a_prior_that_vllm_would_get_wrong_is_named(fields: dict[str, Any], words: str):
    assert words in (obstacle(LLAMA | fields, "cpu") or "")


def test_a_build_for_another_device_is_named():
    assert "was not built for the device cuda" in (obstacle(LLAMA, "cuda") or "")


@pytest.mark.usefixtures("cuda")
def test_auto_does_not_take_vllm_for_what_it_cannot_do():
    assert choose_engine(config_with({"compute_dtype": "float64"}), LLAMA, None) == "transformers"
    assert choose_engine(config_with(), LLAMA | {"max_position_embeddings": 512}, None) == "transformers"
    shorter = Config.model_validate({"data": {"max_length": 512}})
    assert choose_engine(shorter, LLAMA | {"max_position_embeddings": 512}, None) == "vllm"
