"""FLOPs of replies, of likelihoods and of benchmarks before any of them is made; by formula, from counted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.compare.matrix import Cell, benchmark_of
from coala.compare.study import Study, StudyMethod
from coala.costs import body_flops, decoding_flops, full_flops, gated_layers_flops
from coala.settings import GuidanceSettings

if TYPE_CHECKING:
    from coala.costs import Shape
    from coala.plan.tokens import Counts

# Tokens of a bundled question with its template.
QUESTION = 40


def writing(
    study: Study, shape: Shape, prompts: Sequence[int], guidance: GuidanceSettings | None = None, before: int = 0
) -> int:
    """Replies to prompts of these many tokens, ``before`` more in front of each, and to the bundled questions.

    With what measures them: likelihoods under the start.
    """
    if not prompts:
        return 0
    settings = study.evaluation
    asked = [(tokens + before, settings.max_new_tokens) for tokens in prompts]
    asked += [(QUESTION + before, settings.question_tokens)] * settings.questions
    measured = full_flops(shape, [tokens + settings.max_new_tokens for tokens in prompts])
    return measured + sum(reply_flops(shape, tokens, new, guidance) for tokens, new in asked)


def reply_flops(shape: Shape, tokens: int, new: int, guidance: GuidanceSettings | None) -> int:
    from coala.decoding import Guidance

    if guidance is None or guidance.mode == "none":
        return decoding_flops(shape, tokens, new)
    whole = Guidance(**asdict(guidance))
    once = decoding_flops(shape, tokens, new, candidates=whole.looked_at, every=whole.interval)
    # Several are written behind one prompt.
    return once + (whole.written - 1) * (once - body_flops(shape, [tokens]))


def drifting(study: Study, shape: Shape, prompts: Sequence[int], before: int = 0) -> int:
    """The divergence from the start: replies that two models read token by token."""
    new = study.evaluation.max_new_tokens
    some = prompts[: study.evaluation.kl_prompts]
    return sum(decoding_flops(shape, n + before, new) + decoding_flops(shape, n, new) for n in some)


def likelihoods(shape: Shape, counts: Counts, part: str, before: int = 0) -> int:
    """Log-likelihoods of both replies of every pair of a part; what both begin with is read once."""
    survey = counts.surveys[part]
    whole = counts.scaled(full_flops(shape, survey.own_lengths))
    return whole + counts.scaled(len(survey.index) * body_flops(shape, [before]) if before else 0)


def before_prompt(method: StudyMethod, system: str | None, counts: Counts) -> int:
    """Tokens that a method of kind prompt puts in front: its system prompt and examples of a mean length."""
    survey = counts.surveys["train"]
    mean = float(survey.lengths[survey.index[:, 0]].mean())
    return round(method.examples * mean) + (len(system or "") // 4 if method.system else 0)


def guided(study: Study, method: StudyMethod, shape: Shape, counts: Counts) -> int:
    if method.guidance is None or method.guidance.mode == "none":
        return 0
    flops = writing(study, shape, counts.prompts, method.guidance)
    if method.guidance.mode != "shift" or not counts.prompts:
        return flops
    # Policy accuracy: every reply token by token, guided, within top-k and top-p and without.
    survey = counts.surveys["eval"]
    pairs = survey.index[: study.evaluation.policy_pairs].reshape(-1)
    starts, stops = survey.start[pairs].tolist(), survey.stop[pairs].tolist()
    return flops + 2 * sum(reply_flops(shape, a, b - a, method.guidance) for a, b in zip(starts, stops, strict=True))


def writer(study: Study, cell: Cell, shape: Shape, counts: Counts) -> int:
    """The start as it is, asked otherwise or guided: its replies, and its likelihoods where it has a row of them."""
    method = next((m for m in study.methods if m.name == cell.method and cell.kind != "base"), None)
    if method is None:
        validation = round(study.split.validation * likelihoods(shape, counts, "train"))
        # Twice, per token and as sums; the test pairs once.
        return writing(study, shape, counts.prompts) + 2 * validation + likelihoods(shape, counts, "eval")
    if cell.kind == "guided":
        return guided(study, method, shape, counts)
    before = before_prompt(method, study.datasets[cell.dataset].system, counts)
    return (
        writing(study, shape, counts.prompts, before=before)
        + (drifting(study, shape, counts.prompts, before) if study.evaluation.kl == "samples" else 0)
        + sum(likelihoods(shape, counts, "eval", more) for more in (0, before))
    )


def measuring(study: Study, cell: Cell, shape: Shape, counts: Counts) -> int:
    """What is done with a trained model: likelihoods of validation and test pairs, and replies."""
    if cell.kind == "count":
        return 0
    kind = next(method.kind for method in study.methods if method.name == cell.method)
    models = 2 if kind == "dpo" else 1
    tried = len(study.settings[cell.setting].tried(kind)) if cell.seed == study.seeds[0] else 0
    validation = round(tried * models * study.split.validation * likelihoods(shape, counts, "train"))
    test = likelihoods(shape, counts, "eval")
    if kind == "reward":
        return validation + test
    written = writing(study, shape, counts.prompts)
    if study.evaluation.kl == "samples":
        written += drifting(study, shape, counts.prompts)
    # DPO's reward is its policy's log-ratio; of the others that takes both models once more.
    return validation + (2 if kind == "dpo" else 3) * test + written


def reading(study: Study, cell: Cell, shape: Shape) -> dict[str, Any]:
    """The replies of a benchmark, a token for every four characters; nothing is counted where its file is not here."""
    from coala.compare.benchmarks import read_benchmark, sample

    name = benchmark_of(cell)
    settings = study.datasets[cell.dataset].benchmarks[name]
    found: dict[str, Any] = {"flops": 0, "parts": {}, "pairs": 0, "how": "its file is not here: nothing is counted"}
    if not Path(settings.path).exists():
        return found
    whole = read_benchmark(name, settings)
    most = study.models[cell.model].max_tokens or 1 << 20
    lengths = [
        min(most, (sum(len(turn.text) for turn in item.prompt) + len(text)) // 4 + QUESTION)
        for item in (whole.items[i] for i in sample(whole.items, settings.prompts, study.split.seed))
        for text in (*item.chosen, *item.rejected)
    ]
    flops = body_flops(shape, lengths)
    return {**found, "flops": flops, "pairs": len(lengths), "how": "weights alone; replies for pairs"}


def small(cell: Cell, shape: Shape, counts: Counts, all_layers: bool) -> dict[str, Any]:
    """What reads no model: features put together, a rule of cues, gates at all layers."""
    pairs = counts.pairs("train")
    found: dict[str, Any] = {"flops": 0, "parts": {}, "bytes": {}, "pairs": pairs, "how": "arrays alone"}
    if cell.kind == "layers":
        found |= gated_layers(pairs, shape)
    elif cell.kind == "features" and all_layers:
        found["flops"] = picking(pairs, shape)
    return found


def gated_layers(pairs: int, shape: Shape) -> dict[str, int]:
    """FLOPs, and bytes ``moved``, of gates at all layers: at most, if every solve takes all its steps.

    A FLOP comes with a byte of states that is read, which takes longer; and L-BFGS goes twice over each of up to
    ``STEPS`` kept steps and gradients, 20 bytes a number.
    """
    from coala.compare.controls import EVALUATIONS, FOLDS, RIDGES, STEPS

    # Each fold is left out once at each ridge; then all pairs are fitted.
    flops = gated_layers_flops(pairs, shape.n_layers, shape.width, EVALUATIONS * (len(RIDGES) * (FOLDS - 1) + 1))
    kept = 2 * 20 * (2 * shape.n_layers * shape.width) * (STEPS * (STEPS + 1) // 2)
    return {"flops": flops, "moved": flops + kept * (FOLDS * len(RIDGES) + 1)}


def picking(pairs: int, shape: Shape) -> int:
    """FLOPs of the linear heads that a layer and a pooling are picked by, at most."""
    from coala.compare.every_layer import LAYERS_TRIED
    from coala.compare.matrix import POOLINGS_TRIED
    from coala.plan.plan import fit_flops
    from coala.settings import HeadSettings

    heads = len(POOLINGS_TRIED) * min(LAYERS_TRIED, shape.n_layers)
    return heads * fit_flops(HeadSettings(method="linear"), pairs, shape.width, 1)
