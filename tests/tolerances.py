"""How far two computations of the same number may lie apart: from their arithmetic, not from what one machine printed.

A sum of n products, each rounded to the precision of a type, is off by some sqrt(n) eps times its largest partial sum
(rounding errors have random signs; Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019);
beyond four times that is out of reach. Which order a sum is taken in, and in pieces of what width, is a processor's and
a library's own affair. Sums that feed on each other's results add their errors up.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def rounding(terms: int, stages: int = 1, dtype: Any = np.float32) -> float:
    """Relative to the largest number met: for ``stages`` sums of ``terms`` products, one after the other."""
    return float(4 * np.finfo(dtype).eps * math.sqrt(terms) * stages)


# The small networks of the tests: three layers at most of six sums one after the other (three projections in a row,
# scores, values, the two of the network between), then the head's; 64 terms at most. In float32 7e-5: what a wrong
# token, layer or mask changes is a thousand times as much.
NETWORK = rounding(64, stages=19)


def of_network(values: Any) -> float:
    """What a hidden state, a score or a log-probability of ``values`` may be off by, absolutely."""
    return NETWORK * max(1.0, float(np.abs(np.asarray(values)).max()))
