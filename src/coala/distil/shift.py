"""The soft teacher: replies of mode ``shift``, and the exact distribution that each of their tokens was drawn from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.backbone import LanguageModel
from coala.decoding.budget import centred
from coala.decoding.decoder import Batch, Decoder
from coala.decoding.guidance import Float64, Guidance, scaled
from coala.decoding.requests import Prepared, Request, prepare
from coala.decoding.sampling import Nucleus
from coala.decoding.search import by_tokens
from coala.distil.states import N_TOKENS, SHARD, open_states, write_states
from coala.policies import DistilStates
from coala.store import FeatureStore
from coala.values import CoalaError, ConvexHead, Turn, prompt_id

Step = tuple[NDArray[np.int64], Float64]


class _Recorder(Decoder):
    """A decoder of mode ``shift`` that keeps, of every step of a reply, its nucleus and what it was sampled from."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps: dict[int, list[Step]] = defaultdict(list)
        self._heard: list[Float64] = []  # the scores of the step under way, if they were asked for

    def preview(self, batch: Batch, tokens: NDArray[np.int64]) -> Float64:
        self._heard.append(super().preview(batch, tokens))
        return self._heard[-1]

    def _choose(self, batch: Batch, nucleus: Nucleus) -> NDArray[np.intp]:
        self._heard.clear()
        due = np.array([len(reply.tokens) % self.guidance.interval == 0 for reply in batch.replies])
        rank = super()._choose(batch, nucleus)
        log_q = nucleus.log_probs.copy()
        for scores in self._heard:
            sizes = np.isfinite(log_q).sum(1)
            asked = due & (sizes > 1)
            k = min(self.guidance.candidates, int(sizes[asked].max()))
            top = log_q[:, :k]
            tilt = centred(top, scaled(scores[:, :k], np.isfinite(top), self.guidance.rule))
            log_q[:, :k] += np.where(asked, self.guidance.strength, 0.0)[:, None] * tilt
        q = np.exp(log_q - log_q.max(1, keepdims=True))
        for row, reply in enumerate(batch.replies):
            self.steps[reply.index].append((nucleus.tokens[row], q[row] / q[row].sum()))
        return rank


def shift_states(
    backbone: LanguageModel,
    head: ConvexHead,
    prompts: Sequence[tuple[Turn, ...]],
    folder: Path,
    guidance: Guidance,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    on_reply: Callable[[int, int], None] = lambda *_: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> DistilStates:
    """The states of a reply to each of ``prompts``, each to become the distribution that its token was drawn from.

    ``guidance`` is of mode ``shift``, without a budget. Shards of a few replies are written to ``folder``; a killed
    call goes on where it was. The states of the result are mapped from a file there.
    """
    if guidance.mode != "shift" or guidance.budget is not None or temperature == 0:
        raise CoalaError(f"Found guidance {guidance} at temperature {temperature:g}; expected mode shift, no budget.")
    names = [prompt_id(prompt) for prompt in prompts]
    plan = {
        "prompts": hashlib.sha256(repr(names).encode()).hexdigest(),
        "head": hashlib.sha256(
            b"".join(part.tobytes() for part in (head.linear, head.gates, head.weights))
        ).hexdigest(),
        "evidence": head.evidence,
        "weights": backbone.weights,
        "template": backbone.template,
        "guidance": repr(guidance),
        "settings": [max_new_tokens, temperature, seed],
    }
    if (found := open_states(folder, plan)) is not None:
        return found
    store = FeatureStore(folder / "shards")
    done, firsts = store.begin(plan, on_note), range(0, len(prompts), SHARD)
    for number, first in enumerate(firsts):
        if number not in done:
            parts = [
                prepare(
                    Request(prompts[at], guidance, max_new_tokens, seed, temperature, (), names[at]),
                    backbone,
                    head,
                    index=at,
                )
                for at in range(first, min(len(prompts), first + SHARD))
            ]
            store.write(number, _shard(backbone, _Recorder(backbone, head, guidance, temperature=temperature), parts))
        on_reply(min(len(prompts), first + SHARD), len(prompts))
    return write_states(folder, store, len(firsts), plan)


def _shard(backbone: LanguageModel, decoder: _Recorder, parts: Sequence[Prepared]) -> dict[str, Any]:
    batch = decoder.begin([part.row for part in parts], [part.read for part in parts], [part.reply for part in parts])
    for _ in by_tokens(decoder, batch):
        pass
    made = [_of_reply(backbone, part, decoder.steps[part.reply.index]) for part in parts]
    return {name: np.concatenate([one[name] for one in made]) for name in made[0]}


def _of_reply(backbone: LanguageModel, part: Prepared, steps: Sequence[Step]) -> dict[str, Any]:
    reply = part.reply
    # The step that drew a stop token is one more; what a stop string cut off is none.
    n = len(reply.tokens) + (reply.finish == "stop" and reply.cut is None)
    final = backbone.hidden([part.row + reply.tokens], -1)[0, len(part.row) - 1 :][:n].float().cpu().numpy()
    kept = min(N_TOKENS, len(steps[0][0]))
    tokens = np.stack([one[:kept] for one, _ in steps[:n]]) if n else np.zeros((0, kept))
    q = np.stack([one[:kept] for _, one in steps[:n]]) if n else np.zeros((0, kept))
    return {
        "states": final,
        "tokens": tokens.astype(np.int32),
        "size": (q > 0).sum(1).astype(np.int32),
        "target": (q / q.sum(1, keepdims=True)).astype(np.float32),
        "weight": np.ones(n),
        "group": np.full(n, reply.index, dtype=np.int64),
    }
