"""Policy accuracy of a run: of its guided decoding, or of a model trained from its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnProgress
from coala.leaderboards.record import Outcome, interval, measure, require_head
from coala.messages import CoalaError
from coala.recipe import recipe_of

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.store import RunFolder


def run_policy(
    run: Path,
    *,
    pairs: Path | None = None,
    trained: Path | None = None,
    limit: int = 100,
    guidance: Mapping[str, Any] | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    on_progress: OnProgress,
    command: str = "",
) -> Outcome:
    """Share of ``pairs`` (the run's held-out ones unless given) that the policy's log-ratio to the base ranks right.

    The policy is the run's guidance with the settings ``guidance``, or ``trained``: a model folder trained from the
    run's model, or an adapter of it. At most ``limit`` pairs are read. CoalaError for guidance without likelihoods.
    """
    from coala.alignment import load_parts
    from coala.alignment.policy import Guided, policy_accuracy, spread
    from coala.data import read_pairs
    from coala.report import Evaluation
    from coala.store import RunFolder, load_pairs, plain

    require_head(run)
    folder = RunFolder.open(run)
    file = pairs or folder.path / "pairs-eval.jsonl"
    everything = load_pairs(file) if pairs is None else list(read_pairs(str(file)))
    some = spread(everything, limit)
    backbone, head, rule = load_parts(run)
    settings: dict[str, Any] = {"limit": limit}
    policy: LanguageModel | Guided
    if trained is None:
        recipe = recipe_of(folder.settings, folder.path / "run.json").evaluation
        warmth = recipe.temperature if temperature is None else temperature
        policy = Guided(head, rule.changed(**(guidance or {})), warmth, max_new_tokens or recipe.max_new_tokens)
        if policy.unknown:
            raise CoalaError(f"Found guidance {policy.guidance}: {policy.unknown}. Fix: --mode shift or distilled.")
        called = str(policy.guidance)
        settings |= {"guidance": called}
        if policy.distilled:
            settings |= {"over": "the whole vocabulary", "temperature": 1.0}
        else:
            settings |= {"temperature": warmth, "max_new_tokens": policy.max_new_tokens}
    else:
        policy, called = _trained(trained, folder, backbone), trained.resolve().name
        settings |= {"trained": str(trained)}
    found = policy_accuracy(some, backbone, policy, on_texts=lambda done, total: on_progress("replies", done, total))
    named = {"policy accuracy": found.accuracy}
    if found.lifted is not None:
        named["policy accuracy without top-k and top-p"] = found.lifted
    counts = {"inside": found.inside, "by_support": found.by_support, "outside": found.outside}
    remarks = [found.note] if found.note else []
    if len(some) < len(everything):
        remarks.append(f"{len(some)} of {len(everything)} pairs were read, spread evenly: raise --limit for more")
    evaluation = Evaluation(
        kind="policy",
        of=called,
        title=f"Policy accuracy: {called}",
        command=command,
        measures=[measure(name, value, even=0.5) for name, value in named.items()],
        files={"pairs": file},
        settings=settings,
        facts=counts,
        remarks=tuple(remarks),
    )
    rows = [[name, interval(value, 4), str(value.n)] for name, value in named.items()]
    table = rows, [called, "pairs ranked right", "n"]
    return Outcome(evaluation, plain(found), [table], remarks=tuple(remarks))


def _trained(model: Path, run: RunFolder, base: LanguageModel) -> LanguageModel:
    """The trained model on the device and in the dtype of its base."""
    from coala.backbone import load_backbone

    recipe = recipe_of(run.settings, run.path / "run.json").model
    options: dict[str, Any] = {"device": str(base.device), "dtype": str(base.dtype).removeprefix("torch.")}
    options |= {"template": recipe.template}
    if (model / "adapter_config.json").is_file():
        return load_backbone(recipe.name, revision=recipe.revision, adapter=str(model), **options)
    return load_backbone(str(model), **options)
