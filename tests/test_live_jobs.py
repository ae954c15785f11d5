"""Finish, distil, export from the page of a session: what is told of them, true after kills and reloads too."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from coala.export import verify_folder
from coala.live.jobs import HEAD, Jobs, Told, head_of
from coala.live.session import FOLDER
from coala.store import save_head, save_json
from coala.values import CoalaError, ConvexHead

from .page_laws import keeps_to_it
from .test_live_app import Live, called, prompts_file
from .waiting import PATIENCE, wait_for


def kept(out: Path, name: str, told: Told | str) -> Jobs:
    """The jobs of a folder where an earlier server left this record."""
    path = out / FOLDER / f"job-{name}.json"
    if isinstance(told, Told):
        save_json(path, asdict(told))
    else:
        path.parent.mkdir(parents=True)
        path.write_text(told)
    return Jobs(out)


@pytest.mark.parametrize(("name", "label"), [("fit", "Finish"), ("distil", "Distil"), ("export", "Export")])
def test_what_was_at_work_when_its_server_ended_was_interrupted(tmp_path: Path, name: str, label: str) -> None:
    found = kept(tmp_path, name, Told("running", "head 40 %")).look(0)
    assert list(found) == [name]
    assert found[name]["state"] == "interrupted"
    assert f"Press {label} again" in found[name]["said"]


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"state": "other", "said": "x", "commands": []}', '{"commands": 3}']
)
def test_a_record_that_cannot_be_read_is_said_to_be_so(tmp_path: Path, record: str) -> None:
    found = kept(tmp_path, "distil", record).look(0)["distil"]
    assert found["state"] == "failed"
    assert "cannot be read" in found["said"]


def test_what_has_changed_since_is_told(tmp_path: Path) -> None:
    report, policy = tmp_path / "report.html", tmp_path / "distilled"
    report.write_text("a report")
    jobs = kept(tmp_path, "fit", Told("done", "finished", made=str(report), clicks=3))
    assert jobs.look(3)["fit"]["since"] == ""
    assert "3 clicks then and are 5 now" in jobs.look(5)["fit"]["since"]
    report.unlink()
    assert "no longer there" in jobs.look(3)["fit"]["since"]
    policy.mkdir()
    jobs = kept(tmp_path, "distil", Told("done", "distilled", made=str(policy), head=""))
    assert jobs.look(3)["distil"]["since"] == ""
    for name in HEAD:
        (tmp_path / "head").mkdir(exist_ok=True)
        (tmp_path / "head" / name).write_bytes(b"a head")
    assert "another head" in jobs.look(3)["distil"]["since"]
    jobs = kept(tmp_path, "distil", Told("done", "distilled", made=str(policy), head=head_of(tmp_path)))
    assert jobs.look(3)["distil"]["since"] == ""
    for name in HEAD:
        (tmp_path / "head" / name).write_bytes(b"another head")
        assert "another head" in jobs.look(3)["distil"]["since"]
        (tmp_path / "head" / name).write_bytes(b"a head")


def test_a_run_that_was_finished_without_the_page_is_told(tmp_path: Path) -> None:
    assert Jobs(tmp_path).look(0) == {}
    (tmp_path / "report.html").write_text("a report")
    assert Jobs(tmp_path).look(4)["fit"]["state"] == "done"
    with pytest.raises(CoalaError, match="no finished run"):
        Jobs(tmp_path).start("export")


# --- in the browser ------------------------------------------------------------------------------------------------


def edited(place: str, n: int) -> None:
    """So many replies edited into praise, which any head tells from what the model writes."""

    call = partial(called, place)
    for number in range(n):
        wait_for(lambda: call("/state")["question"])
        question = call("/state")["question"]["id"]
        said = {"question": question, "click": f"click-{question}-{number}", "verdict": "edited", "side": "first"}
        call("/answer", {**said, "text": " a wonderful film, great and moving."})


@pytest.mark.slow
@pytest.mark.nightly
def test_the_buttons_do_what_they_say_and_the_page_tells_it_after_kills_and_reloads(
    browser: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    live = Live(out, prompts_file(tmp_path, 12), "--raters", "1").start()
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(live.url)

    def press(label: str) -> None:
        page.get_by_role("button", name=label, exact=True).click()

    def told(name: str, *texts: str, of: Any = page) -> None:
        for text in texts:
            of.locator(f"#job-{name} .told").filter(has_text=text).wait_for()

    def refused(text: str) -> None:
        page.get_by_role("alert").filter(has_text=text).wait_for()

    # No clicks yet, no run yet: a sentence, in sight of the button that was pressed.
    press("Finish")
    refused("fix: click more")
    press("Export")
    refused("Press Finish first")
    assert page.get_by_role("alert").evaluate(
        "(one) => { const box = one.getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight; }"
    )
    edited(page.url, 24)
    press("Finish")
    told("fit", "At work:")
    page.reload()
    told("fit", "Done.", "The run is finished, of", str(out / "report.html"))
    assert page.locator("#job-fit .command").first.inner_text() == f"coala chat {out}"
    edited(page.url, 1)
    told("fit", "finish again")
    # Another tab of the owner tells the same; another rater is told nothing and has no buttons.
    press("Distil")
    told("distil", "At work:")
    tab = browser.new_page()
    tab.set_default_timeout(1000 * PATIENCE)
    tab.goto(page.url)
    told("distil", "At work:", of=tab)
    assert tab.get_by_role("button", name="Export", exact=True).is_disabled()
    rater = browser.new_page()
    rater.goto(next(line.split()[-1] for line in live.log.read_text().splitlines() if line.startswith("link of")))
    rater.get_by_role("heading", name="What is known so far").wait_for()
    assert rater.locator("[data-job], .told").count() == 0
    # Killed while it distils, and begun again: it was interrupted, and goes on when pressed.
    live.end(signal.SIGKILL)
    live.start()
    for each in (page, tab):
        told("distil", "Interrupted.", "Press Distil again", of=each)
        told("fit", "Done.", of=each)
    press("Distil")
    told("distil", "Done.", str(out / "distilled"))
    assert (out / "distilled" / "policy.safetensors").is_file()
    assert f"coala serve {out} --mode distilled" in page.locator("#job-distil .command").all_inner_texts()
    press("Export")
    told("export", "Done.", f"{out}-served")
    assert f"vllm serve {out}-served" in page.locator("#job-export .command").all_inner_texts()
    # A full disk is told in a sentence, and nothing is left of what did not fit.
    before = resource.prlimit(live.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(live.process.pid, resource.RLIMIT_FSIZE, (100_000, before[1]))
    press("Reward model")
    told("reward-model", "Failed.", "could not be written")
    resource.prlimit(live.process.pid, resource.RLIMIT_FSIZE, before)
    assert not list(out.glob("*exported*"))
    press("Reward model")
    told("reward-model", "Done.", str(out / "exported"))
    assert verify_folder(out / "exported")
    assert f"coala serve {out}" in page.locator("#job-reward-model .command").all_inner_texts()
    press("Reward model")
    refused("exported already")
    # A head that held-out pairs do not tell from chance is another head, and distils nothing.
    head = ConvexHead.load(out / "head")
    save_head(out / "head", replace(head, least_slope=0.0))
    told("reward-model", "another head by now")
    press("Distil")
    told("distil", "Failed.", "not shown to be better than chance")
    keeps_to_it(browser, shown(page.url))
    assert live.end() == 0
    assert "Traceback" not in live.log.read_text()


def shown(url: str) -> Callable[[Any], None]:
    def show(seen: Any) -> None:
        seen.set_default_timeout(1000 * PATIENCE)
        seen.goto(url)
        seen.get_by_role("heading", name="Which reply is better?").wait_for()
        seen.locator("#job-reward-model .command").first.wait_for()

    return show
