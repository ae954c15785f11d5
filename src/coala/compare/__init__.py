"""Methods x models x datasets x seeds on the same pairs, tokens and measures, costs counted, in one report.

Knows the stages, the baselines and how they are compared; nothing of terminals. :mod:`coala.compare.study` holds the
settings, :mod:`coala.compare.matrix` the cells, :mod:`coala.compare.runner` starts one process for each.
"""

from coala.compare.loading import bundled, load_study
from coala.compare.matrix import Cell, cells
from coala.compare.page import write_report
from coala.compare.planning import plan_study
from coala.compare.planning import total as plan_total
from coala.compare.results import content_of
from coala.compare.runner import run
from coala.compare.study import Study
from coala.compare.text import PLAN_HEAD, plan_rows, summary_rows

__all__ = [
    "PLAN_HEAD",
    "Cell",
    "Study",
    "bundled",
    "cells",
    "content_of",
    "load_study",
    "plan_rows",
    "plan_study",
    "plan_total",
    "run",
    "summary_rows",
    "write_report",
]
