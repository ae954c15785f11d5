"""How fast conversations are held when the endpoint answers at once, and what is lost to faults and kills.

    python benchmarks/synthesis.py                    # both transports, journal on the disk, fsync and all
    python benchmarks/synthesis.py --kills 10         # 1,000 conversations, faults, the command killed ten times

Two figures: over HTTP on loopback, client and server on the same machine; and with the network taken out (the scripted
answers are computed in the process), which is the overhead of everything else. On a busy machine the rates by CPU time
tell more. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from coala.data.journal import Journal  # noqa: E402
from coala.data.synthesis import Summary, synthesize  # noqa: E402
from coala.endpoint import Post, Server  # noqa: E402
from coala.endpoint.transport import Answer  # noqa: E402
from coala.store.appending import Appender  # noqa: E402
from tests.test_data_synthesis import (  # noqa: E402
    House,
    billed,
    command_for,
    expected_rows,
    recipe_for,
    rows,
    running,
    scripted,
    written,
)
from tests.waiting import wait_for  # noqa: E402


async def at_once(server: Server, body: bytes, timeout: float) -> Answer:
    """The scripted answer without a network."""
    request = json.loads(body)
    text, finish = scripted({**request, "faulty": False})
    prompt, completion = billed(request, text)
    content = {
        "model": "m",
        "choices": [{"message": {"content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
    }
    return Answer(200, {}, json.dumps(content).encode())


def serve(ready: multiprocessing.Queue[int]) -> None:
    asyncio.run(House(faults=False).serve(ready.put))


def hold(url: str, n: int, post: Post | None, folder: Path) -> Summary:
    """The conversations of the tests' recipe, 64 at a time, journal written as the command writes it."""
    recipe = recipe_for(url, n, limits={"concurrency": 64, "timeout": 30.0})
    file = os.open(folder / "journal", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
    try:
        return asyncio.run(synthesize(recipe, Journal(), Appender(file).append, post=post))
    finally:
        os.close(file)


def killed(folder: Path, n: int, kills: int) -> dict[str, object]:
    """``n`` conversations held by the command, which is killed ``kills`` times on its way and then left to finish."""
    house, out, began = House(delay=0.02), folder / "talk.jsonl", time.perf_counter()
    with running(house) as url:
        recipe = recipe_for(url, n, limits={"concurrency": 16})
        command = command_for(written(folder, recipe), out)
        for k in range(kills):
            # Killed after so many more requests: in the middle of things whatever the machine's speed.
            goal = len(house.arrivals) + n * 5 // (kills + 1) + 7 * k
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(lambda goal=goal: len(house.arrivals) >= goal, process)
            process.kill()
            process.wait()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    made = rows(out)
    events = [json.loads(line)["kind"] for line in (folder / "talk.jsonl.journal").open()]
    return {
        "conversations": len(made),
        "kills": kills,
        "as_expected": made == expected_rows(recipe),
        "given_up": events.count("given up"),
        "faults": dict(house.answers),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        if args.kills:
            print(json.dumps(killed(Path(name), 1000, args.kills)))
            return
        ready: multiprocessing.Queue[int] = multiprocessing.Queue()
        server = multiprocessing.Process(target=serve, args=(ready,), daemon=True)
        server.start()
        found = {}
        for label, url, post in (
            ("HTTP on loopback", f"http://127.0.0.1:{ready.get()}/v1", None),
            ("in process", "http://127.0.0.1/v1", at_once),
        ):
            began = time.process_time()
            summary = hold(url, args.conversations, post, Path(name))
            rates = {
                "per_second": summary.kept / summary.seconds,
                "per_cpu_second": summary.kept / (time.process_time() - began),
                "requests_per_second": summary.requests / summary.seconds,
            }
            found[label] = rates
            print(
                f"{label:<18} {rates['per_second']:7.0f} conversations/s  {rates['per_cpu_second']:7.0f} per second of "
                f"this process's CPU  {rates['requests_per_second']:7.0f} requests/s"
            )
        server.terminate()
    print(json.dumps({"conversations": args.conversations, **found}))


if __name__ == "__main__":
    main()
