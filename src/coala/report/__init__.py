"""One self-contained HTML page and one JSON file per run, from saved values only.

This package words, tabulates and draws; it computes no statistic and reads no model. ``report.json`` holds the content,
a plain dictionary; ``report.html`` is a function of it alone. All keys are optional: what is missing is said to be
missing. An ESTIMATE is a :class:`coala.values.Estimate` or the same fields as a dictionary; ``null`` bounds mean that
no interval is known.

    title           str
    command         str, the exact command that makes the run again
    created         str, a date and time given by the caller
    settings        {name: value}, as nested as they come
    summary         n_train, n_eval      pairs
                    accuracy_eval, accuracy_train            ESTIMATE, share of pairs ranked right
                    linear_accuracy_eval                     ESTIMATE of a linear probe on the same pairs
                    gain_over_linear                         ESTIMATE, paired difference of the two accuracies
                    nll_eval                                 ESTIMATE
                    calibration_error                        ESTIMATE, of the probabilities of held-out pairs
                    certified_gap        proved gap as a share of the objective, or null
                    program, statement   str, what was solved and what is proved of it
                    seconds, gflops      whole run
    data_findings   [{severity: "error" | "warning" | "note", text}]
    reads           [str], how the model reads a conversation: template, layer, pooling, oddities, one example
    head            {certificate: {...}, n_neurons, gate_on, temperature, least_slope, spec: {...}}; the certificate has
                    the fields of :class:`coala.values.Certificate` and relative_gap; these facts are put into words:
                    method, separable, gates_estimate {largest_violation, starts}, cv {signal_found},
                    phase_one {relative_gap}; all are listed
    curves          {margin: [{step, train, eval}], solver: [{step, gap, objective}]}: mean margins divided by their
                    standard deviation (margins of two heads have no common scale), gap = objective - lower bound
    layers          [{layer, cost, nll, excess, excess_error, accuracy, chosen}], where the layer was chosen: the fields
                    of :class:`coala.alignment.layer_choice.LayerScore`
    path            [{tau, gate_on, beta_rel, relaxation, cv_nll, cv_se, cv_accuracy, n_neurons, selected}];
                    beta_rel null: the linear head
    scores          {chosen: [float], rejected: [float]}, held-out pairs
    reliability     {bins: [{predicted, observed: ESTIMATE}], confidence, error: ESTIMATE, error_by_chance}, the fields
                    of :class:`coala.statistics.scores.Reliability`, held-out pairs
    by_length       [{low, high, accuracy: ESTIMATE}], length difference chosen - rejected
    length_unit     str, what lengths count ("characters" if not given)
    costs           [{stage, seconds, flops, flops_bound, peak_bytes}]; peak_bytes a number or {host, device}
    win_rates       [{judge, estimate: ESTIMATE, comment}], guided against unguided
    perplexity      {unguided: ESTIMATE, guided: ESTIMATE}, of the text under the base model
    policy          {accuracy: ESTIMATE, lifted: ESTIMATE, note} of log-ratios to the base, or {unknown: str}, why not
    distilled       what `coala align --distil` keeps in RUN/distilled/side_by_side.json: {judge, statement, guidance,
                    summary: [[name, text]], rows: [{name, method, wins: ESTIMATE or null, gain: ESTIMATE of the head's
                    score, perplexity_ratio: ESTIMATE, divergence: ESTIMATE or null, forwards}], stale}, or why not:
                    {nothing: str}
    samples         [{prompt, unguided, guided, scores: {unguided, guided}}]
    receipts        what :mod:`coala.report.receipts` keeps under RUN/receipts; added when the report is written
    evaluations     what :mod:`coala.report.evaluations` keeps under RUN/evaluations; added when the report is written
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coala.report.conclusions import conclusions
from coala.report.content import plain
from coala.report.evaluations import Contrast, Evaluation, Measure, Sample, Side, save_evaluation, saved_evaluations
from coala.report.page import render
from coala.report.receipts import forgotten_since, saved_receipts
from coala.store import RunFolder, load_json, save_json, write_atomic

__all__ = ["Contrast", "Evaluation", "Measure", "Sample", "Side", "add_evaluation", "conclusions", "write_report"]


def write_report(run: RunFolder, content: Mapping[str, Any]) -> Path:
    """Write ``report.json`` and ``report.html`` into the run folder and return the page's path.

    The evaluations and receipts that the run holds come with them.
    """
    receipts = saved_receipts(run)
    evaluations = [{**row, "stale": forgotten_since(receipts, row.get("created"))} for row in saved_evaluations(run)]
    kept = plain({**content, "evaluations": evaluations, "receipts": receipts})
    page = run.path / "report.html"
    save_json(run.path / "report.json", kept)
    write_atomic(page, render(kept))
    return page


def add_evaluation(run: RunFolder, evaluation: Evaluation) -> Path:
    """Keep an evaluation in the run, put it on its page if there is one, and return the evaluation's file."""
    kept = save_evaluation(run, evaluation)
    if (run.path / "report.json").exists():
        write_report(run, load_json(run.path / "report.json"))
    return kept
