"""What each extra of the package costs to install and what it enables, as a table in Markdown.

    python scripts/extras_table.py                       # every extra; minutes, and a few GB in build/extras
    python scripts/extras_table.py gguf style            # only these
    python scripts/extras_table.py --write docs/extras.md

The core goes into an environment of its own; each extra is then resolved there and only what it adds is installed, into
an empty folder. Sizes are of what was unpacked, seconds those of one installation from this machine's package source.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENABLES = {
    "hub": "data sets of the Hub as pairs: `coala align owner/name`",
    "adapters": "models with a LoRA adapter: `--adapter`",
    "parquet": "pairs in parquet files",
    "offload": "models larger than memory: `--device offload`",
    "quantise": "weights in 4 or 8 bits: `--quantise`",
    "gguf": "GGUF files as models; `coala demo chat`; `coala distil --to gguf`",
    "liblinear": "AlpacaEval's own fit: `--stopping liblinear`",
    "lm-eval": "`coala bench lm-eval`",
    "style": "faults of grammar in `coala demo chat`",
    "serve": "`coala serve`, `coala live`, `coala survey serve`",
    "baselines": "`coala compare`, `coala comal train`: training through TRL",
    "ray": "extraction by Ray's workers",
    "inspect": "a run as a model of Inspect AI: `inspect eval TASK --model coala/RUN`",
    "trackio": "`--track trackio`",
    "wandb": "`--track wandb`",
    "mlflow": "`--track mlflow`",
    "docs": "these pages: `make docs`",
}
NOT_SHOWN = ("dev",)


def extras() -> list[str]:
    """The extras of the package that users install."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [name for name in declared if name not in NOT_SHOWN]


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def pip(python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def core(folder: Path) -> tuple[Path, str, str]:
    """An environment with the package and no extra, its row, and the version of torch in it."""
    began = time.monotonic()
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    bare = size(folder)
    pip(python, "install", str(ROOT))
    listed = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format=json"]))
    told = f"| (none) | {len(listed) - 2} | {(size(folder) - bare) / 1e6:.0f} | {time.monotonic() - began:.0f} |"
    torch = next(one["version"] for one in listed if one["name"] == "torch")
    return python, f"{told} `coala demo`, `align`, `generate`, `chat`, `eval`, `export` |", torch


def row(python: Path, extra: str, folder: Path) -> str:
    """What ``extra`` adds to the environment of ``python``."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "resolved.json"
    pip(python, "install", "--dry-run", "--report", str(report), f"coala-align[{extra}] @ file://{ROOT}")
    found = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    names = [f"{one['name']}=={one['version']}" for one in found if one["name"].lower() != "coala-align"]
    target = folder / "added"
    began = time.monotonic()
    if names:
        pip(python, "install", "--no-deps", "--target", str(target), *names)
    seconds = time.monotonic() - began
    added = size(target) / 1e6 if names else 0.0
    return f"| `{extra}` | {len(names)} | {added:.0f} | {seconds:.0f} | {ENABLES[extra]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", help="the extras to try (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "extras")
    parser.add_argument("--write", type=Path, help="the file to write the page to (default: print it)")
    given = parser.parse_args()
    known = extras()
    if unknown := set(given.extras) - set(known):
        raise SystemExit(f"found {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    python, first, torch = core(given.work / "core")
    rows = [first, *(row(python, extra, given.work / extra) for extra in given.extras or known)]
    version = ".".join(map(str, sys.version_info[:2]))
    page = [
        "# Extras",
        "",
        "`pip install 'coala-align[NAME]'` adds packages to the core; several names go with commas between them.",
        "",
        "| extra | packages | MB | seconds | what it enables |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Measured by `scripts/extras_table.py` with Python {version}: packages and MB beyond the core, seconds of one "
        f"installation. The first row is the core itself, most of it torch {torch}; a build for CUDA is larger.",
        "",
    ]
    text = "\n".join(page)
    if given.write:
        given.write.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
