"""How a head steers decoding: the settings, and the rules that put head scores on a scale.

Knows nothing of models or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from coala.settings import GuidanceSettings, Mode, Rule, hints_of, taken_apart
from coala.values import CoalaError

Float64 = NDArray[np.float64]

PAPER_EVERY = 5
# Modes in which one of several sampled continuations is kept.
RANKING: tuple[Mode, ...] = ("block", "best_of")


def usual_strength(mode: Mode, rule: Rule) -> float:
    """The strength of a mode and rule that are not given one; docs/decoding.md has the measurements.

    Candidates that are whole blocks differ by more than tokens do, and there are few of them: it takes more strength to
    have as much of the head, and costs less. A distilled policy is as strong as it was fitted.
    """
    if mode == "distilled":
        return 1.0
    if rule != "calibrated":
        return 2.0
    return 24.0 if mode in RANKING else 8.0


@dataclass(frozen=True)
class Guidance(GuidanceSettings):
    """How the head guides decoding, and the restricted base distribution that guided and unguided text share.

    ``mode``:

    - ``token`` scores ``candidates`` samples of every ``every``-th token (1) and chooses among them;
    - ``prefix`` is the same at every fifth token, the paper's setting (App. H.3);
    - ``shift`` tilts the distribution of every ``every``-th token (1) by the scores of its ``candidates`` likeliest
      tokens, so that its divergence from the base distribution is known exactly and ``budget`` can bound it;
    - ``block`` samples ``candidates`` blocks of ``block_tokens`` tokens, keeps one of them by its score, goes on;
    - ``best_of`` samples ``candidates`` whole replies and keeps one of them by its score;
    - ``beam`` searches, without any chance, for the reply with the best mean log-probability plus ``strength`` times
      score, with ``width`` replies in hand, each of which goes on by its ``candidates`` likeliest tokens;
    - ``distilled`` samples the policy that the guidance was distilled into, ``strength`` times its change of the output
      layer: no head is asked, a token costs one forward;
    - ``none`` is plain sampling.

    ``strength`` multiplies the scores before they are added to log-probabilities. With ``rule="calibrated"`` scores are
    log-odds of preference, as far as held-out pairs vouch for them (:attr:`coala.ConvexHead.evidence`): strength 1
    takes the head at its word, and a head that is no better than chance changes nothing at any strength. The others
    look at the candidates of one choice alone, whatever the evidence: min-max normalised to [0, 1] (``"min-max"``, the
    paper's), as they are (``"raw"``), or in standard deviations from their mean (``"z-score"``). ``strength`` is that
    of mode and rule (:func:`usual_strength`) if not given.

    Strength 0 is unguided in every mode but ``beam``, which then is plain beam search. ``block`` and ``best_of`` keep
    each candidate with probability proportional to exp(strength x log-odds) by the calibrated rule; by the others the
    best simply wins, at any strength above 0. ``beam`` adds strength x log-odds to a reply's log-probability before
    the mean over its tokens is taken; scores by the other rules are added to the mean. ``budget``, for ``shift``
    alone: the nats a reply may spend, from which its strength follows (:mod:`coala.decoding.budget`); 0 is unguided.
    By the calibrated rule ``strength`` bounds it too; by the others it then only says whether to guide at all.
    ``top_k`` (0: off) and then ``top_p`` (1: off) restrict the base distribution.

    ``over="distilled"`` lets the head guide that policy instead of the model, in every mode but the last two: what is
    said of the base distribution then holds for the policy's, and strength 0 is mode ``distilled``.
    """

    strength: float = None  # type: ignore[assignment]  # the usual one

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))
        given: Any = self.strength
        if given is None:
            object.__setattr__(self, "strength", usual_strength(self.mode, self.rule))
        if self.budget is not None and self.mode not in ("shift", "none"):
            raise CoalaError(
                f"Guidance budget is {self.budget:g} in mode {self.mode!r}, whose divergence is not known exactly. "
                "Use mode 'shift', or leave the budget out."
            )
        if self.mode == "none" and self.over == "distilled":
            raise CoalaError(
                "Found guidance over the distilled policy in mode 'none', which is the model as it is; expected a mode "
                "that guides. Fix: mode 'distilled' samples the policy itself."
            )

    @classmethod
    def paper(cls, strength: float = 2.0) -> Guidance:
        """App. H.3: top-p 0.9, top-k 50, five candidates, min-max, every fifth token. It does not give a strength."""
        return cls("prefix", strength, every=PAPER_EVERY, candidates=5, top_k=50, top_p=0.9, rule="min-max")

    @classmethod
    def unguided(cls, *, top_k: int = 50, top_p: float = 0.9) -> Guidance:
        """Plain sampling from the restricted base distribution."""
        return cls("none", top_k=top_k, top_p=top_p)

    def at(self, temperature: float) -> Guidance:
        """Itself; at temperature 0, where samples do not differ, mode ``token`` instead of one of several samples."""
        return self.changed(mode="token") if temperature == 0 and self.mode in RANKING else self

    def changed(self, **settings: Any) -> Guidance:
        """With these settings, where they are not ``None``.

        A new rule brings its own strength if none is given, and so does a new mode to the usual strength, or where one
        of the two is ``distilled``, whose strength is of another kind. By the rules that keep the best of samples,
        however small its lead, a strength says nothing to ``block`` and ``best_of``: given without a mode it means
        ``token``. Modes ``distilled`` and ``none`` go over nothing, and a budget goes where the mode is no longer
        ``shift``.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        rule, mode = given.get("rule", self.rule), given.get("mode", self.mode)
        if mode != self.mode and "distilled" in (mode, self.mode):
            given.setdefault("strength", None)
        if rule != self.rule or self.strength == usual_strength(self.mode, self.rule):
            given.setdefault("strength", None)
        if mode in ("distilled", "none"):
            given.setdefault("over", "model")
        if mode not in (self.mode, "shift"):
            given.setdefault("budget", None)
        if given.get("strength") and "mode" not in given and self.mode in RANKING and rule != "calibrated":
            given["mode"] = "token"
        return replace(self, **given)

    @property
    def plain(self) -> Guidance:
        """Plain sampling of the model, restricted alike."""
        return Guidance.unguided(top_k=self.top_k, top_p=self.top_p)

    @property
    def change(self) -> float:
        """How often the model that is decoded has the change of the distilled policy; 0 is the base model."""
        if self.mode == "distilled":
            return self.strength
        return 1.0 if self.over == "distilled" else 0.0

    @property
    def weighs(self) -> bool:
        """Whether scores count as log-odds that held-out pairs vouch for."""
        return self.rule == "calibrated"

    @property
    def interval(self) -> int:
        """Every how many tokens the head is asked, the first token among them."""
        return self.every or (PAPER_EVERY if self.mode == "prefix" else 1)

    @property
    def rows(self) -> int:
        """Rows of the model that one reply takes."""
        return self.width if self.mode == "beam" else self.written

    @property
    def looked_at(self) -> int:
        """Candidates that a guided step looks ahead to, over all rows of a reply."""
        ahead = {"token": self.candidates, "prefix": self.candidates, "shift": self.candidates + 1}
        return ahead.get(self.mode, self.width * self.candidates if self.mode == "beam" else 0)

    @property
    def forwards(self) -> float:
        """Tokens that the model computes for one of the reply, at most."""
        if not self.looked_at:
            return float(self.rows) if self.active else 1.0
        return (self.interval - 1 + self.looked_at) / self.interval

    @property
    def written(self) -> int:
        """Replies that are written for one that is kept."""
        return self.candidates if self.mode in RANKING else 1

    @property
    def active(self) -> bool:
        """Whether a head could change anything."""
        chooses = self.candidates > 1 or self.mode == "beam"
        return self.mode not in ("distilled", "none") and self.strength > 0 and self.budget != 0 and chooses

    @property
    def samples(self) -> bool:
        """Whether the reply is a sample, which strength 0 makes an unguided one; a beam is not."""
        return self.mode != "beam"

    def __str__(self) -> str:
        if self.change and not self.active and self.samples:
            return "distilled" if self.change == 1 else f"distilled, strength {self.change:g}"
        return self._by_head + (" over the distilled policy" if self.change else "")

    @property
    def _by_head(self) -> str:
        if self.mode == "beam":
            return f"beam, width {self.width}, {self.rule} {self.strength:g}, {self.candidates} candidates"
        if not self.active:
            return "unguided"
        weighed = f", {self.rule} {self.strength:g}" if self.weighs else ""
        if self.mode == "block":
            return f"block{weighed}, {self.candidates} x {self.block_tokens} tokens"
        if self.mode == "best_of":
            return f"{'one' if self.weighs else 'best'} of {self.candidates}{weighed}"
        how = f"{self.strength:g}" if self.budget is None or self.weighs else ""
        if self.budget is not None:
            how = f"{how} within {self.budget:g} nats".strip()
        return f"{self.mode}, {self.rule} {how}, every {self.interval}, {self.candidates} candidates"


def _check(name: str, found: Any) -> None:
    """Raises :class:`CoalaError` for what the recipe's setting of this name does not allow; nothing is converted."""
    kinds, marks = taken_apart(hints_of(GuidanceSettings)[name])
    if found is None and type(None) in kinds:
        return
    bounds: dict[str, Any] = {
        which: getattr(mark, which) for mark in marks for which in ("ge", "gt", "le") if hasattr(mark, which)
    }
    words = get_args(kinds[0])
    number = isinstance(found, int | float | np.number) and not isinstance(found, bool) and math.isfinite(found)
    if str in kinds:
        fits, expected = isinstance(found, str) and bool(found), "a name"
    elif words:
        fits, expected = found in words, f"one of {', '.join(words)}"
    elif int in kinds:
        fits = number and isinstance(found, int | np.integer) and found >= bounds["ge"]
        expected = f"a whole number of at least {bounds['ge']}"
    elif "gt" in bounds:
        fits = number and bounds["gt"] < found <= bounds["le"]
        expected = f"a number in ({bounds['gt']}, {bounds['le']}]"
    else:
        fits = number and found >= bounds["ge"]
        expected = f"a finite number{' of nats' if name == 'budget' else ''} of at least {bounds['ge']}"
    if not fits:
        raise CoalaError(f"Guidance {name} is {found!r}; expected {expected}.")


# --- rules ----------------------------------------------------------------------------------------------------------


def _apart(scores: Float64, valid: NDArray[np.bool_]) -> tuple[Float64, Float64, NDArray[np.bool_]]:
    """Lowest and highest score, and whether they differ by more than rounding, which no rule may blow up."""
    low = np.where(valid, scores, np.inf).min(-1, keepdims=True)
    high = np.where(valid, scores, -np.inf).max(-1, keepdims=True)
    floor = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    return low, high, high - low > floor


def _min_max(scores: Float64, valid: NDArray[np.bool_]) -> Float64:
    low, high, apart = _apart(scores, valid)
    return np.where(apart, (scores - low) / np.where(apart, high - low, 1.0), 0.0)


def _raw(scores: Float64, valid: NDArray[np.bool_]) -> Float64:
    """As they are; by the calibrated rule they are log-odds already (:func:`unit`)."""
    return scores


def _z_score(scores: Float64, valid: NDArray[np.bool_]) -> Float64:
    _, _, apart = _apart(scores, valid)
    count = np.maximum(valid.sum(-1, keepdims=True), 1)
    from_mean = scores - np.where(valid, scores, 0.0).sum(-1, keepdims=True) / count
    deviation = np.sqrt(np.where(valid, from_mean**2, 0.0).sum(-1, keepdims=True) / count)
    return np.where(apart, from_mean / np.where(apart, deviation, 1.0), 0.0)


RULES: Mapping[Rule, Callable[[Float64, NDArray[np.bool_]], Float64]] = {
    "calibrated": _raw,
    "min-max": _min_max,
    "raw": _raw,
    "z-score": _z_score,
}


def unit(rule: Rule, evidence: float) -> float:
    """What head scores are multiplied by before ``rule`` sees them: ``evidence``, log-odds per unit of score."""
    return evidence if rule == "calibrated" else 1.0


def scaled(scores: NDArray[Any], valid: NDArray[np.bool_], rule: Rule) -> Float64:
    """Scores (..., k) by ``rule`` over the ``valid`` candidates of the last axis; 0 for the others."""
    return np.where(valid, RULES[rule](np.asarray(scores, dtype=np.float64), valid), 0.0)


def reach(rule: Rule, candidates: int) -> float:
    """The most by which ``rule`` can set two of so many candidates apart, whatever their scores."""
    if rule == "min-max":
        return 1.0
    # Two deviations a and -b leave at least (a^2 + b^2) / k for the variance, which is 1.
    return math.sqrt(2 * candidates) if rule == "z-score" else math.inf


def reweight(log_probs: Float64, scores: NDArray[Any], strength: float, rule: Rule = "min-max") -> Float64:
    """Log-probabilities proportional to ``p * exp(strength * score)`` over the last axis (candidates), in float64.

    ``log_probs`` and ``scores`` (..., k); a candidate of log-probability -inf does not take part. Strength 0 gives the
    normalised base distribution back.
    """
    valid = np.isfinite(log_probs)
    weights = np.where(valid, log_probs + strength * scaled(scores, valid, rule), -np.inf)
    top = weights.max(-1, keepdims=True)
    total: Float64 = weights - top - np.log(np.exp(weights - top).sum(-1, keepdims=True))
    return total
