"""Training from a score store with other trainers: Hugging Face's `Trainer` and TRL's `SFTTrainer`.

They call a loss function with the model's outputs and the labels, and with nothing else, so the weights travel in the
labels: a label holds the target's id and its weight. It is larger than any vocabulary, so that code which takes it for
a plain id fails instead of training without weights. The loss function gives the labels back as plain ids.

Shape suffixes: B rows of a micro-batch, T tokens of a row, N targets of the micro-batch or of a row, K those that go
through the loss, V vocabulary.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shared.config import TrainConfig
from shared.errors import UserError
from shared.head import vocab_rows
from shared.outlook import warnings_of
from shared.places import place
from shared.score_store import TARGET_WEIGHT, TARGET_WEIGHT_BOUNDS
from shared.statistics import token_statistics
from shared.weighting import TargetStatistics, resolve_weighting
from stage2_train.cache import CachedRow, open_cache
from stage2_train.outlook import weight_outlook
from stage2_train.preflight import refuse_other_tokenizer, refuse_small_vocabulary

_NO_TARGET = -100
"""The libraries' label of a token that is not trained on."""

_MARK = 1 << 31
"""Set in each label that carries a weight; an id is below it, the bits of a float32 weight stand above it."""

_OPEN = 2.0**100
"""Times the data's own weight: a weight that only the model in training will say. Exact, and above every other."""

_SETTINGS: dict[str, tuple[Any, str]] = {
    "remove_unused_columns": (False, "ids and labels are made as a row is read; the data set has no column of them"),
    "label_smoothing_factor": (0, "with a loss function it is left out without a word"),
    "use_liger_kernel": (False, "it leaves out the logits where it can, and the loss is made of them"),
    "loss_type": ("nll", "the rule of the store decides how a target is weighted"),
    "packing": (False, "examples that share a row see each other, unless the attention is told; train.py packs"),
    "eval_packing": (False, "as for packing"),
    "padding_free": (False, "as for packing"),
    "dataset_kwargs": ({"skip_prepare_dataset": True}, "the rows are tokens already"),
}
"""What a trainer's arguments must be where they have such a field, and why."""


