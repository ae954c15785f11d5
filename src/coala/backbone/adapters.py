"""Adapters of a model's weights (LoRA and its kin) as peft saves them: find, check, put into the model, digest."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coala.backbone.checkpoint import read_json, weights_digest
from coala.backbone.files import find, has_tokenizer
from coala.backbone.kinds import brief
from coala.backbone.network import BackboneError

NEEDED = "adapter_config.json and adapter_model.safetensors"
# These say where an adapter came from, not what it computes.
_PROVENANCE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"}
# These make peft import, load or fetch what they name.
_REACHING = {
    "megatron_config": "imports modules by their names",
    "adapters": "loads other adapters by their names",
}
_SETS = ("target_modules", "modules_to_save", "exclude_modules")


@dataclass(frozen=True)
class Adapter:
    """An adapter's ``folder``, the ``name`` it was asked for by, and its ``settings`` as stored."""

    folder: Path
    name: str
    settings: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over its tensors and everything that decides what they compute (rank, scale, where they act)."""
        acting = {key: value for key, value in self.settings.items() if key not in _PROVENANCE}
        for key in _SETS:
            if isinstance(acting.get(key), list):  # peft keeps sets, whose order changes with every save
                acting[key] = sorted(acting[key])
        return hashlib.sha256(
            f"{weights_digest(self.folder)}\n{json.dumps(acting, sort_keys=True)}".encode()
        ).hexdigest()

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer(self.folder)


def find_adapter(adapter: str, *, download: bool = True) -> Adapter:
    """The adapter in a folder or of a hub name; refused if its weights are pickled or it is no adapter of weights."""
    if find_spec("peft") is None:
        raise BackboneError(
            "An adapter needs the package peft, which is not installed: pip install 'coala-align[adapters]'"
        )
    folder, name, _ = find(adapter, None, needed=NEEDED, download=download)
    missing = [file for file in NEEDED.split(" and ") if not (folder / file).is_file()]
    if "adapter_model.safetensors" in missing and (folder / "adapter_model.bin").is_file():
        raise BackboneError(
            f"{folder}: its weights are pickled (adapter_model.bin), and loading a pickle can run any code. Convert "
            "them where you trust them: PeftModel.from_pretrained(model, ...).save_pretrained(...)."
        )
    if missing:
        hint = " It is a whole model: pass it as the model." if (folder / "config.json").is_file() else ""
        raise BackboneError(
            f"{folder}: is not an adapter; missing {', '.join(missing)}. An adapter has {NEEDED}.{hint}"
        )
    settings = read_json(folder / "adapter_config.json")
    for key, reason in _REACHING.items():
        if settings.get(key):
            raise BackboneError(
                f"{folder}: adapter_config.json sets {key}, which {reason}. Fix: train a LORA without it."
            )
    return Adapter(folder, name, settings)


def check_base(adapter: Adapter, name: str, commit: str, weights: str) -> None:
    """Refuse an adapter that says it was trained on weights other than those of ``name``, whose digest is ``weights``.

    Two names tell models apart only if both are hub names; a folder is compared by its weights, if it is still there.
    """
    base = adapter.settings.get("base_model_name_or_path")
    if not base or base == name:
        return
    folder = Path(base).expanduser()
    if folder.is_dir():
        other = any(folder.glob("*.safetensors")) and weights_digest(folder) != weights
    else:
        other = bool(commit) and base.count("/") == 1 and not folder.is_absolute() and base.lower() != name.lower()
    if other:
        raise BackboneError(
            f"{adapter.name}: was trained on {base}, but the model is {name}, with other weights. Fix: pass {base} as "
            f"the model, or an adapter of {name}."
        )


def apply(model: Any, adapter: Adapter, name: str, *, merge: bool) -> Any:
    """``model`` with the adapter in it: added to the weights if ``merge``, else computed beside them.

    Merged weights are rounded to the model's dtype, as weights trained without an adapter would be. Raises
    :class:`BackboneError` unless every tensor of the adapter found its place.
    """
    from peft import PeftConfig, PeftModel

    kind = adapter.settings.get("peft_type", "?")
    fits = (
        f"Fix: pass the model it was trained on ({adapter.settings.get('base_model_name_or_path') or 'it names none'})"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is checked below
            config: Any = PeftConfig.from_pretrained(str(adapter.folder))
            if config.is_prompt_learning or config.is_adaption_prompt:
                raise BackboneError(
                    f"{adapter.name}: is of kind {kind}, which puts states before the text; expected an adapter of "
                    "weights such as LORA. Fix: train one of those."
                )
            config.inference_mode = True
            wrapped = PeftModel(model, config)
            result = wrapped.load_adapter(str(adapter.folder), "default", torch_device="cpu")
    except BackboneError:
        raise
    except Exception as error:  # peft raises whatever its tuners and torch do
        raise BackboneError(f"{adapter.name}: does not fit {name} ({brief(error, 300)}). {fits}.") from error
    astray = [*result.missing_keys, *result.unexpected_keys]
    if astray:
        shown = ", ".join(sorted(astray)[:3]) + (", ..." if len(astray) > 3 else "")
        raise BackboneError(f"{adapter.name}: {len(astray)} tensor(s) do not fit {name} ({shown}). {fits}.")
    _refuse_tied(wrapped, adapter, name)
    if merge and not hasattr(wrapped.base_model, "merge_and_unload"):
        raise BackboneError(f"{adapter.name}: adapters of kind {kind} cannot be added to weights. Fix: train a LORA.")
    adapted: Any = wrapped.merge_and_unload() if merge else wrapped.get_base_model()
    return adapted.eval()


def _refuse_tied(wrapped: Any, adapter: Adapter, name: str) -> None:
    """One matrix that serves as embedding and head cannot hold an adapter of one of them."""
    model = wrapped.get_base_model()
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if tied and any(
        id(m) in ends for m in model.modules() if hasattr(m, "base_layer") or hasattr(m, "modules_to_save")
    ):
        raise BackboneError(
            f"{adapter.name}: changes the embedding or the head of {name}, which are one matrix. Fix: merge it, untie "
            "the two matrices and save the whole model."
        )
