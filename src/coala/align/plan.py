"""What a run will cost, before any of it is done: tokens, FLOPs, memory, disk and time; and what cannot fit.

Sizes come from the model's config.json, tokens from its tokenizer where there is one, seconds from a short probe where
its weights are here. Every formula is one of :mod:`coala.costs`; nothing is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coala.align.counting import Counts, Guess, count
from coala.align.depth import MOST_PAIRS
from coala.align.needs import Needs, Parts, Shortage, mends_of, size
from coala.costs import (
    Shape,
    Stopwatch,
    ask_driver,
    cronos_flops,
    decoding_flops,
    extraction_flops,
    head_flops,
    pairwise_flops,
    search_flops,
    second_phase_flops,
    work_over_bound,
)
from coala.recipe import HeadSettings, Recipe
from coala.values import CoalaError, Estimate, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.features.plan import Survey

# Of a solve of the pairwise program: steps of Newton's method, and of conjugate gradients in each.
NEWTON_STEPS, PCG_STEPS = 10, 20


class PlanError(CoalaError):
    """A run that does not fit the memory or the disk it would have."""


@dataclass(frozen=True)
class Plan:
    """What a run will cost. Bytes are upper bounds by stage and part, FLOPs and tokens by what they are spent on.

    ``tokens``: ``computed``; ``distinct``, the least possible; ``pair_by_pair``, each reply with its prompt, as a loop
    over pairs would encode them; ``counted`` says how. ``flops``: ``extraction``, ``least`` (a lower bound for it),
    ``pair_by_pair``, ``fit`` (at most, by the usual steps of a solve) and ``replies`` (at most). ``seconds`` is the
    time of the extraction; None, with the reason in ``probe``, if it was not measured. ``room`` holds the bytes there
    are of device, host and disk, None if nobody tells. ``mends`` are the flags that make the run fit: any one of them,
    or, with ``together``, all of them.
    """

    model: str
    parameters: int
    device: str
    dtype: str
    quantise: str | None
    layers: int
    pairs: int
    train: int
    rows: int
    longest_row: int
    counted: str
    tokens: dict[str, int]
    flops: dict[str, int]
    device_bytes: dict[str, Parts]
    host_bytes: dict[str, Parts]
    disk_bytes: Parts
    room: dict[str, int | None]
    seconds: Estimate | None
    probe: str
    shortages: tuple[Shortage, ...]
    mends: tuple[str, ...]
    together: bool

    def require(self, *, certain: bool = False) -> None:
        """Raise :class:`PlanError` if something is short; ``certain``: only if even the smallest passes do not fit."""
        short = [shortage for shortage in self.shortages if shortage.certain or not certain]
        if not short:
            return
        if not self.mends:
            way = "No setting makes it fit: use a smaller model, fewer pairs or a larger machine."
        elif self.together and len(self.mends) > 1:
            way = f"These together make it fit: {' '.join(self.mends)}"
        else:
            way = f"{'Any one of these makes' if len(self.mends) > 1 else 'This makes'} it fit: {', '.join(self.mends)}"
        raise PlanError("\n".join([f"{self.model} on {self.pairs:,} pairs does not fit.", *map(str, short), way]))


def make_plan(
    recipe: Recipe,
    *,
    probe_seconds: float = 5.0,
    memory: int | None = None,
    device_memory: int | None = None,
    disk: int | None = None,
    config: Path | None = None,
    rows: int | None = None,
    guess: Guess | None = None,
) -> Plan:
    """The plan of ``coala align`` with this recipe; what does not fit is in its ``shortages``.

    ``memory``, ``device_memory`` and ``disk`` are the bytes there will be (default: what is free here; with
    ``device_memory`` a GPU is planned for though there is none here). ``config`` is a config.json to take the sizes
    from; ``rows`` plans for so many pairs like those given; ``guess`` gives the tokens of a text. The model is loaded
    for the probe alone: if its weights are here, its plan fits and ``probe_seconds`` is not 0.

    Raises :class:`CoalaError` for pairs or a configuration that cannot be used.
    """
    import torch

    from coala.backbone import outline as outline_of
    from coala.convex.rows import available_bytes

    settings = recipe.model
    outline = outline_of(settings.name if config is None else config, None if config else settings.revision)
    folder, weights = _place(recipe, config)
    counts = count(recipe, outline, tokenizer=folder, guess=guess, rows=rows)
    here = torch.cuda.is_available()
    named = settings.device.startswith("cuda") or settings.device == "offload"
    on_gpu = named or (settings.device == "auto" and (here or device_memory is not None))
    room = {
        "device": _card(device_memory) if on_gpu else None,
        "host": available_bytes() if memory is None else memory,
        "disk": shutil.disk_usage(Path()).free if disk is None else disk,
    }
    seconds, probe = None, "not asked for"
    if probe_seconds > 0:
        short = [s for s in Needs(recipe, outline, counts, on_gpu, room).shortages() if s.certain]
        reason = (
            "no weights of this model are here"
            if not weights or config is not None
            else "it would not fit"
            if short
            else "there is no GPU here"
            if on_gpu and not here
            else "tokens were not counted by its tokenizer"
            if guess is not None or not recipe.pairs
            else ""
        )
        probe = f"not measured: {reason}" if reason else ""
        if not reason:
            from coala.align.stages import open_backbone

            backbone = open_backbone(recipe)
            if backbone.shares != counts.shares:
                counts = count(recipe, outline, tokenizer=folder, guess=guess, rows=rows, shares=backbone.shares)
            seconds = _probed(recipe, backbone, counts, probe_seconds)
            probe = seconds.method
    needs = Needs(recipe, outline, counts, on_gpu, room)
    shortages = needs.shortages()
    mends, together = mends_of(recipe, outline, counts, on_gpu, room) if shortages else ((), False)
    return Plan(
        model=settings.name,
        parameters=outline.parameters,
        device="gpu" if on_gpu else "cpu",
        dtype=needs.dtype,
        quantise=settings.quantise,
        layers=needs.layer,
        pairs=counts.pairs("train") + counts.pairs("eval"),
        train=counts.pairs("train"),
        rows=counts.rows("train") + counts.rows("eval"),
        longest_row=counts.longest_row,
        counted=counts.how,
        tokens={
            "computed": counts.total("tokens"),
            "distinct": counts.total("distinct_tokens"),
            "pair_by_pair": counts.total("reply_tokens"),
        },
        flops={
            **_extraction(recipe, outline.shape, counts, needs.layer),
            "fit": fit_flops(recipe.head, counts.pairs("train") * settings.prefixes, outline.width, needs.sources),
            "replies": _replies(recipe, outline.shape, counts.prompts),
        },
        device_bytes=needs.device(),
        host_bytes=needs.host(),
        disk_bytes=needs.disk(),
        room=room,
        seconds=seconds,
        probe=probe,
        shortages=shortages,
        mends=mends,
        together=together,
    )


def _place(recipe: Recipe, config: Path | None) -> tuple[Path | None, bool]:
    """A folder with the model's tokenizer, if there is one, and whether the weights are here; fetches no weights."""
    from coala.backbone.files import find, has_tokenizer

    name = recipe.model.name
    if config is not None:
        folder = Path(name) if Path(name).is_dir() else config.parent
    else:
        small = ("*.json", "*.jinja", "*.model", "*.txt")
        folder = find(name, recipe.model.revision, needed="config.json", wanted=small)[0]
    adapter = Path(recipe.model.adapter) if recipe.model.adapter else None
    weights = any(folder.glob("*.safetensors"))
    for place in (adapter, folder):
        if place is not None and has_tokenizer(place):
            return place, weights
    return None, weights


