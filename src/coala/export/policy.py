"""A distilled policy as files that other programs serve: a Hugging Face folder, a GGUF file, or a LoRA adapter.

Each is written beside its place with its card, read back by plain transformers and compared with the policy, and moved
there whole. A change is of the output layer alone, W (I + A), or an adapter; nothing here knows how it came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coala.decoding.adapted import load_adapted, step_log_probs
from coala.decoding.distilled import Changed
from coala.export.folder import MANIFEST, public_spec
from coala.export.gguf_file import OUTPUT, compare_files, write_changed
from coala.export.merged import merge_into
from coala.export.modelfile import modelfile
from coala.export.network import ExportError, tokenizer_of
from coala.export.policy_card import Form, Policy, PolicyFacts, checked, policy_card, policy_facts
from coala.export.reading_back import PROBES, compare, next_log_probs, plain_model
from coala.policies import DistilledAdapter, DistilledPolicy
from coala.settings import Vehicle
from coala.store import PEFT, file_digest, load_json, save_json, working_folder, write_atomic
from coala.values import CoalaError, Float32

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

FORMS: dict[Vehicle, tuple[Form, ...]] = {"output": ("checkpoint", "gguf", "lora"), "adapter": ("merged", "lora")}


@dataclass(frozen=True)
class ExportedPolicy:
    """``path`` with its ``form``; ``difference`` is the largest between its log-probabilities and the policy's.

    Over the whole vocabulary after each of ``probes`` prompts, by plain transformers; 0 probes where transformers did
    not load a GGUF file, of which the tensor is compared then. ``beside`` are the files that stand
    next to a GGUF file: its card and its Modelfile.
    """

    path: Path
    form: Form
    n_bytes: int
    probes: int
    difference: float
    beside: tuple[Path, ...] = ()

    def summary_rows(self) -> list[list[str]]:
        """What a table says of it."""
        rows = [[self.form, f"{self.path}, {self.n_bytes / 1e6:.1f} MB"]]
        rows += [["read back", checked(self.probes, self.difference)]]
        return rows + ([["beside it", ", ".join(path.name for path in self.beside)]] if self.beside else [])


def changed_layer(policy: DistilledPolicy, backbone: LanguageModel) -> Float32:
    """W (I + A) (V, d) float32, W as the model holds it: a scale of its logits stays in its configuration."""
    Changed(backbone, policy)
    raw = backbone.transformer.get_output_embeddings().weight.detach().float().cpu().numpy()
    left, right = policy.factors()
    found: Float32 = raw + (raw @ left) @ right
    return found


def export_checkpoint(
    policy: DistilledPolicy, backbone: LanguageModel, folder: Path | str, facts: PolicyFacts | None = None
) -> ExportedPolicy:
    """Write a folder that transformers, vLLM or SGLang loads as any model, its output layer no longer tied.

    Weights keep the dtype they are loaded in. Raises ``ExportError`` where the folder does not give the policy's
    probabilities when it is read back.
    """
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
        wanted, rows = _wanted(policy, backbone)
        difference = compare(
            backbone.name, wanted, next_log_probs(plain_model(work, backbone.dtype), rows), backbone.dtype
        )
        _describe(work, policy, "checkpoint", backbone, facts, difference)
        work.rename(folder)
    return _exported(Path(folder), "checkpoint", difference)


def export_lora(
    policy: DistilledPolicy, backbone: LanguageModel, folder: Path | str, facts: PolicyFacts | None = None
) -> ExportedPolicy:
    """Write a LoRA adapter of the output layer: B = W left, A = right, of the policy's rank.

    Not every engine takes one there, and some ignore it silently: compare its probabilities once it is loaded. Raises
    ``ExportError`` for a policy that was not cut to a rank, for a model whose output layer is tied to its embedding,
    and where the adapter does not give the policy's probabilities when it is read back.
    """
    from safetensors.numpy import save as save_tensors

    if policy.right is None:
        raise ExportError(
            f"The policy has full rank, {policy.rank}; an adapter of that rank is larger than the layer. Fix: distil "
            "with a rank, or export a checkpoint."
        )
    Changed(backbone, policy)
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
                "base_model_name_or_path": public_spec(policy.spec).backbone,
                "r": policy.rank,
                "lora_alpha": policy.rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
                "target_modules": [name],
            },
        )
        difference = _tried_lora(policy, backbone, work)
        _describe(work, policy, "lora", backbone, facts, difference)
        work.rename(folder)
    return _exported(Path(folder), "lora", difference)


def export_adapter(
    adapter: DistilledAdapter,
    backbone: LanguageModel,
    form: Form,
    folder: Path | str,
    facts: PolicyFacts | None = None,
    *,
    trust_remote_code: bool = False,
) -> ExportedPolicy:
    """Write ``adapter`` of ``backbone``, the base: ``lora`` as peft reads it, ``merged`` as an ordinary checkpoint.

    Raises ``ExportError`` where the files do not give the adapter's probabilities when they are read back.
    """
    if form not in FORMS["adapter"]:
        raise _unfit(form, "adapter")
    with working_folder(Path(folder)) as work:
        if form == "merged":
            difference = merge_into(
                work,
                adapter.folder,
                base=backbone.name,
                revision=backbone.revision or None,
                trust_remote_code=trust_remote_code,
            )
        else:
            for name in PEFT:
                write_atomic(work / name, (adapter.folder / name).read_bytes())
            config = load_json(work / PEFT[1])
            save_json(work / PEFT[1], {**config, "base_model_name_or_path": public_spec(adapter.spec).backbone})
            difference = _tried_lora(adapter, backbone, work)
        _describe(work, adapter, form, backbone, facts, difference)
        work.rename(folder)
    return _exported(Path(folder), form, difference)


def export_gguf(
    policy: DistilledPolicy,
    backbone: LanguageModel,
    path: Path | str,
    facts: PolicyFacts | None = None,
    *,
    base: Path | str | None = None,
) -> ExportedPolicy:
    """Write the GGUF file ``base`` (the one the model was loaded from) with the output layer changed, in float16.

    Every key and every other tensor is copied byte for byte, so that any architecture that llama.cpp knows will do.
    The layer is added where the file ties it to the embedding. A card and a Modelfile for Ollama are written beside it,
    FILE.md and FILE.Modelfile. Raises ``ExportError`` if the file is of another shape, and where transformers reads it
    back and its log-probabilities are not the policy's of its states.
    """
    import gguf

    path, source = Path(path), _base_of(backbone) if base is None else Path(base)
    beside = beside_of(path)
    for taken in (path, *beside):
        if taken.exists():
            raise ExportError(f"{taken}: exists. Give another name, or delete it.")
    facts = facts or PolicyFacts()
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
        write_changed(reader, made, layer)
        difference, probes = compare_files(source, made, layer), 0
        if (read := _read_gguf(policy, backbone, made)) is not None:
            difference, probes = read, len(PROBES)
        write_atomic(beside[0], policy_card(policy, backbone, "gguf", facts, checked(probes, difference)))
        write_atomic(beside[1], modelfile(path.name, backbone, facts.sampling))
        made.rename(path)
    return ExportedPolicy(path, "gguf", path.stat().st_size, probes, difference, beside)


def beside_of(path: Path) -> tuple[Path, Path]:
    """The card and the Modelfile that stand beside a GGUF file."""
    return path.with_suffix(".md"), path.with_suffix(".Modelfile")


def _read_gguf(policy: DistilledPolicy, backbone: LanguageModel, made: Path) -> float | None:
    """The largest difference between the file's log-probabilities and the policy's of its own states.

    None where transformers does not load it. A file that is quantised otherwise has states of its own.
    """
    from coala.backbone import load_backbone

    options: dict[str, Any] = {
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "template": backbone.template.partition(":")[0],
    }
    try:
        model = load_backbone(made, device="cpu", **options)
    except CoalaError:
        return None
    changed, wanted, found = Changed(backbone, policy), [], []
    for probe in PROBES:
        final = model.hidden([backbone.render(probe).tokens], -1)[0, -1:]
        wanted.append(changed.log_probs(final.to(backbone.device)))
        found.append(torch.log_softmax(model.logits(final), -1))
    # Half precision of the layer, whatever the model is computed in.
    return compare(made.name, wanted, found, torch.float16)


def planned(form: Form | None, out: Path | None, base: Path | None, into: Vehicle = "output") -> None:
    """ExportError, before any work, for an export that is not told whole or whose place is taken."""
    if (form is None) != (out is None):
        raise ExportError("Found one of --to and --out; expected both or neither. Fix: --to checkpoint --out FOLDER.")
    if form is not None and form not in FORMS[into]:
        raise _unfit(form, into)
    if base is not None and form != "gguf":
        raise ExportError("--base belongs to --to gguf; the other forms are made of the model itself.")
    for taken in () if out is None else (out, *(beside_of(out) if form == "gguf" else ())):
        if taken.exists():
            raise ExportError(f"{taken}: exists. Give another --out, or delete it.")


def _unfit(form: Form, into: Vehicle) -> ExportError:
    ways = {
        "gguf": "an adapter changes tensors that llama.cpp's converter names and orders for each architecture. Fix: "
        "--to merged, then its convert_hf_to_gguf.py; or --into output, which changes a single one",
        "checkpoint": "an adapter has to be merged first. Fix: --to merged",
        "merged": "a change of the output layer has nothing to merge. Fix: --to checkpoint",
    }
    told = f"Found --to {form} of --into {into}; expected {' or '.join(FORMS[into])}, for"
    return ExportError(f"{told} {ways[form]}.")


def export_policy(
    policy: Policy,
    run: Path | str,
    form: Form,
    out: Path | str,
    *,
    base: Path | str | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
) -> ExportedPolicy:
    """Write ``policy`` of the run ``run`` to ``out`` in one of the forms of :data:`FORMS`."""
    from coala.alignment import load_parts

    backbone, _, _ = load_parts(run, trust_remote_code=trust_remote_code, download=download)
    facts = policy_facts(run, policy)
    if isinstance(policy, DistilledAdapter):
        return export_adapter(policy, backbone, form, out, facts, trust_remote_code=trust_remote_code)
    if form == "gguf":
        return export_gguf(policy, backbone, out, facts, base=base)
    if form == "merged":
        raise _unfit(form, "output")
    return (export_checkpoint if form == "checkpoint" else export_lora)(policy, backbone, out, facts)


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


def _wanted(policy: Policy, backbone: LanguageModel) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The policy's log-probabilities after each probe, and the probes in tokens."""
    rows = [backbone.render(probe).tokens for probe in PROBES]
    if isinstance(policy, DistilledPolicy):
        changed = Changed(backbone, policy)
        return [changed.log_probs(backbone.hidden([row], -1)[0, -1:])[0] for row in rows], rows
    options: dict[str, Any] = {"device": str(backbone.device), "dtype": str(backbone.dtype).removeprefix("torch.")}
    adapted = load_adapted(policy, **options)
    return [step_log_probs(adapted, row, (), 1)[0] for row in rows], rows


