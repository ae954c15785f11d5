"""A decoding loop for ``model.generate`` of transformers, guided by a head.

The base distribution is what ``generate``'s own logits processors leave (temperature, top-k, top-p, penalties, bans),
so its sampling options mean what they mean without a head; stopping criteria are asked after every token. Everything
else is as in :mod:`coala.decoding.generation`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coala.backbone.external_model import hold, prompts, require_held
from coala.backbone.model import LanguageModel
from coala.decoding.budget import Account
from coala.decoding.decoder import Batch, Decoder
from coala.decoding.guidance import Guidance
from coala.decoding.replies import Reply
from coala.decoding.requests import effective
from coala.decoding.sampling import Nucleus
from coala.decoding.search import WAYS, nobody
from coala.policies import DistilledPolicy
from coala.recipe import recipe_of
from coala.store import RunFolder, head_for, run_policy
from coala.values import CoalaError, ConvexHead

# What generate() can be asked to return beside the tokens and a guided step has no one answer for.
UNKEPT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class guide:
    """``model.generate(..., custom_generate=coala.guide(head, guidance))`` guides by ``head``.

    ``head`` may also be the folder of a finished run: its head then guides, by the run's guidance if none is given.

    Sampling options and stopping criteria are those of ``generate``; :attr:`Guidance.top_k` and ``top_p`` are not used.
    Greedy text has no samples to choose among: modes ``block`` and ``best_of`` are then ``token``. Criteria are asked
    about one reply at a time, and must not remember rows by their place in a batch.
    The seed is drawn from torch's generator, so ``torch.manual_seed`` repeats a text. Prompts must be rendered as they
    were for the head's features, by the tokenizer's chat template for instance: here they are tokens already.

    ``policy`` is the distilled policy of mode ``distilled``, for which ``head`` may be None, and of guidance over it;
    of a run it is the run's own.

    ``streamer`` is handed tokens as they become certain, one at a time; give it here and not to ``generate``, which
    (in transformers 5) hands none to a loop that is not its own.

    Raises :class:`SpecMismatch` for a model the head does not fit, and :class:`CoalaError` for options that a guided
    loop does not have: beams of transformers, scores and hidden states in the output, a cache that is already filled.
    """

    def __init__(
        self,
        head: ConvexHead | str | Path | None,
        guidance: Guidance | None = None,
        *,
        policy: DistilledPolicy | None = None,
        streamer: Any = None,
    ) -> None:
        if isinstance(head, str | Path):
            run = RunFolder.open(head)
            head, own = _of_run(run)
            guidance = own if guidance is None else guidance
            if guidance.change and policy is None:
                policy = run_policy(run)
        if not isinstance(guidance, Guidance | None):
            raise CoalaError(f"Found guidance of type {type(guidance).__name__}; expected coala.Guidance(...).")
        self.head, self.guidance, self.streamer = head, Guidance() if guidance is None else guidance, streamer
        self.policy = policy
        if not (isinstance(head, ConvexHead) or (head is None and self.guidance.mode == "distilled")):
            raise CoalaError(f"Found a head of type {type(head).__name__}; expected a ConvexHead, or a run's folder.")
        if self.guidance.change and not isinstance(policy, DistilledPolicy):
            raise CoalaError(
                f"Found guidance {self.guidance} without a distilled policy; expected one. Fix: guide(head, guidance, "
                "policy=DistilledPolicy.load(RUN/distilled)), or give the run's folder as the head."
            )
        self._held: weakref.WeakKeyDictionary[Any, LanguageModel] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What ``generate`` calls: rows of prompt and reply, padded on the right."""
        _check(input_ids, generation_config, model_kwargs)
        ends = _stop_tokens(generation_config)
        backbone = self._backbone(model, ends)
        mask = model_kwargs.get("attention_mask")
        rows = prompts(input_ids.tolist(), None if mask is None else mask.tolist())
        temperature = 1.0 if generation_config.do_sample else 0.0
        guidance = effective(self.guidance.at(temperature), self.head, temperature)
        told = streamer if streamer is not None else self.streamer
        if told is not None and len(rows) > 1:
            raise CoalaError(f"A streamer follows one reply; found {len(rows)} prompts. Give one at a time.")
        if told is not None and streamer is None:
            told.put(input_ids.cpu())
        seed = int(torch.randint(2**62, ()).item()) if generation_config.do_sample else 0
        room = min(generation_config.max_length - input_ids.shape[1], backbone.max_tokens - max(map(len, rows)))
        if room < 1:
            raise CoalaError(
                f"A prompt of {max(map(len, rows))} tokens leaves no room: max_length is "
                f"{generation_config.max_length}, the context {backbone.max_tokens}. Cut the prompt."
            )
        replies = [
            Reply(
                index,
                str(index),
                room,
                _no_text,
                seed=seed,
                stream=None if told is None else _Tokens(told),
                account=Account(self.guidance.budget),
            )
            for index in range(len(rows))
        ]
        loop = _Loop(backbone, self.head, guidance, temperature, input_ids, logits_processor, stopping_criteria)
        for _ in WAYS[guidance.mode](loop, loop.begin(rows, rows, replies), nobody):
            pass
        if told is not None:
            told.end()
        return _sequences(input_ids, replies, generation_config)

    def _backbone(self, model: Any, stop_tokens: frozenset[int]) -> LanguageModel:
        held = self._held.get(model)
        if held is None or held.stop_tokens != stop_tokens:
            held = hold(model, stop_tokens)
            if self.head is not None:
                require_held(held, self.head.spec, self.head.width, "head")
            if self.policy is not None:
                require_held(held, self.policy.spec, self.policy.width, "policy")
                held = held.with_policy(self.policy)
            self._held[model] = held
        return held


