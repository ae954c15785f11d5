"""The Alternating Population Strategy on a set of the published size: 26,621 conversations to 65,606 pairs.

    python benchmarks/alternate.py

Conversations of 3 and 4 exchanges, in the proportion the published counts imply, with utterances of 30 and 60 made-up
words. Times the library (pairs streamed and counted, peak memory) and the command (pairs written, cues measured), each
in a process of its own. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONVERSATIONS, PAIRS = 26_621, 65_606
COUNT = """
import resource, sys
from coala.data import read_pairs
n = sum(1 for _ in read_pairs(sys.argv[1], "conversations", context=sys.argv[2]))
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write(path: Path) -> None:
    draw = random.Random(0)
    words = [f"word{k}" for k in range(3000)]
    longer = PAIRS - 2 * CONVERSATIONS
    with path.open("w") as file:
        for k in range(CONVERSATIONS):
            turns = [
                {"role": role, "text": " ".join(draw.choices(words, k=n))}
                for _ in range(4 if k < longer else 3)
                for role, n in (("user", 30), ("assistant", 60))
            ]
            file.write(json.dumps({"group": str(k), "turns": turns}) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "conversations.jsonl"
        write(path)
        found: dict[str, object] = {"conversations": CONVERSATIONS, "megabytes": path.stat().st_size / 1e6}
        for context in ("all", "first"):
            began = time.perf_counter()
            command = [sys.executable, "-c", COUNT, str(path), context]
            counted = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            n, memory = map(int, counted.split())
            seconds = time.perf_counter() - began
            found[f"library, context {context}"] = {"pairs": n, "seconds": seconds, "peak_mib": memory}
            print(f"library, context {context:<6} {n:6d} pairs  {seconds:5.1f} s  peak {memory} MiB")
        began = time.perf_counter()
        command = [sys.executable, "-m", "coala", "data", "alternate", str(path), "--out", str(Path(name) / "p.jsonl")]
        said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        seconds = time.perf_counter() - began
        found["command"] = {"pairs": said["pairs"], "seconds": seconds}
        print(f"command, cues measured  {said['pairs']:6d} pairs  {seconds:5.1f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
