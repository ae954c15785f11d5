"""The cells of a study: what is carried out once each, in a process of its own, and what each waits for.

A cell's name and its ``spec`` are functions of the study alone; the spec holds everything that decides its outcome.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from coala.compare.study import Study, StudyMethod
from coala.settings import GuidanceSettings

CellKind = Literal[
    "base",
    "train",
    "features",
    "head",
    "adamw",
    "layers",
    "cues",
    "prompt",
    "guided",
    "teacher",
    "distilled",
    "lm-steer",
    "mean-difference",
    "bias",
    "benchmark",
    "count",
]
# Features of every layer, pooled in both of these ways, from one pass.
ALL = "all"
POOLINGS_TRIED = ("mean", "last")
GATED_POOLING = "mean"
# What is ranked by a benchmark: methods that score a text by itself.
SCORERS = ("coala", "layers", "cues")


@dataclass(frozen=True)
class Cell:
    """One piece of work. ``needs`` names the cells whose files it reads; ``seed`` is None where chance has no part."""

    id: str
    kind: CellKind
    dataset: str
    model: str
    init: str
    method: str
    setting: str
    seed: int | None
    needs: tuple[str, ...]

    @property
    def place(self) -> tuple[str, str, str]:
        """Where methods are comparable: dataset, model, init."""
        return self.dataset, self.model, self.init

    @property
    def label(self) -> str:
        return f"{self.method} ({self.setting})" if self.setting else self.method


def cells(study: Study) -> list[Cell]:
    """All cells, each after those it needs."""
    found: dict[str, Cell] = {}
    for cell in _walk(study):
        found.setdefault(cell.id, cell)
    return list(found.values())


def says_peak(study: Study, cell: Cell) -> bool:
    """Whether the report has this cell's peak memory: features, and what the first seed trains or fits."""
    kinds = ("train", "head", "adamw")
    return cell.kind in ("features", "benchmark") or (cell.kind in kinds and cell.seed == study.seeds[0])


def features_key(method: StudyMethod) -> str:
    """What of a head's method decides its features."""
    if method.all_layers:
        return ALL
    parts = [f"L{method.layer}" if method.layer != -1 else "Llast", method.pooling]
    parts += [f"p{method.prefixes}"] if method.prefixes > 1 else []
    parts += ["ratios"] if method.log_ratios else []
    parts += ["prompts"] if prompt_features(method) else []
    return "-".join(parts)


def prompt_features(method: StudyMethod) -> bool:
    return method.head.gate_on in ("auto", "prompt")


# --- teachers ------------------------------------------------------------------------------------------------------


def teacher_guidance(study: Study, method: StudyMethod) -> GuidanceSettings:
    """How the head that ``method`` learns from guides: as `coala distil` has it of a run's guidance."""
    settings = method.distil_settings
    chosen = next(m for m in study.methods if m.name == method.of).guidance or GuidanceSettings()
    return GuidanceSettings(
        mode="shift" if settings.teacher == "shift" else "block",
        rule=chosen.rule,
        candidates=settings.candidates,
        block_tokens=settings.block_tokens,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
    )


def teacher_of(study: Study, method: StudyMethod) -> StudyMethod | None:
    """The method whose replies to held-out prompts are those of this one's teacher, if the study has it."""
    if method.lessons in (None, "chosen"):
        return None
    wanted = teacher_guidance(study, method)
    found = [
        m
        for m in study.methods
        if (m.kind == "guided" and m.of == method.of) or (m.kind == "coala" and m.name == method.of)
    ]
    return next((m for m in found if m.guidance == wanted), None)


def teacher_key(study: Study, method: StudyMethod, place: tuple[str, str, str]) -> str:
    """What of a method decides the replies it learns from; ``teacher-`` and it name their cell.

    Methods that differ in the number of prompts alone share one cell of as many as the largest wants.
    """
    if method.lessons == "chosen":
        return "teacher-chosen"
    settings = method.distil_settings
    if method.lessons == "weighted":
        return f"teacher-{method.of}-weighted-{settings.beta:g}"
    size = f"{settings.candidates}" + (f"x{settings.block_tokens}" if method.lessons == "guided" else "")
    most = max(
        other.distil_settings.prompts
        for other in study.methods
        if (other.of, other.lessons) == (method.of, method.lessons)
        and runs(other, place)
        and teacher_guidance(study, other) == teacher_guidance(study, method)
    )
    return f"teacher-{method.of}-{method.lessons}-{size}-{most}"


