"""What XLA compiles for one run, kept for the next, which then fits a head on as many pairs several times faster.

JAX keeps the programs in a folder of the user's cache, one for each kind of processor, for what is compiled for one
may not run on another. JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false none.
"""

from __future__ import annotations

import os
import platform
import warnings
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

MOST_BYTES = 256 * 2**20


def keep_compiled() -> None:
    """Set JAX's variables for this process and those it starts, unless they are set; does nothing without a place."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_folder()
        above = next(place for place in (folder, *folder.parents) if place.exists())
    except (OSError, RuntimeError):  # no home, or one that may not be looked into
        return
    if not (above.is_dir() and os.access(above, os.W_OK)):
        return
    _prune(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Many small programs, not a few large ones, are what a fit waits for.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # A file of which a killed process wrote half is compiled anew; nobody need be told of it each time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def cache_folder() -> Path:
    """Where programs for this processor are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    about = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return Path(home) / "coala" / "xla" / sha256(about.encode()).hexdigest()[:16]


def _prune(folder: Path) -> None:
    """Delete the oldest files of ``folder`` until it is half full, if it is over full."""
    with suppress(OSError):
        found = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder))
        total = sum(size for _, size, _ in found)
        if total <= MOST_BYTES:
            return
        for _, size, path in found:
            with suppress(OSError):
                os.unlink(path)
            total -= size
            if total <= MOST_BYTES // 2:
                return
