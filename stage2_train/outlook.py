"""What a run's rule will do with the first targets of its store."""

import numpy as np
import torch

from shared.outlook import Outlook, WeightSums
from shared.score_store import TARGET_WEIGHT
from shared.weighting import TargetStatistics, Weighting
from stage2_train.cache import ScoreCache


def weight_outlook(cache: ScoreCache, weighting: Weighting, most_targets: int = 1_000_000) -> Outlook | None:
    """Look at the first targets of a store.

    None for sft, whose weights are those of the data, and for the model's own statistics, which are not known before.

    Args:
        cache: with the columns of the rule.
    """
    if weighting.source != "prior" or weighting.rule == "sft":
        return None
    ids = torch.from_numpy(cache.target_ids(most_targets).astype(np.int64))
    is_stop_N = torch.isin(ids, torch.tensor(cache.manifest.stop_token_ids, dtype=torch.int64))
    columns = {name: torch.from_numpy(np.array(cache.columns[name][: len(ids)])) for name in weighting.columns}
    row_nll_R = -columns["logprob"].mean()[None] if weighting.needs_row_nll else None
    given_N = torch.from_numpy(np.array(cache.columns[TARGET_WEIGHT][: len(ids)])) if cache.is_weighted else None
    weights_N = weighting.weights(TargetStatistics(columns, row_nll_R, given_N), is_stop_N)
    sums = WeightSums()
    sums.add(weights_N, is_stop_N)
    return sums.outlook()