def runs(method: StudyMethod, place: tuple[str, str, str]) -> bool:
    """Whether a method is carried out on a dataset, with a model, from a start."""
    dataset, model, init = place
    return (
        (not method.models or model in method.models)
        and (not method.datasets or dataset in method.datasets)
        and init in method.inits
    )


def teacher_method(study: Study, cell: Cell) -> StudyMethod:
    """The method that wants most of a teacher's cell."""
    here = [m for m in study.methods if m.lessons is not None and runs(m, cell.place)]
    found = [m for m in here if teacher_key(study, m, cell.place) == cell.method]
    return max(found, key=lambda m: m.distil_settings.prompts)


def spec_of(study: Study, cell: Cell) -> dict[str, Any]:
    """Everything that decides a cell's outcome, as plain JSON values; files of pairs are stamped by the runner."""
    # Without what is at its default, so that a field which is new in the package makes no cell another one.
    plain: dict[str, Any] = {"mode": "json", "exclude_defaults": True}
    there = study.datasets[cell.dataset]
    not_here = {"inits", "models", "rows", "source", "benchmarks", "base"}
    dataset = there.model_dump(**plain, exclude=not_here if cell.kind == "prompt" else not_here | {"system"})
    method = next((m for m in study.methods if m.name == cell.method), None)
    about: dict[str, Any] = {
        "cell": [cell.kind, *cell.place, cell.method, cell.setting, cell.seed],
        "model": study.models[cell.model].model_dump(**plain, exclude={"config"}),
        "dataset": dataset,
        "split": study.split.model_dump(**plain),
        "evaluation": study.evaluation.model_dump(**plain),
        "device": study.device,
        "first_seed": study.seeds[0],
        # The model it starts from, where that is one of the study's own.
        "start": list(cell.needs[:1]) if cell.init == "sft" else [],
    }
    if cell.kind == "benchmark":
        about["benchmark"] = there.benchmarks[benchmark_of(cell)].model_dump(**plain)
        about["methods"] = list(cell.needs)
    if cell.kind == "teacher":
        taught = teacher_method(study, cell)
        names = ("teacher", "prompts", "candidates", "block_tokens", "beta")
        about["teacher"] = {name: getattr(taught.distil_settings, name) for name in names}
        about["needs"] = list(cell.needs)
    if method is not None:
        # Where else a method runs, and whether it is counted, decides nothing of this cell.
        elsewhere = {"inits", "models", "datasets", "settings", "about", "count_flops"}
        about["method"] = method.model_dump(**plain, exclude=elsewhere)
        about["beta"] = study.beta if method.log_ratios else None
    if cell.setting:
        about["setting"] = study.settings[cell.setting].model_dump(**plain)
    return about


def _walk(study: Study) -> Iterator[Cell]:
    for dataset, about in study.datasets.items():
        for model in about.models or tuple(study.models):
            # The base first, then SFT: other cells start from it and are judged against it.
            for init in sorted(about.inits, key=("base", "sft").index):
                yield from _place(study, dataset, model, init)