class ScoreStore:
    """A score store and a rule, as data set, collator and loss function of other trainers."""

    def __init__(
        self,
        scores: str | Path,
        *,
        method: str | None = None,
        normalize_by: Literal["targets", "kept"] = "targets",
        cache_dir: str | Path | None = None,
        **weighting: Any,
    ):
        """
        Args:
            scores: folder of the store.
            method: as `train.method`: sft, dft, prift_prob or prift_mass.
            normalize_by: what sum(weight * nll) is divided by, over all devices and micro-batches of an optimizer
                step: the number of targets, or of those of non-zero weight.
            cache_dir: node-local folder for the memory-mapped copy of the store; None: `~/.cache/prift`.
            weighting: fields of `train.weighting`: rule, source, the rule's parameters, floor, stop_token_weight.

        Raises:
            UserError: no store, or a rule that it lacks the columns of or that a loss function cannot compute.
        """
        given: dict[str, Any] = dict(method=method, normalize_by=normalize_by, cache_dir=cache_dir, **weighting)
        self._make_again = partial(ScoreStore, scores, **given)
        self._weighting = resolve_weighting(_train_config(method, weighting))
        _refuse_rule(self._weighting.rule, self._weighting.source, normalize_by)
        self._is_online, self._keeps_zeros = self._weighting.source == "online", normalize_by == "targets"
        columns = () if self._is_online else self._weighting.columns
        self._cache = open_cache(place(scores), columns, Path(cache_dir or Path.home() / ".cache" / "prift"))
        self._stop_token_ids = torch.tensor(self._cache.manifest.stop_token_ids, dtype=torch.int64)

    def __reduce__(self) -> tuple[Callable[[], "ScoreStore"], tuple[()]]:
        """By its arguments: a worker opens the memory map itself, and `datasets` hashes no more than them."""
        return self._make_again, ()

    @property
    def dataset(self) -> Any:
        """A `datasets.Dataset` of the rows in source order; ids and labels are made as a row is read.

        Its labels carry the weights, so it may evaluate a model that is trained from another store or by another rule.
        """
        from datasets import Dataset

        return Dataset.from_dict({"row": np.arange(len(self._cache))}).with_transform(self._examples)

    def trainer_arguments(self, model: Any, args: Any, tokenizer: Any = None) -> dict[str, Any]:
        """What a trainer is given: `train_dataset`, `data_collator`, `compute_loss_func`, and the tokenizer if any.

        Args:
            model: the model to train.
            args: the trainer's `TrainingArguments` or `SFTConfig`.
            tokenizer: checked, and passed on as `processing_class`.

        Raises:
            UserError: settings under which the loss would not be what the store and the rule say, or a model or
                tokenizer that the ids are not made for.
        """
        manifest, name = self._cache.manifest, model.config.name_or_path or type(model).__name__
        _refuse_settings(args, int(self._cache.lengths[:].max()))
        if getattr(model.config, "output_router_logits", False):
            raise UserError(f"{name}: output_router_logits adds a loss of the router, which a loss function replaces")
        refuse_small_vocabulary(vocab_rows(model), manifest, name)
        arguments = {"train_dataset": self.dataset, "data_collator": collate, "compute_loss_func": self.loss}
        if tokenizer is not None:
            refuse_other_tokenizer(tokenizer, manifest, self._cache.store, name)
            arguments["processing_class"] = tokenizer
        if outlook := weight_outlook(self._cache, self._weighting):
            for warning in warnings_of(outlook, self._weighting):
                warnings.warn(warning.removeprefix("WARNING: "), stacklevel=2)
        return arguments

    def loss(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A trainer's `compute_loss_func`: sum of weight * nll over a micro-batch, by the size of the whole batch.

        Args:
            outputs: of the model, with `logits` (B, T, V).
            labels: int64 (B, T) from `dataset`; they become plain ids, in place, for the metrics that follow.
            num_items_in_batch: labels of the optimizer step over all devices; None counts those given.

        Returns:
            A scalar with its graph, nats; 0 where all weights are.

        Raises:
            UserError: the labels carry no weights, were cut or shifted, or the logits are missing or rounded.
        """
        logits_BTV = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
        if labels is None or logits_BTV is None or logits_BTV.shape[:2] != labels.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (logits_BTV, labels)]
            raise UserError(f"expected logits (B, T, V) and labels (B, T), got the shapes {shapes[0]} and {shapes[1]}")
        is_target_BT = labels != _NO_TARGET
        ids_N, weights_N = _unpack(labels[is_target_BT])
        if is_target_BT[:, 0].any():
            raise UserError("the first token of a row is a target: rows were cut or shifted between store and loss")
        labels[is_target_BT] = ids_N
        seen_N = weights_N != 0
        is_seen_BT = is_target_BT.masked_scatter(is_target_BT, seen_N).to(logits_BTV.device)
        ids_K, weights_K = (values[seen_N].to(logits_BTV.device) for values in (ids_N, weights_N))
        # Logits at t speak of token t + 1; labels stand, as the libraries want them, with their own tokens.
        logits_KV = logits_BTV[:, :-1][is_seen_BT[:, 1:]]
        logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
        nll_K = F.cross_entropy(logits_KV, ids_K, reduction="none")
        total = (self._weigh_online(logits_KV.detach(), ids_K, weights_K) * nll_K).sum()
        num_items = torch.as_tensor(len(ids_N) if num_items_in_batch is None else num_items_in_batch)
        return total / num_items.clamp(min=1).to(total.device)

    def _weigh_online(self, logits_KV: Tensor, ids_K: Tensor, weights_K: Tensor) -> Tensor:
        """Weights, those that the labels leave open made from the model's own statistics.

        An open one is the data's own weight, 1 where the data has none, times a power of two that no weight reaches.
        """
        is_open_K = weights_K >= _OPEN * TARGET_WEIGHT_BOUNDS[0]
        if not is_open_K.any():
            return weights_K
        if not self._is_online:
            raise UserError("the labels are of a store with source=online, but the loss is of one with source=prior")
        _refuse_rounded(logits_KV[:1])
        statistics = token_statistics(logits_KV, ids_K, self._weighting.columns)
        is_stop_K = torch.isin(ids_K, self._stop_token_ids.to(ids_K.device))
        # Where it is not open, what stands there is not the data's own weight, and the product is not used.
        seen = TargetStatistics(statistics, target_weights_N=weights_K / _OPEN)
        return torch.where(is_open_K, self._weighting.weights(seen, is_stop_K), weights_K)

    def _examples(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[np.ndarray]]:
        """Ids and labels, int64 (T,) each, of some rows."""
        rows = [self._cache.row(index) for index in batch["row"]]
        labels = [self._labels(row) for row in rows]
        return {"input_ids": [row.input_ids.astype(np.int64) for row in rows], "labels": labels}

    def _labels(self, row: CachedRow) -> np.ndarray:
        """int64 (T,): id and weight of each target, at its own position."""
        ids_N = torch.from_numpy(row.input_ids[row.target_positions].astype(np.int64))
        columns = {name: torch.from_numpy(values.copy()) for name, values in row.statistics.items()}
        given_N = columns.pop(TARGET_WEIGHT, torch.ones(ids_N.shape))
        weights_N = given_N * _OPEN
        if not self._is_online:
            seen = TargetStatistics(columns, target_weights_N=given_N)
            weights_N = self._weighting.weights(seen, torch.isin(ids_N, self._stop_token_ids))
        labels_T = np.full(len(row.input_ids), _NO_TARGET, dtype=np.int64)
        labels_T[row.target_positions] = _pack(ids_N, weights_N).numpy()
        if not self._keeps_zeros:
            labels_T[row.target_positions[(weights_N == 0).numpy()]] = _NO_TARGET
        return labels_T


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A micro-batch of rows of `ScoreStore.dataset`, padded on the right: int64 (B, T) each."""
    ids = [torch.as_tensor(example["input_ids"]) for example in examples]
    labels = [torch.as_tensor(example["labels"]) for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_NO_TARGET),
    }


