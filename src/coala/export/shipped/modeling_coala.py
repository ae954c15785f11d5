"""A frozen language model with a convex preference head: one score per prompt and reply, higher is preferred.

The score of pooled hidden states h, with x = (h, 1):

    score(h) = linear . x + sum_i 1(gates_i . z >= 0) weights_i . x

with z = x if the gates act on the reply, z = (p, 1) for the pooled states p of the prompt alone if on the prompt.
P(first reply is preferred) = sigmoid((score of the first - score of the second) / config.preference_temperature).

Inputs come from ``tokenization_coala.py`` beside this file: ``token_type_ids`` are 1 at the reply's tokens. Rows may be
padded on either side. This file needs torch and transformers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class CoalaRewardConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """``backbone``: the settings of the inner model; ``layer``: which of its hidden states is read (0, the embedding).

    ``layer`` beyond the folder's layers (``reads_final``) is the final, normalised state. ``tail`` counts the tokens
    that a tokenizer puts behind the reply. ``coala`` tells where all of it came from.
    """

    model_type = "coala_reward"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        backbone_options: dict[str, Any] | None = None,
        layer: int = 0,
        reads_final: bool = True,
        causal: bool = True,
        tail: int = 0,
        pooling: str = "mean",
        gate_on: str = "reply",
        width: int = 0,
        n_neurons: int = 0,
        preference_temperature: float = 1.0,
        coala: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.backbone_options = backbone_options or {}
        self.layer, self.reads_final, self.causal, self.tail = layer, reads_final, causal, tail
        self.pooling, self.gate_on = pooling, gate_on
        self.width, self.n_neurons, self.preference_temperature = width, n_neurons, preference_temperature
        self.coala = coala or {}
        kwargs.setdefault("num_labels", 1)
        # Pipelines then return the score itself, not its sigmoid.
        kwargs.setdefault("problem_type", "regression")
        super().__init__(**kwargs)


class ConvexHead(nn.Module):
    """Gates and weights (m, d + 1) and the linear block (d + 1,), always in float32."""

    def __init__(self, width: int, n_neurons: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(n_neurons, width + 1, dtype=torch.float32))
        self.weights = nn.Parameter(torch.zeros(n_neurons, width + 1, dtype=torch.float32))
        self.linear = nn.Parameter(torch.zeros(width + 1, dtype=torch.float32))

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """Scores (B,) of features h (B, d) with gates on z (B, d)."""
        gates, weights, linear = self.gates.float(), self.weights.float(), self.linear.float()
        score = h @ linear[:-1] + linear[-1]
        if len(gates):
            is_open = z @ gates[:, :-1].T + gates[:, -1] >= 0
            values = h @ weights[:, :-1].T + weights[:, -1]
            score = score + torch.where(is_open, values, 0.0).sum(-1)
        return score


class CoalaRewardModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """``model(**tokenizer(...)).logits`` is (B, 1): the scores."""

    config_class = CoalaRewardConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _keep_in_fp32_modules = ["head"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["head"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: CoalaRewardConfig) -> None:
        super().__init__(config)
        self.num_labels = 1
        settings = dict(config.backbone)
        inner = AutoConfig.for_model(settings.pop("model_type"), **settings)
        made: Any = AutoModel
        self.backbone = made.from_config(inner, **config.backbone_options)
        self.head = ConvexHead(config.width, config.n_neurons)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing here is ever trained from scratch."""

    def get_input_embeddings(self) -> Any:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Scores of B rows (B, T); ``prompt_ids`` (B, T') are the prompts alone, where gates act on them."""
        if input_ids is None:
            raise ValueError("A reward needs input_ids; make them with the tokenizer of this folder.")
        config = self.config
        gated = config.gate_on == "prompt" and config.n_neurons > 0
        if token_type_ids is None and (config.pooling == "mean" or gated):
            raise ValueError(
                "token_type_ids are missing: they mark where the reply starts. Use this folder's tokenizer."
            )
        tokens, length = _begin_at_zero(input_ids, attention_mask)
        stop = length - config.tail
        start = torch.zeros_like(stop)
        if token_type_ids is not None:
            start = stop - token_type_ids.masked_fill(~_mask(input_ids, attention_mask), 0).sum(1)
        hidden = self._hidden(tokens, length)
        h = z = _pool(hidden, start, stop, config.pooling)
        if gated:
            if prompt_ids is None:
                raise ValueError("prompt_ids are missing: the gates act on the prompt. Use this folder's tokenizer.")
            prompt, prompt_length = _begin_at_zero(prompt_ids, prompt_mask)
            # What a causal model makes of a prompt does not depend on the reply, unless truncation cut the prompt.
            if not (config.causal and bool((prompt_length == start).all())):
                hidden = self._hidden(prompt, prompt_length)
            end = prompt_length - config.tail
            z = _pool(hidden, torch.zeros_like(end), end, config.pooling)
        logits = self.head(h, z)[:, None]
        loss = None if labels is None else nn.functional.mse_loss(logits[:, 0], labels.reshape(-1).to(logits.dtype))
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _hidden(self, tokens: Tensor, length: Tensor) -> Any:
        """Hidden states (B, T, d) at the head's layer of right-padded ``tokens``; arbitrary at padding."""
        arguments: dict[str, Any] = {"input_ids": tokens}
        if self.config.causal:
            # No token sees the padding behind it, so that no mask is needed.
            arguments |= {"attention_mask": None, "use_cache": False}
        else:
            arguments["attention_mask"] = (torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]).long()
        if self.config.reads_final:
            return self.backbone(**arguments).last_hidden_state
        caught: list[Tensor] = []
        handle = self._watch(caught)
        try:
            self.backbone(**arguments)
        finally:
            handle.remove()
        return caught[0]

    def _watch(self, caught: list[Tensor]) -> Any:
        """Catch hidden state ``layer``: what that layer reads, or what the last one here gives before any norm."""
        n_layers = self.backbone.config.num_hidden_layers
        layers = next(m for m in self.backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        layer = self.config.layer
        if layer < n_layers:
            return layers[layer].register_forward_pre_hook(before, with_kwargs=True)
        return layers[layer - 1].register_forward_hook(after)


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def _begin_at_zero(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows rolled so that padding stands on their right, and their lengths (B,)."""
    mask = _mask(input_ids, attention_mask)
    offset = mask.long().argmax(1)
    at = torch.arange(input_ids.shape[1], device=input_ids.device)
    return input_ids.gather(1, (at + offset[:, None]) % input_ids.shape[1]), mask.sum(1)


def _pool(hidden: Tensor, start: Tensor, stop: Tensor, pooling: str) -> Tensor:
    """Features (B, d) float32 of tokens start <= t < stop; of an empty reply, of the token before it."""
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), stop - 1].float()
    at = torch.arange(hidden.shape[1], device=hidden.device)
    first = torch.zeros_like(start) if pooling == "mean_all" else torch.minimum(start, stop - 1)
    inside = (at >= first[:, None]) & (at < stop[:, None])
    return torch.where(inside[..., None], hidden.float(), 0.0).sum(1) / (stop - first)[:, None]
