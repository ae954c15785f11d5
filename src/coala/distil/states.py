"""Replies to states: one forward pass over each reply tells every step's final state and its likeliest tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coala.backbone import LanguageModel
from coala.decoding.guidance import Guidance
from coala.decoding.sampling import restrict
from coala.policies import DistilStates
from coala.store import FeatureStore, StoreError, digest, load_json, save_json, write_rows
from coala.values import CoalaError, ConvexHead, FeatureSet, Float32, Generation, Pair, Turn, conversation_text

N_TOKENS = 64  # likeliest tokens that are kept of a step
SHARD = 16  # replies of a shard: what a kill costs at most
LIGHT = 0.02  # of the weight of all replies: the lightest ones that have no more than this together teach nothing


@dataclass(frozen=True)
class Lesson:
    """A reply to learn from, with its weight; ``ended`` if the model itself ended it, so that the stop is learned too.

    ``group`` numbers its prompt.
    """

    prompt: tuple[Turn, ...]
    text: str
    group: int
    weight: float = 1.0
    ended: bool = False


def guided_lessons(
    backbone: LanguageModel,
    prompts: Sequence[tuple[Turn, ...]],
    replies: Sequence[Generation],
    max_new_tokens: int,
) -> list[Lesson]:
    """The replies that were written to ``prompts``, each prompt a group of its own; empty ones are left out."""
    return [
        Lesson(prompt, reply.text, number, ended=_ended(backbone, reply.n_tokens, max_new_tokens))
        for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
        if reply.text
    ]


def _ended(backbone: LanguageModel, n_tokens: int, max_new_tokens: int) -> bool:
    """Whether a reply ended by the model's own token: one that a stop string ended did not."""
    return not backbone.stop_texts and n_tokens < max_new_tokens


def weighted_lessons(
    backbone: LanguageModel,
    pairs: Sequence[Pair],
    features: FeatureSet,
    head: ConvexHead,
    beta: float,
    max_new_tokens: int,
) -> list[Lesson]:
    """Both replies of every pair, each once, weighted by exp(r / ``beta``) of its score r in standard deviations.

    ``features`` are those of ``pairs``, as the head reads them. A reply of fewer than ``max_new_tokens`` is taken for
    whole, so that its end is learnt too; a longer one may have been cut. The lightest, which together have
    :data:`LIGHT` of all weight, are left out: they cost as much as the others.
    """
    if len(features) != len(pairs):
        raise CoalaError(
            f"Found {len(features)} rows of features of {len(pairs)} pairs: the head was fitted on prefixes, whose "
            "scores are not those of replies. Fix: use the teacher 'guided', or fit on whole replies."
        )
    scores = [head.score(side, features.prompt) for side in (features.chosen, features.rejected)]
    numbers = {text: n for n, text in enumerate(dict.fromkeys(conversation_text(pair.prompt) for pair in pairs))}
    found: dict[tuple[int, str], tuple[tuple[Turn, ...], float]] = {}
    for pair, chosen, rejected in zip(pairs, *scores, strict=True):
        group = numbers[conversation_text(pair.prompt)]
        for text, score in ((pair.chosen, chosen), (pair.rejected, rejected)):
            found.setdefault((group, text), (pair.prompt, float(score)))
    rewards = np.array([score for _, score in found.values()])
    weights = np.exp((rewards - rewards.max()) / (beta * max(float(rewards.std()), 1e-12)))
    lightest = np.argsort(weights, kind="stable")
    light = set(lightest[np.cumsum(weights[lightest]) <= LIGHT * weights.sum()].tolist())
    lessons = []
    for number, ((group, text), (prompt, _)) in enumerate(found.items()):
        if text and number not in light:
            row = backbone.render(prompt, text)
            ended = _ended(backbone, row.stop - row.start, max_new_tokens)
            lessons.append(Lesson(prompt, text, group, float(weights[number]), ended))
    return lessons


