"""How high a policy's own replies score beside its teacher's: what likelihood of the teacher's replies does not tell.

A policy that makes its teacher's replies likeliest may write replies that score less, since it meets states of its
own. Both are scored by the head that taught, on training prompts that the change was not fitted to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coala.costs import decoding_flops
from coala.decoding import generate
from coala.policies import DistilledPolicy
from coala.statistics.intervals import paired_difference
from coala.values import Estimate, Float32, prompt_id

if TYPE_CHECKING:
    from coala.distil.stage import Taught, Work

ROWS = 32  # replies that are written together


class OwnScore:
    """Asked of a change: the head score of the policy's own replies less the teacher's, paired over prompts.

    ``flops`` are those of all replies so far, by formula.
    """

    def __init__(self, work: Work, taught: Taught) -> None:
        self._work, self._taught = work, taught
        self.flops = 0

    def __call__(self, change: Float32, groups: NDArray[np.int64]) -> Estimate:
        """``change`` (d, d); ``groups`` (k,) are numbers of prompts."""
        work, taught, settings = self._work, self._taught, self._work.settings
        policy = DistilledPolicy(change, None, work.backbone.spec(), settings.teacher, settings.support, 1.0, None)
        prompts = [taught.prompts[number] for number in groups]
        replies = generate(
            prompts,
            work.backbone.with_policy(policy),
            work.head,
            work.guidance.changed(mode="distilled"),
            max_new_tokens=work.recipe.evaluation.max_new_tokens,
            temperature=work.recipe.evaluation.temperature,
            seed=settings.seed,
            prompt_ids=[prompt_id(prompt) for prompt in prompts],
            batch_size=ROWS,
        )
        for prompt, reply in zip(prompts, replies, strict=True):
            length = len(work.backbone.render(prompt).tokens)
            self.flops += decoding_flops(work.backbone.shape, length, reply.n_tokens)
        return paired_difference([one.score for one in replies], [taught.replies[number].score for number in groups])
