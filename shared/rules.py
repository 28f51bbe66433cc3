"""What each weighting rule is made of: its parameters, and the statistics it reads. Imports no torch.

The formulas are in `shared/weighting.py`; `docs/design.md` has the table with sources.
"""

from typing import Literal

Column = Literal["logprob", "mass_rank", "entropy", "entropy_top20", "collision"]
"""A per-token statistic; `shared/statistics.py` defines each."""

Source = Literal["prior", "online"]
"""Whose statistics weight the tokens: the stored ones of the prior, or the model's own in training."""

DEFAULT_COLUMNS: tuple[Column, ...] = ("logprob", "mass_rank", "entropy")

RULE_COLUMNS: dict[str, tuple[Column, ...]] = {
    "sft": (),
    "prob": ("logprob",),
    "mass": ("mass_rank",),
    "prob_power": ("logprob",),
    "prob_threshold": ("logprob",),
    "prob_above": ("logprob",),
    "talr": ("logprob",),
    "infosft": ("logprob",),
    "entropy": ("entropy_top20",),
    "chord": ("logprob",),
    "deft": ("logprob", "collision"),
    "idft": ("logprob", "entropy"),
}

RULE_PARAMETERS: dict[str, dict[str, float | None]] = {
    "sft": {},
    "prob": {},
    "mass": {"threshold": 0.5},
    "prob_power": {"alpha": None},
    "prob_threshold": {"min_prob": 0.1},
    "prob_above": {"min_prob": None},
    "talr": {"floor": 0.01},
    "infosft": {"max_prob": 0.93},
    "entropy": {"alpha": 1.0},
    "chord": {},
    "deft": {},
    "idft": {"beta": 1.0, "lo": 0.1, "hi": 2.0},
}
"""Default of each parameter; None where the rule has no default and the user must choose."""

METHODS: dict[str, tuple[str, Source]] = {
    "sft": ("sft", "prior"),
    "dft": ("prob", "online"),
    "prift_prob": ("prob", "prior"),
    "prift_mass": ("mass", "prior"),
}
"""The paper's names for pairs of rule and source."""
