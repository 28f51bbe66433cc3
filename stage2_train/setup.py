"""Everything a run needs before the processes meet, checked by each of them alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from shared.config import Config, TrainConfig
from shared.errors import UserError
from shared.files import probe_writable, replacing
from shared.places import local_place, place
from shared.pretrained import PretrainedFiles, find_pretrained, load_tokenizer
from shared.weighting import Weighting, resolve_weighting
from stage2_train.batch import BatchForm
from stage2_train.cache import ScoreCache, TrainingRows, open_cache
from stage2_train.checkpoint_files import read_state, whole_checkpoints
from stage2_train.lora import require_peft
from stage2_train.metrics import metrics_path
from stage2_train.mixture import MixedCache, MixedPlan, refuse_incompatible
from stage2_train.plan import Bounds, MicroBatch, Plan, deal, make_plan
from stage2_train.preflight import refuse_other_tokenizer
from stage2_train.tracking import refuse_missing_trackers

_FREE_TO_CHANGE = {
    "output", "cache_dir", "eval_scores", "eval_steps", "checkpoint_steps", "keep_checkpoints", "resume", "scores",
    "nll_every", "max_nonfinite_steps", "timeout_seconds", "trackers", "tracking_project",
}  # fmt: skip
"""Settings that a resumed run may change: they do not touch the numbers."""


@dataclass(frozen=True)
class Job:
    """A run as one process sees it before it meets the others."""

    config: TrainConfig
    output: Path
    weighting: Weighting
    cache: TrainingRows
    eval_caches: dict[str, ScoreCache]
    plan: Plan | MixedPlan
    files: PretrainedFiles
    tokenizer: Any
    starts_from_prior: bool
    checkpoints: list[Path]
    """To resume from: the first one that is whole; none where the run begins."""
    damaged: list[str]
    """What is wrong with newer ones."""
    model_weights: str | None = None
    """With LoRA: sha256 of the weight files, which no checkpoint holds."""

    def bounds(self, form: BatchForm) -> Bounds:
        """How a step is cut into micro-batches; ranks that share one have room for as many times the tokens."""
        config = self.config
        # A layer has about 12 * hidden_size^2 weights, and a token's attention costs its length * hidden_size.
        attention_tokens = 12 * int(self.files.config().get("hidden_size", 1024))
        return Bounds(
            config.micro_batch_tokens * form.num_parts, config.micro_batch_examples,
            config.normalize_by == "micro_batch", form.packed, attention_tokens,
        )  # fmt: skip

    def deal(self, rows: np.ndarray, world_size: int, form: BatchForm) -> list[list[MicroBatch]]:
        """The micro-batches of a step, a list for each rank, or for each group of ranks that share them."""
        return deal(self.cache.lengths[rows].tolist(), world_size // form.num_parts, self.bounds(form))

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on from."""
        settings = _binding(self.config.model_dump(mode="json"))
        return {**settings, "scores_key": self.cache.key, "model_weights": self.model_weights}


