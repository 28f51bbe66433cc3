"""What the vLLM engine does before vLLM runs. vLLM itself runs in tests/integration/test_vllm.py."""

import os
from typing import Any

import pytest
import torch

import stage1_score.vllm_engine as vllm_module
from shared.config import ScoreConfig
from shared.errors import UserError


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes with which vLLM was started; it finds memory for 5,000 tokens."""
    tried: list[int] = []

    def start(files: Any, identity: Any, max_length: int, config: ScoreConfig, batch_tokens: int) -> str:
        tried.append(batch_tokens)
        if batch_tokens > 5000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return "loaded"

    monkeypatch.setattr(vllm_module, "_start", start)
    return tried


def test_a_start_without_memory_is_tried_with_half_the_batch(budgets: list[int], capsys: pytest.CaptureFixture[str]):
    files: Any = None
    assert vllm_module._load(files, files, 100, ScoreConfig(batch_tokens=16384)) == "loaded"
    assert budgets == [16384, 8192, 4096]
    assert "out of memory with batches of 16384 tokens; going on with 8192" in capsys.readouterr().out


def test_a_model_that_does_not_fit_at_all_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch):
    def start(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm_module, "_start", start)
    files: Any = None
    with pytest.raises(UserError, match="vLLM cannot start: CUDA out of memory"):
        vllm_module._load(files, files, 100, ScoreConfig(batch_tokens=1024))


@pytest.mark.parametrize(
    ("fields", "asked", "longest"),
    [({"max_position_embeddings": 512}, 2048, 512), ({"max_position_embeddings": 4096}, 2048, 2048), ({}, 2048, 2048),
     # Stretched frequencies reach further than the config's own number says.
     ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn"}}, 2048, 2048)],
)  # fmt: skip
def test_rows_are_as_long_as_the_prior_has_positions(fields: dict[str, Any], asked: int, longest: int):
    assert vllm_module.longest_row(fields, asked) == longest


def test_the_users_own_environment_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_LEVEL": "DEBUG"})
    vllm_module._set_environment("cpu", 2)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["PRIFT_VLLM_SCORING"] == "1"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"].count("|") == 1
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
