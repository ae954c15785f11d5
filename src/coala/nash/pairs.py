"""One step of COMAL as numbers: its settings, the pairs trained on with their targets, and what was reached.

The step is IPO's against the one virtual reference v = w log ref + (1 - w) log mu_k, w = eta tau. With
d(y) = log pi(y) - v(y) and win rates w(y) against mu_k, over pairs of answers drawn from mu_k the losses are

    inpo   (d(y1) - d(y2) - eta (P(y1, y2) - 1/2))^2
    rebel  (d(y1) - d(y2) - eta (w(y1) - w(y2)))^2
    dro    (d(y) - eta w(y) + c_x)^2 with the best c_x: rebel over all pairs of a prompt
    sppo   (d(y) - eta (w(y) - 1/2))^2 for each answer

Knows nothing of models, judges or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from coala.nash.criteria import Note
from coala.nash.game import Float
from coala.values import CoalaError

Loss = Literal["inpo", "sppo", "dro", "rebel"]
Selection = Literal["random", "all", "best_worst"]
Target = Literal["soft", "bernoulli", "hard"]
LOSSES: tuple[Loss, ...] = ("inpo", "sppo", "dro", "rebel")
DRIFT = 2.0  # nats by which the likelihood of sampled answers may fall in one step before it is called drift
MASS = 0.8  # share of the probability that answers like the sampled ones have to keep in one step


@dataclass(frozen=True)
class COMALSettings:
    """What decides the outcome of a run.

    ``eta`` is the step size (or ``beta`` = 1/eta), ``ref_weight`` = eta tau the weight of the reference (or give
    ``tau``); 0 is iterative IPO. ``outer_steps`` and ``inner_steps`` count updates made: ``outer_steps`` 1 is INPO.
    ``prompts_per_step`` takes the prompts in turns (None: all of them in every step). Pairs: ``random`` pairs up the
    ``num_candidates`` answers to a prompt at random, ``all`` takes every pair, ``best_worst`` the two of highest and
    lowest win rate, which with ``target="hard"`` is the published recipe and solves another game (see docs/nash.md).
    Targets: ``soft`` eta (P - 1/2), ``bernoulli`` a label drawn with probability P, ``hard`` who is preferred; the last
    two ask for a margin of eta/2. ``length_normalize`` divides d(y) by the answer's tokens. ``anchor_nll``, a,
    weighs the mean negative log-likelihood of the sampled answers: pair losses see differences only, and it holds the
    sum where it belongs. To first order it shortens the step of ``inpo`` by the factor 1 - a/4, whatever eta.
    """

    eta: float | None = None
    beta: float | None = None
    ref_weight: float | None = None
    tau: float | None = None
    outer_steps: int = 3
    inner_steps: int = 6
    inner_loss: Loss = "inpo"
    num_candidates: int = 5
    pair_selection: Selection = "random"
    target: Target = "soft"
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    prompts_per_step: int | None = None
    length_normalize: bool = False
    anchor_nll: float = 0.0
    learning_rate: float = 5e-7
    epochs: float = 3.0
    batch_size: int = 8
    accumulation: int = 1
    schedule: str = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        eta = _one("eta", self.eta, "beta", self.beta, lambda beta: 1 / beta, 500.0)
        weight = _one("ref_weight", self.ref_weight, "tau", self.tau, lambda tau: eta * tau, 1 / 3)
        for name, value in (("eta", eta), ("beta", 1 / eta), ("ref_weight", weight), ("tau", weight / eta)):
            object.__setattr__(self, name, value)
        if not 0 <= weight <= 1:
            raise CoalaError(f"ref_weight = eta tau is {weight:g}; expected 0 (iterative IPO) to 1.")
        for name in ("outer_steps", "inner_steps", "batch_size", "accumulation", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise CoalaError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.num_candidates < 2:
            raise CoalaError(f"num_candidates is {self.num_candidates}; expected 2 at least, a pair.")
        if self.prompts_per_step is not None and self.prompts_per_step < 1:
            raise CoalaError(f"prompts_per_step is {self.prompts_per_step}; expected at least 1, or None for all.")
        for name, known in (
            ("inner_loss", LOSSES),
            ("pair_selection", ("random", "all", "best_worst")),
            ("target", ("soft", "bernoulli", "hard")),
        ):
            if getattr(self, name) not in known:
                raise CoalaError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if self.inner_loss != "inpo" and self.target != "soft":
            raise CoalaError(f"Loss {self.inner_loss!r} is fitted to win rates; targets {self.target!r} are inpo's.")
        if self.inner_loss == "dro" and self.pair_selection != "all":
            raise CoalaError("Loss 'dro' runs over all answers to a prompt: give pair_selection='all'.")
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.learning_rate >= 0 and self.epochs > 0):
            raise CoalaError(
                f"temperature {self.temperature}, top_p {self.top_p}, learning_rate {self.learning_rate}, epochs "
                f"{self.epochs}; expected positive numbers, and top_p of at most 1."
            )

    def notes(self) -> list[Note]:
        """What the settings say before any run."""
        eta, weight = self.step, self.weight
        found = []
        if self.temperature != 1 or self.top_p != 1:
            text = f"answers drawn at temperature {self.temperature:g}, top_p {self.top_p:g} are not those of mu_k"
            found.append(Note("warning", f"{text}: the game that is solved is another. Take 1 and 1."))
        if self.pair_selection == "best_worst" or self.target == "hard":
            text = "best-against-worst pairs or hard labels: the fixed point is the Nash policy of another game"
            found.append(Note("warning", f"{text}. Take pair_selection='random' and target='soft'."))
        if 0 < weight * self.inner_steps < 0.5 and self.outer_steps > 1:
            text = f"inner_steps * eta * tau is {weight * self.inner_steps:.2g}: the inner game is not nearly solved "
            found.append(Note("warning", text + "before the reference moves. Raise inner_steps or ref_weight."))
        if weight == 0:
            text = "ref_weight 0 is iterative IPO, which moves away from an interior Nash policy."
            found.append(Note("information", text))
        if eta > 10:
            text = f"eta {eta:g}: a step that reached its target would jump between single answers; what holds it back "
            found.append(Note("information", text + "is early stopping. Compare the achieved margin with the target."))
        return found

    @property
    def step(self) -> float:
        """eta, the step size."""
        assert self.eta is not None
        return self.eta

    @property
    def weight(self) -> float:
        """eta tau, the weight of the reference in v."""
        assert self.ref_weight is not None
        return self.ref_weight


def _one(
    name: str, value: float | None, other: str, given: float | None, of: Callable[[float], float], default: float
) -> float:
    if value is not None and given is not None and not math.isclose(value, of(given), rel_tol=1e-9):
        raise CoalaError(
            f"{name} is {value:g} but {other} is {given:g}, which makes it {of(given):g}: give one of them."
        )
    if given is not None and other == "beta" and given <= 0:
        raise CoalaError(f"beta is {given:g}; expected a positive number.")
    found = value if value is not None else of(given) if given is not None else default
    if not math.isfinite(found) or (name == "eta" and found <= 0):
        raise CoalaError(f"{name} is {found:g}; expected a positive number.")
    return found


@dataclass(frozen=True)
class Sampled:
    """One drawn answer: its ``tokens`` (the stop token among them if ``finished``) and its ``text``."""

    tokens: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class TrainRow:
    """A pair to train on: prompt and answers in tokens, log v of each, weight and targets (see the losses)."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    reference: tuple[float, float]
    weight: float
    target: tuple[float, float]


