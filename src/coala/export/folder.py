"""A head and the model it reads as one Hugging Face folder, written beside its place, tried, and moved there whole.

Two forms: ``reward model`` holds any head and brings its code along; ``linear head`` is a stock class with one linear
layer and holds only what fits there. Knows files and configurations; scores come from ``rewards``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.export.card import RunFacts, card
from coala.export.network import (
    ExportError,
    linear_network,
    rendering,
    reward_network,
    tokenizer_of,
)
from coala.export.rewards import score_replies
from coala.store import file_digest, load_json, save_json, working_folder, write_atomic
from coala.values import ConvexHead, FeatureSpec, Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

MANIFEST = "coala.json"
CODE = ("modeling_coala.py", "tokenization_coala.py")
# What is tried before a folder is handed over: empty, short, long, several turns, borders that tokenizers merge.
PROBES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("How do I boil an egg?",), "Eight minutes in boiling water."),
    (("Name a colour",), ""),
    (("Tell me a story.", "Once upon a time.", "Go on"), "\n\nThe end, they said: 'no'.\n"),
    (("  two spaces ",), "  and some \u00e9\u00e0\u4e2d\u6587 \U0001f600 here "),
    (("x",), "y"),
    (("one two three four five six seven eight nine ten " * 40,), "a long prompt, and a reply " * 30),
)


@dataclass(frozen=True)
class Exported:
    """``folder`` with its ``form``; ``difference`` is the largest one found between its scores and the head's own.

    Over ``probes`` conversations, in units of one plus the largest score.
    """

    folder: Path
    form: str
    n_bytes: int
    probes: int
    difference: float


def export_reward_model(
    head: ConvexHead, backbone: LanguageModel, folder: Path | str, facts: RunFacts | None = None
) -> Exported:
    """Write an ``AutoModelForSequenceClassification`` folder that scores as ``head`` does on ``backbone``.

    It holds the model cut at the head's layer, the head, the tokenizer, the code of both and a card; loading it needs
    ``trust_remote_code=True``. Weights keep the dtype they are loaded in. Raises ``SpecMismatch`` if the head was
    fitted on another model, ``ExportError`` for a model that such a folder cannot hold.
    """
    backbone.require(head.spec)
    with working_folder(Path(folder)) as work:
        network = reward_network(head, backbone, public_spec(head.spec))
        _save(network, backbone, work)
        _finish_tokenizer(work, backbone, rendering(backbone, head))
        for name in CODE:
            write_atomic(work / name, (resources.files("coala.export.shipped") / name).read_text(encoding="utf-8"))
        difference = _tried(head, backbone, lambda: _load_reward_model(work, backbone))
        return _close(work, Path(folder), "reward model", head, facts, difference)


def export_linear_head(
    head: ConvexHead,
    backbone: LanguageModel,
    folder: Path | str,
    facts: RunFacts | None = None,
    *,
    drop_constant: bool = False,
) -> Exported:
    """Write a stock sequence-classification folder, which needs no code of its own, for a head that fits there.

    That is one linear layer without a constant on the final state of the last token. With ``drop_constant`` a constant
    is left out: all scores shift by as much and no preference changes. Raises ``ExportError`` with the reason for any
    other head.
    """
    backbone.require(head.spec)
    if drop_constant:
        linear = head.linear.copy()
        linear[-1] = 0
        head = replace(head, linear=linear)
    with working_folder(Path(folder)) as work:
        network, pad = linear_network(head, backbone)
        _save(network, backbone, work)
        _finish_tokenizer(work, backbone, None, pad)
        difference = _tried(head, backbone, lambda: _load_linear_head(work, backbone, head))
        return _close(work, Path(folder), "linear head", head, facts, difference)


def verify_folder(folder: Path | str) -> dict[str, Any]:
    """What an exported folder's ``coala.json`` says, if every file is the one it lists; README.md may be edited."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ExportError(f"{folder}: is not an exported folder (it has no {MANIFEST}). Make one with `coala export`.")
    manifest = load_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ExportError(f"{folder}: {MANIFEST} lists no files. Export again.")
    lost = sorted(name for name in listed if not (folder / name).is_file())
    changed = sorted(name for name in listed if name not in lost and file_digest(folder / name) != listed[name])
    code = (".py", ".safetensors", ".bin", ".json", ".jinja")
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix in code}
    added = sorted(there - {*listed, MANIFEST})
    parts = {"missing": lost, "changed": changed, "not listed": added}
    if any(parts.values()):
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
        raise ExportError(f"{folder}: is not what was exported ({said}). Export again, and load nothing from it.")
    return dict(manifest)


