"""The settings of an alignment run: one validated object, read from YAML and overridden by flags.

The settings themselves are in ``coala.settings``; here is what holds between them. Knows nothing of how a setting is
carried out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from coala.documents import DocumentError, parse_yaml
from coala.messages import Place, joined, sentences
from coala.permission import CODE_FLAG, permission
from coala.settings import (
    DistilSettings,
    EvaluationSettings,
    GuidanceSettings,
    HeadSettings,
    ModelSettings,
    PairSettings,
    flags,
)
from coala.values import CoalaError


class RecipeError(CoalaError):
    """A recipe that cannot be read or holds a setting that does not exist or fit."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Recipe(PairSettings):
    """Everything that decides the outcome of ``coala align``; checked where it is made."""

    model: ModelSettings
    head: HeadSettings = HeadSettings()
    guidance: GuidanceSettings = GuidanceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    distil: DistilSettings = DistilSettings()

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        head, model = self.head, self.model
        if self.guidance.budget is not None and self.guidance.mode != "shift":
            raise ValueError(f"guidance.budget belongs to guidance.mode shift; found {self.guidance.mode}")
        if self.guidance.over == "distilled" and self.guidance.mode == "none":
            raise ValueError("guidance.over distilled needs a guidance.mode that guides; found none")
        _agree(head)
        if head.gate_on == "prompt" and model.prompt_features is False:
            raise ValueError("head.gate_on prompt needs model.prompt_features, which is false")
        if head.reference_scale is not None and model.log_ratios is False:
            raise ValueError("head.reference_scale needs model.log_ratios, which is false")
        if self.log_ratios and model.prefixes > 1:
            raise ValueError(
                f"log ratios (head.reference_scale, model.log_ratios) are of whole replies, and model.prefixes is "
                f"{model.prefixes}; leave one of them out"
            )
        return self

    @property
    def prompt_features(self) -> bool:
        """Whether prompts are encoded too: as the model's settings say, else where gates are asked to look at them."""
        asked = self.model.prompt_features
        return self.head.gate_on in ("auto", "prompt") if asked is None else asked

    @property
    def log_ratios(self) -> bool:
        """Whether log ratios are computed: as the model's settings say, else where the head's loss needs them."""
        asked = self.model.log_ratios
        return self.head.reference_scale is not None if asked is None else asked

    def located(self) -> Recipe:
        """The same recipe with local paths made absolute, so that it means the same from any folder."""

        def absolute(name: str) -> str:
            return str(Path(name).resolve()) if Path(name).exists() else name

        def judge(named: str) -> str:
            kind, _, rest = named.partition(":")
            return f"{kind}:{absolute(rest)}" if rest and kind in ("head", "words") else absolute(named)

        judges: dict[str, Any] = {
            k: judge(v) for k in ("judge", "labeller") if (v := getattr(self.evaluation, k)) is not None
        }
        adapter = self.model.adapter and absolute(self.model.adapter)
        return replace(
            self,
            pairs=tuple(map(absolute, self.pairs)),
            eval_pairs=tuple(map(absolute, self.eval_pairs)),
            model=replace(self.model, name=absolute(self.model.name), adapter=adapter),
            evaluation=replace(self.evaluation, **judges),
        )

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: nested mappings, lists, texts and numbers; :func:`recipe_of` reads it."""
        found: dict[str, Any] = _RECIPE.dump_python(self, mode="json")
        return found


_RECIPE = TypeAdapter(Recipe)


def _agree(head: HeadSettings) -> None:
    if head.paper and head.method != "two-phase":
        raise ValueError(f"head.paper is a setting of head.method two-phase; found {head.method}")
    if head.gate_on == "prompt" and head.method in ("two-phase", "linear"):
        raise ValueError(f"head.gate_on prompt needs head.method learnt or direct; found {head.method}")


def check_head(head: HeadSettings) -> HeadSettings:
    """The settings as they were given; :class:`RecipeError` for those that no recipe could hold."""
    try:
        _agree(head)
        return TypeAdapter(HeadSettings).validate_python(head)
    except ValidationError as error:
        told = sentences(error.errors(), HeadSettings, name=lambda place: _named(("head", *place)))
        raise RecipeError(joined(told)) from None
    except ValueError as error:
        raise RecipeError(f"{error}.") from None


def load_recipe(path: Path | None, *overrides: dict[str, Any]) -> Recipe:
    """Read YAML (or nothing) and lay each of ``overrides`` (nested; ``None`` leaves out) over it, the last on top."""
    document: Any = {}
    if path is not None:
        try:
            document = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML recipe.") from None
        except (DocumentError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: is {error}. See `coala align --help` for an example.") from None
        if not isinstance(document, dict):
            raise RecipeError(f"{path}: holds {type(document).__name__}; expected a mapping such as `pairs: [FILE]`.")
        for name in ("pairs", "eval_pairs"):
            if isinstance(document.get(name), str):
                document[name] = [document[name]]
    own = document.get("model")
    asks = isinstance(own, dict) and bool(own.get("trust_remote_code"))
    for above in overrides:
        document = overlay(document, above)
    recipe = recipe_of(document, path)
    given = [above["model"]["trust_remote_code"] for above in overrides if _says(above)]
    if asks and path is not None and recipe.model.trust_remote_code and not any(given):
        refuse_asked_code(True, path)
    return recipe


def _says(above: dict[str, Any]) -> bool:
    model = above.get("model")
    return isinstance(model, dict) and model.get("trust_remote_code") is not None


def refuse_asked_code(asked: bool, source: Path) -> None:
    """Refuse a file that asks for a model's Python code to be run, unless this invocation allows that."""
    if asked and not permission().code:
        raise RecipeError(
            f"{source}: sets model.trust_remote_code, which runs Python code that comes with the model; a file cannot "
            f"allow that. Fix: read that code, then pass {CODE_FLAG} (in Python: trust_remote_code=True)."
        )


