"""A distilled policy as files that other programs serve: a Hugging Face folder, a GGUF file, or a LoRA adapter.

Each is written beside its place with its card, read back by plain transformers and compared with the policy, and moved
there whole. A change is of the output layer alone, W (I + A), or an adapter; nothing here knows how it came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

import torch

from coala.callbacks import OnNote, quiet
from coala.decoding.adapted import load_adapted, step_log_probs
from coala.export.folder import MANIFEST, public_spec
from coala.export.merged import merge_into
from coala.export.network import ExportError, tokenizer_of
from coala.export.policy_card import Form, Policy, PolicyFacts, checked, describe, gguf_commands, policy_facts
from coala.export.policy_gguf import (
    Precision,
    beside_of,
    changed_layer,
    check_beside,
    export_gguf,
    export_gguf_lora,
    lora_factors,
)
from coala.export.reading_back import PROBES, ExportedPolicy, compare, next_log_probs, plain_model
from coala.export.writing import check_free, older_names, settle, written_whole
from coala.policies import DistilledAdapter, DistilledPolicy
from coala.settings import Vehicle
from coala.store import DISTILLED, PEFT, RunFolder, digest, load_json, run_policy, save_json, write_atomic

if TYPE_CHECKING:
    from coala.alignment.parts import LoadParts
    from coala.backbone import LanguageModel

FORMS: dict[Vehicle, tuple[Form, ...]] = {
    "output": ("checkpoint", "gguf", "lora", "gguf-lora"),
    "adapter": ("merged", "lora"),
}


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
    with written_whole(Path(folder)) as work:
        state = {key: value for key, value in model.state_dict().items() if key != f"{name}.weight"}
        state[f"{name}.weight"] = torch.from_numpy(layer).to(backbone.dtype)
        with quiet():
            model.save_pretrained(work, state_dict=state)
            tokenizer_of(backbone).save_pretrained(work)
        config = load_json(work / "config.json")
        config["tie_word_embeddings"] = False
        config.pop("_name_or_path", None)
        config.pop("quantization_config", None)
        config |= older_names(config)
        save_json(work / "config.json", config)
        wanted, rows = _wanted(policy, backbone)
        difference = compare(
            backbone.name, wanted, next_log_probs(plain_model(work, backbone.dtype), rows), backbone.dtype
        )
        describe(work, policy, "checkpoint", backbone, facts, checked(len(PROBES), difference))
        settle(work)
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

    left, right = lora_factors(policy, backbone)
    model = backbone.transformer
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ExportError(
            f"{backbone.name} ties its output layer to its embedding, and engines differ in what an adapter of it then "
            "changes; expected a layer of its own. Fix: --to checkpoint or --to gguf."
        )
    name = _name_of(model, model.get_output_embeddings())
    with written_whole(Path(folder)) as work:
        tensors = {"lora_A": right, "lora_B": left}
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
        describe(work, policy, "lora", backbone, facts, checked(len(PROBES), difference))
        settle(work)
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
    with written_whole(Path(folder)) as work:
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
        describe(work, adapter, form, backbone, facts, checked(len(PROBES), difference))
        settle(work)
        work.rename(folder)
    return _exported(Path(folder), form, difference)


def planned(
    form: Form | None,
    out: Path | None,
    base: Path | None,
    into: Vehicle = "output",
    run: Path | None = None,
    precision: Precision = "f16",
) -> None:
    """ExportError, before any work, for an export that is not told whole, or whose place is taken or cannot be."""
    if (form is None) != (out is None):
        raise ExportError("Found one of --to and --out, expected both or neither, fix: --to checkpoint --out FOLDER.")
    if form is not None and form not in FORMS[into]:
        raise _unfit(form, into)
    if (base is not None and form not in ("gguf", "gguf-lora")) or (precision != "f16" and form != "gguf"):
        raise ExportError("Found --base or --precision with another format, expected --to gguf, fix: remove them.")
    if out is not None:
        check_free(out, run)
        if form == "gguf":
            check_beside(out)
    if base is not None and not base.is_file():
        raise ExportError(f"{base}: found no such file, expected a GGUF file, fix: give --base FILE.")


def _unfit(form: Form, into: Vehicle) -> ExportError:
    ways = {
        "gguf": "an adapter changes tensors that llama.cpp's converter names and orders for each architecture. Fix: "
        "--to merged, then its convert_hf_to_gguf.py; or --into output, which changes a single one",
        "gguf-lora": "an adapter changes tensors that llama.cpp names and orders for each architecture. Fix: --to "
        "lora, then its convert_lora_to_gguf.py",
        "checkpoint": "an adapter must be merged first. Fix: use --to merged",
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
    precision: Precision = "f16",
    trust_remote_code: bool = False,
    download: bool = False,
    parts: LoadParts | None = None,
) -> ExportedPolicy:
    """Write ``policy`` of the run ``run`` to ``out`` in one of the forms of :data:`FORMS`.

    ``parts`` are the run's, if its model is loaded already.
    """
    from coala.alignment import load_parts

    backbone, _, _ = parts() if parts else load_parts(run, trust_remote_code=trust_remote_code, download=download)
    facts = policy_facts(run, policy)
    if isinstance(policy, DistilledAdapter):
        return export_adapter(policy, backbone, form, out, facts, trust_remote_code=trust_remote_code)
    if form == "gguf":
        return export_gguf(policy, backbone, out, facts, base=base, precision=precision)
    if form == "gguf-lora":
        return export_gguf_lora(policy, backbone, out, facts, base=base)
    if form == "merged":
        raise _unfit(form, "output")
    return (export_checkpoint if form == "checkpoint" else export_lora)(policy, backbone, out, facts)


@dataclass(frozen=True)
class ServedPolicy:
    """A policy's file or folder beside its run, and ``commands``, each of which serves it."""

    path: Path
    commands: tuple[str, ...]