def _card(given: int | None) -> int | None:
    """Bytes free on the first GPU, as the driver tells: asking torch would take some of them."""
    if given is not None:
        return given
    free = ask_driver("memory.free")
    return int(free[0]) * 2**20 if free else None


# --- FLOPs -------------------------------------------------------------------------------------------------------


def _extraction(recipe: Recipe, shape: Shape, counts: Counts, layer: int) -> dict[str, int]:
    """As ``align`` records them of a finished extraction, and beside them the two that were spared and demanded."""
    from coala.features import distinct_lengths

    found = {"extraction": 0, "least": 0, "pair_by_pair": 0}
    top = None if recipe.log_ratios else layer
    for survey in counts.surveys.values():
        replies = survey.lengths[survey.index.reshape(-1)]
        found["extraction"] += extraction_flops(shape, survey.lengths, own=survey.own_lengths, layer=top)
        found["pair_by_pair"] += extraction_flops(shape, replies, layer=top)
        distinct, once = distinct_lengths(survey.tokens)
        found["least"] += extraction_flops(shape, distinct, own=once, layer=top)
        if recipe.log_ratios:
            logits = head_flops(shape, survey.reply_lengths)
            found = {name: flops + logits for name, flops in found.items()}
    found = {name: counts.scaled(flops) for name, flops in found.items()}
    if recipe.model.layer == "auto":
        # All layers of a sample of the pairs.
        share = min(1.0, MOST_PAIRS / max(1, counts.pairs("train")))
        found["layer"] = round(share * found["extraction"])
    return found


