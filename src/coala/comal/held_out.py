"""Policy accuracy of what COMAL trained: how many held-out pairs its log-ratio to the start ranks right."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnProgress
from coala.comal.inputs import Start
from coala.store import RunFolder, file_digest, load_pairs, save_json
from coala.values import prompt_id

if TYPE_CHECKING:
    from coala.comal.runs import ModelOptions

FILE = "policy.json"
LIMIT = 100  # pairs that are read: each costs a forward per token of its replies, by both models
STAGE = "policy"


def rank_held_out(
    run: RunFolder, start: Start, options: ModelOptions, trained_on: Collection[str], on_progress: OnProgress
) -> None:
    """Write ``policy.json``: policy accuracy on pairs that the COALA run at the start holds out, or why there is none.

    Pairs with a prompt of ``trained_on``, ids, are left out; at most :data:`LIMIT` are read. What is there already is
    not measured again.
    """
    source = None if start.run is None else start.run / "pairs-eval.jsonl"
    if source is None or not source.is_file():
        save_json(run.path / FILE, {"unknown": "the start is not a COALA run, so no pairs are held out"})
        return
    record = run.record("model")
    made = {"model": None if record is None else record["outputs"], "pairs": file_digest(source), "limit": LIMIT}
    if run.done(STAGE, made):
        return
    known = set(trained_on)
    everything = load_pairs(source)
    pairs = [pair for pair in everything if prompt_id(pair.prompt) not in known]
    found: dict[str, Any] = {"unknown": f"all {len(everything)} held-out pairs have prompts that were trained on"}
    if pairs:
        found = _measured(run, start, options, pairs, on_progress)
        found["left_out"] = len(everything) - len(pairs)
    save_json(run.path / FILE, found)
    run.finish(STAGE, made, [FILE])


def _measured(
    run: RunFolder, start: Start, options: ModelOptions, pairs: list[Any], on_progress: OnProgress
) -> dict[str, Any]:
    from coala.alignment.policy import policy_accuracy
    from coala.backbone import load_backbone

    named: dict[str, Any] = {
        "template": options.template if options.template != "auto" else start.template,
        "device": options.device,
        "dtype": options.dtype,
    }
    revision = options.revision or start.revision
    on_progress("policy", 0, None, "loading the start and the last policy")
    base = load_backbone(start.model, revision=revision, download=False, **named)
    if options.lora is None:
        policy = load_backbone(str(run.path / "model"), **named)
    else:
        policy = load_backbone(start.model, revision=revision, adapter=str(run.path / "model"), download=False, **named)
    found = policy_accuracy(
        pairs,
        base,
        policy,
        limit=LIMIT,
        on_texts=lambda done, total: on_progress("policy", done, total, "replies of held-out pairs"),
    )
    return asdict(found)
