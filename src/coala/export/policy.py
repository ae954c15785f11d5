"""A distilled policy as files that other programs serve: a Hugging Face folder, a GGUF file, or a LoRA adapter.

Each is written beside its place, tried against the policy, and moved there whole. The change is of the output layer
alone, W (I + A); nothing here knows how it was fitted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from coala.decoding.distilled import Changed
from coala.export.folder import MANIFEST
from coala.export.network import ExportError, tokenizer_of
from coala.policies import DistilledPolicy
from coala.store import file_digest, load_json, save_json, working_folder, write_atomic, write_error
from coala.values import Float32

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

Form = Literal["checkpoint", "gguf", "lora", "gguf-lora"]
Precision = Literal["f16", "q8_0"]  # numbers of the output layer of a GGUF file
PROBES = ("How do I boil an egg?", "x", "one two three four five six seven eight nine ten " * 8)


@dataclass(frozen=True)
class ExportedPolicy:
    """``path`` with its ``form``; ``difference`` is the largest between its log-probabilities and the policy's.

    Over the whole vocabulary after each of ``probes`` prompts; none is looked for in a GGUF file, which no part of this
    package decodes: the file is read back byte for byte, and ``difference`` is what rounding moves a weight at most.
    """

    path: Path
    form: Form
    n_bytes: int
    probes: int
    difference: float


def changed_layer(policy: DistilledPolicy, backbone: LanguageModel) -> Float32:
    """W (I + A) (V, d) float32, W as the model holds it: a scale of its logits stays in its configuration."""
    Changed(backbone, policy)
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
    with _written_whole(Path(folder)) as work:
        state = {key: value for key, value in model.state_dict().items() if key != f"{name}.weight"}
        state[f"{name}.weight"] = torch.from_numpy(layer).to(backbone.dtype)
        with quiet():
            model.save_pretrained(work, state_dict=state)
            tokenizer_of(backbone).save_pretrained(work)
        config = load_json(work / "config.json")
        config["tie_word_embeddings"] = False
        config.pop("_name_or_path", None)
        config.pop("quantization_config", None)
        config |= _older_names(config)
        save_json(work / "config.json", config)
        template = backbone.template.partition(":")[0]
        difference = _tried(policy, backbone, lambda: load_backbone(work, device="cpu", template=template))
        _describe(work, policy, "checkpoint", backbone)
        _settle(work)
        work.rename(folder)
    return _exported(Path(folder), "checkpoint", len(PROBES), difference)


def _older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions under the names from before transformers 5, which some engines read alone, and then guess."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}  # none, or different ones for different layers, which had no older name
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    return {
        **{name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope},
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
    }


def export_lora(policy: DistilledPolicy, backbone: LanguageModel, folder: Path | str) -> ExportedPolicy:
    """Write a LoRA adapter of the output layer: B = W left, A = right, of the policy's rank.

    Not every engine takes one there, and some ignore it silently: compare its probabilities once it is loaded. Raises
    ``ExportError`` for a policy that was not cut to a rank, for a model whose output layer is tied to its embedding,
    and where the adapter does not give the policy's probabilities when it is read back.
    """
    from safetensors.numpy import save as save_tensors

    from coala.backbone import load_backbone

    left, right = _adapter_factors(policy, backbone)
    model = backbone.transformer
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ExportError(
            f"{backbone.name} ties its output layer to its embedding, and engines differ in what an adapter of it then "
            "changes; expected a layer of its own. Fix: --to checkpoint or --to gguf."
        )
    name = _name_of(model, model.get_output_embeddings())
    with _written_whole(Path(folder)) as work:
        tensors = {"lora_A": right, "lora_B": left}
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
        _settle(work)
        work.rename(folder)
    return _exported(Path(folder), "lora", len(PROBES), difference)


def export_gguf(
    policy: DistilledPolicy,
    backbone: LanguageModel,
    path: Path | str,
    *,
    base: Path | str | None = None,
    precision: Precision = "f16",
) -> ExportedPolicy:
    """Write the GGUF file ``base`` (the one the model was loaded from) with the output layer changed.

    Every key and every other tensor is copied byte for byte, so that any architecture that llama.cpp knows will do.
    The layer is added where the file ties it to the embedding; ``precision`` q8_0 takes half the room of f16. Raises
    ``ExportError`` if the file is of another model or part of one, or its logits are not those of the model.
    """
    import gguf

    from coala.export.base_gguf import compare, read_base, write_anew

    path, source = Path(path), _base_of(backbone) if base is None else Path(base)
    if path.exists():
        raise ExportError(f"{path}: found something of that name, expected a free one, fix: another --out.")
    reader, wanted = read_base(source, backbone), changed_layer(policy, backbone)
    if precision == "q8_0":
        kind = gguf.GGMLQuantizationType.Q8_0
        if wanted.shape[1] % (block := gguf.GGML_QUANT_SIZES[kind][0]):
            raise ExportError(
                f"{backbone.name}: found states of {wanted.shape[1]} numbers, expected a multiple of {block}, which "
                "q8_0 packs together, fix: --precision f16"
            )
        written = gguf.quantize(wanted, kind)
        rounded = gguf.dequantize(written, kind)
    else:
        kind, written = None, wanted.astype(np.float16)
        rounded = written.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise ExportError(
            f"{backbone.name}: found numbers in the changed output layer that half precision cannot hold, expected "
            "smaller ones, fix: --to checkpoint, or a smaller strength."
        )
    with _written_whole(path.with_name(f"{path.name}.parts")) as work:
        made = work / "model.gguf"
        write_anew(reader, made, written, kind)
        compare(source, made, written)
        _settle(work)
        made.rename(path)
    return ExportedPolicy(path, "gguf", path.stat().st_size, 0, float(np.abs(rounded - wanted).max()))


def export_gguf_lora(
    policy: DistilledPolicy, backbone: LanguageModel, folder: Path | str, *, base: Path | str | None = None
) -> ExportedPolicy:
    """Write ``folder``/adapter.gguf, a LoRA of the output layer that llama.cpp scales anew for each request.

    llama.cpp finds no output layer to adapt in a file that ties it to the embedding; base.gguf is then that file with
    its embedding, byte for byte, as its output layer too: the same model. Raises as :func:`export_gguf` does, and for a
    policy that was not cut to a rank.
    """
    from coala.export.base_gguf import EMBEDDING, OUTPUT, compare, read_base, write_anew, write_lora

    source = _base_of(backbone) if base is None else Path(base)
    left, right = _adapter_factors(policy, backbone)
    reader = read_base(source, backbone)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with _written_whole(Path(folder)) as work:
        difference = write_lora(work / "adapter.gguf", reader, left, right)
        if OUTPUT not in tensors:
            layer = tensors[EMBEDDING]
            write_anew(reader, work / "base.gguf", layer.data, layer.tensor_type)
            compare(source, work / "base.gguf", layer.data)
        _describe(work, policy, "gguf-lora", backbone)
        _settle(work)
        work.rename(folder)
    return _exported(Path(folder), "gguf-lora", 0, difference)


def _adapter_factors(policy: DistilledPolicy, backbone: LanguageModel) -> tuple[Float32, Float32]:
    """W left (V, r) and right (r, d), whose product is what the output layer gains."""
    if policy.right is None:
        raise ExportError(
            f"Found a policy of full rank, {policy.rank}, whose adapter is larger than the layer, expected one "
            "that was cut, fix: distil with a rank, or --to checkpoint."
        )
    Changed(backbone, policy)
    raw = backbone.transformer.get_output_embeddings().weight.detach().float().cpu().numpy()
    return np.ascontiguousarray(raw @ policy.left), policy.right


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that ``path`` is made of; a fault of the disk, whoever meets it, is one sentence."""
    from safetensors import SafetensorError

    with working_folder(path) as work:
        try:
            yield work
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise write_error(path, OSError(int(number[1]), os.strerror(int(number[1])))) from error
        except OSError as error:
            raise write_error(path, error) from error


