"""What every stage of an alignment is given: the recipe, the run folder, the model once it is needed, and who watches.

Knows when a stage has to be done; nothing of what any of them does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.costs import Stopwatch, peak_memory
from coala.recipe import Recipe
from coala.settings import ModelSettings
from coala.store import RunFolder, run_policy
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.backbone.template import Renderer


@dataclass
class StageContext:
    """A recipe on its way through a run folder; the backbone is loaded when first needed and kept."""

    recipe: Recipe
    run: RunFolder
    show: OnProgress = silent
    note: OnNote = quiet
    cache: Path | None = None
    n_workers: int = 1
    loaded: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.run.path / name

    def backbone(self) -> LanguageModel:
        if "backbone" not in self.loaded:
            self.loaded["backbone"] = open_backbone(self.recipe).with_policy(partial(run_policy, self.run))
        model: LanguageModel = self.loaded["backbone"]
        return model

    def renderer(self) -> Renderer:
        """How the model writes conversations, without its weights."""
        if "backbone" in self.loaded:
            return self.backbone().renderer
        if "renderer" in self.loaded:
            kept: Renderer = self.loaded["renderer"]
            return kept
        from coala.backbone.load import read_conversations

        names = ("revision", "template", "adapter", "trust_remote_code")
        options = {name: getattr(self.recipe.model, name) for name in names}
        found = self.loaded["renderer"] = read_conversations(self.recipe.model.name, **options)
        return found

    def model_stamp(self) -> Any:
        """What tells whether the model changed, without loading it: its files' sizes and times, or its hub revision."""
        places = [Path(name) for name in (self.recipe.model.name, self.recipe.model.adapter) if name]
        files = [p for at in places for p in (sorted(at.iterdir()) if at.is_dir() else [at]) if p.is_file()]
        return [asdict(self.recipe.model), [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]]

    def once(self, stage: str, inputs: dict[str, Any], outputs: list[str], work: Callable[[], Any]) -> None:
        """Do ``work`` unless this stage is done on these inputs; record seconds, memory and the facts it returns."""
        if self.run.done(stage, inputs):
            self.show(stage, 1, 1, "already done")
            return
        with Stopwatch() as watch:
            facts = work() or {}
        facts |= {"seconds": watch.seconds, "peak_bytes": peak_memory()}
        self.run.finish(stage, inputs, outputs, facts)
        self.show(stage, 1, 1)


def open_backbone(recipe: Recipe, named_by: Path | None = None) -> LanguageModel:
    """The recipe's model; one that only the file ``named_by`` names is not fetched from the hub unasked."""
    from coala.backbone import load_backbone
    from coala.backbone.files import NotCached

    if named_by is None:
        return load_backbone(**loading(recipe.model))
    # Whether its code may run is for the invocation to say, whatever the file does.
    options = {**loading(recipe.model), "trust_remote_code": False, "download": False}
    try:
        return load_backbone(**options)
    except NotCached as error:
        raise CoalaError(f"{named_by}: {error}") from error


def loading(model: ModelSettings) -> dict[str, Any]:
    """The arguments of ``coala.backbone.load_backbone`` for the model."""
    names = ("revision", "template", "device", "dtype", "trust_remote_code", "adapter", "quantise")
    return {"model": model.name, **{name: getattr(model, name) for name in names}}
