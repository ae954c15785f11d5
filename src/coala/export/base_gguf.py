"""The GGUF file that a policy's output layer is written into: whether it is of the model, and the file written anew.

All that is known here of llama.cpp is what it does to logits, by the names that its files give to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coala.export.network import ExportError

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.backbone.gguf_header import Header

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"  # tied files have no output layer of their own
# Two bits a weight move an embedding by a quarter of its length; one of another model is as far as it is long.
FARTHEST = 0.5
# Vectors of norms are kept in float32, whatever the weights: of the same model they are equal, of one that was trained
# further nearly so. Some families are written with one added, or otherwise, and are then like none.
NEARLY = 0.2
PORTION = 1 << 12  # rows of an embedding that are in memory at once
# Architectures whose logits llama.cpp scales by what no key says.
SCALED_BY_NAME = ("minicpm", "grok")


def read_base(source: Path, backbone: LanguageModel) -> Any:
    """The ``gguf`` reader of ``source``, which is ``backbone``'s model in whatever types of numbers.

    Embeddings decide it, within what two bits a weight would move them, and norms, which are not quantised: a copy that
    was trained further is refused where it moved any of them. Raises ``ExportError`` (``BackboneError`` for a file that
    is broken) for another model, a part of a file, logits that llama.cpp shapes otherwise than ``backbone`` does.
    """
    import gguf

    from coala.backbone.gguf_header import read_header

    if not source.is_file():
        raise ExportError(f"{source}: found no such file, expected a GGUF file, fix: give --base FILE.")
    header = read_header(source)
    _check_whole(source, header)
    _check_logits(source, header, backbone)
    reader = gguf.GGUFReader(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_weights(source, tensors, backbone)
    return reader


def _check_whole(source: Path, header: Header) -> None:
    parts, kind = header.metadata.get("split.count", 1), header.metadata.get("general.type", "model")
    if parts != 1:
        raise ExportError(
            f"{source}: found one of {parts} files that the model is split into, expected one whole file, fix: "
            f"llama-gguf-split --merge {source.name} WHOLE.gguf"
        )
    if kind != "model" or header.architecture == "clip":
        raise ExportError(
            f"{source}: found a file of the type {str(kind)[:20]!r} ({header.architecture[:20]}), expected a language "
            "model, fix: give the model's own file."
        )
    names = {tensor.name for tensor in header.tensors}
    if EMBEDDING not in names:
        raise ExportError(f"{source}: found no {EMBEDDING}, expected a whole model, fix: give the model's own file.")
    if strange := sorted(name for name in names if name.startswith("output.") and name != OUTPUT):
        raise ExportError(
            f"{source}: found {', '.join(strange)}, by which logits are more than a matrix times states, expected "
            f"{OUTPUT} alone, fix: give another quantisation of the model."
        )


def _check_logits(source: Path, header: Header, backbone: LanguageModel) -> None:
    """What llama.cpp does to logits by this header is what the model does, to which the policy was fitted."""
    if header.architecture in SCALED_BY_NAME:
        raise ExportError(
            f"{source}: found the architecture {header.architecture}, whose logits llama.cpp scales itself, expected "
            "one fully described by its header, fix: --to checkpoint"
        )
    config = backbone.transformer.config.get_text_config()
    keys = {name: header.of(name) for name in ("final_logit_softcapping", "logit_scale")}
    for name, value in keys.items():
        if value is not None and not (isinstance(value, int | float) and np.isfinite(value)):
            raise ExportError(
                f"{source}: found {header.architecture}.{name} {str(value)[:20]!r}, expected a number, fix: download "
                "the file again."
            )
    cap = keys["final_logit_softcapping"]
    if cap:
        raise ExportError(
            f"{source}: found logits that are soft-capped at {cap:g}, expected none, fix: give the file of the model "
            "that was distilled."
        )
    # Both families write the key; llama.cpp multiplies by it for Command R and divides by it for Granite.
    said = {"logit_scale": "Command R", "logits_scaling": "Granite"}
    ours = next((float(value) for name in said if (value := getattr(config, name, None))), 1.0)
    found = float(keys["logit_scale"] or 1.0)
    if not np.isclose(found, ours, rtol=1e-5):
        raise ExportError(
            f"{source}: found {header.architecture}.logit_scale {found:g}, expected {ours:g} as in {backbone.name}, "
            "fix: give the file of the model that was distilled."
        )


def _check_weights(source: Path, tensors: Mapping[str, Any], backbone: LanguageModel) -> None:
    network = backbone.transformer
    embedding = network.get_input_embeddings().weight.detach()
    n, width = (int(size) for size in embedding.shape)
    for name in (OUTPUT, EMBEDDING):
        shape = tuple(int(size) for size in tensors[name].shape)[::-1] if name in tensors else (n, width)
        if shape != (n, width):
            raise ExportError(
                f"{source}: found {name} of {' x '.join(map(str, shape))}, expected {n} x {width} (vocabulary x width) "
                f"as in {backbone.name}, fix: give the file of the model that was distilled."
            )
    apart = length = 0.0
    for first in range(0, n, PORTION):
        ours = embedding[first : first + PORTION].double().cpu().numpy()
        theirs = dequantised(tensors[EMBEDDING], first, first + PORTION)
        apart, length = apart + float(np.square(theirs - ours).sum()), length + float(np.square(ours).sum())
    distance = float(np.sqrt(apart / max(length, np.finfo(float).tiny)))
    if not distance <= FARTHEST:
        raise ExportError(
            f"{source}: found another model's embedding (it is {distance:.2g} of its length away from that of "
            f"{backbone.name}), expected at most {FARTHEST}, fix: give the file of the model that was distilled."
        )
    _check_norms(source, tensors, backbone)


def _check_norms(source: Path, tensors: Mapping[str, Any], backbone: LanguageModel) -> None:
    own = [weight.detach().double().cpu().numpy() for weight in backbone.transformer.parameters() if weight.ndim == 1]
    rounding = 1e-5 if backbone.dtype.itemsize >= 4 else 2**-7
    for name, tensor in tensors.items():
        if not name.endswith("norm.weight") or tensor.data.ndim != 1 or tensor.data.dtype != np.float32:
            continue
        theirs = tensor.data.astype(np.float64)
        length = max(float(np.linalg.norm(theirs)), 1e-12)
        alike = [one for one in own if one.shape == theirs.shape]
        distances = [float(np.linalg.norm(theirs - one - more)) / length for one in alike for more in (0.0, 1.0)]
        if distances and rounding < min(distances) < NEARLY:
            raise ExportError(
                f"{source}: found {name} nearly as in {backbone.name} ({min(distances):.1g} of its length away), "
                "expected the same: the file is of a model that was trained further, fix: give the file of the model "
                "that was distilled."
            )


def dequantised(tensor: Any, first: int, last: int) -> NDArray[np.float32]:
    """Rows ``first`` to ``last`` of a reader's matrix, float32."""
    import gguf

    found: NDArray[np.float32] = gguf.dequantize(tensor.data[first:last], tensor.tensor_type)
    return found


