"""One cell in a process of its own, or a process to be forked for one cell after another; `coala compare` starts it.

python -m coala.compare OUT CELL
python -m coala.compare OUT --fork LIBRARIES
"""

import sys
from pathlib import Path

if sys.argv[2] == "--fork":
    from coala.compare.processes import fork_for_each

    sys.exit(fork_for_each(Path(sys.argv[1]), sys.argv[3]))
from coala.compare.cell import carry_out

sys.exit(carry_out(Path(sys.argv[1]), sys.argv[2]))
