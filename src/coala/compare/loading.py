"""A study read from YAML: bundled or the user's own, one laid over another, its paths resolved."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coala.compare.study import Study
from coala.documents import DocumentError, parse_yaml
from coala.messages import joined, sentences
from coala.recipe import RecipeError, overlay

STUDIES = Path(str(files("coala") / "recipes" / "studies"))
ASSETS = Path(str(files("coala") / "assets"))


def bundled() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("[!_]*.yaml"))


def load_study(name: str | Path, data: Path | None = None, overrides: list[dict[str, Any]] | None = None) -> Study:
    """The study of a YAML file or a bundled one's name; paths are resolved.

    ``assets:X`` is what the package bundles, ``data:X`` lies in the folder ``data``, other paths are relative to the
    working directory. Raises :class:`~coala.recipe.RecipeError`.
    """
    path = Path(name)
    if not path.is_file():
        inside = STUDIES / f"{path.name.removesuffix('.yaml')}.yaml"
        if not inside.is_file():
            raise RecipeError(f"{name}: found no such file or bundled study; bundled are {', '.join(bundled())}.")
        path = inside
    document = _extended(_mapping(path), path)
    for above in overrides or []:
        document = overlay(document, above, nulls=True)
    return study_of(document, str(path), data)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DocumentError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML ({error}). See `coala compare --help`.") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: holds {type(document).__name__}; expected a mapping with title, models, ...")
    return document


def _extended(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """``extends: NAME`` is laid under the rest; ``use`` keeps only the models, datasets and methods it names."""
    base, use = document.pop("extends", None), document.pop("use", None) or {}
    if base is None:
        return document
    beside = path.parent / f"{base}.yaml"
    whole = overlay(_mapping(beside if beside.is_file() else STUDIES / f"{base}.yaml"), document, nulls=True)
    for name in ("models", "datasets"):
        if name in use:
            _all_known(use[name], whole[name], name, path)
            whole[name] = {key: whole[name][key] for key in use[name]}
    if "datasets" in use:
        whole["methods"] = [_kept_to(method, use["datasets"]) for method in whole["methods"]]
        whole["methods"] = [method for method in whole["methods"] if method.get("datasets") != []]
    if "methods" in use:
        there = {method["name"]: method for method in whole["methods"]}
        _all_known(use["methods"], there, "methods", path)
        whole["methods"] = [there[name] for name in use["methods"]]
    return whole


def _kept_to(method: dict[str, Any], datasets: list[str]) -> dict[str, Any]:
    """A method without the datasets that are not used."""
    if not method.get("datasets"):
        return method
    return {**method, "datasets": [name for name in method["datasets"] if name in datasets]}


def _all_known(wanted: list[str], there: dict[str, Any], name: str, path: Path) -> None:
    unknown = sorted(set(wanted) - set(there))
    if unknown:
        raise RecipeError(f"{path}: use.{name} names {', '.join(unknown)}; there are {', '.join(there)}.")


def study_of(document: dict[str, Any], source: str = "study", data: Path | None = None) -> Study:
    """A study from a plain document; the boundary where settings are checked."""
    try:
        study = Study.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{source}: invalid settings: {joined(sentences(error.errors(), Study))}") from None

    def located(name: str) -> str:
        prefix, colon, rest = name.partition(":")
        if colon and prefix == "assets":
            return str(ASSETS / rest)
        if colon and prefix == "data":
            return str(((data or Path("../shared/data")) / rest).resolve())
        return str(Path(name).resolve()) if Path(name).exists() else name

    models = {key: model.model_copy(update={"path": located(model.path)}) for key, model in study.models.items()}
    datasets = {
        key: dataset.model_copy(
            update={
                "pairs": tuple(map(located, dataset.pairs)),
                "test": tuple(map(located, dataset.test)),
                "judge": dataset.judge and located(dataset.judge),
                "labeller": dataset.labeller and located(dataset.labeller),
                "sampled": dataset.sampled
                and dataset.sampled.model_copy(
                    update={
                        "prompts": located(dataset.sampled.prompts),
                        "labeller": located(dataset.sampled.labeller),
                    }
                ),
                "benchmarks": {
                    name: benchmark.model_copy(
                        update={
                            "path": located(benchmark.path),
                            "scores": benchmark.scores and located(benchmark.scores),
                        }
                    )
                    for name, benchmark in dataset.benchmarks.items()
                },
            }
        )
        for key, dataset in study.datasets.items()
    }
    return study.model_copy(update={"models": models, "datasets": datasets})
