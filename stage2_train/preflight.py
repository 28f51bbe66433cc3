"""Checks before and at the first step: that weights belong to tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from shared.errors import UserError
from shared.places import Place
from shared.pretrained import tokenizer_content
from shared.score_store import Manifest
from stage2_train.cache import TrainingRows

_LARGEST_MEAN_DIFFERENCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5}
"""Mean over a row's targets of |stored logprob - logprob|, nats. float32 rounding gives 1e-4, bfloat16 up to 0.2 on
single tokens; columns that belong to other tokens are off by several nats."""


def refuse_other_tokenizer(tokenizer: Any, manifest: Manifest, store: Place, model_name: str) -> None:
    """Refuse a model whose tokenizer gives other ids than the one the store was made with.

    Raises:
        UserError: token map, merges or special ids differ; names which.
    """
    ours, theirs = tokenizer_content(tokenizer).model_dump(), manifest.tokenizer.model_dump()
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        raise UserError(
            f"the tokenizer of {model_name} is not the one that {store} was scored with ({', '.join(differing)}): "
            f"train a model with the tokenizer of {manifest.prior_name}, or score again with this one"
        )


def refuse_small_vocabulary(vocab_size: int, manifest: Manifest, model_name: str) -> None:
    """Refuse a model with fewer embeddings than the tokenizer has ids; padded vocabularies may differ."""
    largest = max([*manifest.stop_token_ids, *(i for i in manifest.tokenizer.special_ids.values() if i is not None)])
    if vocab_size <= largest:
        raise UserError(f"{model_name} has {vocab_size} embeddings, but special tokens go up to id {largest}")


def stored_logprobs(cache: TrainingRows, rows: Sequence[int]) -> list[np.ndarray]:
    """The prior's log-probabilities of some rows as the store has them, float32 (T,), NaN where no target is."""
    records = cache.stored_rows(rows, ["logprob"])
    return [np.array(record["logprob"], dtype=np.float32) for record in records]


def refuse_misaligned(
    cache: TrainingRows, rows: Sequence[int], difference_R: Sequence[float], dtypes: Iterable[str], model_name: str
) -> None:
    """At the first step of a run that starts from the prior: the model must agree with the stored scores.

    Args:
        rows: of the first step.
        difference_R: mean over the targets of each row of |stored logprob - the model's|, nats.
        dtypes: of the weights in training and of those that scored; the coarser decides what is rounding.

    Raises:
        UserError: a row disagrees: its scores belong to other tokens, or the model is not the prior any more.
    """
    worst = int(np.argmax(difference_R))
    largest = max(_LARGEST_MEAN_DIFFERENCE[dtype] for dtype in dtypes)
    if not difference_R[worst] <= largest:
        row_id = cache.stored_rows([rows[worst]], ["row_id"])[0]["row_id"]
        raise UserError(
            f"row {row_id!r}: before the first step the stored scores of its targets and those of {model_name} are "
            f"{difference_R[worst]:.4f} nats apart (mean), more than {largest}: the scores "
            "belong to other tokens, or this is no longer the model that scored"
        )
