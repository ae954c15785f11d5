"""Find a model's or adapter's folder, here or on the hub, check that its files are there, and digest its tensors.

The only module of the package that reads files or the network by itself. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from coala.backbone.network import BackboneError

NEEDED = "config.json, model.safetensors (or its shards with model.safetensors.index.json) and tokenizer.json"
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Folder, the name to record, and the commit.
Found = tuple[Path, str, str]
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")


def find(model: str, revision: str | None, *, needed: str = NEEDED, wanted: tuple[str, ...] = _WANTED) -> Found:
    """Folder, the name to record, and the commit (empty for a folder) of a model in a folder or on the hub."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision:
            raise BackboneError(f"{model}: is a folder, which has no revisions. Leave revision out.")
        return folder, model, ""
    if folder.exists():
        raise BackboneError(f"{model}: is a file; expected a folder with {needed}.")
    if not _HUB_NAME.fullmatch(model):
        raise BackboneError(
            f"{model}: no such folder. Expected a folder with {needed}, or a hub name like 'owner/model'."
        )
    return _download(model, revision or None, needed, wanted)


def _download(name: str, revision: str | None, needed: str, wanted: tuple[str, ...]) -> Found:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # the client raises its own and its transport's errors alike
        reason = next(iter(str(error).splitlines()), "")
        raise BackboneError(
            f"{name}: there is no such folder here, and the hub model could not be fetched ({type(error).__name__}: "
            f"{reason}). Check the name and the network, or give a local folder with {needed}."
        ) from error
    return folder, name, folder.name


def check_files(folder: Path) -> dict[str, Any]:
    """The stored configuration of a folder that has every file a model needs."""
    missing = []
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "the model it changes"
            raise BackboneError(f"{folder}: is an adapter of {base}. Give that as the model, and this as its adapter.")
        missing.append("config.json")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise BackboneError(
                f"{folder}: its weights are pickled ({', '.join(pickled)}), and loading a pickle can run any code. "
                "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
            )
        missing.append("model.safetensors")
    if not has_tokenizer(folder):
        missing.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json(index).get("weight_map", {}).values())
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        what = "is not a model folder" if "config.json" in missing else "is not complete"
        raise BackboneError(f"{folder}: {what}; missing {', '.join(missing)}. A model folder has {NEEDED}.")
    return check_config(folder / "config.json")


def check_config(path: Path) -> dict[str, Any]:
    """What config.json says, if it says what kind of model it is."""
    config = read_json(path)
    if "model_type" not in config:
        raise BackboneError(f"{path.parent}: config.json names no model_type. Save the model with save_pretrained().")
    return config


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: cannot be read as JSON ({error}). Save the model again.") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: is not a JSON object. Save the model again.")
    return content


# --- what the weights are ----------------------------------------------------------------------------------------


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