def fit_flops(settings: HeadSettings, pairs: int, width: int, sources: int) -> int:
    """At most, by the usual steps of a solve, of fitting a head on ``pairs`` pairs of ``width`` features.

    Pairwise: every ridge on every fold without gates; for each of ``sources`` of gates every sparsity and relaxation on
    every fold with as many gates as there may be, with a search for learnt ones at every sparsity. Two-phase: ADMM and
    the second layer with the published steps (docs/costs.md).
    """
    from coala.convex.fit import N_PATTERNS
    from coala.convex.learn import Search
    from coala.convex.path import RELAXATIONS, RIDGES, SPARSITIES

    gates = N_PATTERNS[settings.method] if settings.n_patterns is None else settings.n_patterns
    if settings.method == "two-phase":
        second = second_phase_flops(2 * pairs, width, 2 * gates, epochs=100)
        return cronos_flops(2 * pairs, width, gates, admm_steps=20, pcg_steps=50) + second
    folds = 4
    solve = pairwise_flops(pairs, width, 1, newton_steps=NEWTON_STEPS, pcg_steps=PCG_STEPS)
    total = len(RIDGES) * folds * solve
    if settings.method != "linear":
        total += sources * folds * len(SPARSITIES) * len(RELAXATIONS) * (gates + 1) * solve
    if settings.method == "learnt":
        search = Search()
        one = search_flops(pairs, width, starts=search.n_starts, steps=search.n_steps)
        total += sources * folds * len(SPARSITIES) * search.max_rounds * one
    return total


def _replies(recipe: Recipe, shape: Shape, prompts: list[int]) -> int:
    """Of unguided and guided replies that all run to their full length, as ``align`` counts them."""
    from coala.decoding import Guidance

    guidance = Guidance(**recipe.guidance.model_dump())
    new = recipe.evaluation.max_new_tokens
    peeked = guidance.candidates if guidance.mode in ("token", "prefix") else 0
    blocks = guidance.candidates if guidance.mode == "block" else 1
    total = 0
    for tokens in prompts:
        guided = decoding_flops(shape, tokens, new, candidates=peeked, every=guidance.interval, n_neurons=16)
        total += decoding_flops(shape, tokens, new) + blocks * guided
    return total


# --- seconds -----------------------------------------------------------------------------------------------------


