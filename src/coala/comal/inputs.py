"""What the commands of `coala comal` are given, turned into values: models or runs, and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coala.comal.oracles import Example

# --- runs --------------------------------------------------------------------------------------------------------


def kind_of_run(path: Path) -> str | None:
    """``comal``, ``baseline`` or ``coala`` for a run folder, None for anything else."""
    if not (path / "run.json").is_file():
        return None
    from coala.store import RunFolder

    settings = RunFolder.open(path).settings
    if settings.get("command") == "comal":
        return "comal"
    return "baseline" if "baseline" in settings else "coala" if "pairs" in settings else None


@dataclass(frozen=True)
class Start:
    """The model that training starts from; ``run`` is the COALA run that named it, if one did."""

    model: str
    revision: str | None = None
    template: str = "auto"
    run: Path | None = None


def start_of(model: str) -> Start:
    """A model folder, a hub name, a COALA run (its model) or a finished COMAL run (its last policy)."""
    from coala.values import CoalaError

    path = Path(model).expanduser()
    kind = kind_of_run(path)
    if kind == "comal":
        return Start(str(whole_model(path)))
    if kind == "baseline":
        raise CoalaError(f"{path}: is the folder of a baseline. Fix: pass the model in it: {path / 'model'}.")
    if kind == "coala":
        from coala.recipe import recipe_of
        from coala.store import RunFolder

        recipe = recipe_of(RunFolder.open(path).settings, path / "run.json").model
        if recipe.adapter or recipe.quantise:
            raise CoalaError(
                f"{path}: its model has an adapter or is quantised, and COMAL trains whole weights or an adapter of "
                "its own. Merge and save it, and give that folder with --oracle head:RUN."
            )
        return Start(_located(recipe.name), recipe.revision, recipe.template, path)
    if path.is_dir() and (path / "run.json").is_file():
        raise CoalaError(f"{path}: is a run folder of another command; expected a model, or a run of align or comal.")
    return Start(_located(model))


def whole_model(run: Path) -> Path:
    """The model folder a COMAL run left; refused when it is not there yet, or is an adapter."""
    from coala.values import CoalaError

    model = run / "model"
    if (model / "adapter_config.json").is_file():
        raise CoalaError(f"{model}: is an adapter. Fix: merge it into its model, save the result and start from that.")
    if not (model / "config.json").is_file():
        raise CoalaError(f"{run}: has no model yet. Fix: rerun its command to resume it.")
    return model


def _located(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


# --- prompts -----------------------------------------------------------------------------------------------------


def examples_of(path: Path) -> list[Example]:
    """Prompts, each once: a .txt of one per line, rows with a "prompt" (text or messages) or pairs of any known format.

    What else a row with a "prompt" holds goes to the oracle with it, except for answers. Raises
    :class:`coala.values.CoalaError` for a file without prompts.
    """
    from coala.values import CoalaError, user

    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CoalaError(
                f"{path}: could not be read ({error}). Fix: pass a text file with one prompt per line."
            ) from None
        found: list[Example] = [{"prompt": user(line)} for line in lines if line.strip()]
    else:
        found = _rows(path)
    distinct = list({repr(sorted(example.items(), key=lambda item: item[0])): example for example in found}.values())
    if not distinct:
        raise CoalaError(f'{path}: found no prompt. Fix: give one per line (.txt), or rows with a "prompt".')
    return distinct


def _rows(path: Path) -> list[Example]:
    from coala.data import DataError, Finding, read_pairs
    from coala.data.files import RowRecord, records
    from coala.data.findings import Fault
    from coala.data.turns import turns
    from coala.values import Turn, user

    answers = {"prompt", "chosen", "rejected", "messages", "completion", "response"}
    found: list[Example] = []
    for event in records(str(path)):
        if isinstance(event, Finding):
            raise DataError([event])
        assert isinstance(event, RowRecord)
        row = event.value
        if not isinstance(row, Mapping) or "prompt" not in row:
            # Not our form: pairs of some known format, or an error that names the row.
            return [{"prompt": pair.prompt} for pair in read_pairs(str(path))]
        said = row["prompt"]
        try:
            prompt: tuple[Turn, ...] = user(said) if isinstance(said, str) else tuple(turns(said, "prompt"))
        except Fault as fault:
            raise DataError([fault.at(event.file, event.row)]) from None
        if not any(turn.text.strip() for turn in prompt):
            raise DataError([Finding(event.file, event.row, "prompt", "an empty prompt", "text", "fill it in")])
        found.append({"prompt": prompt, **{name: value for name, value in row.items() if name not in answers}})
    return found