def _of_run(run: RunFolder) -> tuple[ConvexHead, Guidance]:
    """The head and guidance of a finished run."""
    recipe = recipe_of(run.settings, run.path / "run.json")
    return head_for(run.path / "head", recipe.guidance.rater), Guidance(**asdict(recipe.guidance))


class _Loop(Decoder):
    """A decoder whose distribution and ends are those of ``generate``."""

    def __init__(
        self,
        backbone: LanguageModel,
        head: ConvexHead | None,
        guidance: Guidance,
        temperature: float,
        input_ids: torch.Tensor,
        processors: Any,
        criteria: Any,
    ) -> None:
        super().__init__(backbone, head, guidance, temperature=temperature)
        self._input_ids, self._processors, self._criteria = input_ids, processors, criteria

    def nucleus(self, batch: Batch) -> Nucleus:
        logits = batch.prefix.logits()
        found = logits.new_empty(logits.shape)
        # Processors take rows of one length, and replies that joined later or branched may differ.
        by_length: dict[int, list[int]] = {}
        for row, reply in enumerate(batch.replies):
            by_length.setdefault(len(reply.tokens), []).append(row)
        for some in by_length.values():
            ids = torch.cat([self._sequence(batch.replies[row]) for row in some])
            found[some] = self._processors(ids, logits[some].clone()).to(found.dtype)
        normal = torch.log_softmax(found.double(), dim=-1)
        kept = int(torch.isfinite(normal).sum(-1).max())
        if not kept:
            raise CoalaError("The logits processors leave no token to choose. Take one of them out.")
        top, tokens = torch.topk(normal, kept, dim=-1)
        base = torch.log_softmax(logits, dim=-1).gather(1, tokens)
        return Nucleus(tokens.cpu().numpy(), top.cpu().numpy(), base.cpu().double().numpy())

    def grow(self, batch: Batch, row: int, reply: Reply, token: int, log_prob: float) -> bool:
        ended = super().grow(batch, row, reply, token, log_prob)
        if token in self.backbone.stop_tokens:  # which generate() counts as part of the reply
            reply.tokens.append(token)
            reply.log_probs.append(log_prob)
        if not ended and bool(self._criteria(self._sequence(reply), None).all()):
            reply.finish = "stop"
        return reply.finish != ""

    def _sequence(self, reply: Reply) -> torch.Tensor:
        own = torch.tensor([reply.tokens], dtype=self._input_ids.dtype, device=self._input_ids.device)
        return torch.cat([self._input_ids[reply.index : reply.index + 1], own], dim=1)


@dataclass
class _Tokens:
    """Hands a streamer of transformers the tokens it has not had."""

    streamer: Any
    sent: int = 0

    def send(self, reply: Reply, *, last: bool) -> None:
        for token in reply.tokens[self.sent :]:
            self.streamer.put(torch.tensor([token]))
        self.sent = len(reply.tokens)


def _check(input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> None:
    if config.num_beams != 1:
        raise CoalaError(f"num_beams is {config.num_beams}; a guided search is Guidance('beam', width=...) instead.")
    asked = [name for name in UNKEPT if config.return_dict_in_generate and getattr(config, name)]
    if asked:
        raise CoalaError(f"{', '.join(asked)}: a guided loop keeps tokens alone. Leave it out.")
    if not input_ids.shape[1] or model_kwargs.get("inputs_embeds") is not None:
        raise CoalaError("A guided loop reads input_ids; found none, or inputs_embeds.")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise CoalaError("past_key_values holds tokens already; a guided loop fills a cache of its own. Leave it out.")


def _stop_tokens(config: Any) -> frozenset[int]:
    eos = config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(int(token) for token in (eos if isinstance(eos, Sequence) else [eos]))


def _sequences(input_ids: torch.Tensor, replies: list[Reply], config: Any) -> Any:
    longest = max(len(reply.tokens) for reply in replies)
    filler = config._pad_token_tensor
    blank = 0 if filler is None else int(filler.reshape(-1)[0])
    own = np.full((len(replies), longest), blank, dtype=np.int64)
    for row, reply in enumerate(replies):
        own[row, : len(reply.tokens)] = reply.tokens
    sequences = torch.cat([input_ids, torch.from_numpy(own).to(input_ids)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]


def _no_text(_: list[int]) -> str:
    return ""
