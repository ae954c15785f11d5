"""GGUF, one file that is a whole model: what transformers would misread is refused, the rest dequantised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coala.backbone.gguf_header import ORIGINAL, Header, is_gguf, only_gguf, read_header, stamp
from coala.backbone.network import BackboneError

__all__ = [
    "amend",
    "check_gguf",
    "dense",
    "gguf_digest",
    "is_gguf",
    "only_gguf",
    "read_header",
    "source",
    "stamp",
    "suggest",
]

# Ways to split a text that are GPT-2's, which transformers takes for every name it does not know, or differ from it in
# digits kept apart: such a vocabulary was learnt so, and has no merge over a digit.
_LIKE_GPT2 = {
    *("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "jina-v2-code", "mellum"),
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
# The rotary scaling of Llama 3.1 and later, which a file tells by its effect on each frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def check_gguf(path: Path) -> Header:
    """The header of a file that transformers reads as what it is; :class:`BackboneError`, in one sentence, else."""
    header = read_header(path)
    about = header.metadata
    kind = about.get("general.type", "model")
    if kind == "mmproj" or header.architecture == "clip":
        raise BackboneError(
            f"{path}: is a multimodal projector (mmproj), which turns pictures into states; expected a language "
            "model. Fix: pass the language model's own file, which is next to it."
        )
    parts = about.get("split.count", 1)
    if parts != 1:
        raise BackboneError(
            f"{path}: is one of {parts} files that the model is split into; expected one whole file. Fix: join them: "
            f"llama-gguf-split --merge {path.name} WHOLE.gguf"
        )
    if kind != "model" or not header.tensors:
        what = "a vocabulary without weights" if kind == "model" else f"of the type {str(kind)[:20]!r}"
        raise BackboneError(f"{path}: is {what}; expected a model. Fix: pass the model's own file.")
    _check_architecture(path, header)
    _check_types(path, header)
    _check_tokenizer(path, header)
    _check_rope(path, header)
    return header


def _check_architecture(path: Path, header: Header) -> None:
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # llama.cpp's spelling of those that transformers renames.
    renamed = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
    known = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS, *renamed} - {"general", "tokenizer", "t5", "umt5"}
    found = header.architecture
    # 0 is none; other ways of pooling belong to models that embed texts.
    if header.of("pooling_type") or header.of("attention.causal") is False:
        raise BackboneError(
            f"{path}: is a model that embeds texts ({found[:40]}); expected a language model, which writes them. "
            f"{ORIGINAL}"
        )
    if found not in known or found in renamed.values():
        shown = ", ".join(sorted(known - {*renamed.values()}))
        raise BackboneError(
            f"{path}: has the architecture {found[:40]!r}; expected one that transformers reads from GGUF ({shown}). "
            f"{ORIGINAL}"
        )


def _check_types(path: Path, header: Header) -> None:
    import gguf
    import numpy as np

    for kind in sorted({tensor.kind for tensor in header.tensors}):
        member = gguf.GGMLQuantizationType[kind]
        _, size = gguf.GGML_QUANT_SIZES[member]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), member)
        except (NotImplementedError, ValueError):
            raise BackboneError(
                f"{path}: holds weights quantised as {kind}; expected a type that the package gguf dequantises (F32, "
                "F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ...). Fix: update gguf, or use another quantisation of it."
            ) from None


def _check_tokenizer(path: Path, header: Header) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, GGUF_TOKENIZER_TYPES

    kind, split = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre")
    if kind not in GGUF_TOKENIZER_TYPES or not header.metadata.get("tokenizer.ggml.tokens"):
        found = "no tokenizer" if kind is None else f"a tokenizer of the kind {str(kind)[:20]!r}"
        raise BackboneError(
            f"{path}: has {found}; expected one that transformers makes from GGUF "
            f"({', '.join(sorted(GGUF_TOKENIZER_TYPES))}). {ORIGINAL}"
        )
    if kind == "gpt2" and split is not None and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *_LIKE_GPT2}:
        raise BackboneError(
            f"{path}: splits texts the way {str(split)[:30]!r}, which transformers does differently; expected one it "
            f"supports in GGUF (llama-bpe, qwen2, tekken, gpt-2, ...). {ORIGINAL}"
        )


def _check_rope(path: Path, header: Header) -> None:
    """Refuse rotary scaling, which transformers passes over, but for that of Llama 3, which :func:`amend` puts in."""
    scaled = header.of("rope.scaling.type") not in (None, "none") and header.of("rope.scaling.factor") != 1
    factors = [tensor for tensor in header.tensors if tensor.name.startswith("rope_")]
    if scaled or (factors and _llama3(path, header) is None):
        how = str(header.of("rope.scaling.type") or factors[0].name)[:40]
        raise BackboneError(
            f"{path}: scales its rotary positions ({how}), which transformers ignores in GGUF; expected none, or that "
            f"of Llama 3. {ORIGINAL}"
        )


def _llama3(path: Path, header: Header) -> dict[str, Any] | None:
    """The settings whose effect on each frequency is the file's ``rope_freqs``; None if there are none."""
    import numpy as np

    tensor = next((tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight"), None)
    theta = header.of("rope.freq_base")
    if header.architecture != "llama" or tensor is None or tensor.kind != "F32" or type(theta) is not float:
        return None
    with path.open("rb") as file:
        file.seek(tensor.first)
        found = np.frombuffer(file.read(tensor.last - tensor.first), "<f4")
    low, high, original = _LLAMA3.values()
    lengths = 2 * np.pi * theta ** (np.arange(len(found)) / len(found))
    smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
    for factor in (8.0, 16.0, 32.0):
        if np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}
    return None


def amend(config: Any, path: Path) -> Any:
    """The configuration that transformers made of a header, with what it passes over."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    header = read_header(path)
    rope = _llama3(path, header)
    if rope is not None:
        config.rope_parameters = rope
    kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if kind is not None:
        config.architectures = [kind]
    ends = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    if len(ends) > 1:
        config.eos_token_id = ends
    config.name_or_path = str(path)
    return config


@contextmanager
def source(where: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder and options for ``from_pretrained``, of a model folder or a GGUF file; nothing beside that is read."""
    if not is_gguf(where):
        yield where, {}
        return
    reading: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reading.tqdm
    reading.tqdm = lambda tensors, **_: tensors
    try:
        # A file of that name in the working directory, and any settings beside the file, would be taken instead.
        with TemporaryDirectory(prefix="coala-gguf-") as empty:
            yield Path(empty), {"gguf_file": str(where.resolve())}
    finally:
        reading.tqdm = bar


def dense(model: Any) -> Any:
    """A dequantised model as one that was never quantised, so that it can be moved, trained and saved."""
    for owner in (model, model.config):
        for name in ("hf_quantizer", "quantization_method", "quantization_config", "_is_quantized"):
            if name in vars(owner):
                delattr(owner, name)
    model.is_quantized = False
    return model


def suggest(model: Any, path: Path) -> None:
    """Enter how replies are best sampled, where the file says so, in the model's generation_config."""
    said, config = read_header(path).metadata, getattr(model, "generation_config", None)
    for name, key in (("temperature", "temp"), ("top_p", "top_p"), ("top_k", "top_k")):
        value = said.get(f"general.sampling.{key}")
        if config is not None and type(value) in (int, float):
            setattr(config, name, value)


def gguf_digest(path: Path) -> str:
    """SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
