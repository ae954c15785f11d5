"""All optimisation of the head: convex programs, their certificates and solvers, and ``fit``.

Arrays in, arrays out; pure JAX. Knows no files, models or devices, and changes no process-wide option.
"""

from coala.convex.finetune import Logistic, PairLoss, Pointwise, finetune
from coala.convex.fit import Fit, fit
from coala.convex.gates import sample_patterns
from coala.convex.newton import GatedNewton
from coala.convex.pairwise import PairProgram
from coala.convex.program import GatedProgram, Program, largest_sparsity
from coala.convex.recover import recover_gated, recover_network
from coala.convex.solvers import Solution, Solver, Status, certify, solve

__all__ = [
    "Fit",
    "GatedNewton",
    "GatedProgram",
    "Logistic",
    "PairLoss",
    "PairProgram",
    "Pointwise",
    "Program",
    "Solution",
    "Solver",
    "Status",
    "certify",
    "finetune",
    "fit",
    "largest_sparsity",
    "recover_gated",
    "recover_network",
    "sample_patterns",
    "solve",
]
