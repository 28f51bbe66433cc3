"""Score the same rows with both engines, one tiny random model of each architecture after the other.

usage: run_vllm_families.py FOLDER     prints, for each architecture, the largest difference per column as JSON
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from shared.config import ScoreConfig
from shared.pretrained import find_pretrained
from shared.score_store import Identity
from stage1_score.tokenization import TokenizedExample
from stage1_score.transformers_engine import TransformersEngine
from stage1_score.vllm_engine import VllmEngine

COLUMNS = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")
SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "head_dim": 32,
}  # fmt: skip
WINDOWED = ["sliding_attention", "full_attention"]
MODELS = {
    "Llama": {"attention_bias": False},
    "Mistral": {"sliding_window": 24},
    "Qwen2": {"tie_word_embeddings": True, "hidden_size": 128},
    "Qwen3": {},
    "Gemma": {},
    # Caps low enough to bend the logits of a random model.
    "Gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0, "sliding_window": 24,
               "query_pre_attn_scalar": 32, "layer_types": WINDOWED},
    "Gemma3": {"sliding_window": 24, "query_pre_attn_scalar": 32, "layer_types": WINDOWED},
}  # fmt: skip


def make_model(name: str, folder: Path) -> Path:
    """Random weights in safetensors."""
    torch.manual_seed(0)
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SMALL, **MODELS[name]})
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return folder


def examples() -> list[TokenizedExample]:
    """Rows of 3 to 120 tokens, targets scattered."""
    generator = np.random.default_rng(0)
    rows = []
    for index, length in enumerate([3, 7, 40, 120, 100, 33, 64, 65]):
        positions = np.flatnonzero(generator.random(length) < 0.7)
        positions = np.union1d(positions[positions > 0], [length - 1]).astype(np.int32)
        rows.append(TokenizedExample(f"r{index}", index, generator.integers(0, 300, length, np.int32), positions))
    return rows


def difference(name: str, folder: Path) -> dict[str, Any]:
    """Largest absolute difference per column between the engines, and the spread of logprob."""
    files = find_pretrained(str(make_model(name, folder)))
    fields: dict[str, Any] = dict.fromkeys(Identity.model_fields, "") | {
        "columns": COLUMNS, "max_length": 256, "statistics_version": 1, "weight_dtype": "float32", "split_turns": False,
    }  # fmt: skip
    rows = []
    for engine, compute_dtype in ((VllmEngine, "float64_products"), (TransformersEngine, "float64")):
        identity = Identity(**(fields | {"compute_dtype": compute_dtype}))
        # Less than the longest row: vLLM must take it in pieces.
        loaded = engine(files, identity, "cpu", ScoreConfig(batch_tokens=64, logits_mebibytes=1))
        rows.append(loaded.score(examples()))
        loaded.close()
    found = {
        column: max(
            float(np.abs(a.statistics[column] - b.statistics[column]).max()) for a, b in zip(*rows, strict=True)
        )
        for column in COLUMNS
    }
    found["spread"] = float(np.std(np.concatenate([row.statistics["logprob"] for row in rows[1]])))
    return found


if __name__ == "__main__":
    chosen = sys.argv[2:] or list(MODELS)
    print(json.dumps({name: difference(name, Path(sys.argv[1]) / name) for name in chosen}))