def export_beside(
    run: RunFolder, form: Literal["checkpoint", "gguf"], *, parts: LoadParts | None = None, on_note: OnNote = quiet
) -> ServedPolicy | None:
    """Write the distilled policy of ``run`` to RUN-served or RUN-served.gguf, unless it is there of this very policy.

    None, and a note, where the run has no policy, or another one is there.
    """
    if not (run.path / DISTILLED / "policy.json").exists():
        return None
    policy = run_policy(run)
    out = run.path.with_name(f"{run.path.name}-served{'.gguf' if form == 'gguf' else ''}")
    if not out.exists():
        export_policy(policy, run.path, form, out, parts=parts)
    elif not _is_of(policy, out):
        on_note(f"{out} is there and is not of this policy, so that nothing was written; delete it and run again")
        return None
    if form == "checkpoint":
        return ServedPolicy(out, (f"vllm serve {quote(str(out))}",))
    return ServedPolicy(out, gguf_commands(str(out), policy_facts(run.path, policy).sampling, run.path.name))


def _is_of(policy: DistilledPolicy, out: Path) -> bool:
    """Whether what was exported to ``out`` names this very change: a folder in its manifest, a file in its card."""
    told = beside_of(out)[0] if out.is_file() else out / MANIFEST
    return told.is_file() and digest(policy.change) in told.read_text(errors="replace")


def _name_of(model: Any, layer: Any) -> str:
    for name, module in model.named_modules():
        if module is layer:
            return str(name)
    raise ExportError(f"{type(model).__name__} has no output layer of its own. Use another model.")


def _wanted(policy: Policy, backbone: LanguageModel) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The policy's log-probabilities after each probe, and the probes in tokens."""
    rows = [backbone.render(probe).tokens for probe in PROBES]
    if isinstance(policy, DistilledPolicy):
        changed = backbone.with_policy(policy).changed()
        return [step_log_probs(changed, row, (), 1)[0] for row in rows], rows
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


def _exported(folder: Path, form: Form, difference: float) -> ExportedPolicy:
    n_bytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return ExportedPolicy(folder, form, n_bytes, len(PROBES), difference)
