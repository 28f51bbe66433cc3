"""What a run's rule will do with the first targets of its store."""

import numpy as np
import torch

from shared.outlook import Outlook, WeightSums
from shared.score_store import TARGET_WEIGHT
from shared.weighting import TargetStatistics, Weighting
from stage2_train.cache import ScoreCache, TrainingRows
from stage2_train.mixture import MixedCache


def weight_outlook(cache: TrainingRows, weighting: Weighting, most_targets: int = 1_000_000) -> Outlook | None:
    """Look at the first targets of each store.

    None for sft, whose weights are those of the data, and for the model's own statistics, which are not known before.

    Args:
        cache: with the columns of the rule.
    """
    if weighting.source != "prior" or weighting.rule == "sft":
        return None
    sums = WeightSums()
    for part, most in _looked_at(cache, most_targets):
        ids = torch.from_numpy(part.target_ids(most).astype(np.int64))
        is_stop_N = torch.isin(ids, torch.tensor(part.manifest.stop_token_ids, dtype=torch.int64))
        columns = {name: torch.from_numpy(np.array(part.columns[name][: len(ids)])) for name in weighting.columns}
        row_nll_R = -columns["logprob"].mean()[None] if weighting.needs_row_nll else None
        given_N = torch.from_numpy(np.array(part.columns[TARGET_WEIGHT][: len(ids)])) if part.is_weighted else None
        sums.add(weighting.weights(TargetStatistics(columns, row_nll_R, given_N), is_stop_N), is_stop_N)
    return sums.outlook()


def _looked_at(cache: TrainingRows, most_targets: int) -> list[tuple[ScoreCache, int]]:
    """So many targets of each store that they are in the proportion in which the run sees them."""
    rows = np.array(cache.weights if isinstance(cache, MixedCache) and cache.weights else list(map(len, cache.parts)))
    held = np.array([part.num_targets.sum() for part in cache.parts])
    seen = rows * held / np.array(list(map(len, cache.parts)))
    shares = seen / seen.sum()
    total = min(most_targets, (held / shares).min())
    return [(part, max(round(total * share), 1)) for part, share in zip(cache.parts, shares, strict=True)]
