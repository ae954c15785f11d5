"""A finished run as its user sees it: the head, the model it guides, how, and what the report says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.alignment.parts import load_parts
from coala.recipe import recipe_of
from coala.store import RunFolder, head_for, load_json

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead, Generation


class Run:
    """A finished run; each part is read when it is first asked for. Made by :func:`align` and :func:`load_run`."""

    def __init__(self, path: Path | str, *, trust_remote_code: bool = False, download: bool = False) -> None:
        self.path = RunFolder.open(path).path
        self._permitted: dict[str, Any] = {"trust_remote_code": trust_remote_code, "download": download}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def head(self) -> ConvexHead:
        recipe = recipe_of(load_json(self.path / "run.json"), self.path / "run.json")
        return head_for(self.path / "head", recipe.guidance.rater)

    @cached_property
    def _parts(self) -> tuple[LanguageModel, ConvexHead, Guidance]:
        return load_parts(self.path, **self._permitted)

    @property
    def backbone(self) -> LanguageModel:
        """The model; refused if it is not the one the head was fitted on."""
        return self._parts[0]

    @property
    def guidance(self) -> Guidance:
        """How the run guides; ``run.guidance.changed(strength=2)`` for another way."""
        return self._parts[2]

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json (see ``coala.report``)."""
        content: dict[str, Any] = load_json(self.path / "report.json")
        return content

    def generate(self, prompts: Sequence[Any], guidance: Guidance | None = None, **options: Any) -> list[Generation]:
        """A guided reply to each of ``prompts``: texts or conversations, as :func:`coala.generate` takes them.

        Replies are as long and as varied as the run's recipe says unless ``max_new_tokens`` or ``temperature`` do.
        """
        from coala.decoding import generate

        settings = recipe_of(load_json(self.path / "run.json"), self.path / "run.json").evaluation
        options = {"max_new_tokens": settings.max_new_tokens, "temperature": settings.temperature, "seed": 0, **options}
        return generate(prompts, self.backbone, self.head, guidance or self.guidance, **options)


def load_run(path: Path | str, *, trust_remote_code: bool = False, download: bool = False) -> Run:
    """A finished run with its ``backbone``, ``head``, ``guidance`` and ``report``.

    A run may be somebody else's: its settings cannot have Python code run that comes with the model, nor a hub model
    fetched that is not in the local cache. Only ``trust_remote_code`` and ``download`` can. Raises
    :class:`~coala.values.CoalaError` for a folder that is no run.
    """
    return Run(path, trust_remote_code=trust_remote_code, download=download)
