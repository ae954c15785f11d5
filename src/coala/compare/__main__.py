"""One cell in a process of its own; `coala compare` starts it."""

import sys
from pathlib import Path

from coala.compare.cell import carry_out

sys.exit(carry_out(Path(sys.argv[1]), sys.argv[2]))