# --- pairs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selected:
    """Of one prompt: the distinct answers, the pairs to judge, and those to train on with their weights."""

    places: list[int]
    judged: list[tuple[int, int]]
    trained: dict[tuple[int, int], float]


def shard_of(n: int, size: int | None, number: int, seed: int) -> list[int]:
    """The prompts of step ``number``: the next ``size`` of an order drawn anew whenever all have been used."""
    if size is None or size >= n:
        return list(range(n))
    found: list[int] = []
    position = number * size
    while len(found) < size:
        epoch, at = divmod(position, n)
        order = np.random.default_rng([seed, epoch]).permutation(n)
        take = order[at : at + size - len(found)].tolist()
        found += take
        position += len(take)
    return found


def select(places: list[int], drawn: Sequence[Mapping[str, Any]], settings: COMALSettings, seed: int) -> Selected:
    """Which pairs of a prompt's answers to judge and to train on; an answer drawn n times takes part n times.

    An answer against itself has no gradient in a difference; it has one in SPPO, where it is kept.
    """
    counts = {place: int(drawn[place]["count"]) for place in places}
    every = [(a, b) for k, a in enumerate(places) for b in places[k + 1 :]]
    trained: dict[tuple[int, int], float] = {}
    if settings.pair_selection == "random":
        rng = np.random.default_rng([seed, drawn[places[0]]["prompt"]])
        order = rng.permutation(np.repeat(places, [counts[place] for place in places])).tolist()
        for a, b in zip(order[::2], order[1::2], strict=False):
            trained[min(a, b), max(a, b)] = trained.get((min(a, b), max(a, b)), 0.0) + 1
    elif settings.pair_selection == "all":
        n = sum(counts.values())
        # In `dro` every answer counts once: sum_i (e_i - mean e)^2 = sum_{i < j} (e_i - e_j)^2 / n.
        unit = 1 / n if settings.inner_loss == "dro" else 1.0
        trained = {(a, b): unit * counts[a] * counts[b] for a, b in every}
        trained |= {(a, a): unit * counts[a] * (counts[a] - 1) / 2 for a in places if counts[a] > 1}
    if settings.inner_loss != "sppo":
        trained = {pair: weight for pair, weight in trained.items() if pair[0] != pair[1]}
    needs_all = settings.inner_loss != "inpo" or settings.pair_selection == "best_worst"
    return Selected(places, every if needs_all else list(trained), trained)


