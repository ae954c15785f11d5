"""Load a model folder or hub model: its checkpoint checked, an adapter put in, its tokenizer read, its parts joined."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coala.backbone.adapters import apply, check_base, find_adapter
from coala.backbone.checks import check_cache, check_states
from coala.backbone.files import check_files, find, weights_digest
from coala.backbone.model import LanguageModel
from coala.backbone.network import BackboneError, Network
from coala.backbone.placement import Limits, Placement, place
from coala.backbone.template import Renderer


def load_backbone(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    template: str = "auto",
    trust_remote_code: bool = False,
    generation: bool = True,
    adapter: str | Path | None = None,
    quantise: str | None = None,
    max_memory: Limits | None = None,
) -> LanguageModel:
    """Load a frozen model from a folder, or by its hub name at ``revision``.

    Decoder-only models and encoders (for features only) are supported. ``device``: ``auto``, ``cpu``, ``cuda``, ...,
    or ``offload``, which fills the first GPU, then memory, then reads from disk whatever is left (by accelerate; slow,
    for models larger than the card; ``max_memory`` limits each, as in ``{0: "20GiB", "cpu": "60GiB"}``). ``dtype``:
    ``auto`` (float32 on a CPU, bfloat16 on a GPU), ``float32``, ``bfloat16`` or ``float16``. ``template``: ``auto``
    (``chat`` if the tokenizer has a chat template, else ``dialogue``; ``continuation`` for encoders).
    ``generation=False`` does without a language-model head: features only.

    ``adapter``: folder or hub name of an adapter that peft saved, merged into the weights; a tokenizer saved with it
    is used. ``quantise``: ``8bit`` or ``4bit`` (by bitsandbytes; an adapter then stays beside the weights). In 8 bits
    the columns kept in full depend on the whole batch, and so do hidden states, within the error of quantising; in 4
    bits they do not. Both enter the digest of the weights: features of base, adapted and quantised model differ.

    Raises :class:`BackboneError` for anything that would make hidden states other than those of the trained model,
    for pickled weights, and for a package that is missing.
    """
    folder, name, commit = find(str(model), revision)
    stored = check_files(folder)
    placement = place(device, dtype, quantise, max_memory)
    adapted = None if adapter is None else find_adapter(str(adapter))
    if adapted and placement.device is None:
        raise BackboneError(
            f"{adapted.name}: an adapter cannot be put into weights spread over memory and disk (device={device!r}). "
            "Merge it and save the whole: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)."
        )
    refuse_foreign_code(stored, name, trust_remote_code)
    weights = weights_digest(folder)
    if adapted:
        check_base(adapted, name, commit, weights)
    with quiet():
        loaded, encoder = _load(folder, name, placement, trust_remote_code=trust_remote_code, headless=not generation)
        if adapted:
            loaded = apply(loaded, adapted, name, merge=not getattr(loaded, "is_quantized", False))
        own_tokenizer = adapted is not None and adapted.has_tokenizer
        tokenizer = load_tokenizer(adapted.folder if adapted and own_tokenizer else folder, name, trust_remote_code)
        network = _network(placement.settle(loaded), name, encoder)
        generates = generation and not encoder
        if generates:
            network.check_head()
            check_cache(network)
        renderer = Renderer(tokenizer, template, stop_tokens=_stop_tokens(loaded, tokenizer), encoder=encoder)
    changes = [f"adapter {adapted.digest}"] if adapted else []
    changes += [f"quantised to {quantise}"] if quantise else []
    if changes:
        weights = hashlib.sha256("\n".join([weights, *changes]).encode()).hexdigest()
    name = f"{name}+{adapted.name}" if adapted else name
    return LanguageModel(network, renderer, name=name, revision=commit, weights=weights, generates=generates)


# --- what it is --------------------------------------------------------------------------------------------------


def _load(
    folder: Path, name: str, placement: Placement, *, trust_remote_code: bool, headless: bool
) -> tuple[Any, bool]:
    """The model and whether it is an encoder; refused unless every weight that is used was in the checkpoint."""
    from transformers import AutoModel, AutoModelForCausalLM

    config, encoder = read_config(folder, name, trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True, "config": config}
    options |= {"use_safetensors": True, "output_loading_info": True, **placement.options()}
    options |= encoder_options(config) if encoder else {}
    try:
        model, info = _from_pretrained(AutoModel if encoder else AutoModelForCausalLM, folder, options)
    except Exception as error:
        raise BackboneError(
            f"{name}: cannot be loaded as {config.model_type} ({type(error).__name__}: {error})."
        ) from error
    unset = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    # An encoder's pooler is not read. Without generation neither is the LM head.
    unused = ("pooler.", "model.pooler.") if encoder else ("lm_head.", "embed_out.", "score.") if headless else ()
    unset = {key for key in unset if not key.startswith(unused)} if unused else unset
    if unset or info["error_msgs"]:
        shown = ", ".join(sorted(unset)[:5]) + (", ..." if len(unset) > 5 else "")
        raise BackboneError(
            f"{name}: {len(unset)} weight(s) of {type(model).__name__} are not in the checkpoint or have another shape "
            f"({shown or info['error_msgs']}) and would be random. Save the model again with save_pretrained() "
            "from the class it was trained as"
            + (", or pass generation=False for features only." if "lm_head.weight" in unset else ".")
        )
    return model, encoder


def _from_pretrained(kind: Any, folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # Flash kernels refuse the tree mask; eager is there for the few models without the fused kernel.
    try:
        model, info = kind.from_pretrained(folder, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model, info = kind.from_pretrained(folder, attn_implementation="eager", **options)
    return model, info


def _network(model: Any, name: str, encoder: bool) -> Network:
    """The network of a loaded model, seen to make one state per token that no padding changes."""
    try:
        network = Network(model.eval().requires_grad_(False), encoder=encoder)
        check_states(network)
    except BackboneError:
        raise
    except Exception as error:  # whatever a foreign model's forward raises
        raise BackboneError(
            f"{name}: {type(model).__name__} cannot be read ({type(error).__name__}: {error}); expected a transformer "
            "with one stack of layers over token embeddings. Use another model."
        ) from error
    return network


def read_config(where: Path, name: str, trust_remote_code: bool = False) -> tuple[Any, bool]:
    """The configuration in a folder or config.json, and whether it is an encoder's."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise BackboneError(f"{name}: transformers cannot read its config.json: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(
            f"{name}: is an encoder-decoder ({config.model_type}); expected a decoder-only model or an encoder."
        )
    return config, _is_encoder(config)


