"""The networks that exported folders hold, made from a loaded model and a head without a copy of its weights."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coala.values import CoalaError, ConvexHead, FeatureSpec

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.backbone.network import Network
    from coala.backbone.template import Renderer

# Where a model came from or how it was once run; never what it computes.
_PASSING = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map", "use_cache"),
    *("id2label", "label2id", "problem_type", "_attn_implementation", "attn_implementation"),
)


class ExportError(CoalaError):
    """A head or model that a folder of the wanted form cannot hold, or a folder that is not what was exported."""


def _network_of(backbone: LanguageModel) -> Network:
    return backbone._network


def _renderer_of(backbone: LanguageModel) -> Renderer:
    return backbone._renderer


def tokenizer_of(backbone: LanguageModel) -> Any:
    return _renderer_of(backbone).tokenizer


def rendering(backbone: LanguageModel, head: ConvexHead) -> dict[str, Any]:
    """What ``tokenization_coala.py`` needs to make the rows that the head was fitted on."""
    renderer = _renderer_of(backbone)
    tokenizer, stops = renderer.tokenizer, renderer.stop_tokens
    ends = [t for t in (tokenizer.eos_token_id, min(stops, default=None)) if t is not None]
    if head.spec.ends_with_eos and not ends:
        raise ExportError("The spec ends replies with a stop token, and this tokenizer has none.")
    odd = [] if renderer.chat is None else renderer.chat.facts
    if odd:
        raise ExportError(
            f"The chat template of {backbone.name} is written otherwise than transformers alone would "
            f"({'; '.join(odd)[:120]}), so that an exported folder would read other texts than the head was fitted on. "
            "Fix: score with it here (coala.export.RewardFunction), or fit the head with --template dialogue."
        )
    openings = [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None]
    return {
        "kind": renderer.kind,
        "before": list(renderer.before),
        "after": list(renderer.after),
        "kept": list(renderer.opening),
        "opening": openings[0] if openings else None,
        "end": ends[0] if ends else None,
        "stop_tokens": sorted(stops),
        "ends_with_eos": head.spec.ends_with_eos,
        "max_tokens": min(head.spec.max_tokens, backbone.max_tokens),
        "needs_prompt": head.needs_prompt,
        "template": head.spec.template,
    }


def reward_network(head: ConvexHead, backbone: LanguageModel, spec: FeatureSpec) -> Any:
    """The model of ``modeling_coala.py`` with the weights below the head's layer, shared with ``backbone``, and it."""
    import torch

    from coala.backbone import POOLINGS
    from coala.backbone.kinds import encoder_options
    from coala.export.shipped.modeling_coala import CoalaRewardConfig, CoalaRewardModel

    if POOLINGS[head.spec.pooling].scored:
        raise ExportError(
            f"The head pools by {head.spec.pooling!r}, which listens to one layer's attention; a folder read by "
            "transformers alone gives hidden states only. Fit the head with --pooling mean or last, or score with it "
            "here (coala.export.RewardFunction)."
        )
    network = _network_of(backbone)
    source = _source(network, backbone.name)
    options = encoder_options(source.config) if network.encoder else {}
    state = source.state_dict()
    last: Exception | None = None
    # Layers above the head's are left out; a few kinds of model cannot be built with fewer of them.
    for n_layers in sorted({max(head.spec.layer, 1), network.n_layers}):
        try:
            config = CoalaRewardConfig(
                backbone=_settings(source.config, n_layers, network.n_layers),
                backbone_options=options,
                layer=head.spec.layer,
                reads_final=head.spec.layer == network.n_layers,
                causal=not network.encoder,
                tail=len(_renderer_of(backbone).after),
                pooling=head.spec.pooling,
                gate_on=head.gate_on,
                width=head.width,
                n_neurons=head.n_neurons,
                preference_temperature=head.temperature,
                coala=asdict(spec),
                pad_token_id=tokenizer_of(backbone).pad_token_id,
            )
            with torch.device("meta"):
                made = CoalaRewardModel(config)
            wanted = made.backbone.state_dict()
            kept = {f"backbone.{name}": state[name] for name in wanted}
            break
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            last = error
    else:
        raise ExportError(
            f"{backbone.name}: {type(source).__name__} cannot be built again from its settings ({last!r}). "
            "This kind of model cannot be exported."
        )
    kept |= {f"head.{name}": torch.from_numpy(getattr(head, name)) for name in ("gates", "weights", "linear")}
    made.load_state_dict(kept, strict=True, assign=True)
    config.architectures = ["CoalaRewardModel"]
    config.auto_map = {
        "AutoConfig": "modeling_coala.CoalaRewardConfig",
        "AutoModelForSequenceClassification": "modeling_coala.CoalaRewardModel",
    }
    made.config.dtype = backbone.dtype
    return made