def targets(
    selected: Selected,
    P: Mapping[tuple[int, int], float | None],
    drawn: Sequence[Mapping[str, Any]],
    settings: COMALSettings,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of ``pairs.jsonl``; a pair whose verdict is missing is left out.

    ``target_first`` and ``target_second`` are what d(first) and d(second) should be, of which all losses but SPPO look
    at the difference only.
    """
    eta = settings.step
    rates = win_rates(selected.places, P, [int(drawn[place]["count"]) for place in selected.places])
    pairs = dict(selected.trained)
    if settings.pair_selection == "best_worst":
        known = [place for place in selected.places if math.isfinite(rates[place])]
        best, worst = max(known, key=rates.__getitem__, default=-1), min(known, key=rates.__getitem__, default=-1)
        pairs = {(best, worst): 1.0} if best != worst else {}
    rng = np.random.default_rng([seed, 1])
    rows = []
    for (a, b), weight in pairs.items():
        p = 0.5 if a == b else P[a, b] if (a, b) in P else _turned(P.get((b, a)))
        if settings.inner_loss != "inpo":
            if not (math.isfinite(rates[a]) and math.isfinite(rates[b])):
                continue
            wanted = eta * (rates[a] - 0.5), eta * (rates[b] - 0.5)
        elif p is None:
            continue
        elif settings.target == "bernoulli":
            # Each of the pair's `weight` draws gets a label of its own; their mean is the target of the squared loss.
            half = eta / 2 * (2 * rng.binomial(max(1, round(weight)), p) / max(1, round(weight)) - 1)
            wanted = half / 2, -half / 2
        elif settings.target == "hard":
            half = eta / 2 * float(np.sign(p - 0.5))
            wanted = half / 2, -half / 2
        else:
            wanted = eta * (p - 0.5) / 2, -eta * (p - 0.5) / 2
        row = {"first": a, "second": b, "weight": weight, "target_first": wanted[0], "target_second": wanted[1]}
        rows.append({**row, "preference": p})
    return rows


def win_rates(
    places: Sequence[int], P: Mapping[tuple[int, int], float | None], counts: Sequence[int]
) -> dict[int, float]:
    """Mean win rate of each answer over the other drawn ones (a copy of it is a tie); nan without any verdict."""
    found = {}
    for a, count in zip(places, counts, strict=True):
        total, n = 0.5 * (count - 1), count - 1
        for b, times in zip(places, counts, strict=True):
            p = P[a, b] if (a, b) in P else _turned(P.get((b, a)))
            if a != b and p is not None:
                total, n = total + times * p, n + times
        found[a] = total / n if n else math.nan
    return found


def _turned(p: float | None) -> float | None:
    return None if p is None else 1 - p


def by_prompt(drawn: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Places of the candidates of each prompt."""
    found: dict[int, list[int]] = {}
    for place, candidate in enumerate(drawn):
        found.setdefault(int(candidate["prompt"]), []).append(place)
    return found


# --- what was reached --------------------------------------------------------------------------------------------


def measure(
    drawn: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    v: Float,
    known: Mapping[str, Float],
    new: Float,
    judgements: Sequence[Mapping[str, Any]],
    *,
    length_normalize: bool = False,
) -> dict[str, Any]:
    """The numbers of one step, over the answers drawn from mu_k as often as they were drawn.

    ``achieved``: weighted least-squares slope of d(y1) - d(y2) on what it is at the minimiser of the loss over all
    functions of the answers: 1 when the step was made in full, near 0 when training stopped far short.
    ``target_margin`` is the root mean square of that, and ``transitive`` its share of the targets' mean square: an
    intransitive part of the preferences is no difference of anything and cannot be met.

    ``kl_to_policy``: E_mu_k [log mu_k - log mu_{k+1}], the divergence of the old from the new policy; its estimate can
    be negative. ``kl_to_reference``: E_mu_k [log mu_k - log ref]. ``drift``: by how many nats the mean log-probability
    of the sampled answers changed. ``mass``: E_mu_k [mu_{k+1}/mu_k], what the new policy leaves to answers that mu_k
    gives; 1 if none seeps to others.
    """
    counts = np.array([c["count"] for c in drawn], dtype=np.float64)
    share = counts / counts.sum()
    first, second = (np.array([p[side] for p in pairs], dtype=np.intp) for side in ("first", "second"))
    weight = np.array([p["weight"] for p in pairs], dtype=np.float64)
    wanted = np.array([p["target_first"] - p["target_second"] for p in pairs], dtype=np.float64)
    d = (new - v) / [len(c["tokens"]) if length_normalize else 1 for c in drawn]
    margin = d[first] - d[second]
    best = reachable(first, second, weight, wanted)
    power, asked = float(weight @ best**2), float(weight @ wanted**2)
    gaps = [j["disagreement"] for j in judgements if j["disagreement"] is not None]
    return {
        "answers": int(counts.sum()),
        "distinct": len(drawn),
        "pairs": len(pairs),
        "target_margin": math.sqrt(power / weight.sum()),
        "achieved": float(weight @ (margin * best)) / power if power > 0 else 0.0,
        "residual": math.sqrt(float(weight @ (margin - best) ** 2) / weight.sum()),
        "transitive": power / asked if asked > 0 else 1.0,
        "kl_to_policy": float(share @ (known["policy"] - new)),
        "kl_to_reference": float(share @ (known["policy"] - known["reference"])),
        "log_prob": float(share @ new),
        "drift": float(share @ (new - known["policy"])),
        "mass": float(share @ np.exp(np.minimum(new - known["policy"], 50.0))),
        "tokens": float(share @ [len(c["tokens"]) for c in drawn]),
        "finished": float(share @ [float(c["finished"]) for c in drawn]),
        "judge_failures": sum(j["preference"] is None for j in judgements),
        "judge_disagreement": float(np.mean(gaps)) if gaps else 0.0,
    }


def reachable(first: NDArray[np.intp], second: NDArray[np.intp], weight: Float, wanted: Float) -> Float:
    """Differences u[first] - u[second] (n,) of the u that comes closest to ``wanted`` in weighted least squares.

    Answers that no chain of pairs connects (those to different prompts) are solved for apart.
    """
    n = int(max(first.max(), second.max())) + 1
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(n, n))
    _, part = connected_components(graph, directed=False)
    found = np.empty(len(first))
    order = np.argsort(part[first], kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(part[first][order])) + 1):
        places, index = np.unique(np.concatenate([first[rows], second[rows]]), return_inverse=True)
        at = np.arange(len(rows))
        design = np.zeros((len(rows), len(places)))
        np.add.at(design, (at, index[: len(rows)]), 1)
        np.add.at(design, (at, index[len(rows) :]), -1)
        root = np.sqrt(weight[rows])
        u = np.linalg.lstsq(design * root[:, None], wanted[rows] * root, rcond=None)[0]
        found[rows] = design @ u
    return found


def remarks(log: Mapping[str, Any]) -> list[Note]:
    """What the numbers of a step say."""
    found = []
    if log["drift"] < -DRIFT or log["mass"] < MASS:
        text = (
            f"sampled answers changed by {log['drift']:.1f} nats and kept {100 * log['mass']:.0f} % of their mass in "
        )
        mend = "one step: pair losses do not hold it. Lower eta or the learning rate, or set anchor_nll."
        found.append(Note("warning", text + mend))
    if log["achieved"] < 0.1:
        text = (
            f"{100 * log['achieved']:.0f} % of the margin asked for was reached: the effective eta is that much lower."
        )
        found.append(Note("information", text))
    if log["judge_disagreement"] > 0.2:
        text = f"the judge's two orders disagree by {log['judge_disagreement']:.2f} on average: it looks at positions."
        found.append(Note("warning", text))
    if log["finished"] < 0.5:
        text = (
            f"only {100 * log['finished']:.0f} % of the answers ended before max_new_tokens: they are judged cut off."
        )
        found.append(Note("warning", text))
    return found
