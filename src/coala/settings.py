"""The settings of an alignment: for each its type, default, bounds and one line of help, declared once.

Recipes, flags of commands and what a run records take them from here. Imports nothing that is slow to load, so that
`coala --help` answers at once; ``coala.recipe`` validates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt


@dataclass(frozen=True)
class Setting:
    """The help line of a setting: what it sets, its unit, and its default where the type does not show it.

    ``flag`` is the setting's own on a command line, where it is not ``--`` and its name; None for one that only a
    recipe or ``--set`` gives.
    """

    help: str
    flag: str | None = ""
    letter: str = ""


@dataclass(frozen=True)
class Spellings:
    """Other names for the same choices, in lower case."""

    of: Mapping[str, str] = field(hash=False)

    def usual(self, given: Any) -> Any:
        return self.of.get(given.lower(), given.lower()) if isinstance(given, str) else given

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core.core_schema import no_info_before_validator_function

        return no_info_before_validator_function(self.usual, handler(source))


_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "full": "float32",
}

# Choices that more than one part of the program speaks of.
Mode = Literal["token", "block", "prefix", "shift", "best_of", "beam", "distilled", "none"]
Over = Literal["model", "distilled"]
Rule = Literal["calibrated", "min-max", "raw", "z-score"]
Method = Literal["learnt", "direct", "two-phase", "linear"]
GateOn = Literal["auto", "reply", "prompt"]
PhaseOne = Literal["gated", "cronos", "network"]
WorkerEngine = Literal["processes", "ray"]
Board = Literal["v0.1", "v2.0"]
VerdictRule = Literal["last", "unanimous"]
DifficultyBy = Literal["position", "instruction"]
Stopping = Literal["optimum", "liblinear"]
SubsetWeights = Literal["published", "rows"]
RewardRule = Literal["longer", "shorter", "style"]
# fmt: off
# What `coala audit` reads: by the first row, pairs of any format, or a benchmark by name.
AuditSet = Literal[
    "auto", "pairs", "rewardbench", "rewardbench2", "rmbench", "judgebench", "llmbar", "autoj", "shp", "alpaca",
    "mtbench", "arena", "vicuna",
]
# fmt: on
StepLoss = Literal["inpo", "sppo", "dro", "rebel", "dpo"]
Selection = Literal["random", "all", "best_worst"]
Target = Literal["soft", "bernoulli", "hard"]
Win = Literal["hard", "mean"]
Teacher = Literal["guided", "weighted", "shift"]
Support = Literal["nucleus", "vocabulary"]
Vehicle = Literal["output", "adapter"]
TrackerName = Literal["jsonl", "mlflow", "trackio", "wandb"]

# Settings that more than one command takes.
Template = Annotated[
    Literal["auto", "chat", "dialogue", "continuation"],
    Setting("How conversations become text: the model's chat template, a plain dialogue or a continuation."),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Spellings(_DTYPES),
    Setting("Number format of the weights; bf16, fp16, half and fp32 also work."),
]
Quantise = Annotated[
    Literal["8bit", "4bit"],
    Setting("Bits per weight: 8bit uses torch's kernel on a CPU, the rest bitsandbytes (default: not quantised)."),
]
Device = Annotated[
    str, Setting("Where the model runs: auto, cpu, cuda, or offload (what does not fit goes to CPU memory or disk).")
]
Seed = Annotated[int, Ge(0), Setting("Random seed of the split, the fit and sampling.")]
Format = Annotated[str, Setting("Format of the pairs; auto detects it (see `coala data formats`).")]
SkipBad = Annotated[bool, Setting("Skip rows with errors and list them, instead of stopping.")]

# A section that is given as a mapping names no other settings, and is checked again where it is given as a value.
_STRICT = {"extra": "forbid", "revalidate_instances": "always"}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The frozen backbone and what is read from it."""

    __pydantic_config__ = _STRICT

    name: Annotated[
        str, Setting("Model: a local folder, GGUF file or hub name (no default).", flag="--model", letter="-m")
    ]
    revision: Annotated[str | None, Setting("Commit of a hub model (default: the latest).", flag=None)] = None
    template: Template = "auto"
    layer: Annotated[
        Annotated[int, Ge(-1)] | Literal["auto"],
        Setting(
            "Layer whose hidden states are read; -1 is the last, auto the lowest within one standard error of the best."
        ),
    ] = -1
    pooling: Annotated[
        Literal["mean", "mean_all", "last", "attn"],
        Setting("How token states become one vector; mean averages over the reply, mean_all over the prompt too."),
    ] = "mean"
    ends_with_eos: Annotated[bool, Setting("Append the end-of-sequence token to each reply.", flag=None)] = False
    max_tokens: Annotated[
        Annotated[int, Ge(2)] | None,
        Setting("Maximum length of prompt plus reply, in tokens (default: the model's context)."),
    ] = None
    prefixes: Annotated[int, Ge(1), Setting("Prefixes of each reply to fit on; 1 uses the whole reply only.")] = 1
    batch_tokens: Annotated[int, Ge(1), Setting("Batch size of a forward pass, in tokens.")] = 4096
    device: Device = "auto"
    adapter: Annotated[str | None, Setting("LoRA adapter of the model: a folder or hub name (default: none).")] = None
    quantise: Quantise | None = None
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    prompt_features: Annotated[
        bool | None,
        Setting("Also encode prompts alone, for gates on them (default: on if head.gate_on needs it).", flag=None),
    ] = None
    log_ratios: Annotated[
        bool | None,
        Setting("Also store log p(chosen) - log p(rejected) (default: on if head.reference_scale is set).", flag=None),
    ] = None


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """How the head is fitted; see ``coala.convex.fit``."""

    __pydantic_config__ = _STRICT

    method: Annotated[
        Method,
        Setting(
            "Gates of the head: `learnt` (one convex program), `direct` (the same, sampled gates), `linear` (none) or "
            "`two-phase` (the papers' method)."
        ),
    ] = "learnt"
    gate_on: Annotated[
        GateOn | None,
        Setting("Input of the gates; auto keeps the better of both (default: reply, or auto if prompts are encoded)."),
    ] = None
    reference_scale: Annotated[
        float | None, Setting("CVX-DPO: scale of the model's log ratio in the target margin (default: no reference).")
    ] = None
    loss: Annotated[
        Literal["pairwise", "pointwise"], Setting("Two-phase: loss of Phase II; pointwise is Eq. 9.", flag=None)
    ] = "pairwise"
    phase_one: Annotated[
        PhaseOne,
        Setting("Two-phase: solver of Phase I: Newton (`gated`), ADMM (`cronos`) or a ReLU `network`.", flag=None),
    ] = "gated"
    paper: Annotated[bool, Setting("Two-phase with the published settings, without a search.")] = False
    n_patterns: Annotated[
        Annotated[int, Ge(1)] | None,
        Setting("Number of gates: a maximum (learnt) or the number sampled (default: the method's own).", flag=None),
    ] = None
    tolerance: Annotated[float, Gt(0), Lt(1), Setting("Relative duality gap at which the fit stops.", flag=None)] = 1e-4


