"""Heads of single raters beside the head of a run: one file for all of them, bound to that head by its digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coala.messages import suggestion
from coala.store.files import StoreError, digest, file_digest
from coala.store.values import certificate_of, described, load_head, save_described
from coala.values import ConvexHead

KINDS = ("rater", "source", "group")  # in this order a name is looked for
LONGEST = 60  # characters of a name that a message shows


def save_rater_heads(
    folder: Path,
    kind: str,
    names: Mapping[str, int],
    heads: Sequence[ConvexHead],
    *,
    unlike: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """``raters.safetensors`` and ``raters.json`` beside the head of ``folder``: for each name the number of its head.

    ``kind`` is one of ``KINDS`` and names the files. Heads are kept as linear block and weights, with the gates of the
    folder's head; without any, all have the folder's own. Those ``unlike`` have none that stands for their choices.
    """
    own = load_head(folder)
    empty = np.zeros((0, *own.linear.shape)), np.zeros((0, *own.weights.shape))
    arrays = {
        "linear": np.stack([head.linear for head in heads]) if heads else empty[0],
        "weights": np.stack([head.weights for head in heads]) if heads else empty[1],
    }
    told = [{name: getattr(head, name) for name in ("temperature", "least_slope", "certificate")} for head in heads]
    base = file_digest(Path(folder) / "head.safetensors")
    whole = {**about, "spec": own.spec, "head": base, "names": names, "unlike": unlike, "heads": told}
    save_described(folder, f"{kind}s", arrays, whole)


def head_for(folder: Path, rater: str | None) -> ConvexHead:
    """The head in ``folder``, or with ``rater`` that rater's own: what is shared and the rater's deviation.

    Sources and groups that were compared are found by their names too.

    Raises:
        StoreError: where no heads of raters are saved, for those of another head, and for a name that is not there.
    """
    folder = Path(folder)
    if rater is None:
        return load_head(folder)
    there = [kind for kind in KINDS if (folder / f"{kind}s.json").is_file()]
    if not there:
        raise StoreError(
            f"{folder}: found no heads of raters, expected that of {_short(rater)!r}, fix: make them with "
            "`coala fit RUN --by rater`"
        )
    head = load_head(folder)
    known: set[str] = set()
    for kind in there:
        with described(folder, f"{kind}s", "Fit the raters again.", "head", "names", "unlike", "heads") as (
            about,
            arrays,
        ):
            known |= set(about["names"])
            if rater in about["names"]:
                return _own(folder, kind, head, about, arrays, rater)
    raise StoreError(_unknown(folder, rater, sorted(known)))


def _own(
    folder: Path, kind: str, head: ConvexHead, about: Mapping[str, Any], arrays: Mapping[str, Any], rater: str
) -> ConvexHead:
    number, unlike = about["names"][rater], rater in about["unlike"]
    if about["head"] != file_digest(folder / "head.safetensors"):
        raise StoreError(
            f"{folder}: found heads of {kind}s of another head than is there now, expected its own, fix: "
            f"`coala fit RUN --by {kind}` again"
        )
    if about["heads"]:
        told = about["heads"][number]
        head = replace(
            head,
            linear=arrays["linear"][number],
            weights=arrays["weights"][number],
            temperature=told["temperature"],
            least_slope=told["least_slope"],
            certificate=certificate_of(told["certificate"]),
        )
    # Of whoever chooses otherwise than a head that is not their own, it has no evidence, and then it guides nothing.
    return replace(head, least_slope=0.0) if unlike else head


def head_stamp(folder: Path, rater: str | None) -> str:
    """A digest of the head that :func:`head_for` gives."""
    own = file_digest(Path(folder) / "head.safetensors")
    if rater is None:
        return own
    paths = [Path(folder) / f"{kind}s.safetensors" for kind in KINDS]
    return digest(own, rater, [file_digest(path) for path in paths if path.is_file()])


def _unknown(folder: Path, rater: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(rater[:LONGEST], [name[:LONGEST] for name in names], n=3, cutoff=0.6)
    close = [name for name in names if name[:LONGEST] in near][:3] or [suggestion(rater, names)]
    shown = [repr(_short(name)) for name in (close if any(close) else names[:3])]
    more = f" of {len(names)}" if len(names) > len(shown) else ""
    return (
        f"{folder}: found no rater {_short(rater)!r}, expected one{more} such as {', '.join(shown)}, fix: take a name "
        "as `coala fit RUN --by rater` lists it"
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