def recipe_of(document: Any, source: Path | None = None) -> Recipe:
    """A recipe from a plain document; the boundary where settings are checked."""
    try:
        return _RECIPE.validate_python(document)
    except ValidationError as error:
        told = f"{source}: " if source else ""
        faults = [_HOW_TO_GIVE.get(fault, fault) for fault in sentences(error.errors(), Recipe, name=_named)]
        if len(faults) > 1:
            raise RecipeError(f"{told}invalid settings:\n" + "\n".join(f"  {fault}" for fault in faults)) from None
        raise RecipeError(told + joined(faults)) from None


FLAGS = flags()
_MODEL_MISSING = "--model is missing. Give a model folder or hub name, such as --model ./my-model."
_HOW_TO_GIVE = {
    "model is missing": _MODEL_MISSING,
    "model.name (--model) is missing": _MODEL_MISSING,
    "pairs is missing": "The pairs are missing. Name a file of preference pairs, such as `coala align pairs.jsonl`.",
}


def _named(place: Place) -> str:
    """A setting as people give it: its name, and its flag if it has one."""
    name = ".".join(map(str, place))
    return f"{name} ({FLAGS[name]})" if name in FLAGS else name


def overlay(base: dict[str, Any], above: dict[str, Any], *, nulls: bool = False) -> dict[str, Any]:
    """``above`` laid over ``base``, mapping by mapping; what is ``None`` in it leaves out, or is laid over too."""
    merged = dict(base)
    for key, value in above.items():
        if isinstance(value, dict):
            inner = merged.get(key)
            merged[key] = overlay(inner if isinstance(inner, dict) else {}, value, nulls=nulls)
        elif nulls or value is not None:
            merged[key] = value
    return merged


def set_option(text: str) -> dict[str, Any]:
    """``a.b=value`` as a nested mapping; the value is read as YAML, so numbers and lists work."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected NAME=VALUE, for example --set guidance.strength=3.")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}: {value!r} is not YAML: {getattr(error, 'problem', error)}.") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return dict(nested)
