"""What every page keeps to on a screen, on a phone, in the dark and on paper. Needs Chromium."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coala.pages.parts import page, section, sides
from coala.report.content import plain
from coala.report.page import render
from coala.survey import save_survey
from coala.survey.form import SurveyPrompt, build
from coala.survey.page import results_page
from coala.values import Generation, Turn

from .serving import Here
from .survey_raters import Server
from .test_report import example, short_example
from .test_survey_results import results_of

WIDTHS = (1400, 1000, 390)
PAPER = 680  # CSS pixels of an A4 sheet without its margins
TALK = [
    {"role": "system", "text": "Be brief."},
    {"role": "user", "text": "What is a lighthouse?\nOne line, please."},
    {"role": "assistant", "text": "A tower with a light."},
    {"role": "user", "text": "Why " + "so" * 200 + "?"},
]
# A row of a grid is filled if its last card ends where the grid ends.
HALF_FILLED = """() => [...document.querySelectorAll('.tiles, .certificate, .figures, .sides')].flatMap((grid) => {
  const rows = new Map();
  for (const card of grid.children) {
    if (!card.offsetWidth) continue;
    const box = card.getBoundingClientRect();
    rows.set(Math.round(box.top), Math.max(rows.get(Math.round(box.top)) ?? 0, box.right));
  }
  const ends = grid.getBoundingClientRect().right;
  return [...rows.values()].filter((right) => ends - right > 2).map(() => grid.className);
})"""
SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# WCAG 2: the contrast of every text that is seen with what is painted below it.
FAINT = """() => {
  const rgba = (said) => (said.match(/[\\d.]+/g) ?? ['0', '0', '0', '0']).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(rgb[i] / 255), 0);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]); };
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    const style = getComputedStyle(node);
    const said = walk.currentNode.data.trim();
    if (!said || !node.getClientRects().length || node.closest('.hidden, style, script, :disabled')) continue;
    const ink = rgba(node instanceof SVGElement ? style.fill : style.color);
    const below = ground(node);
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push(`${said.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""
SEEN = "[...document.querySelectorAll('%s')].filter((one) => one.getClientRects().length)"
CUT_OFF = f"""() => {SEEN % "body *"}.filter((one) => !one.closest('svg, .hidden'))
  .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map((one) => `${{one.tagName}} ${{one.className}} ${{one.textContent.trim().slice(0, 40)}}`)"""
PRESSED = f"() => {SEEN % 'button, .button, details:not([open]) > summary'}.length"


def keeps_to_it(
    browser: Any, show: Callable[[Any], None], *, widths: tuple[int, ...] = WIDTHS, paper: bool = True
) -> None:
    """All laws of the page that ``show`` opens."""
    context = browser.new_context(viewport={"width": widths[0], "height": 900})
    seen = context.new_page()
    show(seen)
    assert seen.locator("h1").count() == 1
    assert seen.locator("main").count() == 1
    for width in widths:
        seen.set_viewport_size({"width": width, "height": 900})
        assert seen.evaluate(HALF_FILLED) == [], width
        assert seen.evaluate(SIDEWAYS) == 0, width
    seen.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for scheme in ("light", "dark"):
        seen.emulate_media(color_scheme=scheme)
        assert seen.evaluate(FAINT) == [], scheme
    assert seen.evaluate(SIDEWAYS) == 0
    if paper:
        seen.set_viewport_size({"width": PAPER, "height": 900})
        seen.emulate_media(media="print")
        assert seen.evaluate(CUT_OFF) == []
        assert seen.evaluate(PRESSED) == 0
        assert seen.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()


def of(made: str) -> Callable[[Any], None]:
    return lambda seen: seen.set_content(made)


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
