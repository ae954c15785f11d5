"""How high a policy's own replies score beside its teacher's: what likelihood of the teacher's replies does not tell.

A policy that makes its teacher's replies likeliest may write replies that score less: a ridge shrinks it, and it meets
states of its own. Both are scored by the head that taught, on training prompts that the change was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coala.costs import decoding_flops
from coala.decoding import Guidance, generate
from coala.policies import DistilledPolicy
from coala.statistics.intervals import paired_difference
from coala.values import Estimate, Float32, Turn, prompt_id

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.values import ConvexHead

ROWS = 32  # replies that are written together


class OwnScore:
    """Asked of a change: the head score of the policy's own replies less the teacher's, paired over prompts.

    The policy writes at most ``max_new_tokens`` at ``temperature``, restricted as ``guidance`` is. ``scores`` are those
    of the teacher's replies to ``prompts``, by group. ``flops`` are those of all replies so far, by formula.
    """

    def __init__(
        self,
        backbone: LanguageModel,
        head: ConvexHead,
        prompts: Sequence[tuple[Turn, ...]],
        scores: Sequence[float],
        guidance: Guidance,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        most: int,
    ) -> None:
        self._backbone, self._head, self._prompts, self._scores = backbone, head, prompts, scores
        self._guidance = guidance.changed(mode="distilled")
        self._max_new_tokens, self._temperature, self._seed, self._most = max_new_tokens, temperature, seed, most
        self.flops = 0

    def __call__(self, change: Float32, groups: NDArray[np.int64]) -> Estimate:
        """``change`` (d, d); ``groups`` (k,) are numbers of prompts, of which the first ``most`` are answered."""
        groups = groups[: self._most]
        policy = DistilledPolicy(change, None, self._backbone.spec(), "guided", "nucleus", 1.0, None)
        prompts = [self._prompts[number] for number in groups]
        replies = generate(
            prompts,
            self._backbone.with_policy(policy),
            self._head,
            self._guidance,
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            seed=self._seed,
            prompt_ids=[prompt_id(prompt) for prompt in prompts],
            batch_size=ROWS,
        )
        for prompt, reply in zip(prompts, replies, strict=True):
            length = len(self._backbone.render(prompt).tokens)
            self.flops += decoding_flops(self._backbone.shape, length, reply.n_tokens)
        return paired_difference([one.score for one in replies], [self._scores[number] for number in groups])
