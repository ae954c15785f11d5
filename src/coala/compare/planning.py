"""What a study will cost before any of it is done: FLOPs, memory and time of every cell, from configurations alone.

Tokens are counted where pairs and tokenizer are here, else taken as the study says. Heads are planned by
:mod:`coala.plan.plan`. Training is bounded from below:

    bytes = 4 P (weights) + 12 P' (gradients, both moments of Adam) + 4 P (DPO's reference, all weights trained)
            + activations of one batch + 8 rows T V (logits and their gradient)

P weights, P' those trained, all in float32 as TRL loads them; activations 2 x 34 d L bytes a token (Korthikanti et al.
2022, with fused attention), 2 x 2 d L where they are computed again. Nothing is written and no weights are read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from coala.compare import policy_plan, reply_plan
from coala.compare.data import PARTS, prepare
from coala.compare.matrix import Cell, cells, features_method, prompt_features
from coala.compare.study import CHANGED, Study, StudyMethod
from coala.costs import CostedMethod as TrainMethod
from coala.costs import body_flops, decoding_flops, training_flops
from coala.recipe import Recipe, recipe_of
from coala.store import save_json
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.backbone import Outline
    from coala.plan.plan import RunPlan
    from coala.plan.tokens import Counts, Guess

GIB = 2**30


def plan_study(study: Study) -> list[dict[str, Any]]:
    """A row for every cell: its place, what it is, FLOPs, bytes by part, seconds where the machine's rate is given."""
    with tempfile.TemporaryDirectory() as temporary:
        places: dict[tuple[str, str], _Place] = {}
        out = Path(temporary)
        here = {name: dataset for name, dataset in study.datasets.items() if _there(dataset.pairs)}
        here |= {n: d for n, d in study.datasets.items() if d.joins and all(one in here for one in d.joins)}
        if here:
            prepare(study.model_copy(update={"datasets": here}), out)
        rows = [row for name in study.datasets for row in _sampling(study, name, out)]
        for cell in cells(study):
            key = (cell.dataset, cell.model)
            if key not in places:
                places[key] = _Place(study, *key, out)
            rows.append({"cell": cell.id, "kind": cell.kind, "label": cell.label, **_plan(study, cell, places[key])})
        return rows


def _sampling(study: Study, name: str, out: Path) -> list[dict[str, Any]]:
    """The replies that a dataset's pairs are made of, which no cell has; of sets with the same replies the first."""
    settings = study.datasets[name].sampled
    if settings is None:
        return []
    model = next(iter(study.datasets[name].models or study.models))
    for before, other in study.datasets.items():
        if before == name:
            break
        alike = other.sampled and other.sampled.model_copy(update={"labeller": settings.labeller}) == settings
        if alike and next(iter(other.models or study.models)) == model:
            return []
    place = _Place(study, name, model, out)
    tokens = study.datasets[name].tokens_per_prompt or 0
    one = decoding_flops(place.outline.shape, tokens, settings.max_new_tokens)
    found: dict[str, Any] = {
        "flops": settings.n_prompts * settings.replies * one,
        "parts": {},
        "bytes": _weights(place),
        "pairs": settings.n_prompts,
        "how": "weights alone",
    }
    found["seconds"] = _seconds(study, found["flops"])
    return [{"cell": f"{name}: replies for pairs", "kind": "pairs", "label": "pairs", **found}]


def _seconds(study: Study, flops: int, moved: int = 0) -> float | None:
    """Of arithmetic, or of the bytes ``moved`` through memory where that takes longer."""
    machine = study.machine
    if machine.tflops is None:
        return None
    return max(flops / (machine.tflops * 1e12), moved / (machine.memory_gb_per_second * 1e9))


def plan_cell(study: Study, cell: Cell, out: Path) -> dict[str, Any]:
    """The plan of one cell of a comparison whose pairs are prepared in ``out``."""
    return _plan(study, cell, _Place(study, cell.dataset, cell.model, out))


def _there(names: tuple[str, ...]) -> bool:
    return bool(names) and all(Path(name).exists() for name in names)


