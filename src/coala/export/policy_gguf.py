"""A distilled policy in a GGUF file, and as a LoRA adapter in one, whose strength llama.cpp takes from each request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from coala.export.base_gguf import EMBEDDING, OUTPUT, compare_files, read_base, write_anew, write_lora
from coala.export.modelfile import modelfile
from coala.export.network import ExportError
from coala.export.policy_card import PolicyFacts, checked, describe, policy_card
from coala.export.reading_back import PROBES, ExportedPolicy, compare
from coala.export.writing import check_free, settle, written_whole
from coala.policies import DistilledPolicy
from coala.store import write_atomic
from coala.values import CoalaError, Float32

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

Precision = Literal["f16", "q8_0"]  # numbers of the output layer


def changed_layer(policy: DistilledPolicy, backbone: LanguageModel) -> Float32:
    """W (I + A) (V, d) float32, W as the model holds it: a scale of its logits stays in its configuration."""
    backbone.with_policy(policy).changed()  # refuses a policy of other weights
    raw = backbone.transformer.get_output_embeddings().weight.detach().float().cpu().numpy()
    left, right = policy.factors()
    found: Float32 = raw + (raw @ left) @ right
    return found


def lora_factors(policy: DistilledPolicy, backbone: LanguageModel) -> tuple[Float32, Float32]:
    """W left (V, r) and right (r, d), whose product is what the output layer gains."""
    if policy.right is None:
        raise ExportError(
            f"Found a policy of full rank, {policy.rank}, whose adapter is larger than the layer, expected one "
            "that was cut, fix: distil with a rank, or --to checkpoint."
        )
    backbone.with_policy(policy).changed()  # refuses a policy of other weights
    raw = backbone.transformer.get_output_embeddings().weight.detach().float().cpu().numpy()
    return np.ascontiguousarray(raw @ policy.left), policy.right


def export_gguf(
    policy: DistilledPolicy,
    backbone: LanguageModel,
    path: Path | str,
    facts: PolicyFacts | None = None,
    *,
    base: Path | str | None = None,
    precision: Precision = "f16",
) -> ExportedPolicy:
    """Write the GGUF file ``base`` (the one the model was loaded from) with the output layer changed.

    Every key and every other tensor is copied byte for byte, so that any architecture that llama.cpp knows will do.
    The layer is added where the file ties it to the embedding; ``precision`` q8_0 takes half the room of f16. A
    card and a Modelfile for Ollama are written beside it, FILE.md and FILE.Modelfile. Raises ``ExportError`` if the
    file is of another model or part of one, if its logits are not those of the model, and where transformers reads it
    back and its log-probabilities are not the policy's of its states.
    """
    import gguf

    path, source = Path(path), _base_of(backbone) if base is None else Path(base)
    check_free(path)
    check_beside(path)
    facts, beside = facts or PolicyFacts(), beside_of(path)
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
    with written_whole(path.with_name(f"{path.name}.parts")) as work:
        made = work / "model.gguf"
        write_anew(reader, made, written, kind)
        compare_files(source, made, written)
        difference, probes = float(np.abs(rounded - wanted).max()), 0
        if (read := _read_back(policy, backbone, made, precision)) is not None:
            difference, probes = read, len(PROBES)
        settle(work)
        # The file itself is last: until it is there, the same command makes all three again.
        write_atomic(beside[0], policy_card(policy, backbone, "gguf", facts, checked(probes, difference)))
        write_atomic(beside[1], modelfile(path.name, backbone, facts.sampling))
        made.rename(path)
    return ExportedPolicy(path, "gguf", path.stat().st_size, probes, difference, beside)


def export_gguf_lora(
    policy: DistilledPolicy,
    backbone: LanguageModel,
    folder: Path | str,
    facts: PolicyFacts | None = None,
    *,
    base: Path | str | None = None,
) -> ExportedPolicy:
    """Write ``folder``/adapter.gguf, a LoRA of the output layer that llama.cpp scales anew for each request.

    A file that ties its output layer to the embedding holds no tensor to adapt; base.gguf is then that file with its
    embedding, byte for byte, as its output layer too: the same model. Raises as :func:`export_gguf` does, and for a
    policy that was not cut to a rank.
    """
    source = _base_of(backbone) if base is None else Path(base)
    left, right = lora_factors(policy, backbone)
    reader = read_base(source, backbone)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with written_whole(Path(folder)) as work:
        difference = write_lora(work / "adapter.gguf", reader, left, right)
        if OUTPUT not in tensors:
            layer = tensors[EMBEDDING]
            write_anew(reader, work / "base.gguf", layer.data, layer.tensor_type)
            compare_files(source, work / "base.gguf", layer.data)
        describe(work, policy, "gguf-lora", backbone, facts, "tensors were read back; log-probabilities were not")
        settle(work)
        work.rename(folder)
    n_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    return ExportedPolicy(Path(folder), "gguf-lora", n_bytes, 0, difference)


def beside_of(path: Path) -> tuple[Path, Path]:
    """The card and the Modelfile that stand beside a GGUF file."""
    return path.with_suffix(".md"), path.with_suffix(".Modelfile")


def check_beside(path: Path) -> None:
    """Refuse files of someone else where the card and the Modelfile go; those of an export that was killed are not."""
    card, made = beside_of(path)
    ours = made.is_file() and made.read_text(errors="replace").startswith(f"FROM ./{path.name}\n")
    ours = ours or (card.is_file() and not made.exists() and card.read_text(errors="replace").startswith("---\n"))
    for taken in () if ours else (card, made):
        if taken.exists():
            raise ExportError(f"{taken}: found something of that name, expected a free one, fix: another --out.")


def _read_back(policy: DistilledPolicy, backbone: LanguageModel, made: Path, precision: Precision) -> float | None:
    """The largest difference between the file's log-probabilities and the policy's of its own states.

    None where transformers does not read the architecture. A file that is quantised otherwise has states of its own.
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
    changed, wanted, found = backbone.with_policy(policy).changed(), [], []
    for probe in PROBES:
        final = model.hidden([backbone.render(probe).tokens], -1)[0, -1:]
        wanted.append(torch.log_softmax(changed.logits(final.to(backbone.device)), -1))
        found.append(torch.log_softmax(model.logits(final), -1))
    # Half precision of the layer, or 8 bits of it, whatever the model is computed in.
    return compare(made.name, wanted, found, torch.float16 if precision == "f16" else torch.int8)


def _base_of(backbone: LanguageModel) -> Path:
    """The file that the model was loaded from: in a folder, in an installed package, or from the hub."""
    from coala.backbone import BackboneError
    from coala.backbone.files import find
    from coala.backbone.gguf import is_gguf

    try:
        found = find(backbone.name, backbone.revision or None, download=False)[0]
    except BackboneError:  # with an adapter, or an object of the caller's: no file is it
        found = Path(backbone.name)
    if not is_gguf(found):
        raise ExportError(
            f"{backbone.name}: found a model that was not loaded from a GGUF file, expected one to change, fix: --base "
            "FILE of the same model."
        )
    return found
