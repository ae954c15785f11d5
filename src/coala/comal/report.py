"""What a run of COMAL did, as numbers, as a table and as a page; and the page of a win-rate matrix.

Reads a run folder; knows nothing of models or of how the run was made.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coala.comal.held_out import FILE
from coala.comal.loop import STAGES
from coala.comal.matrix import EmpiricalNash, WinRates
from coala.comal.measures import remarks
from coala.comal.settings import COMALSettings
from coala.nash import plots
from coala.nash.criteria import Note
from coala.nash.page import BRAND, noted
from coala.pages.drawing import FEWEST
from coala.pages.parts import Table, details, facts, gallery, headed, page, paragraphs, section, step, steps
from coala.pages.words import Interval, bracketed
from coala.pages.words import seconds as in_words
from coala.store import RunFolder, load_json

MIB = 2**20


def summarise(folder: Path | str) -> dict[str, Any]:
    """The numbers of a finished run: its settings with their notes, one row per step and one per outer update.

    ``updates`` hold means over the steps of an update (``drift`` their sum, ``mass`` the least, ``kl_to_reference`` the
    last), ``seconds`` by stage, and ``peak_bytes``, the process's highest use until then.
    """
    run = RunFolder.open(folder)
    about = run.settings
    settings = COMALSettings(**about["settings"])
    steps: list[dict[str, Any]] = []
    updates: list[dict[str, Any]] = []
    for outer in range(1, settings.outer_steps + 1):
        rows: list[dict[str, Any]] = []
        seconds = dict.fromkeys(STAGES, 0.0)
        peak: dict[str, int] = {}
        for inner in range(1, settings.inner_steps + 1):
            row = load_json(run.path / f"outer-{outer:02d}/inner-{inner:02d}/log.json")
            facts = {stage: run.facts(f"outer-{outer:02d}-inner-{inner:02d}-{stage}") for stage in STAGES}
            for stage, fact in facts.items():
                seconds[stage] += fact["seconds"]
                peak |= {part: max(size, peak.get(part, 0)) for part, size in fact["peak_bytes"].items()}
            rows.append({"outer": outer, "inner": inner, "judged": facts["judge"]["judged"], **row})
        steps += rows
        updates.append({"outer": outer, **_over(rows), "seconds": seconds, "peak_bytes": peak})
    notes = [*settings.notes(), *_common(steps)]
    return {
        "settings": about["settings"],
        "policy": about["policy"],
        "oracle": about["oracle"],
        "about": about.get("about", {}),
        "notes": [{"level": note.level, "text": note.text} for note in notes],
        "updates": updates,
        "steps": steps,
        "seconds": sum(sum(update["seconds"].values()) for update in updates),
        "policy_accuracy": load_json(run.path / FILE) if (run.path / FILE).exists() else None,
    }


def _over(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = ("target_margin", "achieved", "transitive", "kl_to_policy", "tokens", "finished", "judge_disagreement")
    cyclic = [row["cyclic"] for row in rows if row["cyclic"] is not None]
    return {
        **{name: float(np.mean([row[name] for row in rows])) for name in names},
        "cyclic": float(np.mean(cyclic)) if cyclic else None,
        "drift": float(np.sum([row["drift"] for row in rows])),
        "mass": float(np.min([row["mass"] for row in rows])),
        "kl_to_reference": float(rows[-1]["kl_to_reference"]),
        "judged": sum(int(row["judged"]) for row in rows),
        "judge_failures": sum(int(row["judge_failures"]) for row in rows),
    }


def _common(steps: Sequence[Mapping[str, Any]]) -> list[Note]:
    """What the steps' numbers say, each remark once: of the last step it holds for, with how many."""
    found: dict[str, tuple[Note, int]] = {}
    for row in steps:
        for note in remarks(row):
            kind = note.text.rpartition(":")[2]
            found[kind] = note, found.get(kind, (note, 0))[1] + 1
    return [Note(note.level, f"{note.text} (in {times} of {len(steps)} steps)") for note, times in found.values()]