def encoder_options(config: Any) -> dict[str, Any]:
    """What to build an encoder with: without the pooler, which is not read and often not in the checkpoint."""
    from transformers import MODEL_MAPPING

    kind: Any = MODEL_MAPPING.get(type(config), None)
    takes = isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if takes else {}


def refuse_foreign_code(stored: dict[str, Any], name: str, trust_remote_code: bool = False) -> None:
    """Refuse a configuration whose model is Python code beside its weights, unless that code is trusted."""
    from transformers import CONFIG_MAPPING

    if stored.get("auto_map") and not trust_remote_code and stored["model_type"] not in CONFIG_MAPPING:
        raise BackboneError(
            f"{name}: needs Python code of its own ({', '.join(sorted(stored['auto_map']))}). "
            "Read that code; then pass trust_remote_code=True, or use a model that transformers knows."
        )


def _is_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in getattr(config, "architectures", None) or ())
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder; :class:`BackboneError`, which calls the model ``name``, if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise BackboneError(
            f"{name}: its tokenizer cannot be loaded ({type(error).__name__}: {error}). Save it beside the weights "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        ) from error


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    found: set[int] = set()
    for ids in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or load reports: what matters is checked and raised. The caller's settings are put back."""
    from transformers import utils

    logging: Any = utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
