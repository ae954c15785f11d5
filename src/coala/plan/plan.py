"""What a run will cost, before any of it is done: tokens, FLOPs, memory, disk and time; and what cannot fit.

Sizes come from the model's config.json or GGUF header, tokens from its tokenizer where there is one, seconds from a
short probe where its weights are here. Every formula is one of :mod:`coala.costs`; nothing is written.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from coala.alignment.layer_choice import FEWEST_PAIRS, MOST_PAIRS, SHARE
from coala.costs import (
    Shape,
    ask_driver,
    cronos_flops,
    decoding_flops,
    extraction_flops,
    head_flops,
    pairwise_flops,
    search_flops,
    second_phase_flops,
)
from coala.plan.distilling import DistilPlan, distil_plan
from coala.plan.memory import Needs, Parts, Shortage, mends_of
from coala.plan.probe import probed, reply_seconds
from coala.plan.tokens import Counts, Guess, count
from coala.recipe import Recipe
from coala.settings import HeadSettings
from coala.values import CoalaError, Estimate

# Of a solve of the pairwise program: steps of Newton's method, and of conjugate gradients in each.
NEWTON_STEPS, PCG_STEPS = 10, 20


class PlanError(CoalaError):
    """A run that does not fit the memory or the disk it would have."""


@dataclass(frozen=True)
class RunPlan:
    """What a run will cost. Bytes are upper bounds by stage and part, FLOPs and tokens by what they are spent on.

    ``tokens``: ``computed``; ``distinct``, the least possible; ``pair_by_pair``, each reply with its prompt, as a loop
    over pairs would encode them; ``counted`` says how. ``flops``: ``extraction``, ``least`` (a lower bound for it),
    ``pair_by_pair``, ``fit`` (at most, by the usual steps of a solve) and ``replies`` (at most). ``seconds`` is the
    time of the extraction, ``reply_seconds`` that of the replies at most; None, with the reason in ``probe``, if it was
    not measured. ``room`` holds the bytes there
    are of device, host and disk, None if nobody tells. ``workers`` processes share the extraction. ``distil`` is
    what ``coala distil`` would take of the finished run. ``mends`` are the
    flags that make the run fit: any one of them, or, with ``together``, all of them.
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
    workers: int = 1
    reply_seconds: float | None = None
    distil: DistilPlan | None = None

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
    n_workers: int = 1,
    counts: Counts | None = None,
) -> RunPlan:
    """The plan of ``coala align`` with this recipe; what does not fit is in its ``shortages``.

    ``memory``, ``device_memory`` and ``disk`` are the bytes there will be (default: what is free here; with
    ``device_memory`` a GPU is planned for though there is none here). ``config`` is a config.json to take the sizes
    from; ``rows`` plans for so many pairs like those given; ``guess`` gives the tokens of a text; ``n_workers``
    processes extract; ``counts`` are those of these pairs and this model, if they were counted before. The model is
    loaded for the probe alone: if its weights are here, its plan fits and ``probe_seconds`` is not 0; the time it tells
    is that of one process.

    Raises :class:`CoalaError` for pairs or a configuration that cannot be used.
    """
    import torch

    from coala.backbone import outline as outline_of
    from coala.convex.rows import available_bytes

    settings = recipe.model
    outline = outline_of(settings.name if config is None else config, None if config else settings.revision)
    folder, weights = files_here(recipe, config)
    if counts is None:
        counts = count(recipe, outline, tokenizer=folder, guess=guess, rows=rows)
    here = torch.cuda.is_available()
    named = settings.device.startswith("cuda") or settings.device == "offload"
    on_gpu = named or (settings.device == "auto" and (here or device_memory is not None))
    room = {
        "device": _card(device_memory) if on_gpu else None,
        "host": available_bytes() if memory is None else memory,
        "disk": shutil.disk_usage(Path()).free if disk is None else disk,
    }
    seconds, probe, replies = None, "not requested", None
    if probe_seconds > 0:
        short = [s for s in Needs(recipe, outline, counts, on_gpu, room, n_workers).shortages() if s.certain]
        reason = (
            "the model's weights are not available locally"
            if not weights or config is not None
            else "it would not fit"
            if short
            else "no GPU is available"
            if on_gpu and not here
            else "tokens were not counted by its tokenizer"
            if guess is not None or not recipe.pairs
            else ""
        )
        probe = f"not measured: {reason}" if reason else ""
        if not reason:
            from coala.alignment.context import open_backbone

            backbone = open_backbone(recipe)
            if backbone.shares != counts.shares:
                counts = count(recipe, outline, tokenizer=folder, guess=guess, rows=rows, shares=backbone.shares)
            seconds = probed(recipe, backbone, counts, probe_seconds)
            probe = seconds.method
            if counts.prompts and not outline.encoder:
                flops = _extraction(recipe, outline.shape, counts, backbone.spec(-1).layer)["extraction"]
                replies = reply_seconds(recipe, backbone, counts, seconds.value / max(1, flops))
    needs = Needs(recipe, outline, counts, on_gpu, room, n_workers)
    shortages = needs.shortages()
    mends, together = mends_of(recipe, outline, counts, on_gpu, room, n_workers) if shortages else ((), False)
    return RunPlan(
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
        workers=n_workers,
        reply_seconds=replies,
        distil=distil_plan(recipe, outline, counts, on_gpu=on_gpu),
    )


def files_here(recipe: Recipe, config: Path | None) -> tuple[Path | None, bool]:
    """A folder with the model's tokenizer, if there is one, and whether the weights are here; fetches no weights."""
    from coala.backbone.files import find, has_tokenizer
    from coala.backbone.gguf import is_gguf

    name = recipe.model.name
    if config is not None:
        folder = Path(name) if Path(name).exists() else config.parent
    else:
        small = ("*.json", "*.jinja", "*.model", "*.txt")
        folder = find(name, recipe.model.revision, needed="config.json", wanted=small)[0]
    adapter = Path(recipe.model.adapter) if recipe.model.adapter else None
    weights = is_gguf(folder) or any(folder.glob("*.safetensors"))
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
        # All layers of a sample of the pairs, at most; none where it would be too small to tell.
        pairs = max(1, counts.pairs("train"))
        share = min(SHARE, MOST_PAIRS / pairs)
        found["layer"] = round(share * found["extraction"]) if share * pairs >= FEWEST_PAIRS else 0
    return found


def fit_flops(settings: HeadSettings, pairs: int, width: int, sources: int) -> int:
    """At most, by the usual steps of a solve, of fitting a head on ``pairs`` pairs of ``width`` features.

    Pairwise: every ridge on every fold without gates; for each of ``sources`` of gates every sparsity and relaxation on
    every fold with as many gates as there may be, with a search for learnt ones at every sparsity. Two-phase: ADMM and
    the second layer with the published steps (docs/costs.md).
    """
    from coala.convex.fit import N_PATTERNS
    from coala.convex.gate_search import Search
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

    guidance = Guidance(**asdict(recipe.guidance))
    new = recipe.evaluation.max_new_tokens
    total = 0
    for tokens in prompts:
        guided = decoding_flops(
            shape, tokens, new, candidates=guidance.looked_at, every=guidance.interval, n_neurons=16
        )
        total += decoding_flops(shape, tokens, new) + guidance.written * guided
    return total
