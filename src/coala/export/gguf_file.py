"""A GGUF file copied key by key and tensor by tensor with another output layer, and compared with the old one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coala.export.network import ExportError

OUTPUT = "output.weight"  # what GGUF files call the output layer; tied ones have none


def write_changed(reader: Any, path: Path, layer: Any) -> None:
    """All keys and tensors of ``reader``, and the output layer (V, d), which is added where there was none."""
    import gguf

    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture, endianess=reader.endianess)
    alignment = reader.fields.get("general.alignment")
    if alignment is not None:
        writer.data_alignment = int(alignment.contents())
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    kept = [tensor for tensor in reader.tensors if tensor.name != OUTPUT]
    for tensor in kept:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.add_tensor_info(OUTPUT, layer.shape, layer.dtype, layer.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in kept:
        writer.write_tensor_data(tensor.data, tensor_endianess=reader.endianess)
    writer.write_tensor_data(layer)
    writer.close()


def compare_files(source: Path, made: Path, layer: Any) -> float:
    """Read the new file back: its keys and other tensors are the old one's, and its output layer is ``layer``."""
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
    for tensor in old.tensors:
        if tensor.name != OUTPUT and not np.array_equal(tensor.data, tensors[tensor.name].data):
            raise ExportError(f"{source}: the tensor {tensor.name} could not be copied.")
    return float(np.abs(np.asarray(tensors[OUTPUT].data, np.float32) - layer.astype(np.float32)).max())