def write_anew(reader: Any, path: Path, layer: NDArray[Any], kind: Any = None) -> None:
    """The file of ``reader`` with ``layer`` for its output layer, all else byte for byte.

    ``layer`` (V, d) is of a type that files hold, or the bytes of rows of the quantised type ``kind``.
    """
    import gguf

    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    alignment = reader.fields.get("general.alignment")
    if alignment is not None:
        writer.data_alignment = int(alignment.contents())
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        of = field.types[0]
        inner = field.types[-1] if of == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), of, sub_type=inner)
    kept = [tensor for tensor in reader.tensors if tensor.name != OUTPUT]
    for tensor in kept:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.add_tensor_info(OUTPUT, layer.shape, layer.dtype, layer.nbytes, kind)
    _write(writer, [tensor.data for tensor in kept] + [layer])


class _Told(np.ndarray[Any, Any]):
    """An array that is written by Python: NumPy's own writing is silent where the disk is full at its last bytes."""

    def tofile(self, file: Any, *_: Any, **__: Any) -> None:
        file.write(np.ascontiguousarray(self).reshape(-1).view(np.uint8).data)


def _write(writer: Any, arrays: Sequence[NDArray[Any]]) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays:
            writer.write_tensor_data(array.view(_Told))
    finally:
        writer.close()


def compare_files(source: Path, made: Path, layer: NDArray[Any]) -> None:
    """Read ``made`` back: its keys and other tensors are those of ``source``, its output layer is ``layer``."""
    import gguf

    old, new = gguf.GGUFReader(source), gguf.GGUFReader(made)
    told = [
        {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        for reader in (old, new)
    ]
    if told[0] != told[1]:
        differing = sorted(key for key in {*told[0], *told[1]} if told[0].get(key) != told[1].get(key))
        raise ExportError(f"{source}: these keys could not be copied: {', '.join(differing)}.")
    tensors = {tensor.name: tensor for tensor in new.tensors}
    wanted = {tensor.name: tensor.data for tensor in old.tensors} | {OUTPUT: layer}
    for name, data in wanted.items():
        if name not in tensors or not np.array_equal(tensors[name].data, data):
            raise ExportError(f"{source}: the tensor {name} could not be written as it is.")


def write_lora(path: Path, base: Any, left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """A LoRA adapter of the output layer for the file of the reader ``base``; ``left`` (V, r), ``right`` (r, d).

    Returns the largest difference of what is read back, which is 0.
    """
    import gguf

    writer = gguf.GGUFWriter(path, base.fields["general.architecture"].contents())
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp scales by this over the rank, and by what a request says.
    writer.add_float32("adapter.lora.alpha", float(len(right)))
    parts = {f"{OUTPUT}.lora_a": right, f"{OUTPUT}.lora_b": left}
    for name, array in parts.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    _write(writer, [*parts.values()])
    found = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    return max(float(np.abs(found[name] - array).max()) for name, array in parts.items())
