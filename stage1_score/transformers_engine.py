"""The prior run by transformers: packed or padded batches, the head on target rows only.

Shape suffixes: N targets of a batch, C statistics, D hidden size.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from torch import Tensor

from shared.batching import bounded_batches, bounded_packs, longest_first
from shared.config import ScoreConfig
from shared.errors import UserError, first_line
from shared.head import (
    head_difference,
    hidden_states,
    logits_of_hidden,
    prepare_head,
    refuse_unknown_head,
    vocab_rows,
)
from shared.packed_attention import packing_obstacle, use_packed_attention
from shared.padding import TokenBatch, pack_and_shift, pad_and_shift
from shared.pretrained import PretrainedFiles, load_causal_lm, rope_type_of
from shared.score_store import Identity
from shared.shards import ScoredRow
from shared.statistics import statistics_in_chunks
from stage1_score.engine import DeviceLost, device_errors, scored_row
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
            UserError: the model cannot be loaded, its head is unknown, or it cannot run packed as it was asked to.
        """
        positions = files.config().get("max_position_embeddings", 0)
        if rope_type_of(files.config()) == "dynamic" and identity.max_length > positions:
            raise UserError(
                f"the prior's rotary embedding is dynamic: beyond {positions} tokens its numbers depend on which rows "
                f"were scored before; set data.max_length={positions}"
            )
        self._columns, self._config = identity.columns, config
        model = load_causal_lm(files, getattr(torch, identity.weight_dtype)).to(device)
        if identity.compute_dtype != identity.weight_dtype:
            if hasattr(model.config, "_experts_implementation"):
                model.config._experts_implementation = "eager"  # the grouped products know no float64
            # Only ever upwards: `to` casts buffers too, and rotary frequencies must not be rounded to bfloat16.
            model = model.to(getattr(torch, identity.compute_dtype))
        self._model = model.eval()
        prepare_head(self._model)
        probe = torch.arange(8, device=device).remainder(vocab_rows(self._model))[None]
        refuse_unknown_head(self._model, float(head_difference(self._model, probe)))
        self._is_packed = self._can_pack()
        if self._is_packed:
            use_packed_attention(self._model)
        self._batch_tokens = config.batch_tokens
        # The frequencies of a row must not depend on what stands beside it.
        self._max_examples = 1 if rope_type_of(files.config()) == "longrope" else None

    def _can_pack(self) -> bool:
        """Whether rows are packed: asked for or, with `auto`, on CUDA, and possible."""
        wanted = self._config.padding_free
        if wanted is False or (wanted == "auto" and self._model.device.type != "cuda"):
            return False
        obstacle = packing_obstacle(self._model)
        if obstacle and wanted is True:
            raise UserError(f"score.padding_free=true is not possible: {obstacle}; set score.padding_free=false")
        if obstacle:
            print(f"note: rows are padded, not packed: {obstacle}", flush=True)
        return obstacle is None

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

    def close(self) -> None:
        """See `Engine.close`: there is no other process."""

    def batches(self, examples: Sequence[TokenizedExample]) -> list[list[int]]:
        """The batches that `score` runs while memory suffices: indices of examples, the longest first."""
        return self._cut(examples, longest_first([len(example.input_ids) for example in examples]))

    def batch_of(self, members: Sequence[TokenizedExample]) -> TokenBatch:
        """The members of a batch as `forward` takes them, on the host."""
        return pack_and_shift(members) if self._is_packed else pad_and_shift(members)

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Statistics (N,) of the targets of one batch made by `batch_of`, on the device."""
        batch = batch.to(self._model.device)
        hidden_ND = hidden_states(self._model, batch.input_ids_BT, batch.boundaries).flatten(0, 1)[batch.hidden_rows_N]
        return statistics_in_chunks(
            hidden_ND,
            batch.target_ids_N,
            self._columns,
            lambda hidden: logits_of_hidden(self._model, hidden),
            vocab_rows(self._model),
            self._config.logits_bytes(self._model.device.type),
        )

    @torch.inference_mode()
    def score(
        self, examples: Sequence[TokenizedExample], on_batch: Callable[[int, int], None] = lambda rows, tokens: None
    ) -> list[ScoredRow]:
        """See `Engine.score`.

        Where a batch does not fit into the device's memory, it and all that come after are cut in half.

        Raises:
            UserError: a statistic is not finite, or a row alone does not fit into memory.
            DeviceLost: the device fails.
        """
        try:
            order, values_CN = self._run(examples, on_batch)
        except device_errors() as error:
            raise DeviceLost(
                f"the device {self._model.device} was lost ({first_line(error)}); finished shards are kept: run the "
                "same command again"
            ) from error
        rows: dict[int, ScoredRow] = {}
        start = 0
        for index in order:
            stop = start + len(examples[index].target_positions)
            rows[index] = scored_row(examples[index], self._columns, values_CN[:, start:stop])
            start = stop
        return [rows[index] for index in range(len(examples))]

    def _run(
        self, examples: Sequence[TokenizedExample], on_batch: Callable[[int, int], None]
    ) -> tuple[list[int], np.ndarray]:
        """The order in which the examples went through, and their statistics (C, targets of all) in that order."""
        order: list[int] = []
        # Kept on the device until the shard is through: a copy per batch would make the device wait.
        pending: list[Tensor] = []
        finished = [np.zeros((len(self._columns), 0), np.float32)]
        waiting = deque(self.batches(examples))
        while waiting:
            batch = waiting.popleft()
            members = [examples[index] for index in batch]
            statistics_CN = self._statistics(members)
            if statistics_CN is None:
                finished += _to_host(pending)
                pending.clear()
                self._lower_budget(members)
                waiting = deque(self._cut(examples, [*batch, *(index for later in waiting for index in later)]))
                continue
            order += batch
            pending.append(statistics_CN)
            on_batch(len(members), sum(len(member.input_ids) for member in members))
        return order, np.concatenate([*finished, *_to_host(pending)], axis=1)

    def _statistics(self, members: Sequence[TokenizedExample]) -> Tensor | None:
        """Statistics (C, N), float32, of a batch on the device; None where its memory does not suffice."""
        try:
            statistics = self.forward(self.batch_of(members))
            return torch.stack([statistics[column] for column in self._columns]).float()
        except torch.OutOfMemoryError:
            # Left at once: the exception holds the frames of the forward pass, and they hold its tensors.
            return None

    def _lower_budget(self, members: Sequence[TokenizedExample]) -> None:
        """Halve the batches from here on, after one that did not fit into memory."""
        size = self._size([len(member.input_ids) for member in members])
        if len(members) == 1:
            raise UserError(
                f"row {members[0].row_id!r} (source_index {members[0].source_index}): its {size} tokens do not fit "
                f"into the memory of {self._model.device}, even alone; lower data.max_length or "
                "score.logits_mebibytes, or take a device with more memory"
            )
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._batch_tokens = size // 2
        print(f"out of memory at {size} tokens; going on with {self._batch_tokens}", flush=True)

    def _size(self, lengths: Sequence[int]) -> int:
        """Tokens that a batch of such rows takes, padding included."""
        return sum(lengths) if self._is_packed else len(lengths) * max(lengths)

    def _cut(self, examples: Sequence[TokenizedExample], order: Sequence[int]) -> list[list[int]]:
        lengths = [len(example.input_ids) for example in examples]
        if self._is_packed:
            return bounded_packs(lengths, order, self._batch_tokens)
        return bounded_batches(lengths, order, self._batch_tokens, self._max_examples)


def _to_host(pending: Sequence[Tensor]) -> list[np.ndarray]:
    """Statistics of several batches as one array, in one copy; nothing for none."""
    return [torch.cat(list(pending), dim=1).cpu().numpy()] if pending else []
