"""Load a model folder, GGUF file or hub model: checkpoint checked, adapter put in, tokenizer read, parts joined."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coala.backbone.adapters import apply, check_base, find_adapter
from coala.backbone.checkpoint import kind_of, read_json, stored, weight_files
from coala.backbone.checks import check_cache, check_states, check_weights
from coala.backbone.files import check_files, find, weights_digest
from coala.backbone.gguf import dense, is_gguf, read_header, source, suggest
from coala.backbone.kinds import SUPPORTED, brief, encoder_options, read_config, refuse_foreign_code
from coala.backbone.model import LanguageModel
from coala.backbone.network import BackboneError, Network
from coala.backbone.packed import SCHEME
from coala.backbone.placement import MemoryLimits, Placement, place
from coala.backbone.silence import quiet
from coala.backbone.template import Renderer
from coala.permission import permission

# Any of them may be what breaks a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "special_tokens_map.json",
)


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
    merge: bool = True,
    quantise: str | None = None,
    max_memory: MemoryLimits | None = None,
    download: bool = True,
) -> LanguageModel:
    """Load a frozen model from a folder, a GGUF file, or by its hub name at ``revision``.

    The weights of a GGUF file are dequantised to ``dtype``; its tokenizer and chat template are the file's.

    Decoder-only models and encoders (for features only) are supported. ``device``: ``auto``, ``cpu``, ``cuda``, ...,
    or ``offload``, which fills the first GPU, then memory, then reads from disk whatever is left (by accelerate; slow,
    for models larger than the card; ``max_memory`` limits each, as in ``{0: "20GiB", "cpu": "60GiB"}``). ``dtype``:
    ``auto`` (float32 on a CPU, bfloat16 on a GPU), ``float32``, ``bfloat16`` or ``float16``. ``template``: ``auto``
    (``chat`` if the tokenizer has a chat template, else ``dialogue``; ``continuation`` for encoders).
    ``generation=False`` does without a language-model head: features only.

    ``adapter``: folder or hub name of an adapter that peft saved, merged into the weights, or with ``merge`` off
    computed beside them, so that it can be switched off; a tokenizer saved with it is used. ``quantise``: ``8bit`` or
    ``4bit``. On a CPU 8 bits are torch's own (:mod:`coala.backbone.packed`): the checkpoint, a GGUF file too, is read
    in full, an adapter merged, and each matrix packed. All else is bitsandbytes' (an adapter then stays beside the
    weights); in its 8 bits the columns kept in full depend on the whole batch, and so do hidden states, within the
    error of quantising. All of them enter the digest of the weights: features of base, adapted and quantised model
    differ.

    ``trust_remote_code``: run Python code that comes with the model, if it has any; no file can ask for that.
    ``download=False`` reads hub models from the local cache alone, for names that were found in a file.

    Raises :class:`BackboneError` for anything that would make hidden states other than those of the trained model,
    for files that are broken, for pickled weights, and for a package that is missing.
    """
    trusted = trust_remote_code or permission().code
    placement = place(device, dtype, quantise, max_memory)
    folder, name, commit = find(str(model), revision, download=download)
    config = check_files(folder)
    adapted = None if adapter is None else find_adapter(str(adapter), download=download)
    if adapted and placement.device is None:
        raise BackboneError(
            f"{adapted.name}: an adapter cannot be put into weights spread over memory and disk (device={device!r}). "
            "Merge it and save the whole: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)."
        )
    refuse_foreign_code(config, name, trusted)
    if is_gguf(folder):
        _check_gguf_options(name, placement)
    weights = weights_digest(folder)
    if adapted:
        check_base(adapted, name, commit, weights)
    with quiet(), _told(name):
        loaded, encoder = _load(folder, name, placement, trust_remote_code=trusted, headless=not generation)
        if adapted:
            loaded = apply(loaded, adapted, name, merge=merge and not getattr(loaded, "is_quantized", False))
        own_tokenizer = adapted is not None and adapted.has_tokenizer
        tokenizer = load_tokenizer(adapted.folder if adapted and own_tokenizer else folder, name, trusted)
        check_weights(loaded, name)
        loaded = placement.settle(loaded)
        network = _network(loaded, name, encoder)
        generates = generation and not encoder
        if generates:
            network.check_head()
            check_cache(network)
        renderer = Renderer(tokenizer, template, stop_tokens=_stop_tokens(loaded, tokenizer), encoder=encoder)
    changes = [f"adapter {adapted.digest}"] if adapted else []
    changes += [f"quantised to {SCHEME if placement.packs else quantise}"] if quantise else []
    if changes:
        weights = hashlib.sha256("\n".join([weights, *changes]).encode()).hexdigest()
    name = f"{name}+{adapted.name}" if adapted else name
    notes: tuple[str, ...] = ()
    if is_gguf(folder):
        numbers = str(placement.dtype).removeprefix("torch.")
        notes = (f"The weights are GGUF, {read_header(folder).quantisation}, dequantised to {numbers}.",)
    if placement.packs:
        notes += ("The weights are rounded to 8 bits with one scale per row; torch's kernel (fbgemm) multiplies them.",)
    return LanguageModel(
        network, renderer, name=name, revision=commit, weights=weights, generates=generates, notes=notes
    )


def _check_gguf_options(name: str, placement: Placement) -> None:
    foreign = placement.quantise and not placement.packs
    found = f"quantise={placement.quantise!r}" if foreign else "device='offload'"
    if foreign or placement.device is None:
        raise BackboneError(
            f"{name}: is GGUF, whose weights are dequantised onto one device; found {found}. Fix: remove that "
            "(dtype='bfloat16' halves the memory), or use the original model."
        )


def check_asked(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    quantise: str | None = None,
    layer: int | None = None,
    download: bool = True,
) -> None:
    """Raise what :func:`load_backbone` would for these settings, as far as that is known without reading weights."""
    from coala.backbone.outline import outline

    place(device, dtype, quantise, None)
    folder, name, _ = find(str(model), revision, download=download)
    refuse_foreign_code(check_files(folder), name)
    if adapter is not None:
        find_adapter(str(adapter), download=download)
    if layer is not None:
        with quiet(), _told(name):
            n_layers = outline(folder).n_layers
        if not -n_layers - 1 <= layer <= n_layers:
            raise BackboneError(f"Layer {layer}; {name} has hidden states 0 (embedding) to {n_layers} (final).")


def read_conversations(
    model: str | Path,
    *,
    revision: str | None = None,
    template: str = "auto",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    download: bool = True,
) -> Renderer:
    """How :func:`load_backbone` of the same arguments writes conversations; no weight is read."""
    trusted = trust_remote_code or permission().code
    folder, name, _ = find(str(model), revision, download=download)
    refuse_foreign_code(check_files(folder), name, trusted)
    adapted = None if adapter is None else find_adapter(str(adapter), download=download)
    with quiet(), _told(name):
        config, encoder = read_config(folder, name, trusted)
        place = adapted.folder if adapted is not None and adapted.has_tokenizer else folder
        tokenizer = load_tokenizer(place, name, trusted)
        generation = folder / "generation_config.json"
        eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
        eos = getattr(config.get_text_config(), "eos_token_id", None) if eos is None else eos
        return Renderer(tokenizer, template, stop_tokens=stop_tokens(eos, tokenizer), encoder=encoder)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever a library raises over a model's files becomes one sentence that names the model."""
    try:
        yield
    except BackboneError:
        raise
    except MemoryError as error:
        raise BackboneError(
            f"{name}: not enough memory to load it. Fix: use a smaller dtype, --quantise or --device offload."
        ) from error
    except Exception as error:
        raise BackboneError(f"{name}: cannot be used ({brief(error)}). Fix: download it again.") from error


