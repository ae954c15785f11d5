"""Rounds: the policy of the round before, guided by the head, teaches the next, until held-out replies gain no more.

Each round is one convex program, its change relative to the base model; the series is a policy iteration, of which
nothing is proved but that it ends. What a round gained is the mean head score of the policy's own replies to held-out
prompts, paired with the round before (before the first: the base model) on the same prompts and seed; it goes on while
the interval of that difference lies above 0.

RUN/distilled/round-<k>/policy.safetensors  policy.json  own-<digest>.jsonl  path.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coala.costs import decoding_flops
from coala.decoding import generate
from coala.distil.accounts import reply_states_flops
from coala.distil.own_score import ROWS
from coala.distil.stage import Taught, Teaching, Work, guided_states, project
from coala.policies import DistilledPolicy, DistilStates
from coala.statistics.intervals import mean_estimate, paired_difference
from coala.statistics.scores import perplexity
from coala.store import digest, load_json, load_pairs, save_json
from coala.values import CoalaError, Generation, Turn, conversation_text, prompt_id

TRIED = {"path", "held_out", "flops", "fit_flops"}  # what a fit that is kept has to say of itself


def in_rounds(
    work: Teaching, prompts: list[tuple[Turn, ...]], first: tuple[DistilStates, Taught] | None = None
) -> tuple[DistilledPolicy, dict[str, Any]]:
    """The policy of the last round that gained on held-out ``prompts``, and the figures of all.

    ``first`` is what the first round learns from, if it is there already. That round is kept whatever it gained. A
    killed call goes on where it was. Raises ``CoalaError`` for another teacher than ``guided``.
    """
    settings = work.settings
    if settings.teacher != "guided":
        raise CoalaError(
            f"Found {settings.rounds} rounds of the teacher {settings.teacher}; expected guided, which the policy of a "
            "round can be given. Fix: --teacher guided, or --rounds 1."
        )
    before, rows = _own_replies(work, prompts, work.folder / "round-0", None), []
    best: tuple[DistilledPolicy, dict[str, Any]] | None = None
    for number in range(1, settings.rounds + 1):
        if number == 1 and first is not None:
            states, taught = first
        else:
            states, taught = guided_states(work, None if best is None else best[0], seed=settings.seed + number - 1)
        policy, tried = _projected(work, states, taught, work.folder / f"round-{number}")
        own = _own_replies(work, prompts, work.folder / f"round-{number}", policy)
        written = [*own, *(before if number == 1 else ())]
        flops = {**_teaching_flops(work, states), **tried.pop("flops"), "own": _own_flops(work, prompts, written)}
        figures = _figures(number, policy, own, before)
        figures |= {"n_replies": int(states.group.max()) + 1, **tried, "flops": flops}
        rows.append(figures)
        save_json(work.folder / f"round-{number}" / "path.json", figures)
        work.on_note(_told(figures))
        gained = figures["gain"].low > 0
        if best is None or gained:
            best, before = (policy, figures), own
        if not gained:
            work.on_note(_ended(number))
            break
    assert best is not None
    kept = {name: best[1][name] for name in ("n_replies", "path", "held_out", "fit_flops")}
    flops = {name: sum(row["flops"][name] for row in rows) for name in rows[0]["flops"]}
    return best[0], {**kept, "flops": flops, "kept_round": best[1]["round"], "rounds": rows}


def held_out_prompts(work: Work) -> list[tuple[Turn, ...]]:
    """Prompts that neither head nor policy was fitted to, those that the report does not answer first."""
    pairs, trained = (load_pairs(work.run.path / f"pairs-{part}.jsonl") for part in ("eval", "train"))
    known = {conversation_text(pair.prompt) for pair in trained}
    found = {text: pair.prompt for pair in pairs if (text := conversation_text(pair.prompt)) not in known}
    prompts, shown = list(found.values()), work.recipe.evaluation.prompts
    some = [*prompts[shown:], *prompts[:shown]][: work.settings.held_out]
    if len(some) < 2:
        raise CoalaError(
            f"Found {len(some)} held-out prompts that are not trained on; expected at least 2 to measure the gain of "
            "a round. Fix: hold out more (--eval-fraction), or --rounds 1."
        )
    if shared := max(0, len(some) - max(0, len(prompts) - shown)):
        work.on_note(f"{shared} of the {len(some)} prompts that choose the round are answered in the report too")
    return some


def _teaching_flops(work: Teaching, states: DistilStates) -> dict[str, int]:
    return reply_states_flops(work.backbone, work.head, work.guidance, work.prompts, states)


def _own_flops(work: Teaching, prompts: list[tuple[Turn, ...]], written: list[Generation]) -> int:
    """Of replies that measure a round, one forward a token."""
    lengths = {prompt_id(prompt): len(work.backbone.render(prompt).tokens) for prompt in prompts}
    return sum(decoding_flops(work.backbone.shape, lengths[one.prompt_id], one.n_tokens) for one in written)


def _projected(
    work: Teaching, states: DistilStates, taught: Taught, folder: Path
) -> tuple[DistilledPolicy, dict[str, Any]]:
    """The round's policy, which is fitted unless ``folder`` has it of these states and settings."""
    names = ("support", "ridge", "strength", "rank", "tolerance", "seed")
    settings = [getattr(work.settings, name) for name in names]
    # A column tells states apart that differ at all; the whole may not fit in memory.
    parts = (states.states[:, :1], states.tokens, states.size, states.target, states.weight, states.group)
    decides = digest(settings, work.temperature, *map(np.asarray, parts))
    record = folder / "fit.json"
    if record.exists() and (kept := load_json(record))["of"] == decides and kept.keys() >= TRIED:
        return DistilledPolicy.load(folder), {name: kept[name] for name in TRIED}
    policy, tried = project(work, states, taught)
    policy.save(folder)
    save_json(record, {"of": decides, **tried})
    return policy, tried


