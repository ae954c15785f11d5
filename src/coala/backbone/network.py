"""A frozen transformer as this package needs it: hidden states at one layer, next-token log-probabilities, its shape.

The only module that calls a model. Knows nothing of text, tokenizers or files.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from coala.backbone.attention import overheard
from coala.backbone.shape import shape_of
from coala.costs import Shape
from coala.values import CoalaError, Float32

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class BackboneError(CoalaError):
    """A model or tokenizer that cannot be used as asked."""


class Scored(int):
    """A layer whose hidden states are asked for with their tokens' attention scores, in float32 as one column more.

    The attention is that of the layer which made these hidden states.
    """


@dataclass(frozen=True, eq=False)
class OutputChange:
    """A change of final states h before the output layer, h + strength (left (right h) + bias), float32.

    ``left`` (d, r) and ``right`` (r, d), or ``left`` (d, d) alone; ``bias`` (d,).
    """

    left: Tensor | None = None
    right: Tensor | None = None
    bias: Tensor | None = None
    strength: float = 1.0

    @classmethod
    def of(
        cls,
        left: Float32 | None = None,
        right: Float32 | None = None,
        bias: Float32 | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> OutputChange:
        """Of arrays, copied: what a solver hands out cannot be written to, which torch does not take."""
        made = [None if part is None else torch.tensor(part, device=device) for part in (left, right, bias)]
        return cls(made[0], made[1], made[2])

    def times(self, strength: float) -> OutputChange:
        return self if strength == self.strength else replace(self, strength=strength)

    def __call__(self, final: Tensor) -> Tensor:
        """Changed states (B, d) float32 of ``final`` (B, d)."""
        states = found = final.float()
        if self.left is not None:
            inner = states if self.right is None else states @ self.right.T
            found = torch.add(found, inner @ self.left.T, alpha=self.strength)
        return found if self.bias is None else torch.add(found, self.bias, alpha=self.strength)


class _Reached(Exception):
    """Thrown from inside a forward pass once the wanted hidden state is known; never leaves this module."""


# Position schemes whose frequencies depend on the longest row of a batch once it passes the trained context.
_LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic"}
# Logits computed at once: 128 MB of them in float32.
LOGITS = 1 << 25
# These build part of their attention pattern themselves, whatever mask they are given.
OWN_PATTERN = {"gpt_neo"}


class Network:
    """A loaded model: ``causal`` is the whole (``None``-headed for an encoder), ``body`` what makes hidden states."""

    def __init__(self, model: nn.Module, *, encoder: bool) -> None:
        self.causal = model
        self.encoder = encoder
        self.change: OutputChange | None = None
        self.body: nn.Module = model if encoder else _decoder(model)
        self.config = cast(Any, model).config.get_text_config(decoder=not encoder)
        self.layers = self._find_layers()
        self.n_layers = len(self.layers)
        embedding = cast(Any, model).get_input_embeddings()
        self.dtype: torch.dtype = embedding.weight.dtype
        self.device = _runs_on(embedding)
        self.arguments = set(inspect.signature(self.body.forward).parameters)
        with torch.no_grad():
            outputs = self.body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device))
        self._outputs = type(outputs)
        self._scoring: set[int] = set()
        # Not the configured width: a few models project their final states.
        self.width = int(outputs.last_hidden_state.shape[-1])
        if self.context < 2:
            raise BackboneError(
                f"{type(self.body).__name__} has a context of {self.context} tokens; expected at least 2. Fix: "
                "correct max_position_embeddings in its config.json."
            )

    def _find_layers(self) -> nn.ModuleList:
        n_layers = getattr(self.config, "num_hidden_layers", None)
        for module in self.body.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                return module
        raise BackboneError(
            f"{type(self.body).__name__} has no list of {n_layers} layers; expected a transformer with one stack of "
            "layers. Use another model."
        )

    @property
    def vocabulary(self) -> int:
        return int(cast(Any, self.causal).get_input_embeddings().num_embeddings)

    @cached_property
    def context(self) -> int:
        """Longest row in tokens."""
        config = self.config
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            # Beyond this length a row's hidden states would change with the other rows of its batch.
            longest = rope.get("original_max_position_embeddings") or longest
        if longest is None or longest == -1:
            # Alibi and recurrent models name no limit; any positive bound will do for them.
            longest = 2048
        # RoBERTa counts positions from its padding index on, so that many of them are never used.
        table = next((m for n, m in self.body.named_modules() if n.endswith("position_embeddings")), None)
        if self.encoder and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            longest -= table.padding_idx + 1
        return int(longest)

    @cached_property
    def shape(self) -> Shape:
        return shape_of(self.config, self.layers, self.width, self.vocabulary)

    @cached_property
    def windows(self) -> dict[str, int | None]:
        """Attention window by kind of layer as the model names its masks; ``None``: everything before is seen."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            return {"all": window}
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}

    @property
    def attends(self) -> bool:
        """Whether any layer looks back at single tokens; a purely recurrent model does not."""
        return not set(self.windows) <= {"linear_attention", "conv"}

    # --- forward passes ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        layers: Sequence[int],
        *,
        mask: Tensor | dict[str, Tensor] | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        to_end: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Hidden states (B, T, d) of ``tokens`` (B, T) at each of ``layers`` and at the end, in the model's dtype.

        Unless ``to_end``, nothing above the highest of ``layers`` is run, and the second value is ``None``. States of a
        :class:`Scored` layer are (B, T, d + 1).
        """
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        if not self.encoder:
            arguments["use_cache"] = cache is not None
        if positions is not None and "position_ids" in self.arguments:
            arguments["position_ids"] = positions
        if cache is not None:
            arguments[self._cache_argument] = cache
        inner = sorted({layer for layer in layers if layer < self.n_layers})
        whole = to_end or self.n_layers in layers
        scored = {layer for layer in layers if isinstance(layer, Scored)}
        with self._catch(inner, stop=not whole) as caught, self._overhear(scored) as heard:
            try:
                final = self.body(**arguments).last_hidden_state
            except _Reached:
                final = None
        found: list[Tensor] = []
        for layer in layers:
            states = final if layer == self.n_layers else caught[layer]
            found.append(self._with_scores(states, heard[layer], layer) if isinstance(layer, Scored) else states)
        return tuple(found), final if to_end else None

    @contextmanager
    def _overhear(self, layers: Iterable[int]) -> Iterator[dict[int, list[Tensor]]]:
        with ExitStack() as stack:
            # Hidden state l is what layer l - 1 makes; nothing attends to make the embedding.
            yield {
                layer: stack.enter_context(overheard(self.layers[layer - 1])) if layer > 0 else [] for layer in layers
            }

    def _with_scores(self, states: Tensor, heard: Sequence[Tensor], layer: int) -> Tensor:
        if len(heard) != 1:
            reason = (
                f"{len(heard)} calls of transformers' attention interface were heard where one was expected"
                if layer
                else "it is the embedding, which no attention made"
            )
            raise BackboneError(
                f"Hidden state {layer} of {type(self.body).__name__} has no attention scores: {reason}. "
                "Use the pooling mean, or another layer or model."
            )
        return torch.cat([states.float(), heard[0][..., None]], dim=-1)

    @contextmanager
    def _catch(self, layers: Sequence[int], *, stop: bool) -> Iterator[dict[int, Tensor]]:
        caught: dict[int, Tensor] = {}

        def hook(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught[layer] = args[0] if args else kwargs["hidden_states"]
            if stop and layer == layers[-1]:
                raise _Reached

        # Hidden state l is what layer l reads: the embedding for 0, the output of layer l - 1 otherwise.
        handles = [
            self.layers[layer].register_forward_pre_hook(partial(hook, layer), with_kwargs=True) for layer in layers
        ]
        try:
            yield caught
        finally:
            for handle in handles:
                handle.remove()

    def changed(self, change: OutputChange | None) -> Network:
        """The same network with ``change`` before its output layer, in place of any that it has."""
        found = copy(self)
        found.change = change
        return found

    @torch.no_grad()
    def logits(self, final: Tensor) -> Tensor:
        """Next-token logits (B, V) float32 of final hidden states (B, d)."""
        if self.change is not None:
            final = self.change(final).to(self.dtype)
        states = final[:, None]
        outputs = self._outputs(last_hidden_state=states)
        body = cast(Any, self.body)
        # The model's own head code runs on given states, so soft-capping and scaling are whatever the model does.
        own = vars(body).get("forward")  # accelerate puts its hooks there
        body.forward = lambda *args, **kwargs: outputs
        try:
            ids = torch.zeros(len(final), 1, dtype=torch.long, device=self.device)
            logits = cast(Any, self.causal)(input_ids=ids, use_cache=False).logits
        finally:
            del body.forward
            if own is not None:
                body.forward = own
        return cast(Tensor, logits[:, -1].float())

    def log_probs(self, final: Tensor) -> Tensor:
        """Next-token log-probabilities (B, V) float32 of final hidden states (B, d)."""
        return torch.log_softmax(self.logits(final), dim=-1)

    def log_likelihood(self, final: Tensor, tokens: Tensor, counted: Tensor) -> Tensor:
        """Sum (B,) float64 of the log-probabilities of the ``counted`` (B, T) of ``tokens`` (B, T), never a first one.

        ``final`` (B, T, d) are the final hidden states of the same forward: position t is predicted from t - 1.
        """
        rows, columns = counted.nonzero(as_tuple=True)
        found = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        # The logits of whole rows would take more memory than all the rest of a forward.
        size = max(1, LOGITS // self.vocabulary)
        for first in range(0, len(rows), size):
            at = rows[first : first + size], columns[first : first + size]
            found[at] = self.log_probs(final[at[0], at[1] - 1]).gather(1, tokens[at][:, None])[:, 0].double()
        return found.sum(1)

    def check_scores(self, layer: int) -> None:
        """Refuse a layer whose attention scores cannot be heard."""
        if layer not in self._scoring:
            self.run(torch.zeros(1, 2, dtype=torch.long, device=self.device), (Scored(layer),))
            self._scoring.add(layer)

    @property
    def _cache_argument(self) -> str:
        return "cache_params" if "cache_params" in self.arguments else "past_key_values"

    def check_head(self) -> None:
        """Refuse a model whose head cannot be run by itself."""
        tokens = torch.arange(1, 4, device=self.device)[None] % self.vocabulary
        with torch.no_grad():
            whole = cast(Any, self.causal)(input_ids=tokens, use_cache=False).logits[:, -1].float()
        (states,), _ = self.run(tokens, (self.n_layers,))
        final = states[:, -1]
        if not whole.isfinite().all():
            raise BackboneError(
                f"{type(self.causal).__name__}: the logits of its head are not finite. Check its weights: download "
                "them again, or load it with another dtype."
            )
        if not torch.allclose(self.log_probs(final), whole.log_softmax(-1), atol=1e-2, rtol=1e-2):
            raise BackboneError(
                f"{type(self.causal).__name__} computes its logits from more than its final hidden states, so it "
                "cannot be decoded from. Load it with generation=False for features only."
            )

    # --- masks ---------------------------------------------------------------------------------------------------

    def mask(self, visible: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        """The 4-D mask(s) this model reads, from ``visible`` and ``distance`` (query minus key position), (B, Q, K)."""
        masks = {kind: self._encode(visible, distance, window) for kind, window in self.windows.items()}
        if len(set(self.windows.values())) == 1:
            return next(iter(masks.values()))
        return masks

    def _encode(self, visible: Tensor, distance: Tensor, window: int | None) -> Tensor:
        seen = visible if window is None else visible & (distance < window)
        # A padding column sees itself: a row without any key is nan in some attention kernels.
        seen = (seen | (distance == 0) & ~visible.any(-1, keepdim=True))[:, None]
        if self.config._attn_implementation == "sdpa":
            return seen
        lowest = torch.finfo(self.dtype).min
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(~seen, lowest)

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Rows as one (B, T) tensor and their lengths (B,); checks what a model would answer with a device error."""
        if not rows or not all(rows):
            raise BackboneError("A row without tokens; expected at least one token in every row.")
        longest = max(map(len, rows))
        if longest > self.context:
            raise BackboneError(f"A row has {longest} tokens; the model's context holds {self.context}. Cut it.")
        if max(map(max, rows)) >= self.vocabulary:
            raise BackboneError(
                f"Token {max(map(max, rows))} is beyond the model's {self.vocabulary} embeddings: the tokenizer "
                "belongs to another model. Use the tokenizer saved with the weights."
            )
        # Any token may stand in for padding, for no mask lets it be seen; some models warn of their own pad token.
        filler = 1 if getattr(self.config, "pad_token_id", None) == 0 else 0
        blank = [[filler] * (longest - len(row)) for row in rows]
        padded = [[*b, *row] if left else [*row, *b] for row, b in zip(rows, blank, strict=True)]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return torch.tensor(padded, device=self.device), lengths


def _decoder(model: nn.Module) -> nn.Module:
    """What makes the hidden states of a model with a head."""
    body = cast(Any, model).get_decoder()
    # A few heads give themselves: their decoder stands under the usual name all the same.
    return cast(nn.Module, body if body is not model else model.model)


def _runs_on(module: Any) -> torch.device:
    """Where a module's product is made. Offloaded weights stay elsewhere until accelerate's hook fetches them."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device: Any = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return cast(torch.device, module.weight.device)