@dataclass(frozen=True)
class _Place:
    """A dataset with a model: its sizes and the tokens of its pairs."""

    study: Study
    dataset: str
    model: str
    out: Path
    plans: dict[str, RunPlan] = field(default_factory=dict)
    counted: dict[bool, Counts] = field(default_factory=dict)

    @contextmanager
    def config(self) -> Iterator[Path | None]:
        """A config.json of the model, if the study brings one and the model is not here."""
        model = self.study.models[self.model]
        if model.config is None or Path(model.path).exists():
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            save_json(Path(folder) / "config.json", model.config)
            yield Path(folder) / "config.json"

    @cached_property
    def outline(self) -> Outline:
        from coala.backbone import outline

        with self.config() as config:
            model = self.study.models[self.model]
            return outline(model.path if config is None else config, None if config else model.revision)

    @property
    def _files(self) -> dict[str, Path] | None:
        folder = self.out / "data" / self.dataset
        files = {part: folder / f"{part}.jsonl" for part in PARTS}
        return files if all(path.is_file() for path in files.values()) else None

    def recipe(self, method: StudyMethod | None = None) -> Recipe:
        model, files = self.study.models[self.model], self._files
        head = {} if method is None else {"head": asdict(method.head)}
        # Of all layers the last has to be read.
        layer = -1 if method is None or method.all_layers else method.layer
        pooling = "mean" if method is None or method.pooling == "auto" else method.pooling
        prompts = self.study.datasets[self.dataset].prompts
        settings = {
            "name": model.path,
            "revision": model.revision,
            "template": model.template,
            "layer": layer,
            "pooling": pooling,
            "prefixes": 1 if method is None else method.prefixes,
            "ends_with_eos": model.ends_with_eos,
            "max_tokens": model.max_tokens,
            "batch_tokens": model.batch_tokens,
            "dtype": model.dtype,
            "device": self.study.device,
            "prompt_features": False if method is None else prompt_features(method),
            "log_ratios": method is not None and method.log_ratios,
        }
        return recipe_of(
            {
                "pairs": [str(files["train"])] if files else [],
                "eval_pairs": [str(files["test"])] if files else [],
                "eval_fraction": self.study.split.test,
                "model": settings,
                "evaluation": {
                    "prompts": self.study.evaluation.prompts if prompts is None else prompts,
                    "max_new_tokens": self.study.evaluation_of(self.dataset).max_new_tokens,
                },
                **head,
            }
        )

    @property
    def guess(self) -> tuple[Guess | None, int | None]:
        """Tokens a text and pairs, as the study says, where the pairs are not here."""
        from coala.plan.tokens import Guess

        about = self.study.datasets[self.dataset]
        if self._files:
            return None, None
        if about.rows is None or about.tokens_per_prompt is None or about.tokens_per_reply is None:
            raise CoalaError(
                f"The pairs of dataset {self.dataset!r} are not here, so a plan needs its rows, tokens_per_prompt and "
                "tokens_per_reply."
            )
        return Guess(about.tokens_per_prompt, about.tokens_per_reply), about.rows

    @cached_property
    def counts(self) -> Counts:
        return self.counts_of(self.recipe())

    def counts_of(self, recipe: Recipe) -> Counts:
        """The rows of a recipe of this place; whether prompts are encoded too is all that they differ by."""
        from coala.plan.plan import files_here
        from coala.plan.tokens import count

        if recipe.prompt_features not in self.counted:
            guess, rows = self.guess
            with self.config() as config:
                tokenizer, _ = files_here(recipe, config)
                found = count(recipe, self.outline, tokenizer=tokenizer, guess=guess, rows=rows)
            self.counted[recipe.prompt_features] = found
        return self.counted[recipe.prompt_features]

    def head_plan(self, method: StudyMethod) -> RunPlan:
        """The plan of a head's run; one for all methods whose recipe is the same."""
        from coala.plan.plan import make_plan

        recipe = self.recipe(method)
        key = json.dumps(recipe.plain())
        if key not in self.plans:
            guess, rows = self.guess
            machine = self.study.machine

            def room(gib: float | None) -> int | None:
                return None if gib is None else round(gib * GIB)

            with self.config() as config:
                self.plans[key] = make_plan(
                    recipe,
                    probe_seconds=0,
                    memory=room(machine.memory_gib),
                    device_memory=room(machine.device_memory_gib),
                    disk=room(machine.disk_gib),
                    config=config,
                    rows=rows,
                    guess=guess,
                    counts=self.counts_of(recipe),
                )
        return self.plans[key]


