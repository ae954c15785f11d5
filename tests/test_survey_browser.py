"""The survey in a real browser: keyboard, phone, no scripts, the back button. Needs Chromium."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from coala.survey import Records, read_votes, save_survey
from tests.survey_raters import Server, made_up

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def answer_all(browser: Any, site: str, salt: int) -> tuple[str, dict[int, str]]:
    """One rater from consent to thanks: even salts by keyboard, odd ones by touch on a phone, every fourth without
    scripts. Returns the token and page number -> text chosen."""
    by_touch = salt % 2 == 1
    context = browser.new_context(**(PHONE if by_touch else {}), java_script_enabled=salt % 4 != 3)
    page = context.new_page()
    page.goto(site)
    page.get_by_label("I have read this").check()
    page.get_by_role("button", name="Begin").click()
    page.wait_for_url("**/s/*/1")
    token = page.url.split("/s/")[1].split("/")[0]
    picked: dict[int, str] = {}
    while "/done" not in page.url:
        number = int(page.url.rsplit("/", 1)[1])
        texts = page.locator(".answer .text").all_inner_texts()
        best = max(texts, key=lambda text: hashlib.sha256(f"{salt} {text}".encode()).hexdigest())
        picked[number] = best
        place = texts.index(best)
        if by_touch:
            page.locator(".answer label").nth(place).tap()
            page.get_by_role("button", name="Next").or_(page.get_by_role("button", name="Finish")).tap()
        else:
            page.keyboard.press("abcdefgh"[place] if number % 2 else str(place + 1))
            page.keyboard.press("Enter")
        page.wait_for_url(lambda url, number=number: not url.endswith(f"/{number}"))
        if salt % 5 == 2 and number == 2:
            # Back shows the answer that was kept; forward again changes nothing.
            page.go_back()
            page.wait_for_url("**/2")
            assert page.locator(".answer:has(input:checked) .text").inner_text() == best
            page.get_by_role("button", name="Next").click()
            page.wait_for_url("**/3")
    page.get_by_role("heading", name="Thank you").wait_for()
    context.close()
    return token, picked


@pytest.mark.slow
@pytest.mark.nightly
def test_raters_in_a_browser_by_keyboard_by_touch_and_without_scripts(browser: Any, tmp_path: Path) -> None:
    survey = made_up(n=2, repeats=1, checks=1)
    save_survey(tmp_path, survey)
    with Server(tmp_path) as server:
        site = f"http://127.0.0.1:{server.port}"
        noted = dict(answer_all(browser, site, salt) for salt in (1, 2, 3))
    records = Records(tmp_path, survey)
    raters = records.raters()
    records.close()
    assert len(raters) == 3
    for rater in raters:
        assert rater.next_page is None
        for page, position in rater.choices.items():
            item = rater.pages[page]
            shown = (survey.checks if item.kind == "check" else survey.questions)[item.index].answers
            assert shown[item.order[position]] == noted[rater.token][page + 1]
    assert len(read_votes(survey, raters).votes) == 3 * len(survey.questions)
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_question_page_fits_a_phone_and_can_be_used_without_sight(browser: Any, tmp_path: Path) -> None:
    save_survey(tmp_path, made_up(n=2))
    with Server(tmp_path) as server:
        context = browser.new_context(**PHONE)
        page = context.new_page()
        failures: list[str] = []
        page.on("console", lambda said: failures.append(said.text) if said.type == "error" else None)
        page.goto(f"http://127.0.0.1:{server.port}")
        page.get_by_label("I have read this").check()
        page.get_by_role("button", name="Begin").click()
        page.wait_for_url("**/s/*/1")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        # Every answer is one radio button whose name is its letter and text, in a group named by what is asked.
        group = page.get_by_role("group", name="Which answer is best?")
        names = group.get_by_role("radio").evaluate_all("all => all.map(one => one.labels[0].innerText.trim())")
        assert [name[0] for name in names] == ["A", "B", "C", "D"]
        for i in range(4):
            box = page.locator(".answer label").nth(i).bounding_box()
            assert box["height"] >= 44  # a finger's width
        assert page.get_by_role("progressbar", name="Question 1 of 4").is_visible()
        # Without a choice the browser itself asks for one and nothing is sent.
        page.get_by_role("button", name="Next").click()
        assert page.url.endswith("/1")
        assert failures == []  # the content security policy allows all that the page needs
        context.close()
