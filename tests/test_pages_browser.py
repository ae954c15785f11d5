"""What every page keeps to on a screen, on a phone, in the dark and on paper. Needs Chromium."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.audit import audit_items
from coala.audit.page import render as audit_page
from coala.nash import PreferenceGame, solve
from coala.nash.page import game_page
from coala.pages.parts import page, section, sides
from coala.report.content import plain
from coala.report.page import render
from coala.survey import save_survey
from coala.survey.form import SurveyPrompt, build
from coala.survey.page import results_page
from coala.values import Generation, Turn

from .page_laws import keeps_to_it, of
from .serving import Here
from .survey_raters import Server
from .test_audit_benchmarks import Item, best_of
from .test_report import example, short_example
from .test_survey_results import results_of

TALK = [
    {"role": "system", "text": "Be brief."},
    {"role": "user", "text": "What is a lighthouse?\nOne line, please."},
    {"role": "assistant", "text": "A tower with a light."},
    {"role": "user", "text": "Why " + "so" * 200 + "?"},
]


def test_a_report_keeps_to_it(browser: Any) -> None:
    content = short_example()
    content["samples"][0]["prompt"] = TALK
    del content["by_length"], content["reliability"]  # to draw takes longest, and the nightly ones do
    keeps_to_it(browser, of(render(plain(content))))


@pytest.mark.nightly
@pytest.mark.parametrize(
    "left_out", [(), ("win_rates",), ("perplexity",), ("win_rates", "perplexity"), ("path", "scores")]
)
def test_a_report_of_whatever_parts_keeps_to_it(browser: Any, left_out: tuple[str, ...]) -> None:
    keeps_to_it(browser, of(render(plain({name: value for name, value in example().items() if name not in left_out}))))


def test_turns_are_set_one_by_one(browser: Any) -> None:
    replies = {name: (name, "a reply") for name in ("unguided", "guided")}
    context = browser.new_context(viewport={"width": 390, "height": 900})
    seen = context.new_page()
    seen.set_content(page("t", "b", section("s", sides(TALK, replies))))
    assert seen.locator(".turn .side-name").all_inner_texts() == [turn["role"] for turn in TALK]
    assert [text.strip() for text in seen.locator(".turn .said").all_inner_texts()] == [turn["text"] for turn in TALK]
    boxes = seen.locator(".turn").evaluate_all("all => all.map((one) => one.getBoundingClientRect().toJSON())")
    assert all(one["bottom"] <= other["top"] for one, other in itertools.pairwise(boxes))
    context.close()


@pytest.mark.nightly
def test_results_of_a_survey_keep_to_it(browser: Any) -> None:
    keeps_to_it(browser, of(results_page(results_of(3))))


@pytest.mark.nightly
def test_an_audit_keeps_to_it(browser: Any) -> None:
    items = [
        Item(str(k), f"subset {k % 2} of several words", one.prompt, one.chosen, one.rejected)
        for k, one in enumerate(best_of(40))
    ]
    scores = {"a-reward-model-of-a-long-name-27B": np.random.default_rng(0).standard_normal(160)}
    found = audit_items(items, scores=scores, deals=1, remarks=["7 ties are left out"])
    keeps_to_it(browser, of(audit_page(found, "Audit of a-benchmark.jsonl")))


@pytest.mark.nightly
def test_a_game_keeps_to_it(browser: Any) -> None:
    three = np.array([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]])
    four = np.full((4, 4), 0.5)
    four[0, 1:], four[1:, 0] = 0.9, 0.1
    keeps_to_it(browser, of(game_page(solve(PreferenceGame({"a": three, "b": four}), outer=20), "game.json")))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_question_of_several_turns_keeps_to_it(browser: Any, tmp_path: Path) -> None:
    turns = tuple(Turn(one["role"], one["text"]) for one in TALK)  # type: ignore[arg-type]
    replies = {name: [Generation("p", f"reply {name}", name, 1, 0, 0.0, 0.0)] for name in ("one", "two", "three")}
    save_survey(tmp_path, build(replies, [SurveyPrompt("p", turns, "all")], per_category=1))
    with Server(tmp_path) as server:

        def show(seen: Any) -> None:
            seen.goto(f"http://127.0.0.1:{server.port}")
            seen.get_by_label("I have read this").check()
            seen.get_by_role("button", name="Begin").click()
            seen.wait_for_url("**/s/*/1")
            assert seen.locator(".turn .side-name").all_inner_texts() == [turn["role"] for turn in TALK]

        keeps_to_it(browser, show)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_playground_keeps_to_it(browser: Any, served_run: Path) -> None:
    from coala.alignment import load_parts

    with Here(*load_parts(served_run)[:2]) as here:

        def show(seen: Any) -> None:
            seen.goto(here.url)
            seen.get_by_label("Prompt").fill("hello")
            seen.get_by_label("Tokens").fill("8")
            seen.get_by_role("button", name="Compare").click()
            for side in ("unguided", "guided"):
                seen.locator(f"#{side} .strip span").first.wait_for(state="attached")  # a blank token has no box

        keeps_to_it(browser, show)
