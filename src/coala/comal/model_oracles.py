"""Models as oracles: a reward model, a language model that is shown both answers, a head on hidden states.

Torch is imported inside functions. What scores answers one by one is a Bradley-Terry model and cannot prefer a to c, c
to b and b to a; a language model that sees both answers, and a :class:`coala.comal.pair_head.PairHead`, can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.comal.oracles import Answers, Example, Oracle, from_judge, from_scores, prompt_of
from coala.comal.pair_head import PairHead
from coala.nash.game import Float
from coala.values import CoalaError, ConvexHead, Pair, Turn


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
    # Of all pairs of a prompt's answers each answer is in several: what is the same is read once.
    number: dict[tuple[tuple[int, ...], int, int], int] = {}
    place = [number.setdefault((tuple(row.tokens), row.start, row.stop), len(number)) for row in rows]
    rows = [rows[place.index(k)] for k in range(len(number))]
    pooling = POOLINGS[spec.pooling]
    found = np.empty((len(rows), backbone.width), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        hidden = backbone.hidden([rows[i].tokens for i in batch], spec.layer, scored=pooling.scored)
        start = torch.tensor([rows[i].start for i in batch], device=hidden.device)
        stop = torch.tensor([rows[i].stop for i in batch], device=hidden.device)
        found[batch] = pooling.pool(hidden, start, stop).float().cpu().numpy()
    return found[place]
