"""The frozen language model: conversations to tokens, tokens to hidden states, and prefixes to decode from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from coala.backbone.cache import tree_obstacle
from coala.backbone.network import BackboneError, Network, OutputChange, Scored
from coala.backbone.pooling import POOLINGS
from coala.backbone.prefix import Prefix
from coala.backbone.reading import Reading
from coala.backbone.template import RenderedRow, Renderer
from coala.costs import Shape
from coala.policies import DistilledPolicy
from coala.values import FeatureSpec, Pair, Prompt, SpecMismatch, Turn, turns

Tree = Literal["auto", "always", "never"]


class LanguageModel:
    """A loaded, frozen model with its tokenizer; made by :func:`coala.backbone.load_backbone`.

    ``name`` and ``revision`` tell where it came from, ``weights`` and ``template`` what it is (see
    :class:`coala.values.FeatureSpec`). ``generates`` is false for encoders and models loaded without a head.
    """

    def __init__(
        self,
        network: Network,
        renderer: Renderer,
        *,
        name: str,
        revision: str,
        weights: str,
        generates: bool,
        notes: Sequence[str] = (),
    ) -> None:
        self._network = network
        self._renderer = renderer
        self.name, self.revision, self.weights = name, revision, weights
        self.generates = generates
        self._notes = tuple(notes)
        self._policy: Callable[[], DistilledPolicy] | None = None
        self._own: OutputChange | None = None  # of the model itself, whatever is decoded

    @cached_property
    def template(self) -> str:
        return f"{self._renderer.kind}:{self._renderer.digest}"

    @property
    def width(self) -> int:
        """d, the length of a hidden state."""
        return self._network.width

    @property
    def n_layers(self) -> int:
        return self._network.n_layers

    @property
    def max_tokens(self) -> int:
        """The context: longest prompt plus reply in tokens."""
        return self._network.context

    @property
    def device(self) -> torch.device:
        return self._network.device

    @property
    def dtype(self) -> torch.dtype:
        return self._network.dtype

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return self._renderer.stop_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end a reply: what a model without a chat template writes when it goes on as the other speaker."""
        return ("\n\nHuman:",) if self._renderer.kind == "dialogue" else ()

    @property
    def shape(self) -> Shape:
        """The numbers that decide FLOPs."""
        return self._network.shape

    @property
    def transformer(self) -> Any:
        """The model of transformers itself, for programs that want one; frozen, so not to be trained or changed."""
        return self._network.causal

    @property
    def renderer(self) -> Renderer:
        """What writes conversations for it."""
        return self._renderer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers that comes with it."""
        return self._renderer.tokenizer

    # --- the feature contract ------------------------------------------------------------------------------------

    def spec(
        self, layer: int = -1, pooling: str = "mean", ends_with_eos: bool = False, max_tokens: int | None = None
    ) -> FeatureSpec:
        """What features of this model mean; negative layers count from the last (-1, the final state)."""
        if pooling not in POOLINGS:
            raise BackboneError(f"Pooling {pooling!r}; expected one of {', '.join(POOLINGS)}.")
        if POOLINGS[pooling].scored:
            self._network.check_scores(self._layer(layer))
        longest = self.max_tokens if max_tokens is None else max_tokens
        if not 2 <= longest <= self.max_tokens:
            raise BackboneError(
                f"max_tokens is {longest}; expected 2 to {self.max_tokens}, the context of {self.name}."
            )
        return FeatureSpec(
            self.name, self.revision, self.weights, self.template, self._layer(layer), pooling, ends_with_eos, longest
        )

    def require(self, spec: FeatureSpec) -> None:
        """Raise :class:`SpecMismatch` unless this model makes features of ``spec``."""
        mine = self.spec(spec.layer, spec.pooling, spec.ends_with_eos, min(spec.max_tokens, self.max_tokens))
        if not mine.same_features(spec):
            raise SpecMismatch(
                f"The features are those of {spec.backbone} ({_about(spec)}), but the loaded model is {self.name} "
                f"({_about(mine)}). Load the model the features were made with, or extract them again with this one."
            )

    def _layer(self, layer: int) -> int:
        if not -self.n_layers - 1 <= layer <= self.n_layers:
            raise BackboneError(
                f"Layer {layer}; {self.name} has hidden states 0 (embedding) to {self.n_layers} (final)."
            )
        return layer % (self.n_layers + 1)

    def _place(self, layer: int, scored: bool) -> int:
        return Scored(self._layer(layer)) if scored else self._layer(layer)

    # --- a distilled policy --------------------------------------------------------------------------------------

    def with_policy(self, policy: DistilledPolicy | Callable[[], DistilledPolicy]) -> LanguageModel:
        """The same model with a policy that :meth:`changed` decodes; a function is asked for it when it is needed."""
        found = copy(self)
        found._policy = policy if callable(policy) else lambda: policy
        for kept in ("policy", "_change"):
            found.__dict__.pop(kept, None)
        return found

    def changed(self, strength: float = 1.0) -> LanguageModel:
        """The same model with ``strength`` times its policy's change of the output layer: logits W (h + s A h).

        Strength 0 is the base model. Whatever its name, its features are the base model's: only logits differ. Raises
        :class:`BackboneError` for a model without a policy and :class:`SpecMismatch` for a policy of other weights.
        """
        change = self._change.times(strength) if strength else self._own
        if change is self._network.change:
            return self
        found = copy(self)
        found._network = self._network.changed(change)
        return found

    def with_output(self, change: OutputChange) -> LanguageModel:
        """The same model with ``change`` before its output layer, as if its weights were those: a model in itself."""
        found = copy(self)
        found._network, found._own = self._network.changed(change), change
        return found

    @cached_property
    def policy(self) -> DistilledPolicy:
        """The policy that :meth:`with_policy` gave it."""
        if self._policy is None:
            raise BackboneError(
                f"Found no distilled policy with {self.name}; expected one. Fix: take the model of a distilled run, "
                "coala.load_run(RUN).backbone, or give it one by with_policy."
            )
        self.require_head("Distilled policies")
        found = self._policy()
        # A model that somebody else loaded tells no weights: whoever took it has compared what there is.
        if (self.weights and self.weights != found.spec.weights) or found.width != self.width:
            raise SpecMismatch(
                f"Found a distilled policy of {found.spec.backbone} (weights {found.spec.weights[:12]}), expected one "
                f"of {self.name} (weights {self.weights[:12]}). Fix: load the model it was distilled from, or distil "
                "again (`coala distil RUN`)."
            )
        return found

    @cached_property
    def _change(self) -> OutputChange:
        return OutputChange.of(self.policy.left, self.policy.right, device=self.device)

    # --- text and tokens -----------------------------------------------------------------------------------------

    def render(
        self,
        prompt: Prompt,
        reply: str | None = None,
        *,
        max_tokens: int | None = None,
        ends_with_eos: bool = False,
    ) -> RenderedRow:
        """Tokens of a prompt (see :func:`coala.values.turns`), ready to be continued, or of a prompt and its reply.

        Without truncation the tokens of the prompt alone begin the tokens of prompt and reply. Beyond ``max_tokens``
        (default: the context) the prompt loses tokens on the left, down to a quarter of ``max_tokens``, then the reply
        on the right. A chat template's text behind the reply is left out, but for the stop token if ``ends_with_eos``
        (which a reply cut short does not have).
        """
        longest = self.max_tokens if max_tokens is None else min(max_tokens, self.max_tokens)
        if longest < 1:
            raise BackboneError(f"max_tokens is {max_tokens}; expected at least 1. Ask for fewer new tokens.")
        return self._renderer.render(turns(prompt), reply, max_tokens=longest, ends_with_eos=ends_with_eos)

    def raw(self, text: str, *, max_tokens: int | None = None) -> RenderedRow:
        """Tokens of a text to be continued as it stands, in no template; cut on the left as :meth:`render` does."""
        longest = self.max_tokens if max_tokens is None else min(max_tokens, self.max_tokens)
        return self._plain.render((Turn("user", text),), None, max_tokens=longest)

    def surplus(self, prompt: Sequence[Turn] | str, most: int) -> int:
        """Tokens that a prompt (or a text as it stands) has at least, if these are clearly over ``most``, else 0.

        Takes no longer for a text of millions of characters than for one that fits.
        """
        text = prompt if isinstance(prompt, str) else self._renderer.prompt_text(prompt)
        return self._renderer.surplus(text, most)

    @cached_property
    def _plain(self) -> Renderer:
        return Renderer(self.tokenizer, "continuation", stop_tokens=self.stop_tokens)

    def reads(self, spec: FeatureSpec, pair: Pair | None = None) -> tuple[str, ...]:
        """How conversations are read, in lines for a user: template, layer, pooling, oddities, ``pair`` as written."""
        kind = self._renderer.kind
        layer = "the embedding" if spec.layer == 0 else f"layer {spec.layer} of {self.n_layers}"
        lines = [f"reads: {kind} template, {layer}, pooling {spec.pooling}", *self._notes, *self._renderer.notes]
        if pair is not None:
            row = self.render(pair.prompt, pair.chosen, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
            prompt, reply = (
                str(self.tokenizer.decode(tokens, skip_special_tokens=False))
                for tokens in (row.tokens[: row.start], row.tokens[row.start : row.stop])
            )
            lines.append(f"example: {_short(prompt, 300)!r} | {_short(reply, 120)!r}")
        return tuple(lines)

    def refusal(self, pair: Pair) -> str:
        """Why the chat template does not take this pair; empty if it does."""
        return self._renderer.refusal_of(pair)

    def specials(self, text: str) -> list[str]:
        """The model's special tokens that are written out in a text."""
        return self._renderer.specials(text)

    def count_tokens(self, pair: Pair) -> int:
        """Tokens of the prompt with its longer reply, nothing cut off."""
        unbounded = 1 << 30
        rows = (self._renderer.render(pair.prompt, r, max_tokens=unbounded) for r in (pair.chosen, pair.rejected))
        return max(len(row.tokens) for row in rows)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a reply's tokens; special tokens are left out."""
        return self._renderer.decode(tokens)

    # --- hidden states -------------------------------------------------------------------------------------------

    def hidden(self, rows: Sequence[Sequence[int]], layer: int = -1, *, scored: bool = False) -> Tensor:
        """Hidden states (B, T, d) of right-padded ``rows`` in the model's dtype; what stands at padding is arbitrary.

        Layers above ``layer`` and the LM head are not computed. ``scored`` states are float32 and have one column more:
        the score that the token's attention gives the token itself, which the pooling ``attn`` needs.
        """
        return self.read(rows, (layer,), scored=scored).states[0]

    def read(
        self,
        rows: Sequence[Sequence[int]],
        layers: Sequence[int],
        *,
        to_end: bool = False,
        keep: bool = False,
        scored: bool = False,
    ) -> Reading:
        """Hidden states of right-padded ``rows`` at each of ``layers`` (and at the end), from one forward pass.

        Those of ``layers`` as :meth:`hidden` gives them if ``scored``. With ``keep``, which needs :attr:`shares`, rows
        that begin alike can branch off what was read.
        """
        if keep and not self.shares:
            raise BackboneError(f"Rows of {self.name} cannot share what they begin with: {self._obstacle}.")
        places = [self._place(layer, scored) for layer in layers]
        return Reading(self._network, rows, places, to_end=to_end, keep=keep)

    @property
    def shares(self) -> bool:
        """Whether rows that begin alike can share the forward pass of their beginning: the model follows masks."""
        return not self._obstacle

    def log_likelihood(self, final: Tensor, tokens: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Log-probability (B,) of tokens start <= t < stop of each row of ``tokens`` (B, T), given ``final`` (B, T, d).

        Sums in float64 of next-token log-probabilities at temperature 1; ``start`` is at least 1 wherever a token is
        counted, for a row's first token has none. Raises :class:`BackboneError` without a language-model head.
        """
        self.require_head("Log-probabilities")
        at = torch.arange(tokens.shape[1], device=self.device)
        return self._network.log_likelihood(final, tokens, (at >= start[:, None]) & (at < stop[:, None]))

    def logits(self, final: Tensor) -> Tensor:
        """Next-token logits (B, V) float32 of final hidden states (B, d), by the model's own head."""
        return self._network.logits(final.to(self.dtype))

    def require_head(self, what: str) -> None:
        """Raise :class:`BackboneError` unless the model has a language-model head, which ``what`` needs."""
        if not self.generates:
            raise BackboneError(
                f"{what} need a language-model head, and {self.name} only makes features. "
                "Use a decoder-only model loaded with generation=True, or do without."
            )

    def start(
        self, rows: Sequence[Sequence[int]], layer: int = -1, *, tree: Tree = "auto", scored: bool = False
    ) -> Prefix:
        """Read B prompts of any lengths in one forward and keep their cache; ``scored`` as for :meth:`hidden`.

        ``tree``: peek candidates in one forward under a tree mask if the model follows such masks (``auto``), whatever
        (``always``: an error if not), or by repeating the cache (``never``).
        """
        if not self.generates:
            raise BackboneError(
                f"{self.name} only makes features. Decode with a decoder-only model loaded with generation=True."
            )
        obstacle = "not asked for" if tree == "never" else self._obstacle
        if obstacle and tree == "always":
            raise BackboneError(f"Candidates cannot share a forward: {obstacle}. Use tree='auto'.")
        note = f"Candidates are peeked with a copy of the cache each: {obstacle}." if obstacle else ""
        return Prefix(self._network, rows, self._place(layer, scored), tree=not obstacle, note=note)

    @cached_property
    def _obstacle(self) -> str:
        return tree_obstacle(self._network)


def _short(text: str, longest: int) -> str:
    """Both ends of a text."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def _about(spec: FeatureSpec) -> str:
    return f"weights {spec.weights[:12]}, template {spec.template}, max_tokens {spec.max_tokens}"
