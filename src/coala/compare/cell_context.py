"""What the cells of a study have in common: where they lie, how they are measured, and the files they leave.

CELL/cell.json          status (done or failed), spec, result, costs or error; written last, whole
CELL/generations.jsonl  the replies to held-out prompts, if the method writes
CELL/run/, CELL/head/   what the method trained
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.data import part
from coala.compare.matrix import Cell
from coala.compare.progress import OnStage, Teller, unheard
from coala.compare.study import Study, StudyMethod, StudyModel
from coala.costs import Meter, peak_memory
from coala.store import load_generations, load_json, save_generations
from coala.values import CoalaError, Generation, Pair, conversation_text, prompt_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coala.backbone import LanguageModel

# How a log-likelihood counts as a reward.
SUM, PER_TOKEN = "sum", "per token"


@dataclass(frozen=True)
class CellContext:
    """A cell on its way: the study, where it writes, and what it reads of other cells."""

    study: Study
    cell: Cell
    out: Path
    tell: OnStage = unheard

    @cached_property
    def show(self) -> Teller:
        """Tells whoever waits for this cell how far it is."""
        return Teller(self.tell)

    @property
    def folder(self) -> Path:
        return self.out / "cells" / self.cell.id

    @property
    def method(self) -> StudyMethod:
        return next(m for m in self.study.methods if m.name == self.cell.method)

    @property
    def model(self) -> StudyModel:
        return self.study.models[self.cell.model]

    def part(self, name: str) -> list[Pair]:
        """``train``, ``fit``, ``validation`` or ``test``."""
        return part(self.out, self.cell.dataset, name)

    def result(self, cell_id: str) -> dict[str, Any]:
        """The result of a cell that is done."""
        found: dict[str, Any] = load_json(self.out / "cells" / cell_id / "cell.json")["result"]
        return found

    @cached_property
    def start(self) -> Path | str:
        """The weights this cell's method starts from: the model, or the model after SFT."""
        if self.cell.init == "base":
            return self.model.path
        from coala.baselines import load_trained, whole_model

        assert self.study.sft is not None
        seed = self.study.seeds[0]
        name = f"{self.cell.dataset}.{self.cell.model}.base.{self.study.sft.name}.{self.study.sft_setting}.s{seed}"
        folder = self.out / "cells" / name
        return whole_model(load_trained(folder / "run"), folder / "merged")

    @property
    def revision(self) -> str | None:
        return self.model.revision if self.cell.init == "base" else None

    @cached_property
    def backbone(self) -> LanguageModel:
        """What this cell's method starts from, frozen; loaded when first asked for."""
        from coala.backbone import load_backbone

        return load_backbone(
            self.start,
            revision=self.revision,
            template=self.model.template,
            device=self.study.device,
            dtype=self.model.dtype,
        )


# --- measured ----------------------------------------------------------------------------------------------------