def _probed(recipe: Recipe, backbone: LanguageModel, counts: Counts, seconds: float) -> Estimate:
    """Seconds of the whole extraction, from encoding some of its batches for about so many seconds.

    Batches are drawn evenly over the FLOPs of all, longest rows to shortest; of a batch that would take too long only
    the first trees. The interval is that of the slowest and fastest batch per FLOP.
    """
    part = max(counts.surveys, key=lambda name: int(counts.surveys[name].own_lengths.sum()))
    survey = counts.surveys[part]
    shape = backbone.shape
    layer = None if recipe.log_ratios else backbone.spec(_layer(recipe)).layer
    cost = np.array(
        [
            extraction_flops(shape, [a], own=[b], layer=layer)
            for a, b in zip(survey.lengths, survey.own_lengths, strict=True)
        ],
        dtype=np.float64,
    )
    # A layer of 0 is the embedding, which costs no product.
    cost = np.maximum(cost, 1.0)
    batches = survey.batches(recipe.model.batch_tokens)
    ends = np.cumsum([cost[batch.start : batch.stop].sum() for batch in batches])
    smallest = min(survey.trees(), key=lambda tree: float(cost[tree.start : tree.stop].sum()))
    _timed(recipe, backbone, survey, smallest, counts)  # the first pass of a process is slower than any other
    rate = _timed(recipe, backbone, survey, smallest, counts) / float(cost[smallest.start : smallest.stop].sum())
    spent, work, rates = 0.0, 0.0, []
    for place in _spread(len(batches), ends):
        batch = _cut(survey, batches[place], cost, (seconds - spent) / rate)
        took, flops = _timed(recipe, backbone, survey, batch, counts), float(cost[batch.start : batch.stop].sum())
        spent, work = spent + took, work + flops
        rates.append(took / flops)
        rate = spent / work
        if spent >= seconds:
            break
    total = float(counts.scale) * sum(
        float(extraction_flops(shape, s.lengths, own=s.own_lengths, layer=layer)) for s in counts.surveys.values()
    )
    how = f"{len(rates)} of {len(batches)} batches in {spent:.1f} s; the interval is that of the fastest and slowest"
    return Estimate(total * rate, total * min(rates), total * max(rates), len(rates), how)


def _layer(recipe: Recipe) -> int:
    return -1 if recipe.model.layer == "auto" else recipe.model.layer


def _spread(n: int, ends: NDArray[np.float64]) -> Iterator[int]:
    """Every batch once, first those in the middle of ever finer parts of the whole cost."""
    seen: set[int] = set()
    for i in range(1, 4 * n):
        share, digit, rest = 0.0, 0.5, i
        while rest:  # the digits of i mirrored at the point
            share, digit, rest = share + digit * (rest & 1), digit / 2, rest >> 1
        place = int(np.searchsorted(ends, share * ends[-1]))
        if place not in seen:
            seen.add(place)
            yield place


def _cut(survey: Survey, batch: range, cost: NDArray[np.float64], most: float) -> range:
    """The first trees of a batch, one at least, that cost no more than ``most`` together."""
    stops = [tree.stop for tree in survey.trees() if batch.start <= tree.start < batch.stop]
    affordable = [stop for stop in stops if cost[batch.start : stop].sum() <= most]
    return range(batch.start, affordable[-1] if affordable else stops[0])


def _timed(recipe: Recipe, backbone: LanguageModel, survey: Survey, rows: range, counts: Counts) -> float:
    """Seconds that whole trees take, from tokens to features."""
    from coala.features import extract
    from coala.features.plan import Survey
    from coala.values import Pair

    model, part = recipe.model, slice(rows.start, rows.stop)
    alone = np.arange(len(rows))
    plan = Survey(
        survey.tokens[part],
        survey.start[part],
        survey.stop[part],
        survey.dropped[part],
        survey.trunk[part] - rows.start,
        survey.shared[part],
        np.stack([alone, alone], axis=1),
    )
    pairs = [Pair(user(""), "", "", "")] * len(rows)
    spec = backbone.spec(_layer(recipe), model.pooling, model.ends_with_eos, model.max_tokens)
    with Stopwatch() as watch:
        extract(
            pairs, backbone, spec, plan=plan, batch_tokens=model.batch_tokens, prefixes=model.prefixes,
            log_ratios=recipe.log_ratios,
        )  # fmt: skip
    return watch.seconds


# --- what is shown -----------------------------------------------------------------------------------------------


