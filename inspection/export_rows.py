"""Rows of a store with the weights of a rule baked in.

Shape suffixes: N targets of a row group, T its tokens.
"""

import difflib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError

from inspection.reading import sound_tables
from shared.config import TrainConfig, WeightingConfig
from shared.errors import UserError
from shared.places import Place
from shared.score_store import TARGET_WEIGHT, Manifest
from shared.shards import Shard, flatten
from shared.weighting import TargetStatistics, Weighting, resolve_weighting

SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "source_index": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
    }
)
_NO_TARGET = -100
"""The libraries' label of a token that is not trained on."""


def storable_weighting(method: str | None, rule: str | None, words: Sequence[str]) -> Weighting:
    """The weighting that is baked in.

    Args:
        method: name of a method of the paper, or None.
        rule: name of a rule on the prior's statistics, or None.
        words: key=value, numbers of `train.weighting`.

    Raises:
        UserError: a key or value is wrong, or the weights are not known before training.
    """
    given = dict(_number(word) for word in words)
    try:
        config = TrainConfig.model_validate({"method": method, "weighting": {"rule": rule, **given}})
    except ValidationError as error:
        problems = (_in_words(it["loc"], it["msg"]) for it in error.errors())
        raise UserError("; ".join(problems)) from None
    weighting = resolve_weighting(config)
    if weighting.source != "prior":
        raise UserError(
            f"--method {method} weighs each token by what the model in training thinks of it then: such weights "
            "cannot be stored. --method prift_prob is the same formula with the prior's numbers"
        )
    if weighting.needs_row_nll:
        raise UserError(
            f"--rule {weighting.rule} depends on the other rows of the global batch (the median of their nll), which "
            "only a training run knows: such weights cannot be stored; train with stage2_train/train.py"
        )
    return weighting


def _in_words(place: Sequence[int | str], message: str) -> str:
    name = f"--set {place[-1]}: " if place else ""
    return name + message.removeprefix("Value error, ").replace("train.weighting.", "--set ")


def _number(word: str) -> tuple[str, float]:
    key, equals, text = word.partition("=")
    known = [name for name in WeightingConfig.model_fields if name not in ("rule", "source")]
    if not equals:
        raise UserError(f"--set {word}: expected key=value, such as threshold=0.5")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise UserError(f"--set {word}: unknown key {key}; the nearest known one is {near}")
    try:
        return key, float(text)
    except ValueError:
        raise UserError(f"--set {word}: expected a number") from None


class ExportedRows:
    """The rows of a store with their weights, as tables of `SCHEMA`; counts what has passed."""

    def __init__(self, store: Place, manifest: Manifest, shards: Sequence[Shard], weighting: Weighting):
        have = list(manifest.identity.columns)
        for name in weighting.columns:
            if name not in have:
                raise UserError(
                    f"{store}: expected the column {name}, which rule {weighting.rule} reads; the store has {have}. "
                    f"Score again with score.columns=[{','.join([*have, name])}]"
                )
        self._manifest, self._shards, self._weighting = manifest, shards, weighting
        self.num_rows = self.num_targets = self.num_zero = 0
        self.weight_sum = 0.0

    def tables(self) -> Iterator[pa.Table]:
        """Row group by row group, in source order.

        Raises:
            UserError: the store is damaged.
        """
        for shard in self._shards:
            for table in sound_tables(self._manifest, shard):
                yield self._weighted(table)

    def _weighted(self, table: pa.Table) -> pa.Table:
        ids, is_target_T = flatten(table.column("input_ids")), flatten(table.column("logprob")).valid
        weights_N = self._weights(table, ids.values[is_target_T])
        self.num_rows += table.num_rows
        self.num_targets += len(weights_N)
        self.num_zero += int((weights_N == 0).sum())
        self.weight_sum += float(weights_N.sum(dtype=np.float64))
        weights_T = np.zeros(len(ids.values), dtype=np.float32)
        weights_T[is_target_T] = weights_N
        labels_T = np.where(is_target_T, ids.values, _NO_TARGET).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(ids.lengths)]).astype(np.int32)
        lists = (pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids.values, labels_T, weights_T))
        return pa.table([table.column("row_id"), table.column("source_index"), *lists], schema=SCHEMA)

    def _weights(self, table: pa.Table, ids_N: np.ndarray) -> np.ndarray:
        """float32 (N,)."""
        columns = {}
        for name in self._weighting.columns:
            flat = flatten(table.column(name))
            columns[name] = torch.from_numpy(flat.values[flat.valid])
        given_N = None
        if self._manifest.source.weighted:
            flat = flatten(table.column(TARGET_WEIGHT))
            given_N = torch.from_numpy(flat.values[flat.valid])
        is_stop_N = torch.from_numpy(np.isin(ids_N, self._manifest.stop_token_ids))
        return self._weighting.weights(TargetStatistics(columns, target_weights_N=given_N), is_stop_N).numpy()
