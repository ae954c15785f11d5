"""What a person meets in `coala live`: milliseconds from a click to the next pair, and clicks lost or doubled by kills.

    python benchmarks/live_session.py                    # both parts, on the bundled film model
    python benchmarks/live_session.py --clicks 300 --kills 0
    python benchmarks/live_session.py --clicks 0 --kills 100

The command runs in a process of its own, and this program clicks over HTTP as the page does. ``clicks``: from sending
a verdict to holding the next pair, where one was ready. ``kills``: SIGKILL at a moment drawn evenly from a start,
loading and recovering included, to some seconds after its first pair, while clicks are sent as fast as they are
answered; what got no answer is sent again after the restart, as the page does. Then the journal is compared with what
was acknowledged. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from coala.live.journal import read_journal
from coala.statistics.intervals import wilson

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
GONE = (OSError, ValueError, urllib.error.URLError)  # the server was killed before or within its answer
POLL = 0.02  # seconds
TAKES = 60  # seconds for an answer, before the run counts as hung


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "film-lm"))
    parser.add_argument("--prompts", type=Path, default=ASSETS / "film_pairs.jsonl.gz")
    parser.add_argument("--tokens", type=int, default=16, help="of a reply")
    parser.add_argument("--ask", default="active", help="active does the most work for each pair")
    parser.add_argument("--clicks", type=int, default=300)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds before each click; people take longer")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--within", type=float, default=3.0, help="seconds after a first pair that kills reach to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.clicks:
            found["clicks"] = clicks(Server(args, Path(folder) / "clicks"), args.clicks, args.pause)
        if args.kills:
            found["kills"] = kills(Server(args, Path(folder) / "kills"), args.kills, args.within, args.seed)
    print(json.dumps(found))


class Server:
    """`coala live` on a folder, and the owner's page of it."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.out, self.page = out, ""
        self._command = [sys.executable, "-m", "coala", "live", "--model", args.model, "--prompts", str(args.prompts)]
        self._command += ["--out", str(out), "--port", self.url.rsplit(":", 1)[1], "--ask", args.ask]
        self._command += ["--max-new-tokens", str(args.tokens), "--template", "chat", "--replies", "8"]

    def start(self) -> None:
        with self.out.with_name(f"{self.out.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        if not self.page:
            self.page = urllib.request.urlopen(f"{self.url}/", timeout=TAKES).url
        request = urllib.request.Request(self.page + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return json.load(urllib.request.urlopen(request, timeout=TAKES))

    def state(self, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """What the page shows, once it is ``ready``; None if the server was killed meanwhile."""
        while self.process.poll() is None:
            with suppress(*GONE):
                if ready(state := self.call("/state")):
                    return dict(state)
            time.sleep(POLL)
        if self.process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the server ended with {self.process.returncode}: see {self.out}.log")
        return None

    def question(self) -> dict[str, Any] | None:
        """The next pair, once one is ready; None if the server was killed meanwhile."""
        state = self.state(lambda shown: shown["question"] is not None)
        return state and dict(state["question"])


def verdict(asked: dict[str, Any], name: str) -> dict[str, Any]:
    """A click of a rater who prefers the shorter reply."""
    better = "first" if len(asked["first"]) < len(asked["second"]) else "second"
    return {"question": asked["id"], "click": name, "verdict": better}


def clicks(server: Server, n: int, pause: float) -> dict[str, Any]:
    """Milliseconds from sending a verdict to holding the next pair; answers without a pair ready are counted apart."""
    server.start()
    took: list[float] = []
    waited = 0
    asked = server.question()
    while len(took) < n and asked is not None:
        time.sleep(pause)
        said = verdict(asked, f"click-{len(took) + waited}")
        began = time.perf_counter()
        asked = server.call("/answer", said)["question"]
        seconds = time.perf_counter() - began
        if asked is None:
            waited += 1
            asked = server.question()
        else:
            took.append(1000 * seconds)
    server.process.terminate()
    server.process.wait(TAKES)
    p50, p95, most = (float(np.quantile(took, q)) for q in (0.5, 0.95, 1.0))
    print(f"from a click to the next pair, {len(took)} clicks: p50 {p50:.1f} ms, p95 {p95:.1f} ms, most {most:.1f} ms;")
    print(f"no pair was ready after {waited} more")
    return {"n": len(took), "p50_ms": p50, "p95_ms": p95, "most_ms": most, "not_ready": waited}


@dataclass
class Clicks:
    """What the page knows: clicks that were acknowledged, by question, and one that was sent and not answered yet."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    pending: dict[str, Any] | None = None
    sent: int = 0


def kills(server: Server, n: int, within: float, seed: int) -> dict[str, Any]:
    """The server killed ``n`` times; then its journal beside what was acknowledged."""
    rng = np.random.default_rng(seed)
    began = time.perf_counter()
    server.start()
    server.question()
    loading = time.perf_counter() - began
    server.process.kill()
    server.process.wait(TAKES)
    known, when = Clicks(), Counter[str]()
    for _ in range(n):
        before = len(known.acknowledged)
        server.start()
        killer = threading.Timer(float(rng.uniform(0, loading + within)), server.process.kill)
        killer.start()
        unheard = _click_until_killed(server, known)
        killer.join()
        server.process.wait(TAKES)
        served = len(known.acknowledged) > before
        when["with a click on its way" if unheard else "between clicks" if served else "before it served"] += 1
    server.start()
    server.state(lambda shown: True)
    if known.pending is not None:
        _send(server, known)
    server.process.terminate()
    server.process.wait(TAKES)
    raw = (server.out / "live" / "journal.jsonl").read_bytes()
    kept = {name: one.click for name, one in read_journal(raw).answered.items()}
    lines = Counter(json.loads(line).get("click") for line in raw.splitlines() if b'"answered"' in line)
    lost = sum(kept.get(question) != click for question, click in known.acknowledged.items())
    doubled = sum(many > 1 for many in lines.values()) + len(set(kept) - set(known.acknowledged))
    total = len(known.acknowledged)
    least, most = wilson((lost + doubled) / max(total, 1), max(total, 1))
    moments = ", ".join(f"{many} {name}" for name, many in sorted(when.items()))
    print(f"{n} kills ({moments}), {total} clicks acknowledged:")
    print(f"lost {lost}, doubled {doubled} ({100 * least:.1f} to {100 * most:.1f} % of clicks, Wilson 95 %)")
    return {"kills": n, **dict(when), "clicks": total, "lost": lost, "doubled": doubled}


def _click_until_killed(server: Server, known: Clicks) -> bool:
    """Clicks as fast as they are answered; True if the kill came while one was on its way."""
    while server.process.poll() is None:
        if known.pending is None:
            asked = server.question()
            if asked is None:
                return False
            known.pending = verdict(asked, f"click-{known.sent}")
            known.sent += 1
        try:
            _send(server, known)
        except GONE:
            if server.page and server.process.poll() is not None:
                return True
            time.sleep(POLL)  # still loading
    return known.pending is not None


def _send(server: Server, known: Clicks) -> None:
    assert known.pending is not None
    server.call("/answer", known.pending)
    known.acknowledged[known.pending["question"]] = known.pending["click"]
    known.pending = None


if __name__ == "__main__":
    main()
