"""How likely a model finds the replies of pairs, and the reward that each method reads off that.

By our own backbone, which reads what two replies have in common once; nothing here is TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray

from coala.backbone import LanguageModel
from coala.baselines.rows import PairRows, render_pairs
from coala.baselines.settings import TrainSettings
from coala.baselines.training import HEAD, Trained
from coala.values import CoalaError, Pair, SpecMismatch

Float64 = NDArray[np.float64]
# Values (B,) of rows with their states at the end (B, T, d), their tokens (B, T) and the reply's first and last + 1.
_Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PairLikelihoods:
    """log pi(reply | prompt) in nats, ``chosen`` and ``rejected`` (n,), and how many tokens each reply has."""

    chosen: Float64
    rejected: Float64
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]

    @property
    def ratio(self) -> Float64:
        """log pi(chosen) - log pi(rejected)."""
        return self.chosen - self.rejected

    @property
    def average_ratio(self) -> Float64:
        """The same of log-probabilities per token."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def log_likelihoods(
    backbone: LanguageModel, pairs: Sequence[Pair], settings: TrainSettings, *, batch_tokens: int = 4096
) -> PairLikelihoods:
    """Log-likelihoods of both replies of each pair, of the very tokens that training with ``settings`` sees."""
    backbone.require_head("Log-likelihoods")
    rows = render_pairs(pairs, backbone, settings)

    def measure(final: torch.Tensor, tokens: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        return backbone.log_likelihood(final, tokens, start, stop)

    chosen, rejected = _measured(backbone, rows, measure, batch_tokens)
    return PairLikelihoods(
        chosen,
        rejected,
        np.array([len(pair.chosen.tokens) - pair.chosen.start for pair in rows]),
        np.array([len(pair.rejected.tokens) - pair.rejected.start for pair in rows]),
    )


def reward_margins(
    trained: Trained,
    pairs: Sequence[Pair],
    reference: LanguageModel,
    *,
    policy: LanguageModel | None = None,
    average: bool = False,
    batch_tokens: int = 4096,
) -> Float64:
    """reward(chosen) - reward(rejected) (n,) of pairs by a method's own reward; what TRL logs as margins.

        dpo           beta (log pi - log ref), sums over the reply's tokens; ``ref`` is the base, ``reference``
        orpo, simpo   beta log pi / tokens; SimPO's gamma is part of its loss, not of its reward
        sft           log pi, or log pi / tokens with ``average``; TRL logs none
        reward        the model's score

    Scales differ, so compare methods by what has no scale (accuracy, AUC). ``policy`` is ``trained.backbone()`` if the
    caller has it; else it is loaded as ``reference`` is. Raises ``SpecMismatch`` if the reference is not the base.
    """
    if reference.weights != trained.base_weights or reference.template != trained.template:
        raise SpecMismatch(
            f"The reference {reference.name} (weights {reference.weights[:12]}, template {reference.template}) is not "
            f"the base of {trained.folder} ({trained.model}, weights {trained.base_weights[:12]}, template "
            f"{trained.template}). Load that with load_backbone."
        )
    if average and trained.method != "sft":
        raise CoalaError(f"average is a choice for sft; the reward of {trained.method} is defined. Leave it out.")
    model = policy if policy is not None else loaded_like(trained, reference)
    if trained.method == "reward":
        return _score_margins(trained, model, pairs, batch_tokens)
    found = log_likelihoods(model, pairs, trained.settings, batch_tokens=batch_tokens)
    beta = trained.settings.beta
    if trained.method == "sft":
        return found.average_ratio if average else found.ratio
    if trained.method == "dpo":
        base = log_likelihoods(reference, pairs, trained.settings, batch_tokens=batch_tokens)
        return beta * ((found.chosen - base.chosen) - (found.rejected - base.rejected))
    return beta * found.average_ratio


def loaded_like(trained: Trained, model: LanguageModel) -> LanguageModel:
    """The trained model on the device and in the dtype of ``model``."""
    return trained.backbone(device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))


def _score_margins(trained: Trained, body: LanguageModel, pairs: Sequence[Pair], batch_tokens: int) -> Float64:
    """Margins of the linear head at the last token that is not padding; a closing token that pads is passed over."""
    head = import_module("safetensors.torch").load_file(trained.folder / HEAD)["score"][0].to(body.device)
    padding = int(trained.facts["padding_token"])

    def measure(final: torch.Tensor, tokens: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
        at = torch.arange(tokens.shape[1], device=tokens.device)
        real = (at < stop[:, None]) & (tokens != padding)
        last = torch.where(real, at, -1).amax(1).clamp(min=0)
        states = final[torch.arange(len(final), device=final.device), last]
        scores: torch.Tensor = (states.float() @ head).double()
        return scores

    chosen, rejected = _measured(body, render_pairs(pairs, body, trained.settings), measure, batch_tokens)
    return chosen - rejected


def _measured(
    backbone: LanguageModel, rows: Sequence[PairRows], measure: _Measure, batch_tokens: int
) -> tuple[Float64, Float64]:
    """``measure`` of the chosen and of the rejected row of each pair, from one forward over what they share."""
    out = np.zeros((2, len(rows)))

    def take(side: int, batch: Sequence[int], final: torch.Tensor | None) -> None:
        assert final is not None
        mine = [rows[i].rejected if side else rows[i].chosen for i in batch]
        tokens = torch.zeros(final.shape[:2], dtype=torch.long)
        for r, row in enumerate(mine):
            tokens[r, : len(row.tokens)] = torch.tensor(row.tokens)
        start, stop = (
            torch.tensor(ends, device=final.device)
            for ends in ([row.start for row in mine], [row.stop for row in mine])
        )
        values = measure(final, tokens.to(final.device), start, stop)
        out[side, list(batch)] = values.cpu().numpy()

    for batch in _batches(rows, batch_tokens):
        first = [rows[i].chosen.tokens for i in batch]
        second = [rows[i].rejected.tokens for i in batch]
        # At least one token of its own: the states of a row that is the beginning of the other are not kept whole.
        shared = [min(_common(a, b), len(b) - 1) for a, b in zip(first, second, strict=True)]
        branches = backbone.shares and min(shared) > 0
        reading = backbone.read(first, (-1,), to_end=True, keep=branches)
        take(0, batch, reading.final)
        if branches:
            own = [row[s:] for row, s in zip(second, shared, strict=True)]
            take(1, batch, reading.branch(range(len(batch)), shared, own).final)
        else:
            take(1, batch, backbone.read(second, (-1,), to_end=True).final)
    return out[0], out[1]


def _batches(rows: Sequence[PairRows], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of pairs of about one length, whose longer rows take at most ``batch_tokens`` together or are one."""
    if batch_tokens < 1:
        raise CoalaError(f"batch_tokens is {batch_tokens}; expected at least 1.")
    lengths = [max(len(pair.chosen.tokens), len(pair.rejected.tokens)) for pair in rows]
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
