"""Policy accuracy of whatever writes replies: guided decoding of a head, or a trained model beside its base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coala.statistics.policy import PolicyAccuracy, accuracy_of_log_ratios
from coala.values import CoalaError, Pair

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead

OnTexts = Callable[[int, int], None]


@dataclass(frozen=True)
class Guided:
    """The policy of a head that guides: its log-ratio is to unguided decoding at the same temperature and top-k, top-p.

    That of mode ``distilled`` is a trained model's: over the whole vocabulary, at temperature 1.

    ``max_new_tokens`` cuts replies as decoding does, which a ``budget`` needs.
    """

    head: ConvexHead
    guidance: Guidance
    temperature: float = 1.0
    max_new_tokens: int | None = None

    @property
    def unknown(self) -> str:
        """Why its likelihood is not known, in a few words; "" where it is."""
        from coala.decoding import unknown_likelihood

        return unknown_likelihood(self.guidance, self.head, self.temperature)

    @property
    def distilled(self) -> float:
        """The strength of the distilled policy that this comes to; 0 where the head guides."""
        from coala.decoding.requests import effective

        found = effective(self.guidance.at(self.temperature), self.head, self.temperature)
        return found.change if found.mode == "distilled" else 0.0


def policy_accuracy(
    pairs: Sequence[Pair],
    base: LanguageModel,
    policy: LanguageModel | Guided,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    on_texts: OnTexts | None = None,
) -> PolicyAccuracy:
    """Share of ``pairs`` whose log-ratio log pi(y|x) - log pi_0(y|x) of ``policy`` to ``base`` ranks right.

    A trained model, an adapter among them, and the distilled policy of ``base`` are compared over the whole vocabulary
    at temperature 1. A :class:`Guided` policy is compared with unguided decoding: a reply that top-k and top-p rule out
    has log-ratio -inf; where both of a pair are ruled out, the same guidance of the whole distribution decides. With
    ``limit`` only so many pairs are read, spread evenly. It costs a forward per token of each reply: two for a trained
    model, one for a distilled policy, up to two (with a look ahead at the candidates) for a guided one.
    ``on_texts(done, total)`` counts texts read.

    Raises :class:`CoalaError` where the policy's likelihood is not known (``policy.unknown``) or no pair is given.
    """
    from coala.decoding import guided_likelihoods, lifted, model_log_ratios, policy_likelihood

    some = spread(pairs, limit)
    if not some:
        raise CoalaError("Found no pairs, expected at least one. Fix: pass pairs that were not trained on.")
    prompts = [pair.prompt for pair in some] * 2
    texts = [pair.chosen for pair in some] + [pair.rejected for pair in some]
    groups, n = [pair.group for pair in some], len(some)
    if not isinstance(policy, Guided):
        ratios = model_log_ratios(prompts, texts, policy, base, batch_size=batch_size, on_texts=on_texts)
        return accuracy_of_log_ratios(ratios[:n], ratios[n:], groups)
    if policy.distilled:
        read = policy_likelihood(prompts, texts, base, strength=policy.distilled, on_texts=on_texts)
        log_ratios = np.array([ours - theirs for ours, theirs, _ in read])
        return accuracy_of_log_ratios(log_ratios[:n], log_ratios[n:], groups)
    found = []
    for turn, guidance in enumerate((policy.guidance, lifted(policy.guidance))):

        def tell(done: int, total: int, turn: int = turn) -> None:
            if on_texts is not None:
                on_texts(turn * total + done, 2 * total)

        under = guided_likelihoods(
            prompts,
            texts,
            base,
            policy.head,
            guidance,
            temperature=policy.temperature,
            max_new_tokens=policy.max_new_tokens,
            batch_size=batch_size,
            on_texts=tell,
        )
        found.append(np.array([one.log_ratio for one in under]))
    (within, free), half = found, n
    return accuracy_of_log_ratios(within[:half], within[half:], groups, lifted=(free[:half], free[half:]))


def spread(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """At most ``limit`` of the pairs, evenly over all."""
    if limit is None or len(pairs) <= limit:
        return list(pairs)
    return [pairs[i * len(pairs) // limit] for i in range(limit)]
