"""What a run is made of once it is loaded: model, head and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from coala.alignment.context import open_backbone
from coala.permission import permitted
from coala.recipe import Recipe, recipe_of, refuse_asked_code
from coala.store import RunFolder, head_for, run_policy

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead

    Parts = tuple[LanguageModel, ConvexHead, Guidance]
    # Asked once the parts are needed, by steps of one run that shall load its model once.
    LoadParts = Callable[[], Parts]


def load_parts(
    path: Path | str, *, trust_remote_code: bool = False, download: bool = False, rater: str | None = None
) -> Parts:
    """Model, head and guidance of a finished run; refuses a model that is not the one the head was fitted on.

    The head is that of the ``rater`` named here or by the run's guidance, else everybody's. The model knows the run's
    distilled policy, which is read when it is first decoded.

    A run may be somebody else's: its settings cannot have Python code run that comes with the model, nor a hub model
    fetched that is not in the local cache. Only ``trust_remote_code`` and ``download`` can.
    """
    run = RunFolder.open(path)
    source = run.path / "run.json"
    recipe = recipe_of(run.settings, source)
    head = head_for(run.path / "head", rater or recipe.guidance.rater)
    with permitted(code=trust_remote_code, download=download):
        refuse_asked_code(recipe.model.trust_remote_code, source)
        backbone = open_backbone(recipe, named_by=source)
    backbone.require(head.spec)
    return backbone.with_policy(partial(run_policy, run)), head, guidance_of(recipe)


def guidance_of(recipe: Recipe) -> Guidance:
    from coala.decoding import Guidance

    return Guidance(**asdict(recipe.guidance))
