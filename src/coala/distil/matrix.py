"""The output layer of a model, if its logits are that matrix times the final state and nothing else."""

from __future__ import annotations

import numpy as np
import torch

from coala.backbone import LanguageModel
from coala.values import CoalaError, Float32

# Configurations under which logits are the product times a number: how a model family names it, and whether it divides.
SCALES = {"logit_scale": False, "logits_scaling": True}
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
OTHER = "fix: distil another model"


@torch.no_grad()
def output_matrix(backbone: LanguageModel) -> Float32:
    """W (V, d) float32 with logits W h for final states h; a scale that the model applies is multiplied in.

    V is the rows of the layer, those of tokens that the tokenizer does not have included.

    Raises:
        CoalaError: for a model whose logits are bent (soft-capping), shifted (a bias), or anything else than W h.
    """
    backbone.require_head("Distilled policies")
    model = backbone.transformer
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if weight is None:
        raise CoalaError(
            f"{backbone.name}: found no single output layer ({type(model).__name__} has several, or none), expected "
            f"one matrix, {OTHER}."
        )
    if weight.ndim != 2 or not weight.is_floating_point():
        raise CoalaError(
            f"{backbone.name}: found an output layer of {str(weight.dtype).removeprefix('torch.')} of shape "
            f"{tuple(weight.shape)}, expected a matrix of plain numbers, fix: load it without quantisation."
        )
    if getattr(layer, "bias", None) is not None:
        raise CoalaError(f"{backbone.name}: found a bias in the output layer, expected a matrix alone, {OTHER}.")
    config = model.config.get_text_config()
    for name in SOFT_CAPS:
        if getattr(config, name, None):
            raise CoalaError(
                f"{backbone.name}: found soft-capped logits ({name}: {getattr(config, name)}), expected none, for no "
                f"change of the output layer is convex then, {OTHER}."
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
    theirs = backbone.logits(final)[0].cpu().numpy()
    if output.shape != (len(theirs), final.shape[1]):
        raise CoalaError(
            f"{backbone.name}: found an output layer of {output.shape[0]} x {output.shape[1]} for final states of "
            f"{final.shape[1]} numbers and {len(theirs)} logits, expected one matrix from state to logits, {OTHER}."
        )
    ours = output @ final[0].float().cpu().numpy()
    # Half precision rounds logits of size 30 to about 0.1.
    loose = 1e-3 if backbone.dtype == torch.float32 else 0.1
    if not np.abs(ours - theirs).max() <= loose * max(1.0, np.abs(ours).max() / 10):
        raise CoalaError(
            f"{backbone.name}: found logits that are not its output layer times its final state (off by "
            f"{np.abs(ours - theirs).max():.2g}), expected those of one matrix, {OTHER}."
        )
