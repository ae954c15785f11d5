"""What a step of COMAL reached: the achieved margin beside the target, divergences, drift of likelihood.

Arrays and rows in, numbers out; knows nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from coala.nash.criteria import Note
from coala.nash.game import Float

DRIFT = 2.0  # nats by which the likelihood of sampled answers may fall in one step before it is called drift
MASS = 0.8  # share of the probability that answers like the sampled ones have to keep in one step


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
    gives; 1 if none seeps to others. ``cyclic``: see :func:`cyclic_share`, over distinct answers; None where not all
    pairs of three answers were judged.
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
        "cyclic": cyclic_share(_tables(drawn, judgements)),
    }


def cyclic_share(tables: Sequence[Float]) -> float | None:
    """Share of triples of answers to one prompt that go in a circle: a beats b, b beats c, c beats a.

    ``tables`` (n, n) hold P of each prompt, nan where not judged; only triples judged whole count. A quarter of a
    random tournament's triples do, none of what scores order. None without such a triple.
    """
    cycles = triples = 0.0
    for P in tables:
        known = np.isfinite(P).astype(np.float64)
        np.fill_diagonal(known, 0)
        beats = (np.nan_to_num(P, nan=0.0) > 0.5 + 1e-9).astype(np.float64)
        np.fill_diagonal(beats, 0)
        # A closed walk of three steps is a triangle, met from each of its corners; an undirected one both ways round.
        cycles += float(np.trace(beats @ beats @ beats)) / 3
        triples += float(np.trace(known @ known @ known)) / 6
    return cycles / triples if triples else None


def _tables(drawn: Sequence[Mapping[str, Any]], judgements: Sequence[Mapping[str, Any]]) -> list[Float]:
    """P over the distinct texts of each prompt, nan where not judged."""
    places: dict[int, dict[str, int]] = {}
    for candidate in drawn:
        own = places.setdefault(int(candidate["prompt"]), {})
        own.setdefault(candidate["text"], len(own))
    tables = {prompt: np.full((len(own), len(own)), np.nan) for prompt, own in places.items()}
    for verdict in judgements:
        first, second = drawn[verdict["first"]], drawn[verdict["second"]]
        if verdict["preference"] is not None:
            prompt = int(first["prompt"])
            i, j = places[prompt][first["text"]], places[prompt][second["text"]]
            tables[prompt][i, j], tables[prompt][j, i] = verdict["preference"], 1 - verdict["preference"]
    return list(tables.values())


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
        text = f"sampled answers changed by {log['drift']:.1f} nats "
        if log["mass"] < MASS:
            text += f"and kept {100 * log['mass']:.0f} % of their mass "
        mend = "in one step, which pair losses do not prevent. Lower eta or the learning rate, or set anchor_nll."
        found.append(Note("warning", text + mend))
    if log["achieved"] < 0.1:
        text = f"{100 * log['achieved']:.0f} % of the target margin was reached: the effective eta is that much lower."
        found.append(Note("information", text))
    if log["judge_disagreement"] > 0.2:
        text = (
            f"the judge's two orders disagree by {log['judge_disagreement']:.2f} on average: it is biased by position."
        )
        found.append(Note("warning", text))
    if log["finished"] < 0.5:
        text = f"only {100 * log['finished']:.0f} % of the answers ended before max_new_tokens; the rest are truncated."
        found.append(Note("warning", text))
    return found
