"""What the tests of evaluation share: replies, files of rows, commands run to their JSON line, and a small run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from coala.recipe import load_recipe
from coala.store import RunFolder, save_head
from coala.values import ConvexHead, Generation

from .menagerie import tiny_backbone


def reply(prompt_id: str, text: str, method: str = "ours", seed: int = 0) -> Generation:
    return Generation(prompt_id, text, method, 1, seed, math.nan, 0.0)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def called(app: typer.Typer, *arguments: object, code: int = 0, **environment: str) -> tuple[dict[str, Any], str, str]:
    """The JSON line of a command, the tables above it, and stderr."""
    found = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False, env=environment)
    assert found.exit_code == code, found.output
    *lines, last = found.stdout.splitlines()
    result = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return result, "\n".join(lines), found.stderr


def small_run(folder: Path, *, seed: int = 0) -> Path:
    """A run of a tiny random model with a random linear head, as `coala align` leaves it before it writes replies."""
    from coala.backbone import load_backbone

    model = load_backbone(tiny_backbone("llama", folder / "model"), device="cpu")
    settings = {"pairs": ["x"], "model": {"name": model.name, "device": "cpu"}, "evaluation": {"max_new_tokens": 6}}
    made = RunFolder(folder / "run")
    made.start(load_recipe(None, settings, {}).plain())
    none = np.zeros((0, model.width + 1))
    save_head(
        made.path / "head",
        ConvexHead(none, none, np.random.default_rng(seed).normal(size=model.width + 1), model.spec()),
    )
    return made.path