def _pack(ids_N: Tensor, weights_N: Tensor) -> Tensor:
    """Labels, int64, from ids and float32 weights; each is at least 2**31."""
    return weights_N.view(torch.int32).to(torch.int64) << 32 | _MARK | ids_N


def _unpack(labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Ids, int64, and weights, float32, from labels.

    Raises:
        UserError: a label carries no weight.
    """
    if not (labels_N & _MARK).all():
        raise UserError(
            "the labels carry no weights: expected those of ScoreStore.dataset, got others; a data collator may have "
            "made labels of its own from the ids. Pass what ScoreStore.trainer_arguments gives"
        )
    return labels_N & _MARK - 1, (labels_N >> 32).to(torch.int32).view(torch.float32)


def _train_config(method: str | None, weighting: Mapping[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.model_validate({"method": method, "weighting": weighting})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise UserError("; ".join(problem.removeprefix(": Value error, ") for problem in problems)) from None


def _refuse_rule(rule: str, source: str, normalize_by: str) -> None:
    if rule == "talr":
        raise UserError("rule talr looks at the whole global batch, a loss function at one micro-batch: use train.py")
    if normalize_by not in ("targets", "kept") or (normalize_by == "kept" and source == "online"):
        raise UserError(
            f"normalize_by={normalize_by} with source={source}: expected targets, or kept with source=prior: a loss "
            "function is told how many labels the global batch has, and nothing else of it. Use train.py"
        )


def _refuse_settings(args: Any, longest: int) -> None:
    kind = type(args).__name__
    for name, (expected, reason) in _SETTINGS.items():
        found = getattr(args, name, None)
        if found is not None and found != expected:
            raise UserError(f"{kind}.{name}={found}: expected {expected}: {reason}")
    if args.n_gpu > 1:
        raise UserError(f"{kind}.n_gpu={args.n_gpu}: DataParallel scales the loss; start a process for each GPU")
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise UserError(
            f"{kind}.average_tokens_across_devices=False: the loss is divided by the targets of all devices"
        )
    parallel = args.parallelism_config
    if parallel is not None and max(parallel.cp_size, parallel.sp_size) > 1:
        raise UserError(f"{kind}.parallelism_config cuts rows into parts, which the loss needs whole: use train.py")
    most = getattr(args, "max_length", None)
    if most is not None and longest > most:
        raise UserError(
            f"{kind}.max_length={most}, but the store has a row of {longest} tokens, and what was scored is not cut: "
            "set max_length=None, or score again with a smaller data.max_length"
        )


def _refuse_rounded(logits_KV: Tensor) -> None:
    """Refuse logits that a 16-bit type holds exactly: rounded to it, they tie."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(logits_KV, logits_KV.to(dtype).to(logits_KV.dtype)):
            raise UserError(
                f"the logits were rounded to {dtype}, and source=online makes weights of them: set bf16=False and "
                "fp16=False; for a model in bfloat16 call shared.head.prepare_head(model) before the trainer is made"
            )
