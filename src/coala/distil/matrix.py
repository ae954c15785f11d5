"""The output layer of a model, if its logits are that matrix times the final state and nothing else."""

from __future__ import annotations

import numpy as np
import torch

from coala.backbone import LanguageModel
from coala.values import CoalaError, Float32

# Configurations under which logits are the product times a number: how a model family names it, and whether it divides.
SCALES = {"logit_scale": False, "logits_scaling": True}
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


@torch.no_grad()
def output_matrix(backbone: LanguageModel) -> Float32:
    """W (V, d) float32 with logits W h for final states h; a scale that the model applies is multiplied in.

    Raises:
        CoalaError: for a model whose logits are bent (soft-capping), shifted (a bias), or anything else than W h.
    """
    backbone.require_head("Distilled policies")
    model = backbone.transformer
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise CoalaError(
            f"{backbone.name} has no output layer of plain numbers, so nothing can be distilled into it. Fix: load it "
            "without quantisation."
        )
    if getattr(layer, "bias", None) is not None:
        raise CoalaError(f"{backbone.name} has a bias in its output layer; distillation expects a matrix alone.")
    config = model.config.get_text_config()
    for name in SOFT_CAPS:
        if getattr(config, name, None):
            raise CoalaError(
                f"{backbone.name} soft-caps its logits ({name}: {getattr(config, name)}), and no change of the "
                "output layer is convex then. Fix: distil another model."
            )
    scale = 1.0
    for name, divides in SCALES.items():
        value = getattr(config, name, None)
        if value:
            scale *= 1 / value if divides else value
    found: Float32 = scale * weight.detach().float().cpu().numpy()
    _compare(backbone, found)
    return found


def _compare(backbone: LanguageModel, output: Float32) -> None:
    final = backbone.hidden([[1 + t % (len(output) - 1) for t in range(4)]], -1)[0, -1:]
    ours = output @ final[0].float().cpu().numpy()
    theirs = backbone.logits(final)[0].cpu().numpy()
    # Half precision rounds logits of size 30 to about 0.1.
    loose = 1e-3 if backbone.dtype == torch.float32 else 0.1
    if not np.abs(ours - theirs).max() <= loose * max(1.0, np.abs(ours).max() / 10):
        raise CoalaError(
            f"The logits of {backbone.name} are not its output layer times its final state (off by "
            f"{np.abs(ours - theirs).max():.2g}), so a change of that layer is not what it would be taken for. Fix: "
            "distil another model."
        )
