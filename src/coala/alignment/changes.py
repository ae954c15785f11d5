"""What another setting undoes of a run: the stages that depend on it, and no other.

Knows which setting decides which stage; nothing of what a stage does.
"""

from __future__ import annotations

from coala.recipe import Recipe, recipe_of
from coala.store import RunFolder, differences, worded

# What `coala distil` and `--distil` write of a head.
DISTILLED_FILES = ("distilled", "distilled-adapter", "generations-distilled.jsonl")
# Each part of a run with the stages that record it and what they write, in the order of the stages.
_PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "features": (("features-train", "features-eval"), ("features",)),
    "head": (("head",), ("head",)),
    "distilled": (("distil",), DISTILLED_FILES),
    "replies": (
        ("replies-unguided", "replies-guided", "policy"),
        ("generations-unguided.jsonl", "generations-guided.jsonl", "portions", "policy.json"),
    ),
    "judge": (("judgements-judge",), ("judgements-judge.jsonl",)),
    "labeller": (("judgements-labeller",), ("judgements-labeller.jsonl",)),
}
_REPORT = ("report.html", "report.json")
_AFTER_FEATURES = ("head", "distilled", "replies", "judge", "labeller")
_AFTER_HEAD = ("replies", "judge", "labeller")


def adopt(recipe: Recipe, run: RunFolder) -> list[str]:
    """Begin ``run`` with ``recipe``, go on with it, or undo what other settings undo; what was undone, in lines.

    Settings of the head undo the head and all after it, those of guidance and evaluation the replies and judgements or
    the judgements alone. Raises ``StoreError``, naming each, for settings that decide pairs or features.
    """
    recorded = run.path / "run.json"
    wanted = recipe.plain()
    if not recorded.exists():
        run.start(wanted)
        return []
    # Read as a recipe, a run of before a setting existed has that setting's default.
    before = recipe_of(run.settings, recorded)
    differing = differences(before.plain(), wanted)
    if not differing:
        return []
    undone: set[str] = set()
    refused = {}
    for name, sides in differing.items():
        decided = _undone(name)
        if decided is None:
            refused[name] = sides
        else:
            undone |= set(decided)
    if refused:
        raise run.refusal(refused)
    read = [(one.prompt_features, one.log_ratios) for one in (before, recipe)]
    if read[0] != read[1]:
        # The head reads of the model what was not extracted for the one of before.
        undone |= {"features", *_AFTER_FEATURES}
    parts = [part for part in _PARTS if part in undone]
    run.change(
        wanted,
        [stage for part in parts for stage in _PARTS[part][0]],
        [*(name for part in parts for name in _PARTS[part][1]), *_REPORT],
    )
    kept = [part for part in ("pairs", "features", "head", "replies") if part not in undone]
    names = {"judge": "judgements", "labeller": "judgements"}
    redone = list(dict.fromkeys(names.get(part, part) for part in parts if part != "distilled"))
    told = f"{run.path}: keeps {_listed(kept)}" + (f"; redoes {_listed(redone)}" if redone else "")
    return [*worded(differing), told]


def check_changes(recipe: Recipe, run: RunFolder) -> None:
    """Raise what :func:`adopt` would raise; changes nothing."""
    recorded = run.path / "run.json"
    if not recorded.exists():
        run.require_free()
        return
    before = recipe_of(run.settings, recorded).plain()
    refused = {name: sides for name, sides in differences(before, recipe.plain()).items() if _undone(name) is None}
    if refused:
        raise run.refusal(refused)


def _undone(setting: str) -> tuple[str, ...] | None:
    """The parts of a run that a setting decides; None if pairs or features are among them."""
    section, _, name = setting.partition(".")
    if section == "head":
        return _AFTER_FEATURES
    if section == "evaluation" and name in ("judge", "labeller"):
        return (name,)
    if section in ("guidance", "evaluation"):
        return _AFTER_HEAD
    # What is distilled records its own settings, and keeps the replies and states that others share with it. Whether a
    # model's code may run decides no number.
    return () if section == "distil" or setting == "model.trust_remote_code" else None


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else "nothing"
