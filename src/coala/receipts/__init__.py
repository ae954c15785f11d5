"""Receipts: what each pair did to a run's head, a head without some of its pairs, and what an adversary could do.

    pair_influence(run)              the pairs whose absence would change a measure most, exact, and proved to be all
    forget_pairs(run, groups=[...])  an exact refit without them, their features destroyed, a receipt
    rater_effects(run)               who agrees with the others, who is reversed or random, and heads of their own

Everything is a computation on the run's saved features; no model is loaded but to score a reply that is given.
"""

from coala.receipts.forgetting import forget_pairs
from coala.receipts.influence import pair_influence
from coala.receipts.raters import rater_effects, rater_effects_of

__all__ = ["forget_pairs", "pair_influence", "rater_effects", "rater_effects_of"]
