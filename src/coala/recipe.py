"""The settings of an alignment run: one validated object, read from YAML and overridden by flags.

Knows names, types and limits; knows nothing of how a setting is carried out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from coala.choices import DTYPES, Dtype, GateOn, Loss, Method, Mode, PhaseOne, Pooling, Quantise, Rule, Template
from coala.documents import DocumentError, parse_yaml
from coala.messages import Place, joined, sentences
from coala.permission import CODE_FLAG, permission
from coala.values import CoalaError


class RecipeError(CoalaError):
    """A recipe that cannot be read or holds a setting that does not exist or fit."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _usual_name(dtype: Any) -> Any:
    return DTYPES.get(dtype.lower(), dtype.lower()) if isinstance(dtype, str) else dtype


class ModelSettings(_Strict):
    """The frozen backbone and what is read from it."""

    name: str = Field(description="local model folder or hub name")
    revision: str | None = None
    template: Template = "auto"
    layer: Annotated[int, Field(ge=-1)] | Literal["auto"] = Field(
        -1, description="hidden state to read; -1 is the last, auto the lowest within one standard error of the best"
    )
    pooling: Pooling = "mean"
    ends_with_eos: bool = False
    max_tokens: int | None = Field(None, ge=2, description="prompt plus reply (default: the model's context)")
    prefixes: int = Field(1, ge=1, description="fit the head on this many prefixes of every reply; 1 is the whole")
    batch_tokens: int = Field(4096, ge=1)
    device: str = Field(
        "auto", description="auto, cpu, cuda, ... or offload: layers that do not fit stay in CPU memory or on disk"
    )
    adapter: str | None = Field(None, description="folder or hub name of a LoRA adapter of the model")
    quantise: Quantise | None = None
    dtype: Annotated[Dtype, BeforeValidator(_usual_name)] = "auto"
    trust_remote_code: bool = False
    prompt_features: bool | None = Field(
        None, description="encode prompts too, for gates on them; on where head.gate_on asks for it"
    )
    log_ratios: bool | None = Field(
        None, description="log-probability differences of the replies; on where head.reference_scale needs them"
    )


class HeadSettings(_Strict):
    """How the head is fitted; see ``coala.convex.fit``."""

    method: Method = "learnt"
    gate_on: GateOn | None = Field(
        None, description="what gates look at; auto lets the two compete; without a word auto over what there is"
    )
    reference_scale: float | None = Field(None, description="CVX-DPO: margin, this times the reference's log ratio")
    loss: Loss = Field("pairwise", description="Phase II loss of the two-phase method")
    phase_one: PhaseOne = Field("gated", description="what solves Phase I")
    paper: bool = Field(False, description="the two-phase method with its published settings, nothing searched")
    n_patterns: int | None = Field(None, ge=1, description="gates at most (learnt) or sampled; the method's own if not")
    tolerance: float = Field(1e-4, gt=0, lt=1, description="certified relative gap")


class GuidanceSettings(_Strict):
    """How the head guides decoding; :class:`coala.decoding.Guidance` and requests to a server have these bounds too."""

    mode: Mode = "block"
    strength: float | None = Field(None, ge=0, description="default: the rule's own")
    every: int | None = Field(None, ge=1, description="guide every N tokens; 1, in prefix mode 5")
    candidates: int = Field(5, ge=1)
    top_k: int = Field(50, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    block_tokens: int = Field(5, ge=1)
    rule: Rule = "calibrated"
    budget: float | None = Field(None, ge=0, description="of mode shift: nats a reply may spend on guidance")
    width: int = Field(4, ge=1, description="of mode beam: hypotheses kept")


class EvaluationSettings(_Strict):
    """What is generated and judged for the report."""

    prompts: int = Field(50, ge=0, description="held-out prompts that get a guided and an unguided reply")
    max_new_tokens: int = Field(48, ge=1)
    temperature: float = Field(1.0, ge=0)
    judge: str | None = Field(
        None,
        description="head:RUN, rule:NAME[:ARGUMENT], words:FILE or a word-judge file; none: only the head's scores",
    )
    labeller: str | None = Field(None, description="the scorer that made the labels, in the same form; shown beside it")


class Recipe(_Strict):
    """Everything that decides the outcome of ``coala align``."""

    pairs: tuple[str, ...]
    eval_pairs: tuple[str, ...] = ()
    format: str = "auto"
    role: str = "assistant"
    skip_bad: bool = Field(False, description="leave out rows with errors, and say so, instead of stopping")
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    model: ModelSettings
    head: HeadSettings = HeadSettings()
    guidance: GuidanceSettings = GuidanceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        head, model = self.head, self.model
        if self.guidance.budget is not None and self.guidance.mode != "shift":
            raise ValueError(f"guidance.budget belongs to guidance.mode shift; found {self.guidance.mode}")
        if head.paper and head.method != "two-phase":
            raise ValueError(f"head.paper is a setting of head.method two-phase; found {head.method}")
        if head.gate_on == "prompt" and head.method in ("two-phase", "linear"):
            raise ValueError(f"head.gate_on prompt needs head.method learnt or direct; found {head.method}")
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

        judges = {k: judge(v) for k in ("judge", "labeller") if (v := getattr(self.evaluation, k)) is not None}
        return self.model_copy(
            update={
                "pairs": tuple(map(absolute, self.pairs)),
                "eval_pairs": tuple(map(absolute, self.eval_pairs)),
                "model": self.model.model_copy(
                    update={
                        "name": absolute(self.model.name),
                        "adapter": self.model.adapter and absolute(self.model.adapter),
                    }
                ),
                "evaluation": self.evaluation.model_copy(update=judges),
            }
        )


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
        return Recipe.model_validate(document)
    except ValidationError as error:
        told = f"{source}: " if source else ""
        faults = [_HOW_TO_GIVE.get(fault, fault) for fault in sentences(error.errors(), Recipe, name=_named)]
        if len(faults) > 1:
            raise RecipeError(f"{told}invalid settings:\n" + "\n".join(f"  {fault}" for fault in faults)) from None
        raise RecipeError(told + joined(faults)) from None


# Settings that have a flag of their own on the command line.
FLAGS = {
    **{name: "--" + name.replace("_", "-") for name in ("format", "skip_bad", "eval_fraction", "seed")},
    "eval_pairs": "--eval",
    "model.name": "--model",
    **{
        f"{section}.{name}": "--" + name.replace("_", "-")
        for section, names in {
            "model": (
                *("template", "device", "dtype", "adapter", "quantise", "layer", "pooling", "prefixes"),
                *("batch_tokens", "max_tokens"),
            ),
            "head": ("method", "gate_on", "reference_scale", "paper"),
            "guidance": ("mode", "strength"),
            "evaluation": ("prompts", "max_new_tokens", "judge"),
        }.items()
        for name in names
    },
}
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
