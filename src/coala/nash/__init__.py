"""Preference games: Nash policies of preferences that may be intransitive, and the methods that look for them.

COMAL (`solve`) moves the reference policy in an outer loop and solves a regularised game in an inner one; the losses it
is built from (IPO, DPO, SPPO, INPO, DRO, REBEL), MWU, Mirror-Prox and OMWU run on the same driver and measure. NumPy
and SciPy only.
"""

from coala.nash.criteria import Note
from coala.nash.game import Nash, PreferenceGame, duality_gap, kl_divergence, load_game, read_game
from coala.nash.selection import FixedPoint, selection_fixed_point
from coala.nash.solvers import INNER_STEPS, METHODS, History, Result, solve

__all__ = [
    "INNER_STEPS",
    "METHODS",
    "FixedPoint",
    "History",
    "Nash",
    "Note",
    "PreferenceGame",
    "Result",
    "duality_gap",
    "kl_divergence",
    "load_game",
    "read_game",
    "selection_fixed_point",
    "solve",
]
