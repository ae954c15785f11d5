"""GGUF, one file that is a whole model: its header read within bounds, and what transformers would misread refused.

The header is walked here before any library sees the file, for those trust its lengths and counts. Weights are read by
transformers, and dequantised.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coala.backbone.checkpoint import AGAIN, kind_of
from coala.backbone.network import BackboneError

# More than any model has; the readers of transformers and gguf make objects of every entry.
MOST_ENTRIES, MOST_IN_ALL, MOST_TENSORS, MOST_KEYS = 1 << 20, 1 << 22, 1 << 16, 1 << 14
# Longer arrays of numbers (scores of a vocabulary) are known by their length alone.
_KEPT = 1 << 12
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ORIGINAL = "Fix: give the original model (a folder or its hub name) in place of the GGUF file."
# Ways to split a text that are GPT-2's, which transformers takes for every name it does not know, or differ from it in
# digits kept apart: such a vocabulary was learnt so, and has no merge over a digit.
_LIKE_GPT2 = {
    *("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "jina-v2-code", "mellum"),
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
# The rotary scaling of Llama 3.1 and later, which a file tells by its effect on each frequency.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the header tells of it: shape in the order of torch; ``first`` counts bytes of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights. Arrays of strings and long ones of numbers are their length."""

    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of(self, key: str) -> Any:
        """A value of the model's own architecture."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def numbers(self) -> int:
        """Weights in the file."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def quantisation(self) -> str:
        """The types of its tensors, that of most weights first."""
        found: Counter[str] = Counter()
        for tensor in self.tensors:
            found[tensor.kind] += math.prod(tensor.shape)
        first, *others = [kind for kind, _ in found.most_common()]
        return f"{first} (with {', '.join(others)})" if others else first


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name or its first bytes."""
    return path.is_file() and (path.suffix.lower() == ".gguf" or kind_of(path) == "GGUF")


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file that a folder without other weights holds; :class:`BackboneError` if there are several."""
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".gguf" and path.is_file())
    if len(found) > 1:
        shown = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise BackboneError(
            f"{folder}: holds {len(found)} GGUF files ({shown}); expected one. Fix: name the file, as in {found[0]}."
        )
    return found[0] if found else None


def read_header(path: Path) -> Header:
    """The header of a GGUF file, whose counts, lengths and places were all checked against the file.

    Raises :class:`BackboneError` for a file that is broken or no GGUF, and without the packages that read one.
    """
    missing = [name for name in ("gguf", "accelerate", "transformers.integrations.gguf") if find_spec(name) is None]
    if missing:
        raise BackboneError(
            f"{path}: is GGUF, which needs packages that are not installed, or newer ({', '.join(missing)}). Fix: pip "
            "install 'coala-align[gguf]'"
        )
    return _read_header(path, stamp(path))


def stamp(path: Path) -> tuple[int, ...]:
    """What tells that a path still leads to the same content."""
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


@lru_cache(maxsize=4)
def _read_header(path: Path, _stamp: tuple[int, ...]) -> Header:
    if kind_of(path) != "GGUF":
        raise _broken(path, f"is {kind_of(path) or 'no GGUF file, whatever its name'}; expected GGUF")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(path, content).header()