def update_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table by outer update."""
    head = ["update", "margin asked", "achieved", "transitive", "cyclic", "KL to ref", "drift", "mass", "tokens"]
    head += ["orders disagree", "verdicts (failed)", "seconds", "peak MiB"]
    rows = []
    for update in summary["updates"]:
        peak = update["peak_bytes"].get("device") or update["peak_bytes"].get("host") or 0
        rows.append(
            [
                str(update["outer"]),
                f"{update['target_margin']:.3g}",
                f"{100 * update['achieved']:.0f} %",
                f"{100 * update['transitive']:.0f} %",
                "-" if update["cyclic"] is None else f"{100 * update['cyclic']:.1f} %",
                f"{update['kl_to_reference']:.2f}",
                f"{update['drift']:+.2f}",
                f"{update['mass']:.2f}",
                f"{update['tokens']:.1f}",
                f"{update['judge_disagreement']:.3f}",
                f"{update['judged']} ({update['judge_failures']})",
                f"{sum(update['seconds'].values()):.0f}",
                f"{peak / MIB:.0f}",
            ]
        )
    return head, rows


def policy_sentence(summary: Mapping[str, Any]) -> str:
    """What the log-ratio of the last policy to the start ranks right, with n and interval, or why that is not known."""
    found = summary.get("policy_accuracy") or {"unknown": "it was not measured"}
    if "unknown" in found:
        return f"No policy accuracy: {found['unknown']}."
    rate = Interval(found["accuracy"])
    left = f"; {found['left_out']} with prompts that were trained on are left out" if found.get("left_out") else ""
    return (
        f"Policy accuracy: the log-ratio of the last policy to the start ranks {rate.percent()} of {rate.n} held-out "
        f"pairs right, a tie one half{left}."
    )


COLUMNS = (
    (
        "margin asked",
        "root mean square of the differences of log-probabilities that the targets ask for, as far as differences can "
        "meet them, in nats",
    ),
    ("achieved", "the share of it that was reached: the effective eta as a share of eta"),
    ("transitive", "that part's share of the targets' mean square; no difference can meet the rest"),
    ("cyclic", "the share of triples of answers that go in a circle, where all pairs were judged"),
    ("KL to ref", "KL divergence of the update's last policy from its reference, in nats"),
    ("drift", "nats by which the log-probability of the sampled answers changed, summed over the steps"),
    ("mass", "the least share of probability that was kept in a step"),
    ("orders disagree", "how far the oracle's two orders of a pair are apart, on average"),
    ("peak", "the process's highest use of memory until then"),
)


def run_page(summary: Mapping[str, Any], title: str, run: str = "RUN") -> str:
    """One self-contained HTML page; ``run`` is the folder that its commands name."""
    head, rows = update_rows(summary)
    settings, steps_of = summary["settings"], summary["steps"]
    seconds = [
        [str(update["outer"]), *(f"{update['seconds'][stage]:.1f}" for stage in STAGES)]
        for update in summary["updates"]
    ]
    lines = {
        "asked": np.array([row["target_margin"] for row in steps_of]),
        "achieved": np.array([abs(row["achieved"]) * row["target_margin"] for row in steps_of]),
    }
    words = f"Margin asked for and margin achieved by step, at the end {lines['asked'][-1]:.3g} and "
    words += f"{lines['achieved'][-1]:.3g}."
    drawn = plots.curves(lines, "margin, nats", words, floor=1e-6, xlabel="step", first=1, wide=True)
    name = shlex.quote(run)
    played = f"coala comal matrix {name}@all -p OTHER-PROMPTS.txt --oracle ORACLE --out {shlex.quote(f'{run}-matrix')}"
    weights = f"{run}/model"
    return page(
        title,
        BRAND,
        section(
            "In short",
            paragraphs(policy_sentence(summary)),
            *noted([Note(note["level"], note["text"]) for note in summary["notes"]]),
            facts(
                "The run",
                (
                    ("policy", summary["policy"]),
                    ("oracle", summary["oracle"]),
                    (
                        "step",
                        f"eta {settings['eta']:g}, tau {settings['tau']:.3g} (eta tau {settings['ref_weight']:.3g})",
                    ),
                    ("loss", settings["inner_loss"]),
                    ("updates", f"{settings['outer_steps']} of {settings['inner_steps']} steps"),
                    ("time", in_words(summary["seconds"])),
                ),
            ),
        ),
        section(
            "What to do next",
            steps(
                step(
                    "Does the last policy beat its start?",
                    "This page does not say: its verdicts are on the prompts that were trained on.",
                    commands=((played, "Win rates of the start and of every update, on other prompts."),),
                ),
                step("Where is the model?", f"In {weights}: it loads as any model, or adapter, does."),
            ),
        ),
        section(
            "By update of the reference",
            gallery(drawn if len(steps_of) >= FEWEST else None),
            headed(Table("Updates", head, rows), Table("Seconds by stage", ("update", *STAGES), seconds)),
            details("What the columns mean", facts("Columns", COLUMNS)),
        ),
    )


# --- matrices ----------------------------------------------------------------------------------------------------


def matrix_rows(rates: WinRates) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a win-rate table: row beats column, in %, with 95 % intervals; the mean is over the others."""
    head = ["row beats column, %", *rates.names, "mean", "characters"]
    rows = []
    for i, name in enumerate(rates.names):
        cells = ["50" if i == j else bracketed(e, scale=1) for j, e in enumerate(rates.intervals[i])]
        rows.append([name, *cells, bracketed(rates.averages[i], scale=1), f"{rates.characters[i]:.0f}"])
    return head, rows


def nash_rows(nash: EmpiricalNash) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the mixture that none of the entrants beats, and of how far each alone is beaten."""
    rows = [[name, f"{share:.3f}", f"{nash.gap[name]:.3f}"] for name, share in nash.mixture.items()]
    return ["entrant", "in the Nash mixture", "gap alone"], rows


def matrix_page(
    rates: WinRates,
    nash: EmpiricalNash,
    title: str,
    sentences: Sequence[str] = (),
    entrants: Sequence[tuple[str, str]] = (),
) -> str:
    """One self-contained HTML page; ``entrants`` are names, each with what it is."""
    head, rows = matrix_rows(rates)
    alone = "It is the only one." if nash.unique else "It is one of several."
    how = "who is preferred counts (a tie half)" if rates.mode == "hard" else "mean of the oracle's probabilities"
    return page(
        title,
        BRAND,
        section(
            "Who beats whom",
            paragraphs(*sentences),
            facts("Entrants", entrants) if entrants else None,
            headed(Table(f"Win rates in %; {how}", head, rows)),
        ),
        section(
            "Empirical Nash mixture",
            paragraphs(
                f"The mixture of these entrants that none of them beats. {alone} The gap of an entrant is what the one "
                "that beats it most wins beyond what it loses, as a share; 0 if none does. Both are of the win rates "
                "as measured and inherit their error."
            ),
            Table("Mixture", *nash_rows(nash)),
        ),
    )
