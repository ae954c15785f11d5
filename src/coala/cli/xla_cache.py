"""What XLA compiles for one run, kept for the next, which then fits a head on as many pairs several times faster.

JAX keeps the programs in a folder of the user's cache, one for each kind of processor, for what is compiled for one
may not run on another. It writes them in place and never over a file that is there: one that a killed process left
half written would be compiled again in every run, so it is found and deleted here, and then replaced.
JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false none.
"""

from __future__ import annotations

import os
import platform
import warnings
import zlib
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

MOST_BYTES = 256 * 2**20
# Its time is that of the last look: what was written since, or in the same moment, is looked at next time.
LOOKED = ".looked"
_ZSTD = b"\x28\xb5\x2f\xfd"


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
    _drop_broken(folder)
    _prune(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    # Many small programs, not a few large ones, are what a fit waits for.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # What cannot be read or written all the same is compiled again; nobody need be told of it each time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def cache_folder() -> Path:
    """Where programs for this processor are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    about = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return Path(home) / "coala" / "xla" / sha256(about.encode()).hexdigest()[:16]


def _drop_broken(folder: Path) -> None:
    """Delete programs written since the last look that are not whole; what is still being written is compiled again."""
    with suppress(OSError):
        mark = folder / LOOKED
        since = mark.stat().st_mtime_ns if mark.exists() else 0
        found = [entry for entry in os.scandir(folder) if entry.name.endswith("-cache")]
        newer = [entry for entry in found if entry.stat().st_mtime_ns >= since]
        if not newer:
            return
        latest = max(entry.stat().st_mtime_ns for entry in newer)
        for entry in newer:
            if not _is_whole(Path(entry.path)):
                with suppress(OSError):
                    os.unlink(entry.path)
        mark.touch()
        os.utime(mark, ns=(latest, latest))


def _is_whole(path: Path) -> bool:
    """Whether a program unpacks as JAX would unpack it."""
    try:
        data = path.read_bytes()
        if data.startswith(_ZSTD):
            unpack = _zstd()
            return unpack is None or bool(unpack(data))
        return bool(zlib.decompress(data))
    except Exception:  # noqa: BLE001  each library has an error of its own for what is broken
        return False


def _zstd() -> Any:
    """What unpacks zstd here, if anything does."""
    with suppress(ImportError):
        from compression import zstd  # type: ignore[import-not-found]

        return zstd.decompress
    with suppress(ImportError):
        import zstandard  # type: ignore[import-not-found]

        return zstandard.ZstdDecompressor().decompress
    return None


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