def _place(study: Study, dataset: str, model: str, init: str) -> Iterator[Cell]:
    here = f"{dataset}.{model}.{init}"
    start: tuple[str, ...] = ()
    if init == "sft":
        assert study.sft is not None
        start = (f"{dataset}.{model}.base.{study.sft.name}.{study.sft_setting}.s{study.seeds[0]}",)
    methods = [
        method
        for method in study.methods
        if runs(method, (dataset, model, init))
        # SFT from SFT would be a second epoch of it; where others start from it, it has to be there.
        and not (method.kind == "sft" and init == "sft")
    ]
    if not methods:
        return
    # A head that judges comes before what it judges.
    methods.sort(key=lambda method: method.name != study.judging_head(dataset))
    base = Cell(f"{here}.base", "base", dataset, model, init, "base", "", study.seeds[0], start)
    if study.datasets[dataset].base:
        yield base
    if init == "base" and study.sft is not None and "sft" in study.datasets[dataset].inits:
        sft = study.sft
        if sft not in methods:
            methods = [sft, *methods]
    for method in methods:
        if method.kind == "base":
            continue
        # After SFT the same shapes are trained, at the same cost.
        count = study.count_flops and method.count_flops and init == "base"
        for setting in study.settings_of(method):
            yield from _method(study, base, method, setting, start, count)
    scorers = [m for m in methods if m.kind in SCORERS and not m.log_ratios]
    needs = tuple(f"{here}.{m.name}.s{study.seeds[0]}" for m in scorers)
    for name in study.datasets[dataset].benchmarks if scorers else ():
        yield Cell(f"{here}.benchmark-{name}", "benchmark", dataset, model, init, f"benchmark-{name}", "", None, needs)


def benchmark_of(cell: Cell) -> str:
    """The name of a benchmark cell's benchmark."""
    return cell.method.removeprefix("benchmark-")


_KINDS: dict[str, CellKind] = {
    "coala": "head",
    "adamw": "adamw",
    "layers": "layers",
    "cues": "cues",
    "prompt": "prompt",
    "guided": "guided",
    "distilled": "distilled",
    "lm-steer": "lm-steer",
    "mean-difference": "mean-difference",
    "bias": "bias",
}


def _method(
    study: Study, base: Cell, method: StudyMethod, setting: str, start: tuple[str, ...], count: bool
) -> Iterator[Cell]:
    where = (base.dataset, base.model, base.init)
    here = ".".join((*where, method.name, *([setting] if setting else [])))
    kind: CellKind = "train" if method.trained else _KINDS[method.kind]
    beside = (base.id,) if study.datasets[base.dataset].base else ()
    read: tuple[str, ...] = ()
    if method.reads:
        parts = [_features(method, (part, *where[1:]), start) for part in study.datasets[base.dataset].joins]
        yield from parts
        features = _features(method, where, (*start, *(part.id for part in parts)))
        yield features
        read = (features.id,)
    first = f"{here}.s{study.seeds[0]}"
    judge = study.judging_head(base.dataset)
    for seed in study.seeds:
        # Rates are tried once, with the first seed.
        after = () if seed == study.seeds[0] or kind not in ("train", "adamw") else (first,)
        guide = () if method.of is None else (f"{'.'.join(where)}.{method.of}.s{seed}",)
        if method.lessons is not None:
            teacher = _teacher(study, method, where, (*start, *guide), seed)
            yield teacher
            guide = (*guide, teacher.id)
        judged = (f"{'.'.join(where)}.{judge}.s{study.seeds[0]}",) if judge not in (None, method.name) else ()
        needs = tuple(dict.fromkeys((*start, *beside, *read, *guide, *judged, *after)))
        yield Cell(f"{here}.s{seed}", kind, *where, method.name, setting, seed, needs)
    if count and kind in ("train", "head"):
        needs = (*start, *read, *((first,) if method.trained else ()))
        yield Cell(f"{here}.count", "count", *where, method.name, setting, study.seeds[0], needs)


def _teacher(study: Study, method: StudyMethod, where: tuple[str, str, str], needs: tuple[str, ...], seed: int) -> Cell:
    key = teacher_key(study, method, where)
    chance = method.lessons in ("guided", "shift")
    name = f"{'.'.join(where)}.{key}" + (f".s{seed}" if method.of else "")
    return Cell(name, "teacher", *where, key, "", seed if chance or method.of else None, needs)


def _features(method: StudyMethod, where: tuple[str, str, str], needs: tuple[str, ...]) -> Cell:
    key = f"features-{features_key(method)}"
    return Cell(f"{'.'.join(where)}.{key}", "features", *where, key, "", None, needs)


def features_method(study: Study, cell: Cell) -> StudyMethod:
    """A method whose features a cell of features holds."""
    return next(m for m in study.methods if m.reads and f"features-{features_key(m)}" == cell.method)
