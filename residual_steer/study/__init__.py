"""Studies: several methods on one problem, under the same rules, with results that survive an interruption."""

from .budget import adapted, match_budget, trainable
from .identity import digest
from .ledger import Ledger
from .paired import Difference, difference
from .problem import Arm, Problem, rates_around
from .sweep import Entry, Run, every_run, sweep
from .tables import comparison, gap, measured, records

__all__ = [
    "Arm",
    "Difference",
    "Entry",
    "Ledger",
    "Problem",
    "Run",
    "adapted",
    "comparison",
    "difference",
    "digest",
    "every_run",
    "gap",
    "match_budget",
    "measured",
    "rates_around",
    "records",
    "sweep",
    "trainable",
]