def _own_replies(
    work: Teaching, prompts: list[tuple[Turn, ...]], folder: Path, policy: DistilledPolicy | None
) -> list[Generation]:
    """A reply of the policy itself to each prompt, beside the base model; without one, the base model's."""
    sampling = work.guidance
    ids = [prompt_id(prompt) for prompt in prompts]
    guidance = sampling.plain if policy is None else sampling.changed(mode="distilled")
    head = (work.head.linear, work.head.gates, work.head.weights)
    decides = [ids, str(guidance), sampling.top_k, sampling.top_p, work.longest, work.sampled_at]
    named = digest(*decides, work.settings.seed, *head, *([] if policy is None else [policy.change]))[:12]
    return generate(
        prompts,
        work.backbone if policy is None else work.backbone.with_policy(policy),
        work.head,
        guidance,
        max_new_tokens=work.longest,
        temperature=work.sampled_at,
        seed=work.settings.seed,
        prompt_ids=ids,
        batch_size=ROWS,
        kept=folder / f"own-{named}.jsonl",
        on_reply=lambda n, total: work.on_progress(f"own replies, {folder.name}", n, total, f"{n} of {total} replies"),
        with_base=True,
    )


def _figures(number: int, policy: DistilledPolicy, own: list[Generation], before: list[Generation]) -> dict[str, Any]:
    scores = [[reply.score for reply in some] for some in (own, before)]
    return {
        "round": number,
        "rank": policy.rank,
        "ridge": policy.ridge,
        "score": mean_estimate(scores[0]),
        "gain": paired_difference(*scores),
        "divergence": mean_estimate([reply.divergence or 0.0 for reply in own]),
        "perplexity": perplexity([reply.log_prob for reply in own], [reply.n_tokens for reply in own]),
    }


def _told(figures: dict[str, Any]) -> str:
    gain, nats = figures["gain"], figures["divergence"]
    against = "the base model" if figures["round"] == 1 else f"round {figures['round'] - 1}"
    return (
        f"round {figures['round']}: head score {gain.value:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}] against {against} "
        f"(n = {gain.n} held-out prompts); KL {nats.value:.3g} [{nats.low:.3g}, {nats.high:.3g}] nats a reply"
    )


def _ended(number: int) -> str:
    if number == 1:
        return "round 1 is kept, but shows no clear gain: there is no second round"
    return f"round {number} shows no clear gain: round {number - 1} is kept"
