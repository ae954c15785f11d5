"""What content-blind cues make of preferences: of pairs, of benchmarks with several replies a prompt, of judgements.

    audit_preferences(source)     from files to an :class:`Audit`: one call
    audit_items(items)            the same of items
    balance(pairs, cue)           a part of the pairs on which a cue says nothing

Nothing here needs a model, but for the cue of a base model's likelihood, which is asked for by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.audit.balance import Balanced, balance
from coala.audit.measure import Audit, audit_items
from coala.audit.sets import PreferenceSet, read_set
from coala.callbacks import OnProgress, silent
from coala.data.files import Source, sources
from coala.settings import AuditSet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from coala.backbone import LanguageModel

__all__ = ["Audit", "Balanced", "PreferenceSet", "audit_items", "audit_preferences", "balance", "read_set"]


def audit_preferences(
    source: Source | PreferenceSet,
    bench: AuditSet = "auto",
    *,
    format: str = "auto",
    by: str | None = None,
    subset: Sequence[str] = (),
    questions: Source = (),
    answers: Source = (),
    scores: Sequence[Path | str] = (),
    model: str | LanguageModel | None = None,
    features: NDArray[np.floating[Any]] | None = None,
    against: Source | PreferenceSet | None = None,
    deals: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    on_progress: OnProgress = silent,
) -> Audit:
    """How far cues that understand nothing pick the right reply of ``source``, and what systems' scores add to them.

    ``source`` is a file or several: pairs of any ``format``, a published benchmark, or judgements with the
    ``questions`` and ``answers`` that were judged (``bench`` says which, ``auto`` looks at the first row). ``by`` names
    the column of pairs that holds their subset, ``subset`` those that are looked at. ``scores`` are files of systems'
    scores of the same replies. ``model`` adds the likelihood of each reply under it as a cue, one forward pass over
    each distinct reply. ``against`` is the other side of a split. What is drawn follows from ``seed``; see
    :func:`audit_items` for ``features`` and ``deals``. Raises ``CoalaError`` in a sentence for what cannot be used.
    """
    if isinstance(source, PreferenceSet):
        found, title = source, ""
    else:
        options: dict[str, Any] = {"format": format, "skip_bad": skip_bad}
        texts: dict[str, Any] = {"questions": questions, "answers": answers}
        found = read_set(source, bench, by=by, subset=subset, scores=scores, **texts, **options)
        title = ", ".join(Path(name).name for name in sources(source))
    other = None
    if isinstance(against, PreferenceSet):
        other = against.items
    elif against is not None:
        other = read_set(against, bench, questions=questions, answers=answers, format=format, skip_bad=skip_bad).items
    likelihood = None
    if model is not None:
        from coala.audit.likelihood import reply_likelihoods
        from coala.backbone import load_backbone

        loaded = load_backbone(model) if isinstance(model, str) else model
        likelihood = reply_likelihoods(found.items, loaded, on_progress)
    return audit_items(
        found.items,
        seed=seed,
        title=title,
        scores=found.scores,
        likelihood=likelihood,
        features=features,
        against=other,
        deals=deals,
        remarks=found.remarks,
        on_progress=on_progress,
    )