def _tried_lora(policy: Policy, backbone: LanguageModel, work: Path) -> float:
    """By peft on the base as plain transformers loads it; a base in GGUF as it is dequantised here."""
    from coala.backbone import load_backbone
    from coala.backbone.files import find
    from coala.backbone.gguf import is_gguf

    wanted, rows = _wanted(policy, backbone)
    place = find(backbone.name, backbone.revision or None, download=False)[0]
    if is_gguf(place):
        dtype, template = str(backbone.dtype).removeprefix("torch."), backbone.template.partition(":")[0]
        model = load_backbone(backbone.name, device="cpu", dtype=dtype, template=template, adapter=work, download=False)
        found = [step_log_probs(model, row, (), 1)[0] for row in rows]
    else:
        found = next_log_probs(plain_model(place, backbone.dtype, work), rows)
    return compare(backbone.name, wanted, found, backbone.dtype)


def _describe(
    work: Path,
    policy: Policy,
    form: Form,
    backbone: LanguageModel,
    facts: PolicyFacts | None,
    difference: float,
) -> None:
    """The manifest, and the card, which may be edited."""
    own = ("program", "support", "ridge", "rank", "certificate", "rate", "epoch")
    files = {p.name: file_digest(p) for p in sorted(work.iterdir()) if p.is_file()}
    about = {name: getattr(policy, name) for name in own if hasattr(policy, name)}
    weights = {"weights": backbone.weights, "files": files}
    save_json(work / MANIFEST, {"form": f"distilled {form}", **about, **weights})
    text = policy_card(policy, backbone, form, facts or PolicyFacts(), checked(len(PROBES), difference))
    write_atomic(work / "README.md", text)


def _exported(folder: Path, form: Form, difference: float) -> ExportedPolicy:
    n_bytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return ExportedPolicy(folder, form, n_bytes, len(PROBES), difference)
