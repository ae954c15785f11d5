"""Find, check and load a model folder or hub model. The only module of the package that reads files or the network."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coala.backbone.model import LanguageModel
from coala.backbone.network import BackboneError, Network
from coala.backbone.template import Renderer

NEEDED = "config.json, model.safetensors (or its shards with model.safetensors.index.json) and tokenizer.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_backbone(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    template: str = "auto",
    trust_remote_code: bool = False,
    generation: bool = True,
) -> LanguageModel:
    """Load a frozen model from a folder, or by its hub name at ``revision``.

    Decoder-only models and encoders (for features only) are supported. ``device``: ``auto``, ``cpu``, ``cuda``, ...;
    ``dtype``: ``auto`` (float32 on a CPU, bfloat16 on a GPU), ``float32``, ``bfloat16`` or ``float16``. ``template``:
    ``auto`` (``chat`` if the tokenizer has a chat template, else ``dialogue``; ``continuation`` for encoders).
    ``generation=False`` does without a language-model head: features only. Raises :class:`BackboneError` for
    anything that would make hidden states other than those of the trained model, and for pickled weights.
    """
    folder, name, commit = _find(str(model), revision)
    stored = _check_files(folder)
    place = _device(device)
    precision = _dtype(dtype, place)
    if stored.get("auto_map") and not trust_remote_code and not _known(stored):
        raise BackboneError(
            f"{name}: needs Python code of its own ({', '.join(sorted(stored['auto_map']))}). "
            "Read that code; then pass trust_remote_code=True, or use a model that transformers knows."
        )
    with _quiet():
        loaded, encoder = _load(folder, name, precision, trust_remote_code=trust_remote_code, headless=not generation)
        tokenizer = _tokenizer(folder, name, trust_remote_code)
        network = Network(loaded.to(place).eval().requires_grad_(False), encoder=encoder)
        generates = generation and not encoder
        if generates:
            network.check_head()
        renderer = Renderer(tokenizer, template, stop_tokens=_stop_tokens(loaded, tokenizer), encoder=encoder)
    weights = weights_digest(folder)
    return LanguageModel(network, renderer, name=name, revision=commit, weights=weights, generates=generates)


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a folder's tensors, whatever files they are spread over.

    Of the checkpoint as stored, so that the device and dtype it is run with do not enter.
    """
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        tensors = [
            tensor for found in pool.map(_tensor_digests, sorted(folder.glob("*.safetensors"))) for tensor in found
        ]
    return hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()


def _tensor_digests(path: Path) -> list[str]:
    """One line per tensor. The file begins with the length of a JSON header; offsets count from the header's end."""
    lines = []
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, last = about["data_offsets"]
            file.seek(8 + size + first)
            digest = hashlib.sha256()
            left = last - first
            while left and (block := file.read(min(left, 1 << 22))):
                digest.update(block)
                left -= len(block)
            lines.append(f"{name} {about['dtype']} {about['shape']} {digest.hexdigest()}")
    return lines


# --- where it is -------------------------------------------------------------------------------------------------


def _find(model: str, revision: str | None) -> tuple[Path, str, str]:
    """Folder, the name to record, and the commit (empty for a folder)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision:
            raise BackboneError(f"{model}: is a folder, which has no revisions. Leave revision out.")
        return folder, model, ""
    if folder.exists():
        raise BackboneError(f"{model}: is a file; expected a folder with {NEEDED}.")
    if not _HUB_NAME.fullmatch(model):
        raise BackboneError(
            f"{model}: no such folder. Expected a folder with {NEEDED}, or a hub name like 'owner/model'."
        )
    return _download(model, revision or None)


def _download(name: str, revision: str | None) -> tuple[Path, str, str]:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client raises its own and its transport's errors alike
        reason = next(iter(str(error).splitlines()), "")
        raise BackboneError(
            f"{name}: there is no such folder here, and the hub model could not be fetched ({type(error).__name__}: "
            f"{reason}). Check the name and the network, or give a local folder with {NEEDED}."
        ) from error
    return folder, name, folder.name


def _check_files(folder: Path) -> dict[str, Any]:
    """The stored configuration of a folder that has every file it needs."""
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise BackboneError(
                f"{folder}: its weights are pickled ({', '.join(pickled)}), and loading a pickle can run any code. "
                "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
            )
        missing.append("model.safetensors")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        missing.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(_json(index).get("weight_map", {}).values())
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        what = "is not a model folder" if "config.json" in missing else "is not complete"
        raise BackboneError(f"{folder}: {what}; missing {', '.join(missing)}. A model folder has {NEEDED}.")
    config = _json(folder / "config.json")
    if "model_type" not in config:
        raise BackboneError(f"{folder}: config.json names no model_type. Save the model with save_pretrained().")
    return config


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: cannot be read as JSON ({error}). Save the model again.") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: is not a JSON object. Save the model again.")
    return content


def _known(stored: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return stored["model_type"] in CONFIG_MAPPING


# --- what it is --------------------------------------------------------------------------------------------------


def _load(folder: Path, name: str, dtype: torch.dtype, *, trust_remote_code: bool, headless: bool) -> tuple[Any, bool]:
    """The model and whether it is an encoder; refused unless every weight that is used was in the checkpoint."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except Exception as error:
        raise BackboneError(f"{name}: transformers cannot read its config.json: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(
            f"{name}: is an encoder-decoder ({config.model_type}); expected a decoder-only model or an encoder."
        )
    encoder = _is_encoder(config)
    options |= {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
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


def _is_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in getattr(config, "architectures", None) or ())
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal


def _tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
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


# --- where and how it runs ---------------------------------------------------------------------------------------


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"Device {device!r}; expected auto, cpu, cuda, cuda:0, ...") from error
    if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
        raise BackboneError(f"Device {device!r}: torch finds {torch.cuda.device_count()} GPU(s). Use device='cpu'.")
    return place


def _dtype(dtype: str, place: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if place.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise BackboneError(f"dtype {dtype!r}; expected auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


@contextmanager
def _quiet() -> Iterator[None]:
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
