"""What `generate` and `chat` share: a run opened to be talked to, how its replies are sampled, and what fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.recipe import Recipe
    from coala.values import ConvexHead, Turn

OWN = "the model's generation_config"


@dataclass(frozen=True)
class Opened:
    """A finished run's model and head, and how they reply: what the flags, the run and the model itself come to.

    ``chosen`` is the guidance that was asked for, ``guidance`` what it is at this temperature.
    """

    backbone: LanguageModel
    head: ConvexHead
    chosen: Guidance
    guidance: Guidance
    temperature: float


def opened(run: Path, sampling: Mapping[str, float | None], mode: str | None, **guidance: Any) -> Opened:
    """The run with the ``mode`` and ``guidance`` that flags change (``None``: not given); says what is not evident.

    ``sampling`` holds the flags' temperature, top_p and top_k; see :func:`sampled` for those not given.
    """
    from coala.alignment import evidence_notes, load_parts
    from coala.cli.output import say
    from coala.recipe import recipe_of
    from coala.store import RunFolder

    backbone, head, found = load_parts(run)
    chosen = sampled(sampling, recipe_of(RunFolder.open(run).settings, run / "run.json"), backbone.transformer)
    say(f"sampling: {', '.join(f'{name} {value:g} ({source})' for name, (value, source) in chosen.items())}")
    if mode not in (None, "shift"):
        found = replace(found, budget=None)  # the recipe's is of another mode
    changed = found.changed(mode=mode, **guidance)
    if mode is None and changed.mode != found.mode:
        say(f"note: by rule {changed.rule} a strength means mode token: in mode {found.mode} the best always wins.")
    changed = changed.changed(top_p=chosen["top-p"][0], top_k=int(chosen["top-k"][0]))
    temperature = chosen["temperature"][0]
    for note in evidence_notes(run, head, changed):
        say(f"note: {note}")
    return Opened(backbone, head, changed, changed if mode else cooled(changed, temperature), temperature)


def cooled(guidance: Guidance, temperature: float) -> Guidance:
    """The guidance at this temperature; says so where that is another mode."""
    from coala.cli.output import say

    found = guidance.at(temperature)
    if found != guidance:
        say(f"note: at temperature 0 all samples are the same: mode token instead of {guidance.mode}.")
    return found


def sampled(given: Mapping[str, float | None], recipe: Recipe, model: Any) -> dict[str, tuple[float, str]]:
    """Temperature, top-p and top-k, each with where it comes from.

    A flag goes first, then the recipe where it differs from the defaults, then the generation_config of ``model`` (of
    transformers) where it holds the setting, then the default.
    """
    from coala.recipe import EvaluationSettings, GuidanceSettings

    usual = {"temperature": EvaluationSettings().temperature, **GuidanceSettings().model_dump()}
    own = {"temperature": recipe.evaluation.temperature, **recipe.guidance.model_dump()}
    config = getattr(model, "generation_config", None)
    suggested = {} if config is None else config.to_diff_dict()
    fits: dict[str, Callable[[float], bool]] = {
        "temperature": lambda x: x >= 0,
        "top_p": lambda x: 0 < x <= 1,
        "top_k": lambda x: x >= 0,
    }
    found: dict[str, tuple[float, str]] = {}
    for name, fit in fits.items():
        flag, hint = given.get(name), suggested.get(name)
        sound = isinstance(hint, int | float) and not isinstance(hint, bool) and math.isfinite(hint) and fit(hint)
        if flag is not None:
            found[name] = flag, "as asked"
        elif own[name] != usual[name]:
            found[name] = own[name], "the run's recipe"
        elif hint is not None and sound:
            found[name] = hint, OWN
        else:
            found[name] = usual[name], "default"
    return {name.replace("_", "-"): value for name, value in found.items()}


def conversation(system: str | None, *turns: Turn) -> tuple[Turn, ...]:
    """The turns behind a system prompt, if there is one."""
    from coala.values import Turn

    return ((Turn("system", system),) if system else ()) + turns


def room(backbone: LanguageModel, prompt: Sequence[Turn], max_new_tokens: int, *, cut: bool, mend: str) -> int:
    """How many tokens a reply may have behind ``prompt``, nothing of which is lost without a word.

    Raises :class:`CoalaError` for a prompt that leaves no room, unless it may be ``cut``; ``mend`` says what to do.
    """
    from coala.cli.output import say
    from coala.values import CoalaError

    context = backbone.max_tokens
    row = backbone.render(prompt)
    n_tokens = len(row.tokens) + row.dropped
    left = context - n_tokens
    if left >= max_new_tokens:
        return max_new_tokens
    if cut:
        kept = max(context - max_new_tokens, context // 2)
        if n_tokens > kept:
            say(f"note: the first {n_tokens - kept:,} of the prompt's {n_tokens:,} tokens are cut; {context:,} fit.")
        return max_new_tokens
    if left < 1:
        raise CoalaError(
            f"context_length: the prompt has {n_tokens:,} tokens; the model's context holds {context:,}, the reply "
            f"among them. {mend}"
        )
    say(f"note: the context of {context:,} tokens leaves the reply {left:,} of the {max_new_tokens:,} asked for.")
    return left