def public_spec(spec: FeatureSpec) -> FeatureSpec:
    """The spec without the folders of this machine: a model in a folder is known by the folder's name."""
    if spec.revision:
        return spec
    return replace(spec, backbone="+".join(Path(part).name for part in spec.backbone.split("+")))


# --- files -------------------------------------------------------------------------------------------------------


def _save(network: Any, backbone: LanguageModel, work: Path) -> None:
    from coala.backbone.silence import quiet

    with quiet():
        network.save_pretrained(work)
        tokenizer_of(backbone).save_pretrained(work)


def _finish_tokenizer(
    work: Path, backbone: LanguageModel, settings: dict[str, Any] | None, pad: str | None = None
) -> None:
    """Give the tokenizer a padding token, and with ``settings`` the code that renders and marks replies."""
    if not (work / "tokenizer.json").is_file():
        raise ExportError(
            f"{backbone.name}: its tokenizer has no fast form (tokenizer.json), which the folder needs. "
            "Convert it with AutoTokenizer.from_pretrained(...).save_pretrained(...) where tokenizers can."
        )
    path = work / "tokenizer_config.json"
    stored = load_json(path)
    for name in ("name_or_path", "local_files_only", "is_local"):
        stored.pop(name, None)
    tokenizer = tokenizer_of(backbone)
    pad = pad or tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    stored |= {"pad_token": pad or tokenizer.convert_ids_to_tokens(0), "padding_side": "right"}
    if settings is not None:
        name = "tokenization_coala.CoalaTokenizer"
        stored |= {"tokenizer_class": "CoalaTokenizer", "auto_map": {"AutoTokenizer": [None, name]}, "coala": settings}
    save_json(path, stored)


def _close(
    work: Path, folder: Path, form: str, head: ConvexHead, facts: RunFacts | None, difference: float
) -> Exported:
    """Card and manifest, and the folder in its place."""
    spec = public_spec(head.spec)
    files = {p.relative_to(work).as_posix(): file_digest(p) for p in sorted(work.rglob("*")) if p.is_file()}
    certificate = head.certificate
    manifest = {
        "form": form,
        "spec": spec,
        "gate_on": head.gate_on,
        "n_neurons": head.n_neurons,
        "temperature": head.temperature,
        "certificate": None
        if certificate is None
        else {"program": certificate.program, "relative_gap": certificate.relative_gap, "status": certificate.status},
        "tried": {"conversations": len(PROBES), "largest_difference": difference},
        "files": files,
    }
    save_json(work / MANIFEST, manifest)
    write_atomic(work / "README.md", card(head, spec, form, facts, difference))
    n_bytes = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
    if folder.is_dir():
        folder.rmdir()  # empty: seen before anything was written
    os.replace(work, folder)
    return Exported(folder, form, n_bytes, len(PROBES), difference)


# --- trying it ---------------------------------------------------------------------------------------------------

_Batch = tuple[list[list[int]], Callable[[], np.ndarray[Any, Any]]]


