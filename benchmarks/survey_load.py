"""The survey under load: many raters at once, lost connections, a server killed again and again; counts stay exact.

    python benchmarks/survey_load.py --raters 200 --kills 2
    python benchmarks/survey_load.py --raters 0 --browsers 30

HTTP raters hang up in the middle of requests, click twice and go back. Afterwards the file of answers must hold one
answer per rater and page, and each must be the text that the rater chose. ``--browsers`` raters answer in a real
headless Chromium, by keyboard and by touch. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from coala.survey import Records, Survey, read_votes, save_survey  # noqa: E402
from coala.survey.records import Rater  # noqa: E402
from tests.survey_raters import Server, crowd, made_up  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raters", type=int, default=200, help="raters by HTTP, at once")
    parser.add_argument("--kills", type=int, default=2, help="SIGKILLs of the server while they answer")
    parser.add_argument("--browsers", type=int, default=0, help="raters in Chromium, one after the other")
    parser.add_argument("--questions", type=int, default=5, help="per category, two categories")
    args = parser.parse_args()
    survey = made_up(n=args.questions, repeats=1, checks=1)
    rows = {}
    if args.raters:
        rows["http"] = by_http(survey, args.raters, args.kills)
    if args.browsers:
        rows["browser"] = by_browser(survey, args.browsers)
    for name, row in rows.items():
        print(name.ljust(8), "  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps(rows))
    if any(row["wrong"] or row["answers"] != row["expected"] for row in rows.values()):
        sys.exit(1)


def by_http(survey: Survey, n: int, kills: int) -> dict[str, float]:
    """Everybody at once; what each rater noted against what the file holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_survey(folder, survey)
        with Server(folder) as server:
            began = time.perf_counter()
            raters = crowd(server, n, kills)
            spent = time.perf_counter() - began
            log = server.log
        noted = {rater.token: rater.picked for rater in raters}
        row = compare(folder, survey, noted)
        row |= {"kills": kills, "hung_up": sum(rater.cut for rater in raters), "seconds": round(spent, 1)}
        return row | {"per_second": round(row["answers"] / spent, 1), "tracebacks": log.count("Traceback")}


def by_browser(survey: Survey, n: int) -> dict[str, float]:
    """One after the other in Chromium, every other one on a phone."""
    from playwright.sync_api import sync_playwright

    from tests.test_survey_browser import answer_all

    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("There is no chromium; install it (Debian: apt-get install chromium).")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as play:
        folder = Path(name)
        save_survey(folder, survey)
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        noted = {}
        with Server(folder) as server:
            began = time.perf_counter()
            for salt in range(n):
                token, picked = answer_all(browser, f"http://127.0.0.1:{server.port}", salt)
                noted[token] = picked
            spent = time.perf_counter() - began
        browser.close()
        return compare(folder, survey, noted) | {"seconds": round(spent, 1)}


def compare(folder: Path, survey: Survey, noted: dict[str, dict[int, str]]) -> dict[str, float]:
    """Answers in the file, how many there should be, how many are not the text that was chosen, votes by method."""
    records = Records(folder, survey)
    raters = {rater.token: rater for rater in records.raters()}
    records.close()
    wrong = 0
    for token, picked in noted.items():
        kept = {page + 1: chosen_text(survey, raters[token], page) for page in raters[token].choices}
        wrong += kept != picked
    votes = Counter(survey.methods[vote.method] for vote in read_votes(survey, list(raters.values())).votes)
    return {
        "raters": len(noted),
        "answers": sum(len(rater.choices) for rater in raters.values()),
        "expected": sum(len(rater.pages) for rater in raters.values() if rater.began),
        "wrong": wrong,
        **{f"votes_{method}": votes[method] for method in survey.methods},
    }


def chosen_text(survey: Survey, rater: Rater, page: int) -> str:
    item = rater.pages[page]
    shown = survey.checks[item.index].answers if item.kind == "check" else survey.questions[item.index].answers
    return shown[item.order[rater.choices[page]]]


if __name__ == "__main__":
    main()