def _binding(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `train` that a resumed run may not change."""
    bound = {name: value for name, value in settings.items() if name not in _FREE_TO_CHANGE}
    if bound.get("lora"):
        bound["lora"] = {name: value for name, value in bound["lora"].items() if name != "export"}
    return bound


def prepare(config: Config) -> Job:
    """Check everything that one process can check alone.

    Raises:
        UserError: any mistake in the config, the stores, the model or the output folder.
    """
    train = config.train
    if not train.scores:
        raise UserError("expected train.scores, the score store to train from; got none")
    if train.lora is not None:
        require_peft()
    refuse_missing_trackers(train.trackers)
    weighting = resolve_weighting(train)
    if num_ranks() % train.sequence_parallel:
        raise UserError(
            f"train.sequence_parallel={train.sequence_parallel}: expected a number of ranks that it divides, "
            f"got {num_ranks()}"
        )
    cache_dir = local_place(train.cache_dir, "train.cache_dir") if train.cache_dir else Path.home() / ".cache" / "prift"
    prior_columns = weighting.columns if weighting.source == "prior" else ()
    output = local_place(train.output or "runs/train", "train.output")
    checkpoints, damaged = _checkpoints(train, output)
    begun_with = read_state(checkpoints[0]).settings.get("scores_key") if checkpoints else None
    cache = _open_stores(train, prior_columns, cache_dir, begun_with)
    stores = {"eval": train.eval_scores} if isinstance(train.eval_scores, str) else train.eval_scores or {}
    eval_caches = {name: open_cache(place(store), ("mass_rank",), cache_dir) for name, store in stores.items()}
    manifest = cache.manifest
    starts_from_prior = train.model is None
    name, revision = (
        (train.model, train.model_revision) if train.model else (manifest.prior_name, manifest.prior_revision)
    )
    files = find_pretrained(name, revision, train.trust_remote_code)
    tokenizer = load_tokenizer(files)
    for store in (*cache.parts, *eval_caches.values()):
        refuse_other_tokenizer(tokenizer, store.manifest, store.store, name)
    plan = _plan(train, cache)
    probe_writable(output)
    job = Job(
        train, output, weighting, cache, eval_caches, plan, files, tokenizer, starts_from_prior,
        checkpoints, damaged, files.weights_digest() if train.lora else None,
    )  # fmt: skip
    _refuse_other_settings(job)
    return job


def _open_stores(
    config: TrainConfig, columns: Sequence[str], cache_dir: Path, begun_with: str | None
) -> ScoreCache | MixedCache:
    """The store, or the stores as one, with the rows that the run began with."""
    shares = config.scores
    # The key of several stores is made of theirs: key*weight+key*weight.
    keys = [key.partition("*")[0] for key in begun_with.split("+")] if begun_with else []
    known = keys if len(keys) == len(shares) else [None] * len(shares)
    caches = [open_cache(place(it.store), columns, cache_dir, key) for it, key in zip(shares, known, strict=True)]
    if len(caches) == 1:
        return caches[0]
    refuse_incompatible(caches, config.model is None)
    weights = [share.weight for share in shares if share.weight is not None]
    return MixedCache(caches, weights or None)


def _plan(config: TrainConfig, cache: ScoreCache | MixedCache) -> Plan | MixedPlan:
    plan = make_plan(len(cache), config.batch_size, config.epochs, config.max_steps, config.seed)
    if not isinstance(cache, MixedCache) or cache.weights is None:
        return plan
    return MixedPlan(list(map(len, cache.parts)), cache.weights, plan.batch_size, plan.num_steps, config.seed)


def write_config(job: Job) -> None:
    """Write the resolved config of the run."""
    with replacing(job.output / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump({"train": job.config.model_dump(mode="json")}, sort_keys=False))


def num_ranks() -> int:
    """Processes of the run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage that runs: 1 for 0."""
    return max(1, config.zero_stage())


def resolve_dtype(config: TrainConfig) -> str:
    """float32 or bfloat16."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


def _checkpoints(config: TrainConfig, output: Path) -> tuple[list[Path], list[str]]:
    """Checkpoints to resume from, the best first, and what is wrong with others."""
    if config.resume not in ("auto", "never"):
        chosen = Path(config.resume)
        if chosen.resolve().parent != (output / "checkpoints").resolve():
            raise UserError(f"train.resume={chosen}: expected a checkpoint in {output / 'checkpoints'}, auto or never")
        read_state(chosen)
        return [chosen], []
    folders, damaged = whole_checkpoints(output)
    if config.resume == "never":
        if metrics_path(output).exists() or folders or damaged:
            raise UserError(f"{output} holds a run already, and train.resume=never: give another train.output")
        return [], []
    if damaged and not folders:
        raise UserError(f"{'; '.join(damaged)}. None is whole: remove {output / 'checkpoints'} to start over")
    return folders, damaged


def _refuse_other_settings(job: Job) -> None:
    """Refuse to go on from a checkpoint of a run with other settings."""
    if not job.checkpoints:
        _refuse_other_config(job)
        _refuse_finished(job.output)
        return
    newest = job.checkpoints[0]
    state = read_state(newest)
    if state.zero_stage != zero_stage(job.config):
        raise UserError(
            f"{newest} was saved with ZeRO stage {state.zero_stage}, this run has {zero_stage(job.config)}: use the "
            "same; only the number of ranks may change"
        )
    _refuse_differences(job, str(newest), state.settings)


def _refuse_other_config(job: Job) -> None:
    """Refuse to overwrite a run with other settings that was stopped before its first checkpoint."""
    path = job.output / "config.yaml"
    if path.is_file() and metrics_path(job.output).is_file():
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
        unwritten = {"scores_key": job.cache.key, "model_weights": job.model_weights}
        _refuse_differences(job, str(job.output), {**unwritten, **_binding(stored)})


def _refuse_finished(output: Path) -> None:
    """Refuse to begin where a model lies: that of a finished run without its checkpoints, or any other."""
    if (output / "model").exists():
        raise UserError(
            f"{output / 'model'} is there, and no checkpoint to go on from: training would begin at step 1 and replace "
            "it; give another train.output, or move it away"
        )


def _refuse_differences(job: Job, place: str, stored: dict[str, Any]) -> None:
    differing = [
        f"train.{name}: {stored.get(name)!r} there, {value!r} now"
        for name, value in job.settings().items()
        if stored.get(name) != value
    ]
    if differing:
        raise UserError(
            f"{place} is of a run with other settings ({'; '.join(differing)}): give another train.output, the "
            f"settings of that run, or remove {job.output} to start over"
        )
