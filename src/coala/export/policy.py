"""A distilled policy as files that other programs serve: a Hugging Face folder, a GGUF file, or a LoRA adapter.

Each is written beside its place, tried against the policy, and moved there whole. The change is of the output layer
alone, W (I + A); nothing here knows how it was fitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from coala.export.folder import MANIFEST
from coala.export.network import ExportError, tokenizer_of
from coala.policies import DistilledPolicy
from coala.store import file_digest, load_json, save_json, working_folder, write_atomic
from coala.values import Float32

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

Form = Literal["checkpoint", "gguf", "lora"]
OUTPUT = "output.weight"  # what GGUF files call the output layer; tied ones have none
PROBES = ("How do I boil an egg?", "x", "one two three four five six seven eight nine ten " * 8)


@dataclass(frozen=True)
class ExportedPolicy:
    """``path`` with its ``form``; ``difference`` is the largest between its log-probabilities and the policy's.

    Over the whole vocabulary after each of ``probes`` prompts; none is looked for in a GGUF file, which no part of this
    package decodes: what is compared there is the tensor.
    """

    path: Path
    form: Form
    n_bytes: int
    probes: int
    difference: float


def changed_layer(policy: DistilledPolicy, backbone: LanguageModel) -> Float32:
    """W (I + A) (V, d) float32, W as the model holds it: a scale of its logits stays in its configuration."""
    backbone.with_policy(policy).changed()  # refuses a policy of other weights
    raw = backbone.transformer.get_output_embeddings().weight.detach().float().cpu().numpy()
    left, right = policy.factors()
    found: Float32 = raw + (raw @ left) @ right
    return found


def export_checkpoint(policy: DistilledPolicy, backbone: LanguageModel, folder: Path | str) -> ExportedPolicy:
    """Write a folder that transformers, vLLM or SGLang loads as any model, its output layer no longer tied.

    Weights keep the dtype they are loaded in. Raises ``ExportError`` where the folder does not give the policy's
    probabilities when it is read back.
    """
    from coala.backbone import load_backbone
    from coala.backbone.silence import quiet

    model, layer = backbone.transformer, changed_layer(policy, backbone)
    name = _name_of(model, model.get_output_embeddings())
    with working_folder(Path(folder)) as work:
        state = {key: value for key, value in model.state_dict().items() if key != f"{name}.weight"}
        state[f"{name}.weight"] = torch.from_numpy(layer).to(backbone.dtype)
        with quiet():
            model.save_pretrained(work, state_dict=state)
            tokenizer_of(backbone).save_pretrained(work)
        config = load_json(work / "config.json")
        config["tie_word_embeddings"] = False
        config.pop("_name_or_path", None)
        config.pop("quantization_config", None)
        save_json(work / "config.json", config)
        template = backbone.template.partition(":")[0]
        difference = _tried(policy, backbone, lambda: load_backbone(work, device="cpu", template=template))
        _describe(work, policy, "checkpoint", backbone)
        work.rename(folder)
    return _exported(Path(folder), "checkpoint", len(PROBES), difference)


def export_lora(policy: DistilledPolicy, backbone: LanguageModel, folder: Path | str) -> ExportedPolicy:
    """Write a LoRA adapter of the output layer: B = W left, A = right, of the policy's rank.

    Not every engine takes one there, and some ignore it silently: compare its probabilities once it is loaded. Raises
    ``ExportError`` for a policy that was not cut to a rank, for a model whose output layer is tied to its embedding,
    and where the adapter does not give the policy's probabilities when it is read back.
    """
    from safetensors.numpy import save as save_tensors

    from coala.backbone import load_backbone

    if policy.right is None:
        raise ExportError(
            f"The policy has full rank, {policy.rank}; an adapter of that rank is larger than the layer. Fix: distil "
            "with a rank, or export a checkpoint."
        )
    backbone.with_policy(policy).changed()
    model = backbone.transformer
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ExportError(
            f"{backbone.name} ties its output layer to its embedding, and engines differ in what an adapter of it then "
            "changes; expected a layer of its own. Fix: --to checkpoint or --to gguf."
        )
    name = _name_of(model, model.get_output_embeddings())
    raw = model.get_output_embeddings().weight.detach().float().cpu().numpy()
    with working_folder(Path(folder)) as work:
        tensors = {"lora_A": policy.right, "lora_B": np.ascontiguousarray(raw @ policy.left)}
        named = {f"base_model.model.{name}.{part}.weight": array for part, array in tensors.items()}
        write_atomic(work / "adapter_model.safetensors", save_tensors(named, metadata={"format": "pt"}))
        save_json(
            work / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": policy.spec.backbone,
                "r": policy.rank,
                "lora_alpha": policy.rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "target_modules": [name],
            },
        )
        template = backbone.template.partition(":")[0]
        difference = _tried(
            policy, backbone, lambda: load_backbone(backbone.name, device="cpu", adapter=str(work), template=template)
        )
        _describe(work, policy, "lora", backbone)
        work.rename(folder)
    return _exported(Path(folder), "lora", len(PROBES), difference)


def export_gguf(
    policy: DistilledPolicy, backbone: LanguageModel, path: Path | str, *, base: Path | str | None = None
) -> ExportedPolicy:
    """Write the GGUF file ``base`` (the one the model was loaded from) with the output layer changed, in float16.

    Every key and every other tensor is copied byte for byte, so that any architecture that llama.cpp knows will do.
    The layer is added where the file ties it to the embedding. Raises ``ExportError`` if the file is of another shape.
    """
    import gguf

    path, source = Path(path), _base_of(backbone) if base is None else Path(base)
    if path.exists():
        raise ExportError(f"{path}: exists. Give another name, or delete it.")
    layer = changed_layer(policy, backbone).astype(np.float16)
    if not np.isfinite(layer).all():
        raise ExportError(
            "The changed output layer does not fit in float16. Fix: export a checkpoint, or scale the policy."
        )
    reader = gguf.GGUFReader(source)
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    tied = shapes.get(OUTPUT, shapes.get("token_embd.weight"))
    if tied != layer.shape[::-1]:
        raise ExportError(
            f"{source}: its output layer is {tied}; expected {layer.shape[::-1]}. Give the file of the model that was "
            "distilled."
        )
    with working_folder(path.with_name(f"{path.name}.parts")) as work:
        made = work / "model.gguf"
        _write_gguf(reader, made, layer)
        difference = _compare_gguf(source, made, layer)
        made.rename(path)
    return ExportedPolicy(path, "gguf", path.stat().st_size, 0, difference)


def planned(form: Form | None, out: Path | None, base: Path | None) -> None:
    """ExportError, before any work, for an export that is not told whole or whose place is taken."""
    if (form is None) != (out is None):
        raise ExportError("Found one of --to and --out; expected both or neither. Fix: --to checkpoint --out FOLDER.")
    if base is not None and form != "gguf":
        raise ExportError("--base belongs to --to gguf; the other forms are made of the model itself.")
    if out is not None and out.exists():
        raise ExportError(f"{out}: exists. Give another --out, or delete it.")


def export_policy(
    policy: DistilledPolicy,
    run: Path | str,
    form: Form,
    out: Path | str,
    *,
    base: Path | str | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
) -> ExportedPolicy:
    """Write ``policy`` of the run ``run`` to ``out`` in one of the three forms."""
    from coala.alignment import load_parts

    backbone, _, _ = load_parts(run, trust_remote_code=trust_remote_code, download=download)
    if form == "gguf":
        return export_gguf(policy, backbone, out, base=base)
    return (export_checkpoint if form == "checkpoint" else export_lora)(policy, backbone, out)


def _write_gguf(reader: Any, path: Path, layer: Any) -> None:
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


def _compare_gguf(source: Path, made: Path, layer: Any) -> float:
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


def _base_of(backbone: LanguageModel) -> Path:
    from coala.backbone.files import find
    from coala.backbone.gguf import is_gguf

    found = find(backbone.name, None, download=False)[0] if Path(backbone.name).exists() else Path(backbone.name)
    if not is_gguf(found):
        raise ExportError(
            f"{backbone.name} was not loaded from a GGUF file. Fix: give the GGUF file of the same model as the base."
        )
    return found


def _name_of(model: Any, layer: Any) -> str:
    for name, module in model.named_modules():
        if module is layer:
            return str(name)
    raise ExportError(f"{type(model).__name__} has no output layer of its own. Use another model.")


def _tried(policy: DistilledPolicy, backbone: LanguageModel, load: Callable[[], LanguageModel]) -> float:
    """The largest difference of next-token log-probabilities; ExportError beyond what the dtype rounds."""
    ours, model = backbone.with_policy(policy).changed(), load()
    worst = 0.0
    for probe in PROBES:
        row = backbone.render(probe).tokens
        wanted = torch.log_softmax(ours.logits(backbone.hidden([row], -1)[0, -1:]), -1)
        found = torch.log_softmax(model.logits(model.hidden([row], -1)[0, -1:]), -1)
        worst = max(worst, float((wanted.cpu() - found.cpu()).abs().max()))
    # Half precision rounds the layer: logits of size 30 are off by about 0.1.
    allowed = 1e-3 if backbone.dtype == torch.float32 else 0.5
    if not worst <= allowed:
        raise ExportError(
            f"What was written for {backbone.name} is off by {worst:.3g} nats when it is read back, more than "
            "rounding: its output layer is not read from the files. Use another form."
        )
    return worst


def _describe(work: Path, policy: DistilledPolicy, form: Form, backbone: LanguageModel) -> None:
    certificate = policy.certificate
    files = {p.name: file_digest(p) for p in sorted(work.iterdir()) if p.is_file()}
    save_json(
        work / MANIFEST,
        {
            "form": f"distilled {form}",
            "program": policy.program,
            "support": policy.support,
            "ridge": policy.ridge,
            "rank": policy.rank,
            "weights": backbone.weights,
            "certificate": certificate,
            "files": files,
        },
    )


def _exported(folder: Path, form: Form, probes: int, difference: float) -> ExportedPolicy:
    n_bytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return ExportedPolicy(folder, form, n_bytes, probes, difference)
