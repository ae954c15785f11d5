"""An adapter merged into an ordinary checkpoint: the tensors it changes, every other one byte for byte the base's.

Of adapters that distillation trains, and of any LoRA that peft saved: those of the baselines too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coala.backbone.adapters import find_adapter
from coala.backbone.checkpoint import weight_files
from coala.backbone.files import find
from coala.backbone.gguf import is_gguf
from coala.export.network import ExportError
from coala.export.policy_card import checked, merged_card
from coala.export.reading_back import PROBES, compare, next_log_probs, plain_model
from coala.export.writing import older_names, settle, written_whole
from coala.store import load_json, save_json, write_atomic

# What of a base folder is no part of the model: weights are written anew, cards are of the base.
_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md", ".h5", ".msgpack", ".onnx")


def merge_into(
    work: Path,
    adapter: Path | str,
    *,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
) -> float:
    """Write the base of ``adapter`` with it merged into the folder ``work``; the largest difference of log p.

    ``base`` is the name that the adapter gives unless it is told. Each tensor that changes is W + the adapter's product
    in float32, rounded to the dtype it is stored in. A base in GGUF is dequantised to float32 first. Raises
    ``ExportError`` for adapters other than plain LoRA, for checkpoints that name their tensors otherwise than the model
    does, and where plain transformers does not give peft's probabilities when it reads the folder back.
    """
    found = find_adapter(str(adapter), download=download)
    if found.has_tokenizer:
        raise ExportError(f"{found.name}: has its own tokenizer; expected its base's. Fix: merge it with peft.")
    name = base or str(found.settings.get("base_model_name_or_path") or "")
    place = find(name, revision, download=download)[0]
    if is_gguf(place):
        _dequantised(name, work)
        place = work
    else:
        _copy_rest(place, work)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    model = plain_model(place, _dtype_of(place), found.folder, **options)
    dtype = next(model.parameters()).dtype
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = [row[:longest] for row in _rows(place)]
    wanted = next_log_probs(model, rows)
    changes = _changes(model, found.name)
    prefix = str(getattr(model.get_base_model(), "base_model_prefix", ""))
    del model
    _write(place, work, changes, prefix, name)
    return compare(name, wanted, next_log_probs(plain_model(work, dtype, **options), rows), dtype)


@dataclass(frozen=True)
class ExportedMerge:
    """``folder`` with its bytes; ``difference`` is the largest that was found to peft's log-probabilities."""

    folder: Path
    n_bytes: int
    difference: float

    def summary_rows(self) -> list[list[str]]:
        """What a table says of it."""
        return [
            ["folder", str(self.folder)],
            ["size", f"{self.n_bytes / 1e6:.1f} MB"],
            ["read back", checked(len(PROBES), self.difference)],
        ]


def export_merged(
    adapter: Path | str,
    folder: Path | str,
    *,
    base: str | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
) -> ExportedMerge:
    """:func:`merge_into` a new ``folder``, with a card."""
    found = find_adapter(str(adapter), download=download)
    with written_whole(Path(folder)) as work:
        difference = merge_into(work, adapter, base=base, trust_remote_code=trust_remote_code, download=download)
        name = base or str(found.settings["base_model_name_or_path"])
        text = merged_card(name, found.folder, int(found.settings["r"]), checked(len(PROBES), difference))
        write_atomic(work / "README.md", text)
        settle(work)
        work.rename(folder)
    n_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return ExportedMerge(Path(folder), n_bytes, difference)


@dataclass(frozen=True)
class _Product:
    """What an adapter adds to a matrix: scaling B A, or its transpose where the model stores its matrices so."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """W plus the product, in float32, rounded once to the dtype of W."""
        product = self.scaling * (self.b.float() @ self.a.float())
        return (weight.float() + (product.T if self.transposed else product)).to(weight.dtype).contiguous()


def _changes(model: Any, name: str) -> dict[str, _Product]:
    """What the adapter adds to each tensor, by the tensor's name in the model."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found: dict[str, _Product] = {}
    for place, module in model.get_base_model().named_modules():
        plain = isinstance(module, Linear)
        if isinstance(module, ModulesToSaveWrapper) or (isinstance(module, BaseTunerLayer) and not plain):
            raise ExportError(
                f"{name}: is more than a LoRA of linear layers ({type(module).__name__} at {place}); expected one. "
                "Fix: merge it with peft, merge_and_unload()."
            )
        if not plain:
            continue
        if getattr(module, "lora_variant", None) or any(getattr(module, "use_dora", {}).values()):
            raise ExportError(f"{name}: scales what it changes (DoRA or its kin); expected plain LoRA. Fix: use peft.")
        if any(getattr(module, "lora_bias", {}).values()):
            raise ExportError(f"{name}: changes biases too; expected weights alone. Fix: merge it with peft.")
        (one,) = module.active_adapters
        a, b = (getattr(module, part)[one].weight.detach().clone() for part in ("lora_A", "lora_B"))
        found[f"{place}.weight"] = _Product(a, b, float(module.scaling[one]), bool(module.fan_in_fan_out))
    if not found:
        raise ExportError(f"{name}: changes no linear layer of its base. Fix: give the model that it was trained on.")
    return found


def _write(place: Path, work: Path, changes: Mapping[str, _Product], prefix: str, name: str) -> None:
    """The weight files of ``place`` in ``work``, the named tensors changed; the others are compared byte for byte."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    left = set(changes)
    for file in weight_files(place):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors, new = load_file(file), {}
        for stored, tensor in tensors.items():
            known = next((one for one in (stored, f"{prefix}.{stored}") if one in left), None)
            if known is None:
                new[stored] = tensor
                continue
            if tuple(tensor.shape) != changes[known].shape or not tensor.is_floating_point():
                raise ExportError(
                    f"{name}: stores {stored} as {tensor.dtype} of shape {tuple(tensor.shape)}; expected plain numbers "
                    f"of shape {changes[known].shape}. Fix: merge into weights that are not quantised."
                )
            left.discard(known)
            new[stored] = changes[known].added_to(tensor)
        made = work / f"{file.name}.new"
        save_file(new, made, metadata=metadata or {"format": "pt"})
        again = load_file(made)
        for stored, tensor in tensors.items():
            if new[stored] is tensor and not _same_bytes(tensor, again[stored]):
                raise ExportError(f"{name}: the tensor {stored} could not be copied. Fix: run it again.")
        made.replace(work / file.name)
    if left:
        shown = ", ".join(sorted(left)[:3])
        raise ExportError(
            f"{name}: {len(left)} tensor(s) that the adapter changes have other names in its files ({shown}). Fix: "
            "save the model again with save_pretrained(), or merge with peft."
        )


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def _copy_rest(place: Path, work: Path) -> None:
    for file in sorted(place.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix not in _LEFT:
            shutil.copyfile(file, work / file.name)


def _dequantised(name: str, work: Path) -> None:
    from coala.backbone import load_backbone
    from coala.backbone.silence import quiet

    loaded = load_backbone(name, device="cpu", dtype="float32", download=False)
    with quiet():
        loaded.transformer.save_pretrained(work)
        loaded.tokenizer.save_pretrained(work)
    config = load_json(work / "config.json")
    save_json(work / "config.json", config | older_names(config))


def _dtype_of(place: Path) -> torch.dtype:
    """That of the stored weights."""
    from safetensors import safe_open

    with safe_open(weight_files(place)[0], framework="pt") as opened:
        kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 (no mapping)
    return torch.bfloat16 if "BF16" in kinds else torch.float16 if "F16" in kinds else torch.float32


def _rows(place: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
    return [tokenizer(text)["input_ids"] for text in PROBES]
