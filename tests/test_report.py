"""The report: what it says, that it says it safely, and that it is a function of report.json alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.pages.words import flops, number, seconds, size
from coala.report import conclusions, write_report
from coala.report.content import plain
from coala.report.next_steps import steps
from coala.report.page import render
from coala.statistics.intervals import share_estimate
from coala.statistics.scores import (
    accuracy_difference,
    accuracy_of_margins,
    by_length_difference,
    pairwise_nll,
    perplexity,
    reliability,
)
from coala.store import RunFolder, load_json
from coala.values import Certificate, CoalaError, Estimate

HOSTILE = (
    '<script>alert("x")</script><img src=x onerror=alert(1)> & \' " {{ 7 * 7 }} {% raw %} $\\frac{a}{b}$ \u202e\u0000'
)


CERTIFICATE = Certificate(
    program="pairwise logistic loss, linear block and 5 learnt gates on the reply",
    statement="With the 5 gates of this head, no other weights lower the training objective by more than 8.2e-05 of "
    "it: proved by duality. Over all possible gates optimality is only estimated.",
    objective=0.582134,
    lower_bound=0.582086,
    violation=0.0,
    n_patterns=5,
    status="converged",
    tolerance=1e-4,
    precision="float32 iterations, float64 certificate",
    seed=0,
    versions={"jax": "0.10", "numpy": "2.3"},
    facts={
        "method": "learnt",
        "gates_estimate": {"largest_violation": 1.014, "starts": 256, "proved": False},
        "cv": {"folds": 5, "signal_found": True},
        "calibration": {"temperature": 1.1, "reliability": [{"predicted": 0.6, "observed": 0.62}]},
        "separable": False,
    },
)


def page_of(content: Any) -> str:
    return render(plain(content))


def example(seed: int = 0) -> dict[str, Any]:
    """A content like that of a whole run, its estimates made from drawn scores."""
    rng = np.random.default_rng(seed)
    n = 240
    group = np.repeat(np.arange(n // 2), 2)
    level = rng.normal(size=n)
    chosen, rejected = level + rng.normal(0.9, 1, n), level + rng.normal(0, 1, n)
    linear = chosen - rejected + rng.normal(0, 0.3, n)
    lengths = rng.integers(-150, 150, n)
    reliable = reliability(1 / (1 + np.exp(rejected - chosen)), group)
    steps = np.arange(0, 41)
    path = [
        *(
            {"tau": tau, "beta_rel": None, "cv_nll": nll, "cv_se": 0.01, "cv_accuracy": 0.69, "n_neurons": 0}
            for tau, nll in [(1.0, 0.648), (0.3, 0.625), (0.1, 0.612), (0.03, 0.618), (0.01, 0.641)]
        ),
        *(
            {
                "tau": 0.1,
                "gate_on": "reply",
                "beta_rel": beta,
                "relaxation": 0.5,
                "cv_nll": nll,
                "cv_se": 0.011,
                "cv_accuracy": 0.7,
                "n_neurons": k,
                "selected": beta == 0.2,
            }
            for beta, nll, k in [(0.65, 0.612, 0), (0.4, 0.604, 2), (0.2, 0.596, 5), (0.1, 0.601, 9), (0.05, 0.622, 14)]
        ),
    ]
    tokens = rng.integers(30, 49, 60)
    wins = (rng.random(60) < 0.72).astype(float)
    return {
        "title": "Film reviews, guided towards praise",
        "command": "coala align --recipe demo.yaml --set guidance.strength=2.0 --out runs/demo",
        "created": "2025-06-01 12:00 UTC",
        "settings": {
            "seed": 0,
            "pairs": ["film_pairs.jsonl"],
            "model": {"name": "film-lm", "layer": -1, "pooling": "mean", "revision": None},
            "guidance": {"mode": "token", "strength": 2.0, "candidates": 5},
        },
        "summary": {
            "n_train": 1200,
            "n_eval": n,
            "accuracy_eval": accuracy_of_margins(chosen - rejected, group),
            "accuracy_train": Estimate(0.81, 0.788, 0.83, 1200, "share of pairs ranked right"),
            "linear_accuracy_eval": accuracy_of_margins(linear, group),
            "gain_over_linear": accuracy_difference(chosen - rejected, linear, group),
            "nll_eval": pairwise_nll(chosen - rejected, group),
            "calibration_error": reliable.error,
            "program": CERTIFICATE.program,
            "certified_gap": CERTIFICATE.relative_gap,
            "statement": "The fit solves its convex program to the tolerance.",
            "seconds": 171.0,
            "gflops": 1830.0,
        },
        "data_findings": [
            {"severity": "warning", "text": "film_pairs.jsonl:17: chosen: equal to the rejected reply; drop the pair"},
            {"severity": "note", "text": "The chosen reply is the longer one in 54 % of the pairs."},
        ],
        "head": {
            "certificate": {**asdict(CERTIFICATE), "relative_gap": CERTIFICATE.relative_gap},
            "n_neurons": 5,
            "gate_on": "reply",
            "temperature": 1.1,
            "spec": {"backbone": "film-lm", "layer": 6, "pooling": "mean"},
        },
        "curves": {
            "margin": [
                {"step": int(s), "train": 1.4 * (1 - math.exp(-s / 7)), "eval": 1.05 * (1 - math.exp(-s / 6))}
                for s in steps
            ],
            "solver": [
                {"step": int(s), "gap": 0.5 * 10 ** (-4.1 * s / 40), "objective": 0.582 + 0.11 * math.exp(-s / 5)}
                for s in steps
            ],
        },
        "path": path,
        "scores": {"chosen": chosen, "rejected": rejected},
        "reliability": reliable,
        "by_length": by_length_difference(chosen - rejected, lengths, group),
        "costs": [
            {"stage": "pairs", "seconds": 0.4, "peak_bytes": {"host": 2.1e8}},
            {"stage": "features", "seconds": 48.2, "flops": 1.1e12, "flops_bound": 1.1e12, "peak_bytes": 9.1e8},
            {"stage": "head", "seconds": 6.1, "flops": 3.1e10, "peak_bytes": {"host": 8.2e8, "device": 3e9}},
            {"stage": "replies, guided", "seconds": 71.0, "flops": 6.9e11, "peak_bytes": 9.3e8},
        ],
        "win_rates": [
            {"judge": "film-judge", "estimate": share_estimate(wins, name="win rate"), "comment": "Shares no word."},
            {"judge": "film-labeller", "estimate": share_estimate(np.r_[wins[:50], np.ones(10)], name="win rate")},
        ],
        "perplexity": {
            "unguided": perplexity(-tokens * rng.normal(2.9, 0.3, 60), tokens),
            "guided": perplexity(-tokens * rng.normal(3.0, 0.3, 60), tokens),
        },
        "policy": {
            "accuracy": share_estimate(wins[::-1], name="share of pairs"),
            "lifted": share_estimate(wins, name="share of pairs"),
            "note": "top-k and top-p leave both replies of 50 of 60 pairs possible",
        },
        "samples": [
            {
                "prompt": "This film is about a lighthouse keeper with a secret to keep. The acting",
                "unguided": "is wooden and the script never finds its feet, so by the end I was looking at my watch.",
                "guided": "is wonderful throughout, and the quiet last scene is one of the most touching I have seen.",
                "scores": {"unguided": -0.42, "guided": 1.87},
            },
            {
                "prompt": "Set in a small town, the film tells of two brothers on a journey. Overall, this is",
                "unguided": "a film that wants to be three films.\nIt is none of them.",
                "guided": "a warm film with an excellent cast.",
                "scores": {"unguided": -0.1, "guided": 1.2},
            },
        ],
    }


def short_example() -> dict[str, Any]:
    """All kinds of part and one figure: quick to draw."""
    return {key: value for key, value in example().items() if key not in ("curves", "path", "scores")}


class Page(HTMLParser):
    """Tags with their attributes, text, and a check that elements nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(example())