def linear_network(head: ConvexHead, backbone: LanguageModel) -> tuple[Any, str]:
    """A stock ``...ForSequenceClassification`` with the head as its ``score`` layer, and the padding token it needs."""
    import torch
    import transformers
    from torch import nn

    classifiers: Any = transformers.AutoModelForSequenceClassification
    network, spec = _network_of(backbone), head.spec
    whole = "Use --to reward-model, which holds any head."
    if head.n_neurons:
        raise ExportError(f"The head has {head.n_neurons} gates; a stock folder holds one linear layer. {whole}")
    if spec.pooling != "last":
        raise ExportError(f"The head pools by {spec.pooling!r}; stock classes read the last token alone. {whole}")
    if spec.layer != network.n_layers:
        raise ExportError(
            f"The head reads hidden state {spec.layer}; stock classes read the final one, {network.n_layers}. {whole}"
        )
    if head.linear[-1] != 0:
        raise ExportError(
            f"The head adds a constant, {float(head.linear[-1]):.6g}, and a stock `score` layer has none. "
            "--drop-constant leaves it out (scores shift, preferences stay), or use --to reward-model."
        )
    if network.encoder:
        raise ExportError(f"Stock classes pool encoders by layers of their own. {whole}")
    if tokenizer_of(backbone).encode("a") != [*_renderer_of(backbone).before, *_plain(backbone)] and (
        _renderer_of(backbone).kind != "chat"
    ):
        raise ExportError(f"The tokenizer appends tokens that were absent when the head was fitted. {whole}")
    source = _source(network, backbone.name)
    pad = _padding(head, backbone)
    config = copy.deepcopy(source.config)
    config.num_labels, config.problem_type = 1, "regression"
    config.pad_token_id = tokenizer_of(backbone).convert_tokens_to_ids(pad)
    config._name_or_path = ""
    try:
        with torch.device("meta"):
            made: Any = classifiers.from_config(config)
    except ValueError as error:
        raise ExportError(
            f"{backbone.name}: transformers has no sequence classifier for {config.model_type}. {whole}"
        ) from error
    layer: Any = getattr(made, "score", None)
    # One matrix and no constant.
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()} if layer is not None else {}
    if not isinstance(layer, nn.Linear) or shapes != {"weight": (1, head.width)}:
        raise ExportError(
            f"{type(made).__name__} has no `score` layer without a constant for {head.width} values. {whole}"
        )
    prefix = made.base_model_prefix
    state = {f"{prefix}.{name}": value for name, value in source.state_dict().items()}
    score = torch.from_numpy(head.linear[None, :-1].copy())
    made.load_state_dict({**state, "score.weight": score.to(backbone.dtype).cpu()}, strict=True, assign=True)
    made.config.dtype = backbone.dtype
    return made, pad


def _plain(backbone: LanguageModel) -> list[int]:
    return [int(token) for token in tokenizer_of(backbone).encode("a", add_special_tokens=False)]


def _padding(head: ConvexHead, backbone: LanguageModel) -> str:
    """A token that no reply ends with: a stock class takes the last token that is not this one for the reply's last."""
    tokenizer, stops = tokenizer_of(backbone), _renderer_of(backbone).stop_tokens
    names = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
    for name in names:
        if name is not None and not (head.spec.ends_with_eos and tokenizer.convert_tokens_to_ids(name) in stops):
            return str(name)
    raise ExportError(
        "Replies end with a stop token, and the tokenizer has no other special token to pad with: a stock class would "
        "take the stop token for padding. Use --to reward-model."
    )


def _source(network: Network, name: str) -> Any:
    """The part of the loaded model that transformers builds from its configuration alone."""
    import torch
    import transformers

    models: Any = transformers.AutoModel
    whole: Any = network.causal
    if getattr(whole, "is_quantized", False):
        raise ExportError(f"{name}: is loaded quantised, which a folder would not keep. Load it without quantise.")
    parts: tuple[Any, ...] = (network.body, whole.base_model)
    for part in parts:
        if not type(part).__module__.startswith("transformers."):
            continue
        try:
            with torch.device("meta"):
                built = models.from_config(part.config)
        except (ValueError, KeyError):
            continue
        if type(built) is type(part):
            if any(value.is_meta for value in part.state_dict().values()):
                raise ExportError(f"{name}: is spread over memory and disk. Load it on one device, such as the CPU.")
            return part
    raise ExportError(
        f"{name}: {type(network.body).__name__} is not a model that transformers builds by itself (code of its own, or "
        "a part of a larger one). Such models cannot be exported."
    )


def _settings(config: Any, n_layers: int, of: int) -> dict[str, Any]:
    """The configuration as plain data, for ``n_layers`` of its ``of`` layers."""
    config = copy.deepcopy(config)
    if n_layers < of:
        per_layer = [name for name, value in vars(config).items() if isinstance(value, list) and len(value) == of]
        for name in per_layer:
            setattr(config, name, getattr(config, name)[:n_layers])
        config.num_hidden_layers = n_layers
    settings = config.to_dict()
    return {name: value for name, value in settings.items() if name not in _PASSING}