@dataclass(frozen=True)
class GuidanceSettings:
    """How the head guides decoding; :class:`coala.decoding.Guidance` explains each setting."""

    __pydantic_config__ = _STRICT

    mode: Annotated[Mode, Setting("How the head guides decoding.")] = "block"
    strength: Annotated[
        Annotated[float, Ge(0)] | None, Setting("Guidance strength; 0 is unguided (default: set by the mode and rule).")
    ] = None
    every: Annotated[
        Annotated[int, Ge(1)] | None, Setting("Guide every N tokens (default: 1; 5 in mode prefix).", flag=None)
    ] = None
    candidates: Annotated[int, Ge(1), Setting("Candidates per guided step.", flag=None)] = 5
    top_k: Annotated[int, Ge(0), Setting("Sample from the K most likely tokens; 0 is all.", flag=None)] = 50
    top_p: Annotated[
        float,
        Gt(0),
        Le(1),
        Setting("Sample from the most likely tokens with this total probability; 1 is all.", flag=None),
    ] = 0.9
    block_tokens: Annotated[int, Ge(1), Setting("Mode block: tokens per block.", flag=None)] = 5
    rule: Annotated[Rule, Setting("How scores are scaled; calibrated weighs them by their evidence.", flag=None)] = (
        "calibrated"
    )
    budget: Annotated[
        Annotated[float, Ge(0)] | None,
        Setting("Mode shift: maximum divergence of a reply, in nats (default: no limit).", flag=None),
    ] = None
    width: Annotated[int, Ge(1), Setting("Mode beam: number of hypotheses.", flag=None)] = 4
    over: Annotated[
        Over, Setting("Which model the head guides: the run's, or its distilled policy (`coala distil`).", flag=None)
    ] = "model"
    rater: Annotated[
        str | None,
        Setting("Rater whose head guides; see `coala fit RUN --by rater` (default: the shared head).", flag=None),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is generated and judged for the report."""

    __pydantic_config__ = _STRICT

    prompts: Annotated[
        int, Ge(0), Setting("Number of held-out prompts to answer for the report, guided and unguided.")
    ] = 50
    max_new_tokens: Annotated[int, Ge(1), Setting("Maximum length of a reply, in tokens.")] = 48
    temperature: Annotated[float, Ge(0), Setting("Sampling temperature; 0 is greedy.", flag=None)] = 1.0
    judge: Annotated[
        str | None,
        Setting(
            "Judge of guided against unguided replies: head:RUN, rule:NAME[:ARGUMENT], words:FILE or a file of words "
            "(default: none)."
        ),
    ] = None
    labeller: Annotated[
        str | None,
        Setting("Scorer that made the labels, written like a judge; reported next to it (default: none).", flag=None),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """How the guidance becomes a change of the model's output layer.

    ``guided``: replies to training prompts that the head guides, choosing among ``candidates`` blocks.

    ``weighted``: the training pairs' own replies, weighted by exp(r / ``beta``) for scores r in standard deviations;
    nothing is generated. ``shift``: replies of mode ``shift``, each step to become the exact distribution that its
    token was drawn from, tilted over the ``candidates`` likeliest. ``rank`` "auto" and no ``ridge`` are chosen on
    held-out prompts. More than one of ``rounds``, of the teacher ``guided``, end where replies to held-out prompts
    gain no more (:mod:`coala.distil.rounds`).
    """

    teacher: Annotated[
        Teacher,
        Setting(
            "What the policy learns from: replies the head guides, the pairs' own replies weighted by score, or the "
            "exact distributions of mode shift."
        ),
    ] = "guided"
    prompts: Annotated[int, Ge(2), Setting("Number of training prompts to answer, for `guided` and `shift`.")] = 300
    candidates: Annotated[
        int, Ge(2), Setting("Number of blocks (`guided`) or tokens (`shift`) the head scores per step.")
    ] = 10
    block_tokens: Annotated[int, Ge(1), Setting("Tokens per block, for `guided`.")] = 5
    beta: Annotated[
        float,
        Gt(0),
        Setting("Temperature of the weights exp(score / beta), in standard deviations of the score, for `weighted`."),
    ] = 0.5
    support: Annotated[
        Support, Setting("Tokens each step is normalised over; vocabulary also sharpens the model and is slower.")
    ] = "nucleus"
    ridge: Annotated[
        Annotated[float, Gt(0)] | None,
        Setting("Weight of the penalty on half the squared change (default: chosen on held-out prompts)."),
    ] = None
    strength: Annotated[
        Annotated[float, Gt(0)] | Literal["auto"],
        Setting(
            "Factor on the change; auto: raised until its own replies score like the teacher's (`guided`), else 1."
        ),
    ] = "auto"
    rank: Annotated[
        Annotated[int, Ge(1)] | Literal["auto", "full"],
        Setting("Rank of the change; full leaves it as fitted, auto chooses on held-out prompts."),
    ] = "auto"
    tolerance: Annotated[
        float, Gt(0), Lt(1), Setting("Certified gap at which the fit stops, as a fraction of the gain.")
    ] = 1e-3
    rounds: Annotated[
        int,
        Ge(1),
        Setting("Maximum number of rounds; in each the head guides the previous round's policy and distils it again."),
    ] = 1
    held_out: Annotated[
        int, Ge(2), Setting("Maximum number of held-out prompts that choose the strength or measure a round's gain.")
    ] = 100
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which pairs, how they are read and which are held out: the settings of a recipe that stand in no section."""

    pairs: tuple[str, ...]
    eval_pairs: Annotated[
        tuple[str, ...],
        Setting("File(s) of held-out pairs (default: whole groups of PAIRS are held out).", flag="--eval"),
    ] = ()
    format: Format = "auto"
    role: Annotated[str, Setting("Speaker whose replies are compared.", flag=None)] = "assistant"
    skip_bad: SkipBad = False
    eval_fraction: Annotated[float, Gt(0), Lt(1), Setting("Fraction of the groups to hold out.")] = 0.1
    seed: Seed = 0


SECTIONS = {
    "": PairSettings,
    "model": ModelSettings,
    "head": HeadSettings,
    "guidance": GuidanceSettings,
    "evaluation": EvaluationSettings,
    "distil": DistilSettings,
}


@cache
def hints_of(section: type) -> Mapping[str, Any]:
    """The annotations of ``section``, a dataclass, by field; found once, for commands ask often."""
    return get_type_hints(section, include_extras=True)


def told(section: type, name: str) -> Setting | None:
    """The :class:`Setting` of a field of ``section``, a dataclass; None for a field that has none."""
    return setting_of(hints_of(section)[name])


def setting_of(annotation: Any) -> Setting | None:
    """The :class:`Setting` in an annotation, or in a member of a union."""
    found = [one for one in taken_apart(annotation)[1] if isinstance(one, Setting)]
    return found[-1] if found else None


def flag_of(section: type, name: str) -> str | None:
    """The flag of a setting, or None if it has none of its own."""
    setting = told(section, name)
    if setting is None or setting.flag is None:
        return None
    return setting.flag or "--" + name.replace("_", "-")


def flags() -> dict[str, str]:
    """The flags of ``coala align`` by the names of settings: ``head.gate_on`` -> ``--gate-on``."""
    named = ((f"{section}.{one.name}".lstrip("."), flag_of(kind, one.name)) for section, kind in SECTIONS.items()
             for one in fields(kind) if section != "distil")  # fmt: skip
    return {name: flag for name, flag in named if flag is not None}


_ABOUT = (
    "Each is a key of a YAML recipe (`--recipe FILE`) and can be set with `--set SECTION.NAME=VALUE`; some have a flag "
    "of their own on `coala align` and `coala plan`, those of `distil` on `coala distil`. `pairs` and `model.name` are "
    "required."
)


def table() -> str:
    """The settings of a recipe as Markdown, a section each: name, values, default, flag, and what it is."""
    lines = ["# Settings of a recipe", "", _ABOUT, ""]
    for section, kind in SECTIONS.items():
        lines += [
            f"## {section or 'At the top'}",
            "",
            "| setting | values | default | flag | |",
            "|---|---|---|---|---|",
        ]
        hints = hints_of(kind)
        for one in fields(kind):
            if (setting := setting_of(hints[one.name])) is None:
                continue
            default = "" if one.default in (MISSING, None, ()) else f"`{one.default}`".replace("True", "true")
            flag = f"`{found}`" if (found := flag_of(kind, one.name)) else ""
            values = values_of(hints[one.name]).replace("|", "\\|")
            lines.append(f"| `{one.name}` | {values} | {default.replace('False', 'false')} | {flag} | {setting.help} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def values_of(annotation: Any) -> str:
    """What a setting may be, in words: ``number, 0 to 1``, ``auto | chat``."""
    forms, marks = taken_apart(annotation)
    words = [word for form in forms if get_origin(form) is Literal for word in get_args(form)]
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    kinds = [
        names.get(form, "list of texts") for form in forms if form is not NoneType and get_origin(form) is not Literal
    ]
    bounds = [
        f"{text} {getattr(mark, name):g}"
        for kind, name, text in (
            (Ge, "ge", "at least"),
            (Gt, "gt", "above"),
            (Le, "le", "at most"),
            (Lt, "lt", "below"),
        )
        for mark in marks
        if isinstance(mark, kind)
    ]
    return ", ".join([*kinds, *bounds, " | ".join(f"`{word}`" for word in words)]).rstrip(", ")


def taken_apart(hint: Any) -> tuple[list[Any], list[Any]]:
    """The forms of a union, and everything that annotates it or them."""
    if get_origin(hint) is Annotated:
        forms, marks = taken_apart(get_args(hint)[0])
        return forms, [*marks, *hint.__metadata__]
    if get_origin(hint) in (Union, UnionType):
        parts = [taken_apart(part) for part in get_args(hint)]
        return [form for forms, _ in parts for form in forms], [mark for _, marks in parts for mark in marks]
    return [hint], []