def first_lines(plan: Plan) -> list[str]:
    """The plan in a few lines, for the start of a run."""
    tokens, flops = plan.tokens, plan.flops
    share = tokens["computed"] / tokens["pair_by_pair"] if tokens["pair_by_pair"] else 1.0
    lines = [
        f"{plan.pairs:,} pairs, {plan.rows:,} distinct rows: {tokens['computed']:,} tokens to encode, {share:.2f} of a "
        f"loop over pairs ({plan.counted})",
        f"{operations(sum(flops[name] for name in DONE if name in flops))}, of them {operations(flops['extraction'])} "
        "for features",
    ]
    if plan.seconds is not None:
        lines[-1] += f": {interval(plan.seconds)}"
    for name, stages in (("device memory", plan.device_bytes), ("memory", plan.host_bytes)):
        if stages:
            lines.append(
                f"{name}: {_of(max(sum(parts.values()) for parts in stages.values()), plan.room[_KEYS[name]])}"
            )
    lines.append(f"disk: {_of(sum(plan.disk_bytes.values()), plan.room['disk'])}")
    return lines + [f"short: {shortage}" for shortage in plan.shortages]


def table_rows(plan: Plan) -> list[tuple[str, str]]:
    """The whole plan as two columns."""
    quantised = f", {plan.quantise}" if plan.quantise else ""
    rows = [
        ("model", f"{plan.model}: {plan.parameters:,} parameters, {plan.layers} layers read"),
        ("runs on", f"{plan.device} in {plan.dtype}{quantised}"),
        ("pairs", f"{plan.pairs:,} ({plan.train:,} to train on), {plan.rows:,} distinct rows"),
        ("tokens", f"{plan.tokens['computed']:,} computed; longest row {plan.longest_row:,}"),
        ("  counted", plan.counted),
        ("  distinct", f"{plan.tokens['distinct']:,}, the least that could be"),
        ("  pair by pair", f"{plan.tokens['pair_by_pair']:,} in a loop without sharing"),
        ("FLOPs", operations(sum(plan.flops[name] for name in DONE if name in plan.flops))),
    ]
    over = work_over_bound(plan.flops["extraction"], plan.flops["least"])
    told = {
        "extraction": f" ({over:.2f} of the lower bound; {operations(plan.flops['pair_by_pair'])} pair by pair)",
        "fit": " at most, by the usual steps of a solve",
        "replies": " at most",
    }
    rows += [(f"  {name}", operations(plan.flops[name]) + told.get(name, "")) for name in DONE if name in plan.flops]
    rows.append(("time", "of the extraction: " + (interval(plan.seconds) if plan.seconds else plan.probe)))
    if plan.seconds:
        rows.append(("  probe", plan.probe))
    for name, stages in (("device memory", plan.device_bytes), ("memory", plan.host_bytes)):
        room = plan.room[_KEYS[name]]
        for stage, parts in stages.items():
            rows.append((f"{name}, {stage}", _of(sum(parts.values()), room)))
            rows += [(f"  {part}", size(number)) for part, number in parts.items() if number]
    rows.append(("disk", _of(sum(plan.disk_bytes.values()), plan.room["disk"])))
    return rows + [(f"  {part}", size(number)) for part, number in plan.disk_bytes.items() if number]


# What a run does; the other counts are what it is compared with.
DONE = ("layer", "extraction", "fit", "replies")
_KEYS = {"device memory": "device", "memory": "host"}


def _of(needed: int, there: int | None) -> str:
    return f"up to {size(needed)} of {'an unknown amount' if there is None else size(there)}"


def operations(flops: int) -> str:
    """FLOPs in the unit that suits them."""
    for power, name in ((18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if flops >= 10**power:
            return f"{flops / 10**power:,.1f} {name}"
    return f"{flops / 1e6:,.1f} MFLOP"


def interval(seconds: Estimate) -> str:
    """A duration with its interval."""
    return (
        f"about {_lasting(seconds.value)} [{_lasting(seconds.low)}, {_lasting(seconds.high)}] (n={seconds.n} batches)"
    )


def _lasting(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
