"""The server under load: what sharing a model gains, and what many clients at once meet; nothing may leak.

    python benchmarks/serving.py
    python benchmarks/serving.py --clients 50 --seconds 60 --rounds 6

Makes a run of random weights in the shape given, serves it with `coala serve` in a process of its own and asks it over
HTTP. First replies of a fixed length by 1 and by 8 clients in turns (tokens per second; the ratio with a bootstrap
interval over rounds), then ``--clients`` clients for ``--seconds``, half of them streaming and every fifth hanging up
now and then: latencies (p95 with an interval from order statistics), statuses, memory, descriptors, replies left in
hand. Prints a table; the last line is JSON. Ends with 1 if there was an error other than 429 or work was left over.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.serving import There, tiny_run  # noqa: E402

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "tells", "its", "good", "friend")


@dataclass
class Seen:
    """What the clients met; seconds of whole requests and to the first text of streams."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, status: str, seconds: float, tokens: int = 0, first: float | None = None) -> None:
        with self.lock:
            self.statuses[status] += 1
            self.tokens += tokens
            if status == "200":
                self.seconds.append(seconds)
            if first is not None:
                self.first.append(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the load")
    parser.add_argument("--rounds", type=int, default=5, help="of 1 and of 8 clients")
    parser.add_argument("--round-seconds", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=64, help="of a reply")
    parser.add_argument("--guidance", default="block", help="mode; the default of recipes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2, help="of the server's model")
    parser.add_argument("--max-rows", type=int, default=40)
    parser.add_argument("--queue", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = tiny_run(Path(name), n_layer=args.layers, n_embd=args.width, n_head=4, n_inner=4 * args.width)
        options = ("--max-rows", str(args.max_rows), "--queue", str(args.queue))
        with There(run, *options, OMP_NUM_THREADS=str(args.threads)) as there:
            for n in (1, 8):
                clients(there.port, n, 1.0, args)  # warm
            rounds: dict[int, list[float]] = {1: [], 8: []}
            for _ in range(args.rounds):
                for n, rates in rounds.items():
                    began = time.perf_counter()
                    seen = clients(there.port, n, args.round_seconds, args)
                    rates.append(seen.tokens / (time.perf_counter() - began))
            load = under_load(there, args)
            ended = there.end()
            log = there.log
    row: dict[str, Any] = {
        "shape": f"{args.layers} layers of {args.width}, {args.threads} threads, mode {args.guidance}",
        "tokens_per_second": {n: round(float(np.mean(rates)), 1) for n, rates in rounds.items()},
        "gain": ratio(rounds[8], rounds[1]),
        "rounds": args.rounds,
        **load,
        "requests_counted": ended["requests"],
        "tracebacks": log.count("Traceback"),
    }
    for key, value in row.items():
        print(f"{key:<24} {value}")
    print(json.dumps(row))
    if load["errors"] or load["left_in_hand"] or row["tracebacks"]:
        sys.exit(1)


def clients(port: int, n: int, seconds: float, args: argparse.Namespace, *, rude: bool = False) -> Seen:
    """``n`` clients that ask one request after the other for so many seconds."""
    seen, end = Seen(), time.monotonic() + seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.monotonic() < end:
            streams = rude and number % 2 == 0
            leaves = rude and number % 5 == 0 and draw.random() < 0.3
            try:
                pause = ask(connection, seen, draw, args, streams=streams or leaves, leaves=leaves)
            except (OSError, http.client.HTTPException) as error:
                seen.note(type(error).__name__, 0.0)
                connection.close()
                pause = 0.0
            time.sleep(min(pause, max(end - time.monotonic(), 0.0)))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def ask(
    connection: http.client.HTTPConnection,
    seen: Seen,
    draw: random.Random,
    args: argparse.Namespace,
    *,
    streams: bool,
    leaves: bool,
) -> float:
    """One request; how long to wait before the next, as the server says."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))}],
        "max_tokens": args.tokens,
        "guidance": {"mode": args.guidance},
        "seed": draw.randrange(10**6),
        "stream": streams,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        answer.read()
        seen.note(str(answer.status), time.perf_counter() - began)
        return float(answer.headers.get("Retry-After", 0))
    if not streams:
        usage = json.loads(answer.read())["usage"]
        seen.note("200", time.perf_counter() - began, usage["completion_tokens"])
        return 0.0
    first, usage, whole = None, None, False
    for line in answer:
        text = line.decode().strip().removeprefix("data: ")
        if not text:
            continue
        if text == "[DONE]":
            whole = True
            continue
        event = json.loads(text)
        if "error" in event:
            seen.note(f"event {event['error']['code']}", 0.0)
            return 0.0
        usage = event.get("usage") or usage
        if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - began
            if leaves:
                connection.close()
                seen.note("left", 0.0, first=first)
                return 0.0
    status = "200" if whole and usage is not None else "stream cut off"
    seen.note(status, time.perf_counter() - began, usage["completion_tokens"] if usage else 0, first)
    return 0.0


def under_load(there: There, args: argparse.Namespace) -> dict[str, Any]:
    """Many clients at once, and what the server's process holds meanwhile and afterwards."""
    memory: list[tuple[float, float]] = []
    process = Path(f"/proc/{there.process.pid}")
    stop = threading.Event()

    def watch() -> None:
        began = time.monotonic()
        while not stop.wait(0.5):
            pages = int((process / "statm").read_text().split()[1])
            memory.append((time.monotonic() - began, pages * 4096 / 2**20))

    clients(there.port, args.clients, 2.0, args, rude=True)  # what is made at the first load is no leak
    before = len(list((process / "fd").iterdir()))
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    seen = clients(there.port, args.clients, args.seconds, args, rude=True)
    spent = time.perf_counter() - began
    stop.set()
    watcher.join()
    left = -1
    for _ in range(100):  # those who hung up last are noticed at the next step
        connection = http.client.HTTPConnection("127.0.0.1", there.port, timeout=10)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        left = next(int(float(line.split()[1])) for line in lines if line.startswith("coala_replies_in_hand "))
        if left == 0:
            break
        time.sleep(0.05)
    # Memory is tidied every few seconds: what stays is the lowest of each such while.
    at, size = np.array([min(memory[i : i + 14], key=lambda row: row[1]) for i in range(0, len(memory), 14)]).T
    allowed = {"200", "429", "left"}
    return {
        "clients": args.clients,
        "seconds": round(spent, 1),
        "statuses": dict(seen.statuses),
        "errors": sum(count for status, count in seen.statuses.items() if status not in allowed),
        "requests_per_second": round(seen.statuses["200"] / spent, 1),
        "tokens_per_second_load": round(seen.tokens / spent, 1),
        "p50_seconds": quantile(seen.seconds, 0.5),
        "p95_seconds": quantile(seen.seconds, 0.95),
        "p95_first_text": quantile(seen.first, 0.95),
        "memory_mb": [round(float(one), 1) for one in size],
        "memory_mb_per_minute": round(60 * float(np.polyfit(at, size, 1)[0]), 2) if len(at) > 2 else None,
        "descriptors": [before, len(list((process / "fd").iterdir()))],
        "left_in_hand": left,
    }


def quantile(values: list[float], share: float) -> dict[str, float]:
    """A quantile with the 95 % interval of its order statistics (binomial)."""
    from scipy.stats import binom

    ordered, n = sorted(values), len(values)
    if not n:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    low, high = (min(max(int(binom.ppf(q, n, share)) - 1 + up, 0), n - 1) for q, up in ((0.025, 0), (0.975, 1)))
    found = {"value": float(np.quantile(ordered, share)), "low": ordered[low], "high": ordered[high]}
    return {name: round(value, 3) for name, value in found.items()} | {"n": n}


def ratio(many: list[float], few: list[float], draws: int = 2000) -> dict[str, float]:
    """Ratio of the mean rates, with a bootstrap interval over rounds (which are pairs)."""
    rates = np.array([many, few])
    draw = np.random.default_rng(0)
    rows = draw.integers(0, rates.shape[1], size=(draws, rates.shape[1]))
    ratios = rates[0][rows].mean(1) / rates[1][rows].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(rates[0].mean() / rates[1].mean())
    return {"value": round(value, 2), "low": round(float(low), 2), "high": round(float(high), 2), "n": rates.shape[1]}


if __name__ == "__main__":
    main()
