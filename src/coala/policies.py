"""The values of distillation: final states with what their distributions are to become, and the policy that came of it.

Frozen dataclasses over NumPy arrays, like those of ``values.py``; no file, model or solver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from coala.settings import Support, Teacher
from coala.values import Certificate, CoalaError, FeatureSpec, Float32


@dataclass(frozen=True, eq=False)
class DistilStates:
    """n steps of replies: the state each distribution is made from, its likeliest tokens, and what it is to become.

    ``states`` (n, d) float32 are final, normalised hidden states, in memory or mapped from a file. ``tokens`` (n, K)
    int32 are the likeliest under the model that the replies were drawn from, likeliest first; where none of them is the
    target, it takes the last place. The first ``size`` (n,) of a row are the nucleus. ``target`` (n, K) float32 sums to
    1. ``weight`` (n,) float64 is not negative; ``group`` (n,) int64 numbers the prompts, which no split tears apart.
    """

    states: Float32
    tokens: NDArray[np.int32]
    size: NDArray[np.int32]
    target: Float32
    weight: NDArray[np.float64]
    group: NDArray[np.int64]

    def __post_init__(self) -> None:
        n = len(self.states)
        shapes = {name: getattr(self, name).shape for name in ("tokens", "size", "target", "weight", "group")}
        if self.states.ndim != 2 or self.tokens.ndim != 2 or self.states.dtype != np.float32:
            raise CoalaError(
                f"Found states of shape {self.states.shape} and type {self.states.dtype} and tokens of shape "
                f"{shapes['tokens']}; expected (n, d) float32 and (n, K)."
            )
        wide = (n, self.tokens.shape[1])
        if shapes != {"tokens": wide, "target": wide, "size": (n,), "weight": (n,), "group": (n,)}:
            raise CoalaError(f"Found {shapes} for {n} states; expected (n, K) or (n,). Fix: collect them again.")
        if n and not (self.size.min() >= 1 and self.size.max() <= wide[1]):
            raise CoalaError(f"Found nuclei of {self.size.min()} to {self.size.max()} tokens; expected 1 to {wide[1]}.")
        if not (np.isfinite(self.weight).all() and (self.weight >= 0).all()):
            raise CoalaError("Found a weight below 0 or not finite; expected at least 0, or the program is not convex.")
        if not (np.abs(self.target.sum(1, dtype=np.float64) - 1) <= 1e-4).all() or (self.target < 0).any():
            raise CoalaError(
                "Found a target that is not a distribution; expected sums of 1. Fix: collect the states again."
            )

    def __len__(self) -> int:
        return len(self.states)

    @property
    def width(self) -> int:
        """d, the length of a state."""
        return int(self.states.shape[1])

    @property
    def in_nucleus(self) -> NDArray[np.bool_]:
        """Whether the whole target of each step lies in its nucleus, (n,)."""
        inside = np.arange(self.tokens.shape[1]) < self.size[:, None]
        return np.asarray(np.where(inside, self.target, 0.0).sum(1, dtype=np.float64) >= 1 - 1e-4)

    def held_to(self, used: NDArray[np.bool_]) -> DistilStates:
        """The same states, those that are not ``used`` (n,) at weight 0."""
        return replace(self, weight=np.where(used, self.weight, 0.0))


@dataclass(frozen=True, eq=False)
class DistilledPolicy:
    """A change of a model's output layer: pi(v | s) = softmax(W (h + A h))_v, A = left right.

    ``left`` (d, r) and ``right`` (r, d) float32, or A itself as ``left`` (d, d) and no ``right``. ``spec`` says of
    which model. ``program`` names the teacher, ``support`` what was normalised over: the ``nucleus`` that the replies
    were sampled from, or the whole ``vocabulary``. ``certificate`` says what was proved, its facts what was chosen.
    """

    left: Float32
    right: Float32 | None
    spec: FeatureSpec
    program: Teacher
    support: Support
    ridge: float
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            part = getattr(self, name)
            if part is None:
                continue
            object.__setattr__(self, name, np.ascontiguousarray(part, dtype=np.float32))
            if part.ndim != 2 or not np.isfinite(part).all():
                raise CoalaError(f"The policy's {name} factor is not a finite matrix. Fix: distil again.")
        for name, kind in (("program", Teacher), ("support", Support)):
            if getattr(self, name) not in get_args(kind):
                raise CoalaError(
                    f"Found the {name} {str(getattr(self, name))[:20]!r} of a policy, expected one of "
                    f"{', '.join(get_args(kind))}, fix: distil again."
                )
        if not 0 <= self.ridge < float("inf"):
            raise CoalaError(f"Found a policy's ridge of {self.ridge}, expected a number from 0, fix: distil again.")
        if self.right is None and self.left.shape[0] != self.left.shape[1]:
            raise CoalaError(f"Found a change of shape {self.left.shape}; expected (d, d).")
        if self.right is not None and self.left.shape != self.right.shape[::-1]:
            raise CoalaError(f"Found factors {self.left.shape} and {self.right.shape}; expected (d, r) and (r, d).")

    @property
    def width(self) -> int:
        """d, the length of the states it changes."""
        return len(self.left)

    @property
    def rank(self) -> int:
        """Columns of the factors; d for a change that was not cut."""
        return int(self.left.shape[1])

    @property
    def change(self) -> Float32:
        """A, (d, d)."""
        return self.left if self.right is None else np.asarray(self.left @ self.right, dtype=np.float32)

    def factors(self) -> tuple[Float32, Float32]:
        """(d, r) and (r, d) whose product is A."""
        return self.left, np.eye(self.width, dtype=np.float32) if self.right is None else self.right

    def scaled(self, strength: float) -> DistilledPolicy:
        """``strength`` times the change: 0 is the base model, 1 the policy itself. No certificate holds for it."""
        if strength == 1:
            return self
        return replace(self, left=np.float32(strength) * self.left, certificate=None)

    def summary_rows(self) -> list[list[str]]:
        """What a table says of it."""
        rows = [["rank", f"{self.rank} of {self.width}"], ["ridge", f"{self.ridge:.3g}"], ["support", self.support]]
        if self.certificate is not None:
            share = self.certificate.facts.get("relative_gap_of_full_change", float("nan"))
            most = -self.certificate.lower_bound
            rows += [["gains", f"{-self.certificate.objective:.4f} nats a token on its replies; {most:.4f} at most"]]
            rows += [["certified gap", f"{share:.1e} of what the change gains before it is cut to a rank"]]
            rows += [["certificate", self.certificate.statement]]
        return rows

    def save(self, folder: Path | str) -> None:
        """Write ``folder``/policy.safetensors and policy.json; :meth:`load` reads them."""
        from coala.store import save_policy

        save_policy(Path(folder), self)

    @classmethod
    def load(cls, folder: Path | str) -> DistilledPolicy:
        """The policy of a folder that :meth:`save` wrote; CoalaError for one that is not whole."""
        from coala.store import load_policy

        return load_policy(Path(folder))


@dataclass(frozen=True, eq=False)
class DistilledAdapter:
    """A LoRA adapter trained on a teacher's replies; ``folder`` holds it as peft reads it, and adapter.json beside.

    ``spec`` says of which model, ``program`` names the teacher. ``trials`` has a row for every epoch of every learning
    rate that was tried: ``rate``, ``epoch``, ``held_out`` (what the loss on held-out replies exceeds the base model's
    by, in nats a token over the whole vocabulary) and ``se``, its standard error over prompts. ``rate`` and ``epoch``
    name the row that was kept. ``facts``: settings, counts, FLOPs, seconds, peaks of memory.
    """

    folder: Path
    spec: FeatureSpec
    program: Teacher
    rank: int
    rate: float
    epoch: int
    base_loss: float
    trials: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]

    @property
    def kept(self) -> Mapping[str, Any]:
        """The row of ``trials`` that was kept."""
        return next(row for row in self.trials if (row["rate"], row["epoch"]) == (self.rate, self.epoch))

    def summary_rows(self) -> list[list[str]]:
        """What a table says of it."""
        row = self.kept
        found = f"{row['held_out']:+.4f} nats a token, standard error {row['se']:.4f}; {self.base_loss:.4f} before"
        return [
            ["adapter", f"rank {self.rank}, rate {self.rate:g}, epoch {self.epoch} of {self.facts['epochs']}"],
            ["rates tried", ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in self.trials}))],
            ["held-out loss", found],
            ["replies", f"{self.facts['n_replies']} trained on, {self.facts['n_held_out']} held out"],
            ["certificate", "none: training is not convex, and nothing says how near this is to the best adapter"],
        ]

    @classmethod
    def load(cls, folder: Path | str) -> DistilledAdapter:
        """The adapter of a folder that :func:`coala.store.save_adapter` wrote; CoalaError for one that is not whole."""
        from coala.store import load_adapter

        return load_adapter(Path(folder))
