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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.data import part
from coala.compare.matrix import Cell, features_key
from coala.compare.progress import OnStage, Teller, unheard
from coala.compare.study import Dataset, Study, StudyEvaluation, StudyMethod, StudyModel
from coala.costs import Meter, peak_memory
from coala.store import load_json
from coala.values import CoalaError, Pair

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

    @property
    def dataset(self) -> Dataset:
        return self.study.datasets[self.cell.dataset]

    @property
    def evaluation(self) -> StudyEvaluation:
        """How replies are measured here."""
        return self.study.evaluation_of(self.cell.dataset)

    def features_folder(self, dataset: str | None = None, method: StudyMethod | None = None) -> Path:
        """Where the features lie that this cell's method (or ``method``) reads, here or of another dataset."""
        _, model, init = self.cell.place
        where = f"{dataset or self.cell.dataset}.{model}.{init}"
        return self.out / "cells" / f"{where}.features-{features_key(method or self.method)}"

    def features_result(self) -> dict[str, Any]:
        """What the cell of the features that this cell's method reads found."""
        return self.result(self.features_folder().name)

    def part(self, name: str) -> list[Pair]:
        """``train``, ``fit``, ``validation`` or ``test``."""
        return part(self.out, self.cell.dataset, name)

    def result(self, cell_id: str) -> dict[str, Any]:
        """The result of a cell that is done."""
        found: dict[str, Any] = load_json(self.out / "cells" / cell_id / "cell.json")["result"]
        return found

    def costs(self, cell_id: str) -> dict[str, Any]:
        """What a cell that is done took."""
        found: dict[str, Any] = load_json(self.out / "cells" / cell_id / "cell.json")["costs"]
        return found

    @cached_property
    def start(self) -> Path | str:
        """The weights this cell's method starts from: the model, or the model after SFT."""
        if self.cell.init == "base":
            from coala.baselines import trainable

            return trainable(self.model.path, self.out / "models" / self.cell.model)
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


def keep_compiled(context: CellContext) -> None:
    """What one head's cell compiles, the next reads from the comparison's folder."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(context.out / "compiled"))  # type: ignore[no-untyped-call]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # type: ignore[no-untyped-call]


@contextmanager
def compiling() -> Iterator[list[float]]:
    """Seconds that XLA compiles for, one entry each time."""
    import jax

    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds


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
