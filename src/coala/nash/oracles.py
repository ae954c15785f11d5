"""Preference oracles: how often one answer beats another, asked of a table, scores, a model or a head on pair features.

An oracle answers for a batch of examples; :func:`ask` is how the rest of the package asks one: both orders, range
checked, failures kept apart. Knows nothing of policies. Torch is imported by the adapters that need it.

An oracle that scores answers one by one is a Bradley-Terry model and cannot prefer a to c, c to b and b to a. A
:class:`PairHead` can: its pair features hold what two answers are *together*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.nash.game import Float, PreferenceGame
from coala.values import CoalaError, ConvexHead, Generation, Pair, Turn, conversation_text

Example = Mapping[str, Any]  # at least "prompt", a tuple of turns; whatever else the oracle needs to know
Answers = Sequence[float | None]


class PreferenceOracle(Protocol):
    """P(a beats b | example) in [0, 1] for each row; None where there is no verdict.

    ``name`` tells oracles apart in files. ``antisymmetric`` promises that the two orders of a pair add up to 1, and
    saves asking for both.
    """

    @property
    def name(self) -> str: ...

    @property
    def antisymmetric(self) -> bool: ...

    def __call__(self, examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers: ...


class Keeper(Protocol):
    """Where verdicts are kept, such as :class:`coala.cache.VerdictCache`."""

    def get(self, key: str) -> str | None: ...

    def put(self, key: str, answer: str) -> None: ...


@dataclass(frozen=True)
class Verdict:
    """``preference``: P(a beats b), or None without a verdict. ``disagreement``: |p(a, b) + p(b, a) - 1|, 0 at best."""

    preference: float | None
    disagreement: float | None = None


def prompt_of(example: Example) -> tuple[Turn, ...]:
    """The conversation of an example; CoalaError if there is none."""
    prompt = example.get("prompt")
    if isinstance(prompt, tuple | list) and prompt and all(isinstance(turn, Turn) for turn in prompt):
        return tuple(prompt)
    raise CoalaError(f'An example needs a "prompt" of turns (coala.values.user("text")); found {prompt!r:.80}.')


def ask(
    oracle: PreferenceOracle,
    examples: Sequence[Example],
    a: Sequence[str],
    b: Sequence[str],
    *,
    keeper: Keeper | None = None,
    batch_size: int = 64,
) -> list[Verdict]:
    """The oracle's verdicts with P(a, b) = (p(a, b) + 1 - p(b, a))/2, so that P(a, b) + P(b, a) = 1 whatever it says.

    A row without a verdict in either order has none: no coin replaces it. A value outside [0, 1] or nan is a
    :class:`CoalaError`. Verdicts found in ``keeper`` are not asked for again; new ones are put there after every batch.
    """
    if not len(examples) == len(a) == len(b):
        raise CoalaError(f"Found {len(examples)} examples, {len(a)} and {len(b)} answers; expected as many of each.")
    orders = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    if not oracle.antisymmetric:
        orders += [(i, y, x) for i, x, y in orders]
    said: dict[int, float | None] = {}
    keys = [_key(oracle, examples[i], x, y) if keeper is not None else "" for i, x, y in orders]
    if keeper is not None:
        for row, key in enumerate(keys):
            kept = keeper.get(key)
            if kept is not None:
                said[row] = json.loads(kept)
    open_rows = [row for row in range(len(orders)) if row not in said]
    for first in range(0, len(open_rows), batch_size):
        rows = open_rows[first : first + batch_size]
        batch = [orders[row] for row in rows]
        found = oracle([examples[i] for i, _, _ in batch], [x for _, x, _ in batch], [y for _, _, y in batch])
        if len(found) != len(rows):
            raise CoalaError(f"Oracle {oracle.name!r} gave {len(found)} verdicts for {len(rows)} pairs; one each.")
        for row, value in zip(rows, found, strict=True):
            said[row] = _checked(oracle, value, examples[orders[row][0]])
            # A failure may be a passing one: it is asked for again by the next run.
            if keeper is not None and said[row] is not None:
                keeper.put(keys[row], json.dumps(said[row]))
    n = len(examples)
    if oracle.antisymmetric:
        return [Verdict(said[i], None if said[i] is None else 0.0) for i in range(n)]
    return [_combined(said[i], said[n + i]) for i in range(n)]


def _combined(forward: float | None, backward: float | None) -> Verdict:
    if forward is None or backward is None:
        return Verdict(None)
    return Verdict((forward + 1 - backward) / 2, abs(forward + backward - 1))


def _checked(oracle: PreferenceOracle, value: float | None, example: Example) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not 0 <= number <= 1:  # nan too
        raise CoalaError(
            f"Oracle {oracle.name!r} said {value!r} of {conversation_text(prompt_of(example))[:60]!r}; expected the "
            "probability in [0, 1] that the first answer wins, or None where it has no verdict."
        )
    return number


def _key(oracle: PreferenceOracle, example: Example, a: str, b: str) -> str:
    turns = [[turn.role, turn.text] for turn in prompt_of(example)]
    rest = {str(name): value for name, value in example.items() if name != "prompt"}
    return json.dumps(["preference", oracle.name, turns, rest, a, b], ensure_ascii=False, sort_keys=True, default=str)


# --- adapters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """A function with the name and the promise of a :class:`PreferenceOracle`."""

    function: Callable[[Sequence[Example], Sequence[str], Sequence[str]], Answers]
    name: str
    antisymmetric: bool = False

    def __call__(self, examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers:
        return self.function(examples, a, b)


Score = Callable[[Sequence[Example], Sequence[str]], Sequence[float] | NDArray[Any]]
Link = Literal["bt", "majority"]


def from_callable(
    function: Callable[[Example, str, str], float | None], name: str, *, antisymmetric: bool = False
) -> Oracle:
    """An oracle from ``function(example, a, b)``, the probability that a wins, called once per pair and order."""
    return Oracle(
        lambda examples, a, b: [function(*row) for row in zip(examples, a, b, strict=True)], name, antisymmetric
    )


def from_scores(score: Score, name: str, *, link: Link = "bt", scale: float = 1.0) -> Oracle:
    """An oracle from ``score(examples, answers)``: sigma(scale (s_a - s_b)), or for ``majority`` who scores higher.

    Transitive, whatever the scores. A score that is not finite is no verdict.
    """
    if link not in ("bt", "majority"):
        raise CoalaError(f"Link {link!r}; expected 'bt' or 'majority'.")
    if not (math.isfinite(scale) and scale > 0):
        raise CoalaError(f"scale is {scale}; expected a positive number.")

    def compare(examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers:
        scores = np.asarray(score([*examples, *examples], [*a, *b]), dtype=np.float64)
        if scores.shape != (2 * len(a),):
            raise CoalaError(f"{name}: found scores of shape {scores.shape} for {2 * len(a)} answers; one each.")
        first, second = scores[: len(a)], scores[len(a) :]
        sound = np.isfinite(first) & np.isfinite(second)
        difference = np.where(sound, first, 0) - np.where(sound, second, 0)
        values = _sigmoid(scale * difference) if link == "bt" else (1 + np.sign(difference)) / 2
        return [float(value) if ok else None for value, ok in zip(values, sound, strict=True)]

    return Oracle(compare, name, antisymmetric=True)


def from_table(game: PreferenceGame, name: str = "table", *, prompt: Callable[[Example], str] | None = None) -> Oracle:
    """The oracle of a known game: its labels are the answers (spaces around them ignored), its prompts the prompts.

    ``prompt(example)`` gives the game's name of the prompt (default: the conversation's text). An answer the game does
    not know has no verdict, but equals itself.
    """
    places = [{label: i for i, label in enumerate(labels)} for labels in game.names]

    def one(example: Example, a: str, b: str) -> float | None:
        key = "" if not game.contextual else (prompt or (lambda e: conversation_text(prompt_of(e))))(example)
        if key not in game.prompts:
            raise CoalaError(f"The game has no prompt {key!r:.60}; it has {list(game.prompts)!r:.200}.")
        number = game.prompts.index(key)
        i, j = places[number].get(a.strip()), places[number].get(b.strip())
        if i is None or j is None:
            return 0.5 if a.strip() == b.strip() else None
        return float(game.matrices[number][i, j])

    return from_callable(one, name, antisymmetric=True)


def from_reward_model(
    model: Any, tokenizer: Any, name: str, *, batch_size: int = 8, max_tokens: int = 2048, scale: float = 1.0
) -> Oracle:
    """A sequence classifier of one label (transformers) as Bradley-Terry oracle on prompt and answer.

    The conversation is rendered by the tokenizer's chat template, without one as "Human: ..." and "Assistant: ...". A
    text longer than ``max_tokens`` loses its beginning.
    """
    import torch

    if int(getattr(model.config, "num_labels", 1)) != 1:
        raise CoalaError(
            f"{name}: is a classifier of {model.config.num_labels} labels; expected a reward model, which has one."
        )

    def text(example: Example, answer: str) -> str:
        turns = (*prompt_of(example), Turn("assistant", answer))
        if getattr(tokenizer, "chat_template", None):
            return str(
                tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in turns], tokenize=False)
            )
        speakers = {"system": "System", "user": "Human", "assistant": "Assistant"}
        return "\n\n".join(f"{speakers[turn.role]}: {turn.text}" for turn in turns)

    def score(examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
        # A chat template writes the special tokens out; the tokenizer would add them once more.
        special = not getattr(tokenizer, "chat_template", None)
        rows = [
            list(tokenizer.encode(text(e, y), add_special_tokens=special))[-max_tokens:]
            for e, y in zip(examples, answers, strict=True)
        ]
        found: list[float] = []
        was_training = model.training
        model.eval()
        pad = model.config.pad_token_id
        with torch.no_grad():
            for first in range(0, len(rows), batch_size):
                # Without a padding token transformers cannot find a row's last token; one row needs none.
                batches = [rows[first : first + batch_size]]
                if pad is None:
                    batches = [[row] for row in batches[0]]
                for batch in batches:
                    width = max(map(len, batch))
                    tokens = torch.tensor([row + [pad or 0] * (width - len(row)) for row in batch])
                    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
                    out = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device))
                    found += [float(value) for value in out.logits[:, 0].float().cpu()]
        model.train(was_training)
        return found

    return from_scores(score, name, scale=scale)


def from_judge(judge: Any) -> Oracle:
    """Any :class:`coala.evaluation.Judge`: an object with ``name`` and ``compare(prompt, first, second)``.

    A comparison that fails, or has no preference, is no verdict.
    """
    from coala.evaluation import JudgeFailure

    def one(example: Example, a: str, b: str) -> float | None:
        first, second = (Generation("", text, side, 0, 0, math.nan, math.nan) for side, text in (("a", a), ("b", b)))
        try:
            found = judge.compare(prompt_of(example), first, second).preference
        except JudgeFailure:
            return None
        return None if found is None else float(found)

    return from_callable(one, str(judge.name))


def from_pairwise_lm(backbone: Any, instructions: str = "weighted", *, name: str | None = None) -> Oracle:
    """A :class:`coala.backbone.LanguageModel` that is shown both answers and asked which is better.

    P(a wins) is the probability of the one label against that of the other, so that the strength of a preference is
    kept. ``instructions`` names shipped ones or a folder (see :func:`coala.evaluation.read_instructions`).
    """
    from coala.decoding import log_likelihood
    from coala.evaluation import JudgeFailure, LanguageModelJudge, read_instructions

    def log_probs(prompt: Sequence[Turn], replies: Sequence[str]) -> list[float]:
        tokens = max(backbone.count_tokens(Pair(tuple(prompt), reply, reply, "")) for reply in replies)
        if tokens > backbone.max_tokens:
            # Rendering would cut the question off, and the model would judge what is left of it.
            raise JudgeFailure(
                "too long", f"The question takes {tokens} tokens; the judge reads {backbone.max_tokens}."
            )
        return [value for value, _ in log_likelihood([prompt] * len(replies), replies, backbone)]

    label = name or f"{backbone.name} ({instructions})"
    return from_judge(LanguageModelJudge(label, read_instructions(instructions), log_probs))


def from_coala_head(
    head: ConvexHead | PairHead, backbone: Any, name: str, *, spec: Any = None, batch_size: int = 16
) -> Oracle:
    """A fitted head on the features of prompt and answer: a :class:`ConvexHead` (Bradley-Terry) or a :class:`PairHead`.

    Features are those of ``head.spec``; a pair head has none of its own and needs ``spec``, that of its training.
    """
    if isinstance(head, ConvexHead):
        backbone.require(head.spec)
        if head.needs_prompt:
            raise CoalaError("This head's gates act on the prompt; fit one with gates on the reply to judge answers.")
        convex = head

        def score(examples: Sequence[Example], answers: Sequence[str]) -> Float:
            found = features(backbone, head.spec, examples, answers, batch_size=batch_size)
            return np.asarray(convex.score(found), dtype=np.float64)

        return from_scores(score, name, scale=1 / head.temperature)
    if spec is None:
        raise CoalaError("A pair head needs `spec`: that of the features it was fitted on (FeatureSet.spec).")
    backbone.require(spec)

    def compare(examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers:
        both = features(backbone, spec, [*examples, *examples], [*a, *b], batch_size=batch_size)
        return [float(value) for value in head.probability(both[: len(a)], both[len(a) :])]

    return Oracle(compare, name, antisymmetric=True)


def features(
    backbone: Any, spec: Any, examples: Sequence[Example], answers: Sequence[str], *, batch_size: int = 16
) -> NDArray[np.float32]:
    """Pooled hidden states (n, d) of each answer behind its prompt, as extraction makes them for ``spec``."""
    import torch

    from coala.backbone import POOLINGS

    rows = [
        backbone.render(prompt_of(e), y, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
        for e, y in zip(examples, answers, strict=True)
    ]
    found = np.empty((len(rows), backbone.width), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        hidden = backbone.hidden([rows[i].tokens for i in batch], spec.layer)
        start = torch.tensor([rows[i].start for i in batch], device=hidden.device)
        stop = torch.tensor([rows[i].stop for i in batch], device=hidden.device)
        found[batch] = POOLINGS[spec.pooling].pool(hidden, start, stop).float().cpu().numpy()
    return found


# --- a head on pair features -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PairHead:
    """P(a beats b) = sigma(w . (x_a - x_b) + x_a^T K x_b) with K = -K^T, x = (h - mean) projected on k directions.

    Antisymmetric by construction: swapping a and b negates the margin. w alone is Bradley-Terry; K holds what no score
    can: with x in the plane and K a rotation, each answer beats those on one side of it. ``projection`` (d, k),
    ``mean`` (d,), ``linear`` (k,), ``skew`` (k, k). Fitted by :func:`fit_pair_head`; ``objective`` is its mean loss and
    ``gradient_norm`` tells how far from optimal it may be: the program is ``ridge``-strongly convex, hence
    objective - optimum <= gradient_norm^2 / (2 ridge).
    """

    projection: Float
    mean: Float
    linear: Float
    skew: Float
    ridge: float
    objective: float
    gradient_norm: float

    @property
    def gap(self) -> float:
        """Upper bound of objective - optimum."""
        return self.gradient_norm**2 / (2 * self.ridge)

    def margin(self, a: ArrayLike, b: ArrayLike) -> Float:
        """Logit (n,) of P(a beats b) from features (n, d) each."""
        x, y = ((np.asarray(h, dtype=np.float64) - self.mean) @ self.projection for h in (a, b))
        return cast(Float, (x - y) @ self.linear + np.einsum("ni,ij,nj->n", x, self.skew, y))

    def probability(self, a: ArrayLike, b: ArrayLike) -> Float:
        """P(a beats b), (n,)."""
        return _sigmoid(self.margin(a, b))


def fit_pair_head(
    a: ArrayLike, b: ArrayLike, preference: ArrayLike | None = None, *, rank: int = 16, ridge: float = 1e-3
) -> PairHead:
    """Least cross-entropy of sigma(margin) against ``preference`` (n,), P(a beats b) (1 if not given), plus ridge.

    min mean_i CE(p_i, margin_i) + ridge/2 |(w, K above its diagonal)|^2, linear in the k + k(k-1)/2 pair features and
    therefore convex; solved by Newton's method. Features (n, d) are centred and projected on the ``rank`` leading
    principal directions, each scaled to unit variance.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise CoalaError(f"Features must be two (n, d) arrays of one shape; found {first.shape} and {second.shape}.")
    p = np.ones(len(first)) if preference is None else np.asarray(preference, dtype=np.float64)
    if p.shape != (len(first),) or not ((p >= 0) & (p <= 1)).all():
        raise CoalaError(f"Preferences must be {len(first)} probabilities in [0, 1]; found shape {p.shape}.")
    if rank < 1 or not (math.isfinite(ridge) and ridge > 0):
        raise CoalaError(f"rank {rank}, ridge {ridge}; expected a rank of at least 1 and a positive ridge.")
    stacked = np.concatenate([first, second])
    mean = stacked.mean(axis=0)
    _, sizes, directions = np.linalg.svd(stacked - mean, full_matrices=False)
    k = max(1, min(rank, int((sizes > 1e-10 * max(sizes[0], 1e-300)).sum())))
    scale = np.maximum(sizes[:k] / math.sqrt(len(stacked)), 1e-300)
    projection = directions[:k].T / scale
    x, y = (first - mean) @ projection, (second - mean) @ projection
    above = np.triu_indices(k, 1)
    design = np.concatenate([x - y, x[:, above[0]] * y[:, above[1]] - x[:, above[1]] * y[:, above[0]]], axis=1)
    theta, objective, norm = _logistic(design, p, ridge)
    skew = np.zeros((k, k))
    skew[above] = theta[k:]
    return PairHead(projection, mean, theta[:k], skew - skew.T, ridge, objective, norm)