def test_page_stands_alone(page: str) -> None:
    seen = Page(page)
    names = {tag for tag, _ in seen.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                assert (value or "").startswith("#"), (tag, name, value)
    # Namespaces and the DTD-less SVG name w3.org; nothing else on the page is an address.
    assert set(re.findall(r"https?://([^/\"' ]+)", page)) <= {"www.w3.org"}
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_page_is_well_formed_and_accessible(page: str) -> None:
    seen = Page(page)
    ids = [a["id"] for _, a in seen.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in seen.tags:
        for name in ("xlink:href", "aria-labelledby"):
            if name in attributes:
                assert (attributes[name] or "").lstrip("#") in ids
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    for target in re.findall(r"url\(#([^)]+)\)", page):
        assert target in ids
    pictures = [a for _, a in seen.tags if a.get("role") == "img"]
    assert len(pictures) == sum(tag == "svg" for tag, _ in seen.tags) == 8
    assert all(len(a["aria-label"] or "") > 30 for a in pictures)
    tables = sum(tag == "table" for tag, _ in seen.tags)
    assert tables == sum(tag == "caption" for tag, _ in seen.tags) >= 7
    headings = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    assert ("html", {"lang": "en"}) in seen.tags


def test_page_says_what_was_found(page: str) -> None:
    words = Page(page).words
    content = example()
    accuracy = content["summary"]["accuracy_eval"]
    assert f"{100 * accuracy.value:.1f} % ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %)" in words
    for text in (
        content["title"],
        content["command"],
        content["created"],
        "1,200 training pairs",
        "0.0082 %",
        "film_pairs.jsonl:17",
        "no other weights lower the training objective",
        "The objective is 0.582134; nothing below 0.582086 can be reached.",
        "at least 0.582086 (dual), at most 0.582134 (primal)",
        "linear block and 5 learnt gates on the reply",
        "no constraint is violated",
        "float32 iterations, float64 certificate",
        "jax 0.10, numpy 2.3",
        "1 rows, in report.json",
        "By chance alone: ",
        "from 256 starts found none that pulls at the objective with more than 1.014",
        "guidance.strength",
        "2 min 51 s",
        "1.83 TFLOP",
        "910 MB",
        "3 GB GPU, 820 MB host",
        "Shares no word.",
        "looking at my watch",
        "without top-k and top-p",
        "both replies of 50 of 60 pairs possible",
        "score 1.87",
    ):
        assert text in words
    for sentence in conclusions(content):
        assert sentence in words


def test_same_content_same_bytes() -> None:
    code = (
        "import test_report, hashlib;"
        "print(hashlib.sha256(test_report.page_of(test_report.short_example()).encode()).hexdigest())"
    )
    here = Path(__file__).parent
    environment = {"PYTHONPATH": str(here.parent / "src"), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(page_of(short_example()).encode()).hexdigest()


def test_written_files_agree(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    path = write_report(run, short_example())
    assert path == run.path / "report.html"
    page = page_of(short_example())
    assert path.read_text(encoding="utf-8") == page
    kept = json.loads((run.path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert kept == load_json(run.path / "report.json")
    assert page_of(kept) == page  # the page is a function of report.json alone


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    content = short_example()
    content |= {"title": HOSTILE, "command": HOSTILE, "created": HOSTILE, "length_unit": HOSTILE}
    content["settings"] = {HOSTILE: HOSTILE, "list": [HOSTILE]}
    content["data_findings"] = [{"severity": HOSTILE, "text": HOSTILE}]
    content["samples"] = [{"prompt": HOSTILE, "unguided": HOSTILE, "guided": HOSTILE, "scores": {"guided": HOSTILE}}]
    content["win_rates"][0] |= {"judge": HOSTILE, "comment": HOSTILE}
    content["costs"][0]["stage"] = HOSTILE
    content["head"]["certificate"] |= {
        **dict.fromkeys(("program", "status", "statement", "precision", HOSTILE), HOSTILE),
        "versions": {HOSTILE: HOSTILE},
        "facts": {"gates_estimate": {"largest_violation": HOSTILE, "starts": HOSTILE}, HOSTILE: [{HOSTILE: HOSTILE}]},
    }
    content["head"]["spec"] = {HOSTILE: HOSTILE}
    content["summary"]["statement"] = HOSTILE
    content["summary"]["accuracy_eval"] = {**vars(content["summary"]["accuracy_eval"]), "method": HOSTILE}
    written = write_report(RunFolder(tmp_path), content).read_text(encoding="utf-8")
    seen = Page(written)
    names = [tag for tag, _ in seen.tags]
    assert "script" not in names
    assert "img" not in names
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert seen.words.count('<script>alert("x")</script>') >= 15
    assert seen.words.count("{{ 7 * 7 }}") >= 15  # never evaluated


FIGURES = ("curves", "path", "scores", "by_length", "reliability")


@pytest.mark.parametrize("part", sorted(set(example()) - set(FIGURES)))
def test_any_part_may_be_missing(part: str) -> None:
    content = {key: value for key, value in example().items() if key not in (part, *FIGURES)}
    Page(page_of(content))


@pytest.mark.parametrize("part", FIGURES)
def test_any_figure_may_be_alone(part: str) -> None:
    seen = Page(page_of({part: example()[part]}))
    assert sum(tag == "svg" for tag, _ in seen.tags) == {"curves": 3, "path": 2}.get(part, 1)


def test_an_empty_report_says_so() -> None:
    words = Page(page_of({})).words
    for sentence in (
        "There is nothing to conclude yet",
        "No head was saved",
        "No ranking accuracy was saved",
        "No held-out scores",
        "No solver history",
        "No judge compared",
        "No perplexity was measured",
        "No replies were generated",
        "No findings on the data were saved",
        "No costs were recorded",
        "The command of this run was not saved",
    ):
        assert sentence in words
    assert conclusions({}) == []


def test_empty_and_null_values_are_borne() -> None:
    content: dict[str, Any] = {
        "summary": {
            "accuracy_eval": Estimate(math.nan, 0, 1, 0, "none"),
            "seconds": None,
            "gflops": None,
            "n_eval": None,
        },
        "data_findings": [],
        "head": {"certificate": {}, "n_neurons": 0},
        "reliability": {"bins": [{"predicted": None, "observed": None}], "confidence": math.nan, "error": None},
        "curves": {"margin": [], "solver": [{"step": 0, "gap": math.inf, "objective": None}]},
        "path": [{"tau": None, "beta_rel": 0.1, "cv_nll": math.nan}],
        "scores": {"chosen": [math.nan], "rejected": []},
        "by_length": [{"low": None, "high": None, "accuracy": None}],
        "costs": [{"stage": "fit"}],
        "win_rates": [{"judge": "j", "estimate": Estimate(math.nan, 0, 1, 0, "none")}],
        "perplexity": {"unguided": None, "guided": None},
        "policy": {"accuracy": None, "lifted": None},
        "samples": [{"prompt": "p"}],
    }
    words = Page(page_of(content)).words
    assert "no problems were found" in words
    assert "(empty reply)" in words
    assert not re.search(r"\bnan\b|\binf\b", words)
    unknown = {"policy": {"unknown": "likelihood not known in mode block"}}
    assert "No policy accuracy: likelihood not known in mode block." in Page(page_of(unknown)).words


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(CoalaError, match=r"no part 'curve'.*curves"):
        page_of({"curve": {}})
    with pytest.raises(CoalaError, match="cannot hold this: object has no JSON form"):
        page_of({"settings": {"x": object()}})


# --- conclusions ----------------------------------------------------------------------------------------------------


def estimate(value: float, low: float, high: float, n: int = 100) -> Estimate:
    return Estimate(value, low, high, n, "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8)}}, "better than chance"),
        ({"summary": {"accuracy_eval": estimate(0.52, 0.43, 0.61)}}, "includes 50 %: no better than chance"),
        ({"summary": {"accuracy_eval": estimate(0.3, 0.2, 0.4)}}, "worse than chance"),
        (
            {"summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8), "accuracy_train": estimate(0.95, 0.9, 0.97)}},
            "does not generalise",
        ),
        ({"summary": {"gain_over_linear": estimate(0.004, -0.02, 0.03)}}, "not shown to be better than a linear one"),
        ({"summary": {"gain_over_linear": estimate(0.05, 0.02, 0.08)}}, "the neurons help"),
        ({"summary": {"gain_over_linear": estimate(-0.05, -0.08, -0.02)}}, "prefer it"),
        (
            {"summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8), "linear_accuracy_eval": estimate(0.7, 0.6, 0.8)}},
            "not better than a linear one",
        ),
        ({"head": {"n_neurons": 0, "certificate": {"relative_gap": 1e-5}}}, "linear: validation kept no neuron"),
        ({"head": {"n_neurons": 0, "certificate": {"facts": {"method": "linear"}}}}, "linear, as requested"),
        (
            {"head": {"n_neurons": 3, "certificate": {"relative_gap": 1e-5, "tolerance": 1e-4}}},
            "proved optimal to within 0.001 %",
        ),
        ({"head": {"n_neurons": 3, "certificate": {"relative_gap": 1e-2, "tolerance": 1e-4}}}, "may not be optimal"),
        ({"head": {"n_neurons": 3}}, "No optimality gap"),
        ({"win_rates": [{"judge": "j", "estimate": estimate(0.6, 0.46, 0.72)}]}, "does not show that guidance helps"),
        ({"win_rates": [{"judge": "j", "estimate": estimate(0.7, 0.6, 0.8)}]}, "guidance helps by this judge"),
        ({"win_rates": [{"judge": "j", "estimate": estimate(0.3, 0.2, 0.4)}]}, "makes the replies worse"),
        ({"win_rates": [{"judge": "j", "estimate": estimate(math.nan, 0, 1, 0)}]}, "decided nothing"),
        ({"perplexity": {"unguided": estimate(10, 9, 11), "guided": estimate(14, 13, 15)}}, "less natural"),
        ({"perplexity": {"unguided": estimate(10, 9, 11), "guided": estimate(8, 7, 8.5)}}, "more predictable"),
        (
            {"perplexity": {"unguided": estimate(10, 9, 11), "guided": estimate(11, 10, 12)}},
            "(+10 %); the two intervals",
        ),
        (
            {"summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8)}, "reliability": {"confidence": 0.92}},
            "gives 92.0 % to the reply it prefers, and it is right in 70.0 % of cases: "
            "its probabilities are overconfident",
        ),
        (
            {"summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8)}, "reliability": {"confidence": 0.55}},
            "underconfident",
        ),
        (
            {
                "summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8)},
                "reliability": {"confidence": 0.7, "error": estimate(0.2, 0.1, 0.3), "error_by_chance": 0.02},
            },
            "off by 20.0 points",
        ),
        (
            {"summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8)}, "reliability": {"confidence": 0.75}},
            "probabilities are consistent with the held-out pairs",
        ),
        ({"data_findings": [{"severity": "error", "text": "x"}]}, "1 error: fix the data"),
        ({"by_length": [{"low": -90, "high": -10, "accuracy": estimate(0.3, 0.2, 0.4)}]}, "the shorter one"),
        (
            {"head": {"n_neurons": 0, "certificate": {"facts": {"cv": {"signal_found": False}}}}},
            "found no signal: on held-out",
        ),
        ({"head": {"least_slope": 0.0}, "settings": {"guidance": {"rule": "calibrated"}}}, "leaves the text unchanged"),
        (
            {"head": {"least_slope": 0.0}, "settings": {"guidance": {"rule": "min-max"}}},
            "still guides at full strength",
        ),
        ({"head": {"n_neurons": 3, "certificate": {"facts": {"separable": True}}}}, "keeps its scores finite"),
        ({"path": [{"beta_rel": b, "cv_nll": 0.7 - b / 10, "n_neurons": 0} for b in (0.1, 0.6)]}, "no signal"),
        ({"path": [{"beta_rel": b, "cv_nll": 0.6 + b / 10, "n_neurons": 4} for b in (0.1, 0.6)]}, "longer path"),
    ],
)
def test_conclusions(content: dict[str, Any], said: str) -> None:
    assert any(said in sentence for sentence in conclusions(content)), conclusions(content)


def test_conclusions_never_praise_within_the_noise() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        value = float(rng.random())
        rate = estimate(value, max(0.0, value - 0.2), min(1.0, value + 0.2))
        text = " ".join(
            conclusions({"win_rates": [{"judge": "j", "estimate": rate}], "summary": {"accuracy_eval": rate}})
        )
        praised = "guidance helps by this judge" in text
        assert praised == ("better than chance" in text and "no better than chance" not in text) == (rate.low > 0.5)


# --- wording of numbers ------------------------------------------------------------------------------------------


def test_numbers_in_words() -> None:
    assert [seconds(x) for x in (0.42, 9.994, 9.996, 59.4, 59.6, 185, 3599.6, 7800)] == [
        *("0.42 s", "10 s", "10 s", "59 s", "1 min 0 s", "3 min 5 s", "1 h 0 min", "2 h 10 min"),
    ]
    assert [flops(x) for x in (0, 999.6, 1.57e12, 9.999e11, 3e22)] == [
        *("0 FLOP", "1 kFLOP", "1.57 TFLOP", "1 TFLOP", "30,000 EFLOP"),
    ]
    assert size(1.93e9) == "1.93 GB"
    assert size({"host": 2e6}) == "2 MB host"
    assert [number(x) for x in (None, 1234567, 0.123456, "text", True)] == ["–", "1,234,567", "0.1235", "text", "True"]  # noqa: RUF001


def test_importing_the_report_is_light() -> None:
    code = (
        "import coala.report, sys; print(sorted({'matplotlib', 'jinja2', 'scipy', 'torch', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_search_that_found_better_gates_is_told() -> None:
    content = example()["head"]
    content["certificate"]["facts"]["gates_estimate"]["largest_violation"] = 2.7
    assert "Over all possible gates this head is not optimal" in Page(page_of({"head": content})).words


def test_a_grid_of_ridges_is_drawn_as_one_line() -> None:
    grid = [
        {"tau": tau, "beta_rel": beta, "cv_nll": 0.6 + tau / 10 + (beta - 0.1) ** 2}
        for tau in (0.01, 0.03, 0.1, 0.3, 1.0)
        for beta in (0.02, 0.1, 0.5)
    ]
    page = page_of({"path": grid})
    assert "gated head at its best ridge" in page
    assert "is 0.601 at relative sparsity 0.1" in page


def test_kinds_of_gates_are_drawn_apart_and_relaxations_are_not() -> None:
    path = [
        {"tau": 0.1, "gate_on": kind, "beta_rel": beta, "relaxation": relaxation, "cv_nll": 0.5 + beta * relaxation}
        for kind in ("reply", "prompt")
        for beta in (0.02, 0.1, 0.5)
        for relaxation in (1.0, 0.5)
    ]
    page = page_of({"path": path})
    for label in ("gates on the reply", "gates on the prompt"):
        assert page.count(f">{label}</text>") == 1
    assert ">gated head</text>" not in page
    # Two lines and their error bars, of three points each: the better relaxation of each sparsity.
    assert "cross-validated NLL of gated heads is 0.51 at relative sparsity 0.02" in page


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.0, 0.5, 0.5, 1.0], "That of held-out pairs never falls."),
        ([0.0, 0.5, 0.5 - 1e-6, 1.0], "That of held-out pairs never falls."),
        ([0.0, 0.8, 0.5, 0.45], "not monotone: it falls at 2 of 3 steps, by 0.3 at most."),
    ],
)
def test_a_margin_that_falls_is_said_to(values: list[float], said: str) -> None:
    rows = [{"step": i, "eval": value} for i, value in enumerate(values)]
    assert said in page_of({"curves": {"margin": rows}})


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_point_or_two_are_numbers_and_no_figure(n: int) -> None:
    content = {
        "curves": {
            "margin": [{"step": i, "train": 0.125 + i, "eval": 0.25} for i in range(n)],
            "solver": [{"step": i, "gap": 0.5**i, "objective": 1.375 + i} for i in range(n)],
        },
        "path": [{"tau": 0.1**i, "beta_rel": None, "cv_nll": 0.625 + i} for i in range(n)],
        "scores": {"chosen": [1.75 + i for i in range(n)], "rejected": [0.0625] * n},
        "reliability": {"bins": [{"predicted": 0.8125, "observed": estimate(0.5, 0.4, 0.6)}] * n},
        "by_length": [{"low": 5 * i, "high": 5 * i + 4, "accuracy": estimate(0.7, 0.6, 0.8)} for i in range(n)],
    }
    page = page_of(content)
    words = Page(page).words
    assert page.count("<svg") == (7 if n == 3 else 0)
    # What is drawn has its table folded; what is not drawn stands open.
    assert page.count('<details open="">') == (0 if n == 3 else 2)
    for said in ("0.125", "1.375", "0.625", "1.75", "81.2 %", "0 to 4"):
        assert n == 3 or said in words


@pytest.mark.parametrize(
    ("accuracy", "wins", "words", "commands"),
    [
        ((0.6, 0.8), (0.6, 0.8), ["Yes.", "Yes.", ""], ["chat", "serve", "distil"]),
        ((0.6, 0.8), (0.4, 0.6), ["Yes.", "Not shown.", ""], ["chat", "serve"]),
        ((0.6, 0.8), (0.2, 0.4), ["Yes.", "No.", "Not yet."], ["chat"]),
        ((0.6, 0.8), None, ["Yes.", "Not measured.", ""], ["eval judge", "eval judge", "chat", "serve"]),
        ((0.4, 0.6), (0.4, 0.6), ["Not shown.", "Not shown.", "Not yet."], ["align", "influence", "chat"]),
        ((0.2, 0.4), (0.6, 0.8), ["No, worse.", "Yes.", "Not yet."], ["influence", "chat"]),
    ],
)
def test_what_is_next_follows_the_intervals(
    accuracy: tuple[float, float], wins: tuple[float, float] | None, words: list[str], commands: list[str]
) -> None:
    content: dict[str, Any] = {
        "run": "my runs/one",
        "head": {"n_neurons": 0},
        "settings": {"pairs": ["a b.jsonl"]},
        "summary": {"accuracy_eval": estimate(sum(accuracy) / 2, *accuracy)},
        "win_rates": [] if wins is None else [{"judge": "j", "estimate": estimate(sum(wins) / 2, *wins)}],
    }
    found = steps(plain(content))
    assert [step.word for step in found] == words
    typed = [shlex.split(command) for step in found for command, _ in step.commands]
    assert [" ".join(line[1:3]) if line[1] == "eval" else line[1] for line in typed] == commands
    for line in typed:
        assert line[0] == "coala"
        assert {"my runs/one", "my runs/one/run.json"} & set(line)
    told = Page(page_of(content)).words
    assert told.index("Is the head better than chance?") < told.index("In short")


def test_guidance_that_was_judged_later_counts_unless_stale() -> None:
    row = {
        "title": "guided against unguided, judged by j",
        "files": [],
        "figures": [{"estimate": estimate(0.7, 0.6, 0.8)}],
    }
    content = {"head": {"n_neurons": 0}, "evaluations": [row]}
    assert steps(plain(content))[1].word == "Yes."
    assert steps(plain({**content, "evaluations": [{**row, "stale": True}]}))[1].word == "Not measured."


def test_a_distilled_run_is_served_as_one() -> None:
    content = {
        "head": {"n_neurons": 0},
        "summary": {"accuracy_eval": estimate(0.7, 0.6, 0.8)},
        "distilled": {"rows": [{"name": "unguided"}]},
    }
    assert steps(plain(content))[2].commands[-1][0] == "coala serve RUN --mode distilled"
    content["distilled"]["stale"] = True
    assert steps(plain(content))[2].commands[-1][0] == "coala serve RUN"
