"""All optimisation of the head: convex programs, their certificates and solvers, and ``fit``.

Arrays in, arrays out; pure JAX. Knows no files, models or devices, and changes no process-wide option.
"""

from coala.convex.calibration import fit_temperature, least_slope
from coala.convex.fit import Fit, fit
from coala.convex.gate_sampling import sample_patterns
from coala.convex.newton import GatedNewton
from coala.convex.output_fit import OutputFit, fit_output
from coala.convex.output_layer import OutputProgram
from coala.convex.output_solver import OutputLBFGS
from coala.convex.pairwise import PairProgram
from coala.convex.papers.barrier import Barrier
from coala.convex.papers.cronos import Cronos
from coala.convex.papers.finetune import finetune
from coala.convex.papers.losses import Logistic, PairLoss, Pointwise, SecondLayer, TwoScores
from coala.convex.papers.minimisers import LBFGS, AdamW, DampedNewton, Nesterov
from coala.convex.papers.patterns import NetworkSolution, PatternGeneration
from coala.convex.papers.recover import recover_gated, recover_network
from coala.convex.program import GatedProgram, Program, largest_sparsity
from coala.convex.rows import open_rows
from coala.convex.sharding import row_mesh, spread
from coala.convex.solvers import Solution, Solver, Status, certify, solve

__all__ = [
    "LBFGS",
    "AdamW",
    "Barrier",
    "Cronos",
    "DampedNewton",
    "Fit",
    "GatedNewton",
    "GatedProgram",
    "Logistic",
    "Nesterov",
    "NetworkSolution",
    "OutputFit",
    "OutputLBFGS",
    "OutputProgram",
    "PairLoss",
    "PairProgram",
    "PatternGeneration",
    "Pointwise",
    "Program",
    "SecondLayer",
    "Solution",
    "Solver",
    "Status",
    "TwoScores",
    "certify",
    "finetune",
    "fit",
    "fit_output",
    "fit_temperature",
    "largest_sparsity",
    "least_slope",
    "open_rows",
    "recover_gated",
    "recover_network",
    "row_mesh",
    "sample_patterns",
    "solve",
    "spread",
]
