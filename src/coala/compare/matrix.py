"""The cells of a study: what is carried out once each, in a process of its own, and what each waits for.

A cell's name and its ``spec`` are functions of the study alone; the spec holds everything that decides its outcome.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from coala.compare.study import Study, StudyMethod

CellKind = Literal[
    "base", "train", "features", "head", "adamw", "layers", "cues", "prompt", "guided", "benchmark", "count"
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
        if (not method.models or model in method.models)
        and (not method.datasets or dataset in method.datasets)
        and init in method.inits
        # SFT from SFT would be a second epoch of it; where others start from it, it has to be there.
        and not (method.kind == "sft" and init == "sft")
    ]
    if not methods:
        return
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
    for seed in study.seeds:
        # Rates are tried once, with the first seed.
        after = () if seed == study.seeds[0] or kind not in ("train", "adamw") else (first,)
        guide = (f"{'.'.join(where)}.{method.of}.s{seed}",) if kind == "guided" else ()
        needs = (*start, *beside, *read, *guide, *after)
        yield Cell(f"{here}.s{seed}", kind, *where, method.name, setting, seed, needs)
    if count and kind in ("train", "head"):
        needs = (*start, *read, *((first,) if method.trained else ()))
        yield Cell(f"{here}.count", "count", *where, method.name, setting, study.seeds[0], needs)


def _features(method: StudyMethod, where: tuple[str, str, str], needs: tuple[str, ...]) -> Cell:
    key = f"features-{features_key(method)}"
    return Cell(f"{'.'.join(where)}.{key}", "features", *where, key, "", None, needs)


def features_method(study: Study, cell: Cell) -> StudyMethod:
    """A method whose features a cell of features holds."""
    return next(m for m in study.methods if m.reads and f"features-{features_key(m)}" == cell.method)