def _plan(study: Study, cell: Cell, place: _Place) -> dict[str, Any]:
    study = study.model_copy(update={"evaluation": study.evaluation_of(cell.dataset)})
    if cell.kind in ("base", "prompt", "guided"):
        found = _replies(study, cell, place)
    elif cell.kind == "benchmark":
        found = {**reply_plan.reading(study, cell, place.outline.shape), "bytes": _weights(place)}
    elif cell.kind in ("cues", "layers") or (cell.kind == "features" and study.datasets[cell.dataset].joins):
        every = cell.kind == "features" and features_method(study, cell).all_layers
        found = reply_plan.small(cell, place.outline.shape, place.counts, every)
    elif cell.kind == "teacher":
        found = {**policy_plan.teacher(study, cell, place.outline.shape, place.counts), "bytes": _weights(place)}
    elif cell.kind in CHANGED:
        found = {**policy_plan.policy(study, cell, place.outline.shape, place.counts), "bytes": _weights(place)}
    elif cell.kind == "train" or (cell.kind == "count" and cell.setting):
        found = _training(study, cell, place)
    else:
        found = _heads(study, cell, place)
    if cell.kind in ("train", "prompt"):
        found["flops"] += policy_plan.diverging(study, place.outline.shape, place.counts)
    if cell.kind != "benchmark":
        found["flops"] += policy_plan.judging(study, cell, place.outline.shape, place.counts)
    found["seconds"] = _seconds(study, found["flops"], found.pop("moved", 0))
    return found


def _training(study: Study, cell: Cell, place: _Place) -> dict[str, Any]:
    from coala.compare.trained import settings_for

    method = next(m for m in study.methods if m.name == cell.method)
    model, setting = study.models[cell.model], study.settings[cell.setting]
    settings = settings_for(study, setting, method.kind, max_tokens=model.max_tokens, ends_with_eos=model.ends_with_eos)
    outline, counts = place.outline, place.counts
    shape, survey = outline.shape, counts.surveys["train"]
    chosen, rejected = (survey.lengths[survey.index[:, side]] for side in (0, 1))
    if method.of is not None:
        chosen = np.array(policy_plan.lesson_lengths(study, method, counts))
    adapters = settings.lora is not None
    if method.kind == "reward":
        forwards = 2 + (not adapters) + settings.gradient_checkpointing
        epoch = forwards * body_flops(shape, [*chosen, *rejected])
    else:
        epoch = training_flops(
            shape,
            chosen,
            rejected,
            cast("TrainMethod", method.kind),
            adapters=adapters,
            checkpointing=settings.gradient_checkpointing,
        )
    epoch = epoch if method.of is not None else counts.scaled(epoch)
    whole = round(epoch * settings.epochs)
    rates = len(setting.tried(method.kind))
    first = cell.seed == study.seeds[0]
    search = round(whole * rates * (1 - study.split.validation)) if first and cell.kind == "train" else 0
    parameters = outline.parameters
    trained = _adapter_weights(settings.lora.rank, outline) if adapters else parameters
    rows = settings.batch_size * (1 if method.kind == "sft" else 2)
    longest = counts.longest_row
    kept = 2 if settings.gradient_checkpointing else 34
    parts = {
        "weights": 4 * parameters,
        "gradients and moments": 12 * trained,
        "reference": 4 * parameters if method.kind == "dpo" and not adapters else 0,
        "activations": 2 * kept * rows * longest * shape.width * shape.n_layers,
        "logits": 0 if method.kind == "reward" else 8 * rows * longest * shape.vocabulary,
    }
    return {
        "flops": epoch
        if cell.kind == "count"
        else whole + search + reply_plan.measuring(study, cell, place.outline.shape, counts),
        "parts": {"epoch": epoch, "epochs": settings.epochs, "search": search, "rates": rates if first else 0},
        "bytes": parts,
        "pairs": counts.pairs("train"),
        "how": "lower bound of memory",
    }