def _settle(work: Path) -> None:
    """Have what was written on the disk before it gets its name."""
    for path in [*work.rglob("*"), work]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def planned(
    form: Form | None, out: Path | None, base: Path | None, run: Path | None = None, precision: Precision = "f16"
) -> None:
    """ExportError, before any work, for an export that is not told whole, or whose place is taken or cannot be."""
    if (form is None) != (out is None):
        raise ExportError("Found one of --to and --out, expected both or neither, fix: --to checkpoint --out FOLDER.")
    if (base is not None or precision != "f16") and form not in ("gguf", "gguf-lora"):
        raise ExportError(
            "Found --base or --precision beside a form that has none, expected --to gguf, fix: leave them out."
        )
    if out is None:
        return
    try:
        taken = os.path.lexists(out) or bool(out.stat())
    except FileNotFoundError:
        taken = False
    except OSError as error:
        raise write_error(out, error) from error
    if taken:
        raise ExportError(f"{out}: found something of that name, expected a free one, fix: another --out.")
    if run is not None and out.resolve().is_relative_to(run.resolve()):
        raise ExportError(
            f"{out}: found a place inside the run, which is the run's own, expected one outside, fix: another --out."
        )
    there = next(path for path in out.absolute().parents if path.exists())
    if not os.access(there, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise write_error(out, OSError(errno.EACCES, os.strerror(errno.EACCES)))
    if base is not None and not base.is_file():
        raise ExportError(f"{base}: found no such file, expected a GGUF file, fix: give --base FILE.")


def export_policy(
    policy: DistilledPolicy,
    run: Path | str,
    form: Form,
    out: Path | str,
    *,
    base: Path | str | None = None,
    precision: Precision = "f16",
    trust_remote_code: bool = False,
    download: bool = False,
) -> ExportedPolicy:
    """Write ``policy`` of the run ``run`` to ``out`` in one of the forms."""
    from coala.alignment import load_parts

    backbone, _, _ = load_parts(run, trust_remote_code=trust_remote_code, download=download)
    if form == "gguf":
        return export_gguf(policy, backbone, out, base=base, precision=precision)
    if form == "gguf-lora":
        return export_gguf_lora(policy, backbone, out, base=base)
    return (export_checkpoint if form == "checkpoint" else export_lora)(policy, backbone, out)


def _base_of(backbone: LanguageModel) -> Path:
    from coala.backbone.files import find
    from coala.backbone.gguf import is_gguf

    found = find(backbone.name, None, download=False)[0] if Path(backbone.name).exists() else Path(backbone.name)
    if not is_gguf(found):
        raise ExportError(
            f"{backbone.name}: found a model that was not loaded from a GGUF file, expected one to change, fix: --base "
            "FILE of the same model."
        )
    return found


def _name_of(model: Any, layer: Any) -> str:
    for name, module in model.named_modules():
        if module is layer:
            return str(name)
    raise ExportError(f"{type(model).__name__} has no output layer of its own. Use another model.")


def _tried(policy: DistilledPolicy, backbone: LanguageModel, load: Callable[[], LanguageModel]) -> float:
    """The largest difference of next-token log-probabilities; ExportError beyond what the dtype rounds."""
    ours, model = Changed(backbone, policy), load()
    worst = 0.0
    for probe in PROBES:
        row = backbone.render(probe).tokens
        wanted = ours.log_probs(backbone.hidden([row], -1)[0, -1:])
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
