"""A finished run opened to be talked to: how its replies are sampled, what fits in its context, and the replies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.alignment.evidence import evidence_notes
from coala.alignment.parts import load_parts
from coala.callbacks import OnNote, quiet
from coala.recipe import Recipe, recipe_of
from coala.settings import EvaluationSettings, GuidanceSettings
from coala.store import RunFolder
from coala.values import CoalaError, Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead, Generation

OWN = "the model's own"


@dataclass(frozen=True)
class Talker:
    """A finished run's model and head, and how they reply: what is given, the run and the model itself come to.

    ``chosen`` is the guidance that was asked for; ``temperature`` may make another of it (:meth:`guidance`).
    """

    backbone: LanguageModel
    head: ConvexHead
    chosen: Guidance
    temperature: float
    on_note: OnNote = quiet

    @property
    def guidance(self) -> Guidance:
        """What was chosen, as it is at this temperature."""
        return self.chosen.at(self.temperature)

    @property
    def unguided(self) -> Guidance:
        return self.chosen.plain

    def changed(self, **changes: Any) -> Talker:
        """With another ``temperature`` or ``chosen`` guidance; says so where that is another mode."""
        found = replace(self, **changes)
        found.note_mode()
        return found

    def note_mode(self) -> None:
        if self.guidance != self.chosen:
            self.on_note(
                f"note: at temperature 0 all samples are identical: using mode token instead of {self.chosen.mode}."
            )

    def room(self, prompt: Sequence[Turn], max_new_tokens: int, *, cut: bool, mend: str) -> int:
        """How many tokens a reply may have behind ``prompt``, nothing of which is lost without a word.

        Raises :class:`CoalaError` for a prompt that leaves no room, unless it may be ``cut``; ``mend`` says what to do.
        """
        context = self.backbone.max_tokens
        row = self.backbone.render(prompt)
        n_tokens = len(row.tokens) + row.dropped
        left = context - n_tokens
        if left >= max_new_tokens:
            return max_new_tokens
        if cut:
            kept = max(context - max_new_tokens, context // 2)
            if n_tokens > kept:
                self.on_note(
                    f"note: the first {n_tokens - kept:,} of the prompt's {n_tokens:,} tokens are truncated; "
                    f"{context:,} fit."
                )
            return max_new_tokens
        if left < 1:
            raise CoalaError(
                f"context_length: the prompt has {n_tokens:,} tokens; the model's context holds {context:,}, "
                f"including the "
                f"reply. {mend}"
            )
        self.on_note(
            f"note: the context of {context:,} tokens leaves {left:,} of the {max_new_tokens:,} requested "
            f"tokens for the reply."
        )
        return left

    def reply(
        self,
        prompts: Sequence[Sequence[Turn]],
        guidance: Guidance,
        lengths: Sequence[int],
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_piece: Callable[[str], None] | None = None,
    ) -> list[Generation]:
        """A reply of at most so many tokens to each prompt; ``on_piece`` hears the text as it is made."""
        from coala.decoding import generate

        made: dict[int, Generation] = {}
        for length in set(lengths):  # one, unless the context is nearly full
            some = [i for i, own in enumerate(lengths) if own == length]
            several = generate(
                [prompts[i] for i in some],
                self.backbone,
                self.head,
                guidance,
                max_new_tokens=length,
                seed=seed,
                temperature=self.temperature,
                stop=tuple(stop),
                prompt_ids=[str(i) for i in some],
                on_token=None if on_piece is None else lambda _, piece: on_piece(piece),
            )
            made |= dict(zip(some, several, strict=True))
        return [made[i] for i in range(len(prompts))]


def open_talker(
    run: Path, sampling: Mapping[str, float | None], guidance: Mapping[str, Any], on_note: OnNote = quiet
) -> Talker:
    """The run with the settings of ``guidance`` that are given over its own; says what is not evident.

    ``sampling`` holds temperature, top_p and top_k; see :func:`sampled` for those not given.
    """
    backbone, head, found = load_parts(run, rater=guidance.get("rater"))
    for line in backbone.reads(head.spec):
        on_note(line)
    found, temperature = settled(run, backbone, found, sampling, on_note)
    mode = guidance.get("mode")
    changed = found.changed(**guidance)
    if mode is None and changed.mode != found.mode:
        on_note(f"note: by rule {changed.rule} a strength means mode token: in mode {found.mode} the best always wins.")
    for note in evidence_notes(run, head, changed):
        on_note(f"note: {note}")
    backbone.changed(changed.change)  # a policy that is not there is told before anything is typed
    opened = Talker(backbone, head, changed, temperature, on_note)
    if mode is None:
        opened.note_mode()
    return opened


def settled(
    run: Path, backbone: LanguageModel, guidance: Guidance, given: Mapping[str, float | None], on_note: OnNote = quiet
) -> tuple[Guidance, float]:
    """``guidance`` with the top-p and top-k, and the temperature, of :func:`sampled`; tells whose they are."""
    recipe = recipe_of(RunFolder.open(run).settings, run / "run.json")
    chosen = sampled(given, recipe, backbone.transformer)
    on_note(f"sampling: {', '.join(f'{name} {value:g} ({source})' for name, (value, source) in chosen.items())}")
    (temperature, _), (top_p, _), (top_k, _) = chosen.values()
    return replace(guidance, top_p=top_p, top_k=int(top_k)), temperature


def sampled(given: Mapping[str, float | None], recipe: Recipe, model: Any) -> dict[str, tuple[float, str]]:
    """Temperature, top-p and top-k, each with where it comes from.

    A flag goes first, then the recipe where it differs from the defaults, then the generation_config of ``model`` (of
    transformers; of a GGUF file its general.sampling) where it holds the setting, then the default.
    """
    usual = {"temperature": EvaluationSettings().temperature, **asdict(GuidanceSettings())}
    own = {"temperature": recipe.evaluation.temperature, **asdict(recipe.guidance)}
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
    return ((Turn("system", system),) if system else ()) + turns