# --- what it is --------------------------------------------------------------------------------------------------


def _load(
    folder: Path, name: str, placement: Placement, *, trust_remote_code: bool, headless: bool
) -> tuple[Any, bool]:
    """The model and whether it is an encoder; refused unless every weight that is used was in the checkpoint."""
    from transformers import AutoModel, AutoModelForCausalLM

    config, encoder = read_config(folder, name, trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "config": config, **placement.options()}
    options |= encoder_options(config) if encoder else {}
    kind = AutoModel if encoder else AutoModelForCausalLM
    _check_size(kind, config, folder, name, trust_remote_code)
    try:
        model, info = _from_pretrained(kind, folder, options)
    except ImportError as error:
        quantised = getattr(config, "quantization_config", None)
        way = (
            f"its weights are quantised ({_method(quantised)}), which needs a package that is not installed"
            if quantised
            else "a package that it needs is not installed"
        )
        raise BackboneError(f"{name}: {way} ({brief(error)}).") from error
    except Exception as error:
        raise BackboneError(
            f"{name}: cannot be loaded as {config.model_type} ({brief(error)}). Fix: download it again, or save it "
            "again with save_pretrained()."
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


def _method(quantised: Any) -> str:
    found = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    return str(getattr(found, "value", found) or "by no method that it names")[:40]


def _check_size(kind: Any, config: Any, folder: Path, name: str, trust_remote_code: bool) -> None:
    """Refuse a configuration of a far larger model than the checkpoint holds, before memory is taken for it."""
    import torch

    held = (
        read_header(folder).numbers
        if is_gguf(folder)
        else sum(math.prod(tensor.shape) for path in weight_files(folder) for tensor in stored(path))
    )
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
        described = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:
        raise BackboneError(
            f"{name}: config.json describes no model of kind {config.model_type} ({brief(error)}); expected "
            f"{SUPPORTED}. Fix: download it again."
        ) from error
    # Packed weights hold up to 16 numbers in one.
    if described > 32 * held:
        raise BackboneError(
            f"{name}: config.json describes a model of {described:,} weights, and the checkpoint holds {held:,}. "
            "These do not match. Fix: download both again."
        )


def pretrained(kind: Any, where: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """``kind.from_pretrained`` of a model folder or a GGUF file, dequantised, with what it says of the loading."""
    options = {"local_files_only": True, "output_loading_info": True, **options}
    if not is_gguf(where):
        model, info = kind.from_pretrained(where, use_safetensors=True, **options)
        return model, info
    from transformers import GgufConfig

    unpacked = {"config": read_config(where, str(where))[0], "quantization_config": GgufConfig(dequantize=True)}
    with source(where) as (folder, file):
        model, info = kind.from_pretrained(folder, **file, **unpacked | options)
    model.config.name_or_path = str(where)
    suggest(model, where)
    return dense(model), info


def _from_pretrained(kind: Any, folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # Flash kernels refuse the tree mask; eager is there for the few models without the fused kernel.
    try:
        return pretrained(kind, folder, {"attn_implementation": "sdpa", **options})
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return pretrained(kind, folder, {"attn_implementation": "eager", **options})


def _network(model: Any, name: str, encoder: bool) -> Network:
    """The network of a loaded model, seen to make one state per token that no padding changes."""
    try:
        network = Network(model.eval().requires_grad_(False), encoder=encoder)
        check_states(network)
    except BackboneError:
        raise
    except Exception as error:  # whatever a foreign model's forward raises
        raise BackboneError(
            f"{name}: {type(model).__name__} cannot be read ({brief(error)}); expected a transformer with one stack of "
            "layers over token embeddings. Fix: download config.json again, or use another model."
        ) from error
    return network


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder or GGUF file; :class:`BackboneError`, which calls the model ``name``, without."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        with source(folder) as (place, file):
            options = {"local_files_only": True, "trust_remote_code": trust_remote_code, **file}
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
        tokenizer.name_or_path = str(folder)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer_class names a {type(tokenizer).__name__}")
        if not tokenizer.encode("a", add_special_tokens=False):
            raise ValueError("it makes no token of the letter a")
        _check_added(tokenizer)
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers' library panics past Exception
        what = next((f"{file} is {what}" for file in _TOKENIZER_FILES if (what := kind_of(folder / file))), "")
        raise BackboneError(
            f"{name}: its tokenizer cannot be loaded ({what or brief(error)}). Fix: save it next to the weights with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        ) from error


def _check_added(tokenizer: Any) -> None:
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name)
        if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
            raise TypeError(f"its {name} is {found!r}")


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    return stop_tokens(getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer)


def stop_tokens(stored: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a reply: what a generation_config names, and the tokenizer's own."""
    found: set[int] = set()
    for ids in (stored, tokenizer.eos_token_id):
        several = ids if isinstance(ids, list | tuple) else () if ids is None else (ids,)
        for token in several:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise BackboneError(
                    f"The stop token is {token!r}; expected a token id. Fix: correct eos_token_id in "
                    "generation_config.json or config.json."
                )
            found.add(token)
    return frozenset(found)