def _logistic(design: Float, p: Float, ridge: float) -> tuple[Float, float, float]:
    """Damped Newton on mean(softplus(m) - p m) + ridge/2 |theta|^2, m = design @ theta."""

    def value(theta: Float) -> float:
        m = design @ theta
        return float(np.mean(np.logaddexp(0, m) - p * m) + ridge / 2 * theta @ theta)

    theta = np.zeros(design.shape[1])
    objective, gradient = value(theta), np.zeros_like(theta)
    for _ in range(100):
        s = _sigmoid(design @ theta)
        gradient = design.T @ (s - p) / len(p) + ridge * theta
        if np.linalg.norm(gradient) < 1e-10:
            break
        hessian = (design * (s * (1 - s) / len(p))[:, None]).T @ design + ridge * np.eye(len(theta))
        step = np.linalg.solve(hessian, gradient)
        length, decrease = 1.0, float(gradient @ step)
        while (after := value(theta - length * step)) > objective - length * decrease / 4 and length > 1e-8:
            length /= 2
        if after >= objective:
            break  # rounding
        theta, objective = theta - length * step, after
    return theta, objective, float(np.linalg.norm(gradient))


def _sigmoid(x: Float) -> Float:
    return cast(Float, np.exp(-np.logaddexp(0, -x)))