def teacher_states(
    backbone: LanguageModel,
    output: Float32,
    lessons: Sequence[Lesson],
    folder: Path,
    guidance: Guidance,
    *,
    temperature: float = 1.0,
    n_tokens: int = N_TOKENS,
    change: Float32 | None = None,
    on_reply: Callable[[int, int], None] = lambda *_: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> DistilStates:
    """The states of every token of ``lessons``, each to become the token that was taken.

    The nucleus of a step is what ``guidance`` and ``temperature`` restrict sampling to, within its ``n_tokens``
    likeliest. ``output`` W (V, d) is :func:`output_matrix`'s. ``change`` (d, d) is that of the policy that replies were
    drawn from, if it is not the base model: nuclei are then the policy's. Shards of a few replies are written to
    ``folder``; a killed call goes on where it was. The states of the result are mapped from a file there.
    """
    if not lessons:
        raise CoalaError("Found no reply to learn from; expected at least one.")
    named = hashlib.sha256(repr([asdict(lesson) for lesson in lessons]).encode()).hexdigest()
    plan = {
        "lessons": named,
        "weights": backbone.weights,
        "template": backbone.template,
        "nucleus": [guidance.top_k, guidance.top_p, temperature, n_tokens],
        **({} if change is None else {"change": digest(change)}),
    }
    if (there := open_states(folder, plan)) is not None:
        return there
    store = FeatureStore(folder / "shards")
    shards = [lessons[first : first + SHARD] for first in range(0, len(lessons), SHARD)]
    done = store.begin(plan, on_note)
    W = torch.from_numpy(output).to(backbone.device)
    A = None if change is None else torch.tensor(change, device=backbone.device)
    for number, some in enumerate(shards):
        if number not in done:
            arrays = [_of_reply(backbone, W, A, lesson, guidance, temperature, n_tokens) for lesson in some]
            store.write(number, {name: np.concatenate([one[name] for one in arrays]) for name in arrays[0]})
        on_reply(min(len(lessons), (number + 1) * SHARD), len(lessons))
    return write_states(folder, store, len(shards), plan)


@torch.no_grad()
def _of_reply(
    backbone: LanguageModel,
    W: torch.Tensor,
    A: torch.Tensor | None,
    lesson: Lesson,
    guidance: Guidance,
    temperature: float,
    n_tokens: int,
) -> dict[str, Any]:
    row = backbone.render(lesson.prompt, lesson.text, ends_with_eos=lesson.ended)
    wanted = np.asarray(row.tokens[row.start : row.stop], dtype=np.int32)
    if not len(wanted) or row.start < 1:
        final = torch.zeros(0, W.shape[1])
    else:
        final = backbone.hidden([row.tokens], -1)[0, row.start - 1 : row.stop - 1].float()
    read = final.to(W.device)
    logits = (read if A is None else read + read @ A.T) @ W.T
    kept = min(n_tokens, len(W))
    found = restrict(
        torch.log_softmax(logits, -1),
        temperature=temperature,
        top_k=min(guidance.top_k or kept, kept),
        top_p=guidance.top_p,
    )
    size = np.isfinite(found.log_probs).sum(1).astype(np.int32)
    tokens = torch.topk(logits, kept, dim=-1).indices.cpu().numpy().astype(np.int32)
    tokens[:, : found.tokens.shape[1]] = found.tokens  # of equals, those that the nucleus holds
    hit = tokens == wanted[:, None]
    missing = ~hit.any(1)
    tokens[missing, -1] = wanted[missing]
    size[missing] = np.minimum(size[missing], kept - 1)
    n = len(wanted)
    return {
        "states": final.cpu().numpy(),
        "tokens": tokens,
        "size": np.maximum(size, 1),
        "target": (tokens == wanted[:, None]).astype(np.float32),
        "weight": np.full(n, lesson.weight),
        "group": np.full(n, lesson.group, dtype=np.int64),
    }


def write_states(folder: Path, store: FeatureStore, n_shards: int, plan: dict[str, Any]) -> DistilStates:
    """Put the shards together, a file for each array, without ever holding all states; the shards go."""
    rest: dict[str, list[np.ndarray]] = {}
    for number in range(n_shards):
        for name, array in store.read(number).items():
            if name != "states":
                rest.setdefault(name, []).append(array)
    whole = {name: np.concatenate(arrays) for name, arrays in rest.items()}
    n = len(whole["size"])
    if not n:
        raise CoalaError("Found no token in any reply; expected some. Fix: give replies that are not empty.")
    write_rows(folder / "states.npy", (store.read(number)["states"] for number in range(n_shards)), n)
    for name, array in whole.items():
        write_rows(folder / f"{name}.npy", [array if array.ndim > 1 else array[:, None]], n)
    save_json(folder / "states.json", {"plan": plan, "n": n})
    store.discard()
    return _open(folder)


def open_states(folder: Path, plan: dict[str, Any]) -> DistilStates | None:
    """The states of ``folder`` if they are there and of this plan."""
    finished = folder / "states.json"
    return _open(folder) if finished.exists() and load_json(finished)["plan"] == plan else None


def _open(folder: Path) -> DistilStates:
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in DistilStates.__dataclass_fields__}
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: its states cannot be read ({error}). Delete the folder and run again.") from None
    flat = {name: array[:, 0] for name, array in arrays.items() if name in ("size", "weight", "group")}
    return DistilStates(**{**arrays, **flat})