def _probes() -> tuple[list[tuple[Turn, ...]], list[str]]:
    roles = ("user", "assistant")
    prompts = [tuple(Turn(roles[i % 2], text) for i, text in enumerate(turns)) for turns, _ in PROBES]  # type: ignore[arg-type]
    return prompts, [reply for _, reply in PROBES]


def _tried(head: ConvexHead, backbone: LanguageModel, load: Callable[[], Any]) -> float:
    """Largest difference of scores, once the folder has been read back and made the same tokens."""
    prompts, replies = _probes()
    own = score_replies(prompts, replies, head, backbone).astype(np.float64)
    spec = head.spec
    encode, score = load()
    rows = [
        backbone.render(p, r, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos).tokens
        for p, r in zip(prompts, replies, strict=True)
    ]
    encoded = encode(prompts, replies, rows)
    for row, ids in zip(rows, encoded, strict=True):
        if ids is not None and list(ids) != list(row):
            raise ExportError(
                f"{backbone.name}: the tokenizer read back from the folder makes other tokens than the one the head "
                f"was fitted with ({len(ids)} against {len(row)}). Fix: save the model's tokenizer again and refit."
            )
    found = np.asarray(score(prompts, replies, rows), dtype=np.float64)
    difference = float(np.abs(found - own).max() / (1 + np.abs(own).max()))
    tolerance = 1e-4 if backbone.dtype.itemsize >= 4 else 5e-2
    if not difference <= tolerance:
        raise ExportError(
            f"{backbone.name}: the folder scores otherwise than the head (relative difference {difference:.1e}; "
            f"expected at most {tolerance:.0e}). This kind of model cannot be exported."
        )
    return difference


def _messages(prompt: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in prompt]


def _load_reward_model(work: Path, backbone: LanguageModel) -> Any:
    # The very files that were written: this package ships them.
    from coala.export.shipped.modeling_coala import CoalaRewardModel
    from coala.export.shipped.tokenization_coala import CoalaTokenizer

    tokenizer: Any = CoalaTokenizer.from_pretrained(work, local_files_only=True)
    model = _read_back(CoalaRewardModel, work, backbone)

    def encode(prompts: Any, replies: Any, rows: Any) -> Any:
        return tokenizer(text=[_messages(prompt) for prompt in prompts], text_pair=list(replies))["input_ids"]

    def score(prompts: Any, replies: Any, rows: Any) -> Any:
        inputs = tokenizer(
            text=[_messages(prompt) for prompt in prompts], text_pair=list(replies), padding=True, return_tensors="pt"
        )
        return model(**inputs.to(backbone.device)).logits[:, 0].float().cpu().numpy()

    return encode, score


def _load_linear_head(work: Path, backbone: LanguageModel, head: ConvexHead) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(work, local_files_only=True)
    model = _read_back(AutoModelForSequenceClassification, work, backbone)

    def encode(prompts: Any, replies: Any, rows: Any) -> Any:
        # Only the vocabulary is compared: how a text is rendered is up to the caller of a stock folder.
        same = json.dumps(tokenizer.get_vocab(), sort_keys=True) == json.dumps(
            tokenizer_of(backbone).get_vocab(), sort_keys=True
        )
        return rows if same else [[]] * len(rows)

    def score(prompts: Any, replies: Any, rows: Any) -> Any:
        padded = tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding=True, return_tensors="pt")
        return model(**padded.to(backbone.device)).logits[:, 0].float().cpu().numpy()

    return encode, score


def _read_back(kind: Any, work: Path, backbone: LanguageModel) -> Any:
    from coala.backbone.silence import quiet

    with quiet():
        model, info = kind.from_pretrained(
            work, use_safetensors=True, local_files_only=True, dtype=backbone.dtype, output_loading_info=True
        )
    astray = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if astray:
        raise ExportError(
            f"{backbone.name}: {len(astray)} weight(s) are missing from the folder ({astray[0]}, ...). This kind of "
            "model cannot be exported."
        )
    return model.eval().requires_grad_(False).to(backbone.device)
