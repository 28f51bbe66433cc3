"""What every vLLM process loads at its start: our scoring models in place of the generating ones.

The entry point `vllm.general_plugins` in pyproject.toml names `register`. It changes nothing in a vLLM process that was
not started to score.
"""

import os

SCORING_VARIABLE = "PRIFT_VLLM_SCORING"
"""Set to 1 by the scoring engine, and so in the processes that it starts."""
SETTINGS_KEY = "prift"
"""Where the engine's settings stand in vLLM's additional config: columns, max_logits_bytes, float64_products."""
TARGETS_KEY = "prift_targets"
"""Where a request carries its target positions: the bytes of an int32 array, ascending."""

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
"""Architectures that were compared with transformers, and the module of `vllm.model_executor.models` of each."""


def register() -> None:
    """Put our models under the architectures' own names, so that vLLM's fix-ups of their configs still apply."""
    if os.environ.get(SCORING_VARIABLE) != "1":
        return
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        # By name: vLLM imports the model in the processes that need it.
        ModelRegistry.register_model(architecture, f"stage1_score.vllm_model:{architecture}")
