"""What can be known to fail before any work is done: settings against the model, the machine and the files they name.

Reads configurations and the headers of weights, never weights or pairs, and writes nothing but a lock that goes again.
"""

from __future__ import annotations

from pathlib import Path

from coala.alignment.changes import check_changes
from coala.alignment.judges import check_judge
from coala.recipe import Recipe
from coala.store import DISTILLED, RunFolder, head_for
from coala.values import CoalaError


def check_settings(recipe: Recipe, run: RunFolder, cache: Path | None = None, *, restart: bool = False) -> None:
    """Raise :class:`~coala.values.CoalaError` for what ``coala align`` would find out only in the middle.

    A folder that is no run or may not be written, settings that a run cannot go on with (``restart``: it is not to), a
    rater without a head, a judge that is not there, a guidance that cannot be carried out, a package that is missing,
    an adapter that does not exist, a layer, length or pooling that the model does not have.
    """
    recipe = recipe.located()
    _check_distilled(recipe, run, restart)
    if restart:
        run.require_free()
    else:
        check_changes(recipe, run)
    for folder in (run, *([] if cache is None else [RunFolder(cache)])):
        with folder.held():
            pass
    if recipe.guidance.rater is not None:
        head_for(run.path / "head", recipe.guidance.rater)
    for name in ("judge", "labeller"):
        text = getattr(recipe.evaluation, name)
        if text is not None:
            check_judge(text)
    check_model(recipe)


def _check_distilled(recipe: Recipe, run: RunFolder, restart: bool) -> None:
    """Guidance by a policy that is not there yet, or would go with the head that it was made by."""
    asked = recipe.guidance
    there = not restart and (run.path / DISTILLED / "policy.json").is_file()
    if "distilled" in (asked.mode, asked.over) and not there:
        name = "mode" if asked.mode == "distilled" else "over"
        raise CoalaError(
            f"guidance.{name} is distilled: found no distilled policy in {run.path}, expected one. Fix: first align "
            f"without that setting, then run coala distil {run.path}"
        )


def check_model(recipe: Recipe) -> None:
    """The same of what is read of the model, and of guidance; no weights are needed."""
    from coala.alignment.parts import guidance_of
    from coala.backbone import outline
    from coala.backbone.load import check_asked
    from coala.permission import permitted

    settings = recipe.model
    guidance_of(recipe)
    names = ("revision", "device", "dtype", "adapter", "quantise")
    with permitted(code=settings.trust_remote_code):
        check_asked(settings.name, **{name: getattr(settings, name) for name in names})
    if settings.trust_remote_code:
        return  # what its own code makes of it is known once that has run
    found = outline(settings.name, settings.revision)
    if settings.layer != "auto" and not -1 <= settings.layer <= found.n_layers:
        raise CoalaError(
            f"--layer is {settings.layer}; {settings.name} has hidden states 0 (the embedding) to {found.n_layers} "
            "(the last). Fix: choose one of these, -1 for the last, or auto."
        )
    if settings.max_tokens is not None and settings.max_tokens > found.context:
        raise CoalaError(
            f"--max-tokens is {settings.max_tokens:,}; the context of {settings.name} has {found.context:,} tokens. "
            "Fix: use at most that, or remove it."
        )
    if recipe.evaluation.prompts and recipe.evaluation.max_new_tokens >= found.context:
        raise CoalaError(
            f"--max-new-tokens is {recipe.evaluation.max_new_tokens:,}; the context of {settings.name} has "
            f"{found.context:,} tokens for prompt and reply. Fix: use fewer."
        )
    if found.encoder and recipe.evaluation.prompts:
        raise CoalaError(
            f"{settings.name} is an encoder, which writes no replies, and --prompts is {recipe.evaluation.prompts}. "
            "Fix: add --prompts 0."
        )
    if found.encoder and recipe.log_ratios:
        raise CoalaError(f"{settings.name} is an encoder: it has no log ratios. Fix: remove --reference-scale.")
