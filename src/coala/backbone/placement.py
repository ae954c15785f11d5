"""Where a model runs and in which numbers: device, dtype, quantised weights, and spreading over memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch

from coala.backbone.blocked import block
from coala.backbone.network import BackboneError
from coala.backbone.packed import check_kernel, pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = ("8bit", "4bit")
# Not an option of its own: wherever a device can be named, in a recipe or on the command line, this can.
OFFLOAD = "offload"
MemoryLimits = Mapping[int | str, int | str]


@dataclass(frozen=True)
class Placement:
    """``device`` is ``None`` if accelerate spreads the model; ``quantise`` is ``""`` or one of ``QUANTISED``.

    ``scratch`` is a folder for weights on disk that cannot be read from the checkpoint as they are (experts, which a
    model stacks); it goes with the model.
    """

    device: torch.device | None
    dtype: torch.dtype
    quantise: str = ""
    limits: MemoryLimits | None = None
    scratch: TemporaryDirectory[str] | None = None

    @property
    def packs(self) -> bool:
        """Whether the weights, once read, are packed for torch's own kernel: 8 bits on a CPU."""
        return self.quantise == "8bit" and self.device is not None and self.device.type == "cpu"

    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told."""
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.device is None:
            options |= {"device_map": "auto", "max_memory": dict(self.limits or _one_card())}
            options |= {"offload_folder": self.scratch.name if self.scratch else None}
        elif self.quantise and not self.packs:
            # Weights are quantised as they are read, so they have to be where they will stay.
            options["device_map"] = {"": self.device}
        if self.quantise and not self.packs:
            options["quantization_config"] = _quantisation(self.quantise, self.dtype)
        return options

    def settle(self, model: Any) -> Any:
        """The loaded model on its device; what accelerate placed stays where it is."""
        if self.scratch is not None:
            model.offload_scratch = self.scratch
        if self.packs:
            return pack(model)
        placed = self.device is None or self.quantise or getattr(model, "is_quantized", False)
        return model if placed else block(model.to(self.device))


def place(device: str, dtype: str, quantise: str | None, limits: MemoryLimits | None) -> Placement:
    """The placement of these options; raises :class:`BackboneError` for what this machine cannot do."""
    if limits is not None and device != OFFLOAD:
        raise BackboneError(f"max_memory limits device={OFFLOAD!r}; found device={device!r}. Leave it out.")
    if limits is not None and not {*limits} <= {0, "cpu"}:
        raise BackboneError(
            f"max_memory names {', '.join(map(str, limits))}; expected 0 (the first GPU) and 'cpu' only."
        )
    if device == OFFLOAD:
        _need("accelerate", f"device={OFFLOAD!r}")
    where = None if device == OFFLOAD else _device(device)
    numbers = _dtype(dtype, where)
    if quantise and quantise not in QUANTISED:
        raise BackboneError(
            f"quantise={quantise!r}; expected {' or '.join(QUANTISED)}, or None for all of the weights."
        )
    if quantise and where is None:
        raise BackboneError(
            f"quantise={quantise!r} with device={OFFLOAD!r}: quantised weights stay on one device. "
            "Use one of the two; 4 bits take about an eighth of the memory of float32."
        )
    scratch = TemporaryDirectory(prefix="coala-offload-") if where is None else None
    found = Placement(where, numbers, quantise or "", limits, scratch)
    if found.packs:
        check_kernel()
    elif quantise:
        for package in ("bitsandbytes", "accelerate"):
            _need(package, f"quantise={quantise!r}")
    return found


def _one_card() -> MemoryLimits:
    """What is free on the first GPU and in memory: a second one would leave hidden states on two devices."""
    free = import_module("accelerate.utils").get_max_memory()
    return {where: room for where, room in free.items() if where in (0, "cpu")}


def _need(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise BackboneError(f"{what} needs the package {package}, which is not installed: pip install {package}")


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda") or (where.type == "cpu" and where.index not in (None, 0)):
        raise BackboneError(
            f"Device {device!r} is not supported; expected auto, cpu, cuda, cuda:0, ... or {OFFLOAD}. Fix: use one of "
            "them, such as device='cpu'."
        )
    if where.type == "cuda" and (not torch.cuda.is_available() or (where.index or 0) >= torch.cuda.device_count()):
        raise BackboneError(f"Device {device!r}: torch finds {torch.cuda.device_count()} GPU(s). Use device='cpu'.")
    return where


def _dtype(dtype: str, where: torch.device | None) -> torch.dtype:
    if dtype == "auto":
        on_cpu = not torch.cuda.is_available() if where is None else where.type == "cpu"
        return torch.float32 if on_cpu else torch.bfloat16
    if dtype not in DTYPES:
        raise BackboneError(f"dtype {dtype!r}; expected auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _quantisation(quantise: str, dtype: torch.dtype) -> Any:
    import transformers

    settings: Any = transformers.BitsAndBytesConfig
    if quantise == "8bit":
        return settings(load_in_8bit=True)
    # Quantiles of a normal distribution lose less than evenly spaced values; sums are made in the model's own dtype.
    return settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
