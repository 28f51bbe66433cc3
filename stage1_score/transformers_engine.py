"""The prior run by transformers: padded batches, the head on target rows only.

Shape suffixes: N targets of a batch, C statistics, D hidden size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from torch import Tensor

from shared.batching import bounded_batches, longest_first
from shared.config import ScoreConfig
from shared.errors import UserError
from shared.head import (
    head_difference,
    hidden_states,
    logits_of_hidden,
    prepare_head,
    refuse_unknown_head,
    vocab_rows,
)
from shared.padding import PaddedBatch, pad_and_shift
from shared.pretrained import PretrainedFiles, load_causal_lm
from shared.score_store import Identity
from shared.shards import ScoredRow
from shared.statistics import statistics_in_chunks
from stage1_score.tokenization import TokenizedExample

ENGINE_NAME = "transformers"


class TransformersEngine:
    """Scores with a transformers model on one device; see `stage1_score.engine.Engine`."""

    def __init__(self, files: PretrainedFiles, identity: Identity, device: str, config: ScoreConfig):
        """Load the prior.

        Args:
            identity: of the store; its dtypes and columns are taken.
            device: cpu or cuda.

        Raises:
            UserError: the model cannot be loaded, or its head is unknown.
        """
        self._columns, self._config = identity.columns, config
        model = load_causal_lm(files, getattr(torch, identity.weight_dtype)).to(device)
        if identity.compute_dtype != identity.weight_dtype:
            # Only ever upwards: `to` casts buffers too, and rotary frequencies must not be rounded to bfloat16.
            model = model.to(getattr(torch, identity.compute_dtype))
        self._model = model.eval()
        prepare_head(self._model)
        probe = torch.arange(8, device=device).remainder(vocab_rows(self._model))[None]
        refuse_unknown_head(self._model, float(head_difference(self._model, probe)))

    def describe(self) -> dict[str, str]:
        """See `Engine.describe`."""
        device = self._model.device
        return {
            "engine": ENGINE_NAME,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "attention": str(self._model.config._attn_implementation),
        }

    def batches(self, examples: Sequence[TokenizedExample]) -> list[list[int]]:
        """The batches that `score` runs: indices of examples, the longest first."""
        lengths = [len(example.input_ids) for example in examples]
        return bounded_batches(lengths, longest_first(lengths), self._config.batch_tokens)

    @torch.inference_mode()
    def score(
        self, examples: Sequence[TokenizedExample], on_batch: Callable[[int, int], None] = lambda rows, tokens: None
    ) -> list[ScoredRow]:
        """See `Engine.score`."""
        batches = self.batches(examples)
        pending: list[Tensor] = []
        for batch in batches:
            members = [examples[index] for index in batch]
            statistics = self.forward(pad_and_shift(members))
            # Kept on the device until the shard is through: a copy per batch would make the device wait.
            pending.append(torch.stack([statistics[column] for column in self._columns]).float())
            on_batch(len(members), sum(len(member.input_ids) for member in members))
        values_CN = torch.cat(pending, dim=1).cpu().numpy() if pending else np.zeros((len(self._columns), 0))
        rows: list[ScoredRow | None] = [None] * len(examples)
        start = 0
        for index in (index for batch in batches for index in batch):
            stop = start + len(examples[index].target_positions)
            rows[index] = self._scored(examples[index], values_CN[:, start:stop])
            start = stop
        return [row for row in rows if row is not None]

    def forward(self, batch: PaddedBatch) -> dict[str, Tensor]:
        """Statistics (N,) of the targets of one batch, on the device."""
        batch = batch.to(self._model.device)
        hidden_ND = hidden_states(self._model, batch.input_ids_BT).flatten(0, 1)[batch.hidden_rows_N]
        return statistics_in_chunks(
            hidden_ND,
            batch.target_ids_N,
            self._columns,
            lambda hidden: logits_of_hidden(self._model, hidden),
            vocab_rows(self._model),
            self._config.logits_mebibytes << 20,
        )

    def _scored(self, example: TokenizedExample, values_CN: np.ndarray) -> ScoredRow:
        finite_N = np.isfinite(values_CN).all(axis=0)
        if not finite_N.all():
            position = example.target_positions[int(np.argmin(finite_N))]
            raise UserError(
                f"row {example.row_id!r} (source_index {example.source_index}): the prior gives a number that is not "
                f"finite to token {position}; try prior.dtype=float32"
            )
        statistics = {column: values_CN[index] for index, column in enumerate(self._columns)}
        return ScoredRow(example.row_id, example.source_index, example.input_ids, example.target_positions, statistics)
