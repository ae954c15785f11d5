"""A tiny run and servers of it, for tests and the benchmark: in a thread of this process, or `coala serve` itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from coala.backbone import LanguageModel, load_backbone
from coala.decoding import Guidance
from coala.recipe import load_recipe
from coala.serve import Limits
from coala.store import RunFolder, save_head
from coala.values import ConvexHead

from .menagerie import tiny_backbone
from .waiting import PATIENCE, skip, wait_for

CONTEXT = 16384


def tiny_model(folder: Path, **settings: int) -> Path:
    """A random GPT-2 with a real tokenizer and room for long replies; ``settings`` of its shape.

    Its stop token is never among the 50 likeliest, so that a reply is as long as a test wants it.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny_backbone("gpt2", folder)
    config = GPT2Config.from_pretrained(folder)
    config.update({"n_positions": CONTEXT, **settings})
    import torch

    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight[config.eos_token_id] = 0.0  # a logit of 0, which is the middle
    model.save_pretrained(folder)
    return folder


def tiny_run(folder: Path, name: str = "tiny", gates: int = 0, **settings: int) -> Path:
    """A run folder as `coala align` leaves it, with a head of random weights; ``gates`` of them act on the prompt."""
    model = load_backbone(tiny_model(folder / "model", **settings), device="cpu")
    settings_of_run = {"pairs": ["x"], "model": {"name": model.name, "device": "cpu"}, "guidance": {"mode": "token"}}
    recipe = load_recipe(None, settings_of_run, {})
    made = RunFolder(folder / name)
    made.start(recipe.plain())
    draw = np.random.default_rng(0)
    many, width = (gates, model.width + 1), model.width + 1
    head = ConvexHead(draw.normal(size=many), draw.normal(size=many), draw.normal(size=width), model.spec(2), "prompt")
    save_head(made.path / "head", head)
    return made.path


class Here:
    """The server in a thread of this process, so that a test can look at its worker."""

    def __init__(
        self,
        backbone: LanguageModel,
        head: ConvexHead,
        limits: Limits | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        system: str | None = None,
        **options: Any,
    ) -> None:
        from coala.serve.app import Served, create_app
        from coala.web.listening import listen, server

        limits = limits or Limits()
        self.served = Served("tiny", backbone, head, guidance or Guidance(), temperature, system)
        self.app = create_app(self.served, limits, **options)
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self._server = server(self.app, head_time=limits.head_time, read_time=limits.read_time, grace=limits.grace)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Here:
        self._thread.start()
        wait_for(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not end"
        self._socket.close()

    def skip(self, seconds: float) -> None:
        """Move the clock of the server's event loop: whatever waits for that moment or an earlier one is due."""
        skip(self.worker._loop, seconds)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def worker(self) -> Any:
        return self.app.state.observed.worker


class There:
    """`coala serve` in a process of its own."""

    def __init__(self, run: Path, *options: str, **environment: str) -> None:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._command = [sys.executable, "-m", "coala", "serve", str(run), "--port", str(self.port), *options]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._log = run.parent / f"server-{self.port}.log"

    def __enter__(self) -> There:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
            )

        def answers() -> bool:
            assert self.process.poll() is None, self.log
            with suppress(OSError):
                return urllib.request.urlopen(f"{self.url}/healthz", timeout=PATIENCE).status == 200
            return False

        wait_for(answers)
        return self

    def end(self, sig: int = signal.SIGTERM) -> dict[str, Any]:
        """Send the signal, wait, and return what the command printed last."""
        self.process.send_signal(sig)
        said = self.process.communicate(timeout=PATIENCE)[0]
        assert self.process.returncode == 0, (self.process.returncode, self.log)
        last: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return last

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text()