def _adapter_weights(rank: int, outline: Outline) -> int:
    """About: on every matrix of a layer, rank times its two sides; from the layers' weights as if they were square."""
    shape = outline.shape
    per_layer = shape.body_matmul_parameters / max(1, shape.n_layers)
    # A matrix of d x w weights gets rank (d + w), at most rank / d + rank / w of it.
    return round(2 * rank * shape.n_layers * per_layer / shape.width)


def _heads(study: Study, cell: Cell, place: _Place) -> dict[str, Any]:
    method = (
        features_method(study, cell)
        if cell.kind == "features"
        else next(m for m in study.methods if m.name == cell.method)
    )
    if method.all_layers:
        return _all_layers(cell, method, place)
    found = place.head_plan(method)
    flops = {
        "features": found.flops["extraction"] + found.flops.get("layer", 0),
        "head": found.flops["fit"] + reply_plan.guided(study, method, place.outline.shape, place.counts),
        "count": found.flops["extraction"] + found.flops["fit"],
        "adamw": found.flops["fit"],
    }[cell.kind]
    stage = "extraction" if cell.kind == "features" else "fit"
    place_of = "device" if stage in found.device_bytes else "host"
    parts = dict((found.device_bytes if place_of == "device" else found.host_bytes).get(stage, {}))
    there = found.room[place_of]
    return {
        "flops": flops,
        "parts": dict(found.flops),
        "bytes": parts,
        "pairs": found.train,
        "how": "upper bound of memory",
        # Of this cell's own stage; the replies of a run may be short where its extraction is not.
        "short": there is not None and sum(parts.values()) > there,
        "mends": list(found.mends),
    }


def _all_layers(cell: Cell, method: StudyMethod, place: _Place) -> dict[str, Any]:
    """Features of every layer, which all heads share, and a fit on those of one: no plan of a run is like it."""
    from coala.compare.matrix import POOLINGS_TRIED
    from coala.plan.plan import fit_flops

    shape, counts = place.outline.shape, place.counts
    rows = {part: counts.scaled(len(survey.tokens)) for part, survey in counts.surveys.items()}
    if cell.kind == "features":
        surveys = counts.surveys.values()
        flops = counts.scaled(sum(body_flops(shape, s.lengths, own=s.own_lengths) for s in surveys))
        flops += reply_plan.picking(counts.pairs("train"), shape)
        states = 4 * shape.width * shape.n_layers * len(POOLINGS_TRIED) * 2 * max(rows.values())
        parts = {**_weights(place), "features": states}
    else:
        # Gates on the reply alone.
        flops = fit_flops(method.head, counts.pairs("train"), shape.width, 1)
        parts = {"features": 8 * shape.width * counts.pairs("train")}
    found = {"flops": flops, "parts": {}, "bytes": parts, "pairs": counts.pairs("train")}
    return {**found, "how": "lower bound of memory"}


def _weights(place: _Place) -> dict[str, int]:
    return {"weights": place.outline.weight_bytes("float32")}


def _replies(study: Study, cell: Cell, place: _Place) -> dict[str, Any]:
    counts = place.counts
    flops = reply_plan.writer(study, cell, place.outline.shape, counts)
    return {
        "flops": flops,
        "parts": {"replies": flops},
        "bytes": _weights(place),
        "pairs": counts.pairs("eval"),
        "how": "weights alone",
    }


def total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums of a plan: FLOPs by kind of method, and the largest need of memory."""
    by: dict[str, int] = {}
    for row in rows:
        by[row["label"]] = by.get(row["label"], 0) + row["flops"]
    need = [sum(row["bytes"].values()) for row in rows]
    seconds = [row["seconds"] for row in rows]
    return {
        "cells": len(rows),
        "flops": sum(row["flops"] for row in rows),
        "flops_by_method": by,
        "most_bytes": int(np.max(need)),
        "seconds": None if any(s is None for s in seconds) else float(sum(seconds)),
    }