class _Walk:
    """A walk over the bytes of a header, each step checked to stay in the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at, self.entries = path, content, 4, 0

    def header(self) -> Header:
        version, n_tensors, n_keys = self._numbers("IQQ")
        if version not in (2, 3):
            raise _broken(self.path, f"is GGUF of version {version}; expected 2 or 3, little-endian")
        if n_tensors > MOST_TENSORS or n_keys > MOST_KEYS:
            raise _broken(self.path, f"tells of {n_tensors:,} tensors and {n_keys:,} keys; expected fewer")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._text(1 << 10)
            if key in metadata:
                raise self._damaged(f"{key[:60]!r} stands twice")
            metadata[key] = self._value(self._numbers("I")[0])
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged("its alignment is no power of two")
        entries = [self._tensor() for _ in range(n_tensors)]
        begin = -(-self.at // alignment) * alignment
        tensors = tuple(self._placed(begin, alignment, *entry) for entry in entries)
        end = begin
        for tensor in sorted(tensors, key=lambda t: (t.first, t.last)):
            if tensor.first < end:
                raise self._damaged(f"{tensor.name[:60]!r} lies over what stands before it")
            end = tensor.last
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self._damaged("two tensors have one name")
        return Header(metadata, tensors)

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, length: int) -> bytes:
        self._skip(length)
        return self.content[self.at - length : self.at]

    def _skip(self, length: int) -> None:
        if length > len(self.content) - self.at:
            raise _broken(self.path, f"breaks off in its header ({len(self.content):,} bytes)")
        self.at += length

    def _text(self, longest: int) -> str:
        (length,) = self._numbers("Q")
        if length > longest:
            raise self._damaged(f"a text has {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._damaged("a text is no UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind])[0]
        if kind == _STRING:
            return self._text(1 << 24)
        if kind != _ARRAY:
            raise self._damaged(f"a value is of type {kind}")
        of, count = self._numbers("IQ")
        self.entries += count
        if count > MOST_ENTRIES or self.entries > MOST_IN_ALL:
            raise self._damaged(f"an array has {count:,} entries")
        if of in _NUMBERS:
            if count <= _KEPT:
                return list(self._numbers(f"{count}{_NUMBERS[of]}"))
            self._skip(count * struct.calcsize(f"<{_NUMBERS[of]}"))
        elif of == _STRING:
            for _ in range(count):
                self._skip(self._numbers("Q")[0])
        else:
            raise self._damaged(f"an array is of type {of}")
        return count

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(1 << 10)
        (rank,) = self._numbers("I")
        if not 1 <= rank <= 4:
            raise self._damaged(f"{name[:60]!r} has {rank} dimensions")
        shape = self._numbers(f"{rank}Q")
        kind, offset = self._numbers("IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _placed(
        self, begin: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {int(member): member for member in GGMLQuantizationType}
        if kind not in known:
            raise BackboneError(
                f"{self.path}: holds {name[:60]!r} in the type of numbers {kind}; expected one that the package gguf "
                f"knows. Fix: update gguf and transformers, or {_ORIGINAL.removeprefix('Fix: ')}"
            )
        block, size = GGML_QUANT_SIZES[known[kind]]
        numbers = math.prod(shape)
        if not numbers or shape[-1] % block or offset % alignment:
            raise self._damaged(f"{name[:60]!r} has shape {shape} at {offset:,} in {known[kind].name}")
        last = begin + offset + numbers // block * size
        if last > len(self.content):
            raise _broken(self.path, f"breaks off: {len(self.content):,} bytes, of {last:,} that its header tells of")
        return GGUFTensor(name, known[kind].name, shape, begin + offset, last)

    def _damaged(self, what: str) -> BackboneError:
        return _broken(self.path, f"has a damaged header: {what}")


def _broken(path: Path, what: str) -> BackboneError:
    return BackboneError(f"{path}: {what}. {AGAIN}")


# --- what transformers reads ------------------------------------------------------------------------------------------


def check_gguf(path: Path) -> Header:
    """The header of a file that transformers reads as what it is; :class:`BackboneError`, in one sentence, else."""
    header = read_header(path)
    about = header.metadata
    kind = about.get("general.type", "model")
    if kind == "mmproj" or header.architecture == "clip":
        raise BackboneError(
            f"{path}: is a multimodal projector (mmproj), which turns pictures into states; expected a language model. "
            "Fix: give the language model's own file, which lies beside it."
        )
    parts = about.get("split.count", 1)
    if parts != 1:
        raise BackboneError(
            f"{path}: is one of {parts} files that the model is split into; expected one whole file. Fix: join them: "
            f"llama-gguf-split --merge {path.name} WHOLE.gguf"
        )
    if kind != "model" or not header.tensors:
        what = "a vocabulary without weights" if kind == "model" else f"of the type {str(kind)[:20]!r}"
        raise BackboneError(f"{path}: is {what}; expected a model. Fix: give the model's own file.")
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
            f"{_ORIGINAL}"
        )
    if found not in known or found in renamed.values():
        shown = ", ".join(sorted(known - {*renamed.values()}))
        raise BackboneError(
            f"{path}: has the architecture {found[:40]!r}; expected one that transformers reads from GGUF ({shown}). "
            f"{_ORIGINAL}"
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
                f"F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ...). Fix: update gguf, or give another quantisation of it."
            ) from None


def _check_tokenizer(path: Path, header: Header) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, GGUF_TOKENIZER_TYPES

    kind, split = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre")
    if kind not in GGUF_TOKENIZER_TYPES or not header.metadata.get("tokenizer.ggml.tokens"):
        found = "no tokenizer" if kind is None else f"a tokenizer of the kind {str(kind)[:20]!r}"
        raise BackboneError(
            f"{path}: has {found}; expected one that transformers makes from GGUF "
            f"({', '.join(sorted(GGUF_TOKENIZER_TYPES))}). {_ORIGINAL}"
        )
    if kind == "gpt2" and split is not None and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *_LIKE_GPT2}:
        raise BackboneError(
            f"{path}: splits texts the way {str(split)[:30]!r}, which transformers would not do as the model learnt "
            f"it; expected a way that it knows from GGUF (llama-bpe, qwen2, tekken, gpt-2, ...). {_ORIGINAL}"
        )


def _check_rope(path: Path, header: Header) -> None:
    """Refuse rotary scaling, which transformers passes over, but for that of Llama 3, which :func:`amend` puts in."""
    scaled = header.of("rope.scaling.type") not in (None, "none") and header.of("rope.scaling.factor") != 1
    factors = [tensor for tensor in header.tensors if tensor.name.startswith("rope_")]
    if scaled or (factors and _llama3(path, header) is None):
        how = str(header.of("rope.scaling.type") or factors[0].name)[:40]
        raise BackboneError(
            f"{path}: scales its rotary positions ({how}), which transformers passes over in GGUF; expected none, "
            f"or that of Llama 3. {_ORIGINAL}"
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