class Costs:
    """Seconds, joules and peak memory of a cell's parts; ``at_start`` is what its libraries alone take."""

    def __init__(self) -> None:
        self.at_start = peak_memory()
        self.parts: dict[str, dict[str, Any]] = {}

    @contextmanager
    def of(self, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Measure a block; what it puts into the mapping it gets is kept beside the measured."""
        about: dict[str, Any] = dict(facts)
        meter = Meter()
        with meter:
            yield about
        # A block may know better what it took, having been begun in another session.
        measured = {"seconds": meter.seconds, "peak_bytes": peak_memory(), "joules": meter.joules}
        about["measured"] = {**measured, **about.get("measured", {}), "at_start": self.at_start}
        self.parts[name] = about


def measured_margins(margins: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Ranking accuracy, the margins in units of their own deviation, AUC-free of scale, and the margins themselves."""
    from coala.statistics.scores import accuracy_of_margins, tie_share

    values = np.asarray(margins, np.float64)
    if not np.isfinite(values).all():
        raise CoalaError(
            f"{int((~np.isfinite(values)).sum())} of {len(values)} held-out margins are not finite: training diverged. "
            "Try lower rates."
        )
    group = [pair.group for pair in pairs]
    spread = float(values.std())
    return {
        "margins": [float(value) for value in values],
        "accuracy": asdict(accuracy_of_margins(values, group)),
        "margin_ratio": float(values.mean()) / spread if spread > 0 else 0.0,
        "margin_sd": spread,
        "ties": tie_share(values),
        "nll": calibrated_nll(values),
    }


def calibrated_nll(margins: Any) -> float:
    """Mean of log(1 + exp(-margin t)) at the best scale t >= 0: what the margins are worth on a scale common to all."""
    values = np.asarray(margins, np.float64)
    size = float(np.sqrt((values**2).mean()))
    if not size > 0:
        return math.log(2)
    # Convex in the scale: golden section on its logarithm finds the minimum, and a scale of 0 has log 2.
    low, high = math.log(1e-3 / size), math.log(1e3 / size)
    golden = (math.sqrt(5) - 1) / 2

    def nll(log_scale: float) -> float:
        return float(np.logaddexp(0, -math.exp(log_scale) * values).mean())

    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
    return min(math.log(2), nll((low + high) / 2))


# --- replies -----------------------------------------------------------------------------------------------------


def prompts_of(context: CellContext) -> list[Pair]:
    """The held-out pairs whose prompts are answered, each prompt once."""
    distinct = list({conversation_text(pair.prompt): pair for pair in context.part("test")}.values())
    return distinct[: context.study.evaluation.prompts]


def replies_of(
    context: CellContext,
    writer: LanguageModel,
    base: LanguageModel,
    costs: Costs,
    head: Any = None,
    guidance: Any = None,
) -> dict[str, Any]:
    """Answer the held-out prompts, save the replies, and judge them against those of the unguided start.

    ``perplexity`` is that of the replies under ``base``, the model every method of this place starts from.
    """
    from coala.baselines import TrainSettings, log_likelihoods
    from coala.decoding import Guidance, generate
    from coala.statistics.scores import perplexity

    settings = context.study.evaluation
    pairs = prompts_of(context)
    if not pairs:
        return {}
    seed = context.study.seeds[0] if context.cell.seed is None else context.cell.seed
    most, n_pieces = len(pairs) * settings.max_new_tokens, count(1)
    context.show("replies", 0, most)
    with costs.of("replies"):
        replies = generate(
            [pair.prompt for pair in pairs],
            writer,
            head,
            guidance or Guidance(mode="none"),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
            prompt_ids=[prompt_id(pair.prompt) for pair in pairs],
            batch_size=16,
            on_token=lambda index, piece: context.show("replies", next(n_pieces), most, "tokens at most"),
        )
    save_generations(context.folder / "generations.jsonl", replies)
    texts = [Pair(pair.prompt, reply.text, reply.text, pair.group) for pair, reply in zip(pairs, replies, strict=True)]
    # A closing token, so that an empty reply has one; no token is added to what was written otherwise.
    found = log_likelihoods(
        base, texts, TrainSettings(max_length=context.model.max_tokens), batch_tokens=context.model.batch_tokens
    )
    result: dict[str, Any] = {
        "prompts": len(replies),
        "mean_tokens": float(np.mean([reply.n_tokens for reply in replies])),
        "perplexity": asdict(perplexity(found.chosen, found.chosen_tokens, [pair.group for pair in pairs])),
    }
    if any(reply.divergence is not None for reply in replies):
        from coala.statistics.intervals import mean_estimate

        spent = [reply.divergence or 0.0 for reply in replies]
        result["kl"] = asdict(mean_estimate(spent, [pair.group for pair in pairs]))
    return {**result, **_judged(context, replies)}


def _judged(context: CellContext, replies: Sequence[Generation]) -> dict[str, Any]:
    from coala.evaluation import WordJudge, judge

    file = context.study.datasets[context.cell.dataset].judge
    if file is None or context.cell.kind == "base":
        return {}
    dataset, model, init = context.cell.place
    reference = load_generations(context.out / "cells" / f"{dataset}.{model}.{init}.base" / "generations.jsonl")
    ours = [Generation(**{**asdict(reply), "method": context.cell.label}) for reply in replies]
    theirs = [Generation(**{**asdict(reply), "method": "base"}) for reply in reference]
    return {"judgements": [asdict(j) for j in judge(ours, theirs, WordJudge.load(file))]}
