"""Which engine runs the prior, on what, and in which dtypes: every `auto` of the config resolved."""

from typing import Any

from shared.config import Config
from shared.errors import UserError
from shared.pretrained import PretrainedFiles
from shared.score_store import Identity
from stage1_score.engine import Engine

WIDER_COMPUTE = {"transformers": "float64", "vllm": "float64_products"}
"""What each engine offers for the forward pass above the dtype of the weights."""


def choose_engine(config: Config, prior_config: dict[str, Any], begun_with: str | None) -> str:
    """Name of the engine.

    Args:
        prior_config: config.json of the prior.
        begun_with: the engine of the store that is there; `auto` goes on with it.
    """
    if config.score.engine != "auto":
        engine = config.score.engine
    elif begun_with is not None:
        engine = begun_with
    else:
        engine = "vllm" if choose_device(config) == "cuda" and _suits_vllm(config, prior_config) else "transformers"
    if config.score.tensor_parallel > 1 and engine != "vllm":
        raise UserError(
            f"score.tensor_parallel={config.score.tensor_parallel} needs score.engine=vllm; the engine is {engine}"
        )
    return engine


def choose_dtypes(config: Config, engine: str) -> tuple[str, str]:
    """Dtype of the weights and of the forward pass."""
    on_cuda = choose_device(config) == "cuda"
    weights = config.prior.dtype
    if weights == "auto":
        weights = "bfloat16" if on_cuda else "float32"
    compute = config.prior.compute_dtype
    offered = WIDER_COMPUTE[engine]
    if compute == "auto":
        compute = offered if weights == "float32" and not on_cuda else "weights"
    if compute not in ("weights", offered):
        raise UserError(f"prior.compute_dtype={compute}: the engine {engine} offers weights and {offered}")
    return weights, weights if compute == "weights" else compute


def choose_device(config: Config) -> str:
    """cpu or cuda."""
    import torch

    if config.score.device == "cuda" and config.score.launcher != "ray" and not torch.cuda.is_available():
        raise UserError("score.device=cuda, but torch sees no CUDA device here")
    if config.score.device != "auto":
        return config.score.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_engine(config: Config, files: PretrainedFiles, identity: Identity) -> Engine:
    """Load the prior as a store's identity says."""
    device = choose_device(config)
    if identity.engine == "vllm":
        from stage1_score.vllm_engine import VllmEngine

        return VllmEngine(files, identity, device, config.score)
    from stage1_score.transformers_engine import TransformersEngine

    return TransformersEngine(files, identity, device, config.score)


def _suits_vllm(config: Config, prior_config: dict[str, Any]) -> bool:
    from stage1_score.vllm_engine import longest_row, obstacle

    fits = longest_row(prior_config, config.data.max_length) == config.data.max_length
    return fits and config.prior.compute_dtype != "float64" and obstacle(prior_config, "cuda") is None
