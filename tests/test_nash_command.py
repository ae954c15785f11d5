"""`coala comal train` and `matrix`: what they leave, that kills change nothing, and what is said of wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coala.cli import comal
from coala.comal.inputs import examples_of, kind_of_run, start_of
from coala.comal.named_oracles import oracle_of
from coala.comal.oracles import ask
from coala.store import load_json, load_lines
from coala.store.verdict_cache import VerdictCache
from coala.trackers import numbers_of
from coala.values import CoalaError, Generation, Turn, user

pytest.importorskip("trl", reason="needs the extra `baselines`")

from coala.comal.llm import load_policy
from tests.page_laws import keeps_to_it, of
from tests.test_align import pair_rows, write_rows
from tests.tiny_game import ANSWERS, PAPER, RPS, distribution, supervised_start
from tests.waiting import PATIENCE

JUDGE = """
import pathlib

P = {TABLES}
LOG = pathlib.Path(__file__).with_suffix(".log")


def prefer(example, a, b):
    prompt = example["prompt"][0].text
    with LOG.open("a") as log:
        log.write(f"{{prompt}}|{{a}}|{{b}}\\n")
    words, a, b = {WORDS}, a.strip(), b.strip()
    if a not in words or b not in words:
        return 0.5
    # Position counts a little: the two orders disagree by 0.1.
    return min(1.0, max(0.0, P[prompt][words.index(a)][words.index(b)] + 0.05))


def longer(example, answer):
    return len(answer)


def broken(example, a, b):
    raise ValueError("out of order")


NUMBER = 3
"""
STEP = ["--eta", "1", "--outer", "2", "-k", "2", "--candidates", "6", "--pairs", "all", "--max-new-tokens", "2"]
STEP += [
    "--learning-rate",
    "1e-3",
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--template",
    "continuation",
    "--device",
    "cpu",
]


def run(*arguments: Any) -> tuple[str, dict[str, Any]]:
    result = CliRunner().invoke(comal.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(result.stdout.strip().split("\n")[-1], parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the eight-word model, two prompts and a judge in Python that writes down what it is asked."""
    folder = tmp_path_factory.mktemp("comal")
    model, tokenizer = supervised_start()
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("q1\n\nq2\nq1\n")
    tables = {"q1": PAPER.tolist(), "q2": RPS.tolist()}
    (folder / "judge.py").write_text(JUDGE.format(TABLES=tables, WORDS=list(ANSWERS)))
    return folder


def arguments(place: Path, out: Path) -> list[str]:
    oracle = f"python:{place / 'judge.py'}:prefer"
    return ["train", str(place / "model"), str(place / "prompts.txt"), "--oracle", oracle, *STEP, "--out", str(out)]


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, str, dict[str, Any], list[str]]:
    """An uninterrupted run, what it printed, and what the judge was asked."""
    out = place / "whole" / "run"
    (place / "judge.log").unlink(missing_ok=True)
    printed, found = run(*arguments(place, out), "--track", "jsonl")
    return out, printed, found, (place / "judge.log").read_text().splitlines()


def test_a_tracker_is_told_every_step_as_the_log_has_it(whole: Any) -> None:
    out = whole[0]
    lines = list(load_lines(out.with_name("run.tracking.jsonl")))
    steps = [line for line in lines if "achieved" in line]
    logged = [load_json(path) for path in sorted(out.glob("**/log.json"))]
    assert len(steps) == len(logged) == 4
    for told, log in zip(steps, logged, strict=True):
        assert {name: told[name] for name in numbers_of(log)} == numbers_of(log)
    assert lines[-1]["finished"] is True


def test_training_leaves_a_model_and_a_report(place: Path, whole: Any) -> None:
    out, printed, found, asked = whole
    assert found["prompts"] == 2  # one of three was there twice, a line was empty
    assert [update["outer"] for update in found["updates"]] == [1, 2]
    for update in found["updates"]:
        assert update["judge_disagreement"] == pytest.approx(0.1, abs=0.05)
        assert update["judge_failures"] == 0
        assert set(update["seconds"]) == {"sample", "judge", "score", "train"}
        assert update["peak_bytes"]["host"] > 2**20
        assert 0 <= update["cyclic"] <= 1
    assert len(printed.splitlines()[0].split("  ")) > 5
    # Beside the run, and shared by all runs there: each question once.
    assert (out.parent / "verdicts.sqlite").is_file()
    assert set(Counter(asked).values()) == {1}
    page = (out / "report.html").read_text()
    assert "By update of the reference" in page
    assert "No policy accuracy: the start is not a COALA run" in page
    assert "eta tau 0.333" in page
    steps = load_json(out / "report.json")["steps"]
    assert [(row["outer"], row["inner"]) for row in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    # References stay, what lay between them does not.
    assert [(out / f"outer-0{t}/inner-0{k}/policy").is_dir() for t in (1, 2) for k in (1, 2)] == [False, True] * 2
    trained = load_policy(out / "model", template="continuation", device="cpu")
    start = load_policy(place / "model", template="continuation", device="cpu")
    trained_again = load_policy(place / "model", template="continuation", device="cpu")
    trained_again.load(out / "outer-02/inner-02/policy")
    np.testing.assert_array_equal(distribution(trained)[0], distribution(trained_again)[0])
    assert np.abs(distribution(trained)[0] - distribution(start)[0]).max() > 1e-3
    assert kind_of_run(out) == "comal"
    assert start_of(str(out)).model == str(out / "model")


def test_a_finished_run_does_nothing_again(place: Path, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from coala.comal.llm import LanguagePolicy

    out, _, found, _ = whole
    log = place / "judge.log"  # of every test that asked before this one
    before = log.read_text() if log.exists() else ""
    for name in ("sample", "log_probs", "train", "save", "export"):
        monkeypatch.setattr(LanguagePolicy, name, lambda *_, **__: pytest.fail("done again"))
    _, again = run(*arguments(place, out))
    assert again == found
    assert (log.read_text() if log.exists() else "") == before


KILLED = """
import os, signal, sys
import coala.store.verdict_cache
from coala.comal.llm import LanguagePolicy

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at(owner, name, call, before=False):
    own, calls = getattr(owner, name), []
    def wrapped(*given, **options):
        calls.append(1)
        if before and len(calls) == call:
            die()
        found = own(*given, **options)
        if len(calls) == call:
            die()
        return found
    setattr(owner, name, wrapped)

stage = sys.argv[1]
if stage == "sample":
    at(LanguagePolicy, "sample", 1)
elif stage == "judge":
    at(coala.store.verdict_cache.VerdictCache, "put", 5)
elif stage == "score":
    at(LanguagePolicy, "log_probs", 1, before=True)
elif stage == "train":
    own = LanguagePolicy.train
    LanguagePolicy.train = lambda *given, **options: own(
        *given, **{**options, "tell": lambda share: die() if share >= 0.5 else None}
    )
elif stage == "save":
    at(LanguagePolicy, "save", 1)
elif stage == "export":
    at(LanguagePolicy, "export", 1)
sys.argv = ["coala", "comal", *sys.argv[2:]]
from coala.cli import main
main()
"""


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


@pytest.mark.nightly
def test_a_run_ended_while_judging_asks_again_for_what_was_not_kept(
    place: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """test_nash_llm.py ends the other stages."""
    out, log, kept_early = tmp_path / "killed" / "run", place / "judge.log", 5
    log.unlink(missing_ok=True)
    own, calls = VerdictCache.put, []

    def put(self: VerdictCache, key: str, answer: str) -> None:
        calls.append(key)
        if len(calls) > kept_early:
            raise Killed
        own(self, key, answer)

    with monkeypatch.context() as patch:
        patch.setattr(VerdictCache, "put", put)
        with pytest.raises(Killed):
            run(*arguments(place, out))
    ends_as_the_whole(place, whole[0], out, len(log.read_text().splitlines()) - kept_early)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_killed_in_every_stage_ends_with_the_same_pairs_and_weights(
    place: Path, whole: Any, tmp_path: Path
) -> None:
    out, log, kept_early = tmp_path / "killed" / "run", place / "judge.log", 5
    log.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    for stage in ("sample", "judge", "score", "train", "save", "export"):
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, stage, *arguments(place, out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        if stage == "judge":
            in_flight = len(log.read_text().splitlines()) - kept_early
    ends_as_the_whole(place, whole[0], out, in_flight)


def ends_as_the_whole(place: Path, reference: Path, out: Path, in_flight: int) -> None:
    """Carries the run in ``out`` to its end: the same bytes, and no verdict asked for again that was kept."""
    _, found = run(*arguments(place, out))
    for file in sorted(reference.rglob("*.jsonl")):
        assert file.read_bytes() == (out / file.relative_to(reference)).read_bytes(), file
    for name in ("outer-01/inner-02/policy/trained.safetensors", "outer-02/inner-02/policy/trained.safetensors"):
        assert (reference / name).read_bytes() == (out / name).read_bytes(), name
    assert (reference / "model/model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()
    assert load_json(out / "report.json")["steps"] == load_json(reference / "report.json")["steps"]
    # What was kept before the kill is not asked for again; what was not, once more.
    times = Counter((place / "judge.log").read_text().splitlines())
    assert sum(count - 1 for count in times.values()) == in_flight
    assert max(times.values()) <= 2
    assert found["run"] == str(out)


@pytest.mark.slow
def test_a_matrix_over_checkpoints(place: Path, whole: Any) -> None:
    run_folder, out = whole[0], place / "matrix"
    common = ["--prompts", place / "prompts.txt", "--oracle", f"python:{place / 'judge.py'}:prefer", "--out", out]
    common += ["--samples", 40, "--max-new-tokens", 2, "--template", "continuation", "--device", "cpu"]
    printed, found = run("matrix", f"{run_folder}@all", f"base={place / 'model'}", *common)
    assert found["names"] == ["run-start", "run-1", "run-2", "base"]
    percent = np.array(found["percent"])
    np.testing.assert_allclose(percent + percent.T, 100)
    # The start is the base model: of one prompt and seed the noise is the same, and so are the answers.
    assert percent[0, 3] == 50
    np.testing.assert_allclose(percent[0, 1:3], percent[3, 1:3])
    for row in found["intervals"]:
        for cell in row:
            assert cell["low"] <= cell["value"] <= cell["high"]
    assert found["intervals"][0][1]["n"] == 80
    assert sum(found["nash"].values()) == pytest.approx(1)
    assert "run-2" in printed
    assert "after update 2" in (out / "matrix.html").read_text()
    assert not (out / "portions").exists()
    # An entrant more: the others' answers are there, in any of the forms.
    before = {path: path.stat().st_mtime_ns for path in out.glob("answers-*.jsonl")}
    saved = out / "answers-run-1.jsonl"
    _, more = run("matrix", f"{run_folder}@all", f"base={place / 'model'}", f"saved={saved}", *common)
    assert more["names"][-1] == "saved"
    assert more["percent"][1][4] == 50
    assert np.array(more["percent"])[:4, :4] == pytest.approx(percent)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(CoalaError, match=r"run@7: found no such policy; expected start, 1 to 2"):
        run("matrix", f"{run_folder}@7", run_folder, *common)
    with pytest.raises(CoalaError, match="Found 1 entrant; expected two"):
        run("matrix", run_folder, *common)
    with pytest.raises(CoalaError, match="the name 'run' twice"):
        run("matrix", run_folder, run_folder, *common)


@pytest.mark.nightly
def test_pages_of_a_run_and_of_a_matrix_keep_to_what_all_pages_do(
    place: Path, whole: Any, browser: Any, tmp_path: Path
) -> None:
    keeps_to_it(browser, of((whole[0] / "report.html").read_text()))
    common = ["--prompts", place / "prompts.txt", "--oracle", f"python:{place / 'judge.py'}:prefer", "--samples", 2]
    common += ["--max-new-tokens", 2, "--template", "continuation", "--device", "cpu", "--out", tmp_path / "matrix"]
    run("matrix", f"{whole[0]}@all", f"base={place / 'model'}", *common)
    keeps_to_it(browser, of((tmp_path / "matrix" / "matrix.html").read_text()))


@pytest.mark.slow
@pytest.mark.nightly
def test_the_head_of_an_alignment_judges_and_plays(place: Path, tmp_path: Path) -> None:
    """The papers' systems in one command: model, prompts and pairs of a COALA run, and its guided policy beside it."""
    from coala.alignment import align_recipe
    from coala.recipe import recipe_of
    from coala.store import RunFolder
    from tests.menagerie import tiny_backbone

    model = tiny_backbone("llama", tmp_path / "model")
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(60, 20))
    evaluation = {"prompts": 2, "max_new_tokens": 4}
    settings = {"pairs": [str(pairs)], "eval_fraction": 0.3, "model": {"name": str(model)}, "evaluation": evaluation}
    align_recipe(recipe_of({**settings, "head": {"method": "linear"}}), RunFolder(tmp_path / "coala"))
    step = ["--outer", 1, "-k", 1, "--candidates", 3, "--pairs", "all", "--max-new-tokens", 4, "--device", "cpu"]
    step += ["--prompts-per-step", 4, "--learning-rate", 1e-3, "--eta", 1]
    for oracle in ("head", "convex-head"):
        out = tmp_path / f"run-{oracle}"
        lora = ["--lora-rank", 2, "--lora-targets", "q_proj,v_proj"] if oracle == "head" else []
        _, found = run("train", tmp_path / "coala", "--oracle", oracle, *step, *lora, "--out", out)
        assert found["oracle_accuracy"]["value"] > 0.6
        assert found["updates"][0]["judged"] > 0
        assert found["policy_accuracy"]["accuracy"]["n"] == found["policy_accuracy"]["inside"] > 0
        assert "log-ratio of the last policy to the start ranks" in (out / "report.html").read_text()
    assert found["updates"][0]["cyclic"] == 0  # a score has no circles
    assert (tmp_path / "run-head/model/adapter_config.json").is_file()
    with pytest.raises(CoalaError, match="is an adapter"):
        start_of(str(tmp_path / "run-head"))
    entrants = [f"comal={tmp_path / 'run-head'}", f"guided={tmp_path / 'coala'}", f"{tmp_path / 'coala'}@unguided"]
    common = ["-p", pairs, "--oracle", f"head:{tmp_path / 'coala'}", "--max-new-tokens", 4, "--device", "cpu"]
    _, rates = run("matrix", *entrants, *common, "--out", tmp_path / "matrix")
    assert rates["names"] == ["comal", "guided", "coala-unguided"]
    assert np.isfinite(np.array(rates["percent"])).all()


# --- what is given ------------------------------------------------------------------------------------------------


def test_prompts_come_in_many_forms(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("first\n\n second\nfirst\n")
    assert examples_of(lines) == [{"prompt": user("first")}, {"prompt": user(" second")}]
    rows = tmp_path / "prompts.jsonl"
    conversation = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    rows.write_text(
        json.dumps({"prompt": "one", "answer": 7, "chosen": "x", "rejected": "y"})
        + "\n"
        + json.dumps({"prompt": conversation})
        + "\n"
    )
    assert examples_of(rows) == [
        {"prompt": user("one"), "answer": 7},
        {"prompt": (Turn("system", "be kind"), Turn("user", "hello"))},
    ]
    dialogue = tmp_path / "hh.jsonl"
    said = "\n\nHuman: how are you\n\nAssistant:"
    dialogue.write_text(json.dumps({"chosen": said + " fine", "rejected": said + " go away"}) + "\n")
    assert examples_of(dialogue) == [{"prompt": user("how are you")}]
    for content, message in (("", "no rows"), ('{"prompt": "  "}\n', "an empty prompt"), ('{"prompt": 3}\n', "prompt")):
        rows.write_text(content)
        with pytest.raises(CoalaError, match=message):
            examples_of(rows)
    lines.write_text("\n")
    with pytest.raises(CoalaError, match="found no prompt"):
        examples_of(lines)
    with pytest.raises(CoalaError, match="could not be read"):
        examples_of(tmp_path / "none.txt")


def test_oracles_by_their_names(place: Path, tmp_path: Path) -> None:
    example = {"prompt": user("q1")}

    def said(spec: str, a: str, b: str) -> float | None:
        named = oracle_of(spec)
        assert oracle_of(spec).oracle.name == named.oracle.name
        return ask(named.oracle, [example], [a], [b])[0].preference

    assert said("rule:shorter", "ab", "abc") == 1
    assert said("rule:contains:cat", "a cat", "a dog") == 1
    assert said(f"scores:{place / 'judge.py'}:longer", "ab", "a") == pytest.approx(1 / (1 + np.exp(-1)))
    assert said(f"python:{place / 'judge.py'}:prefer", "a", "b") == pytest.approx(0.1)
    assert said("majority:rule:shorter+rule:contains:cat+rule:contains:dog", "a cat", "a big dog") == 1
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"weights": {"good": 2.0}}))
    assert said(f"words:{words}", "good", "bad") == pytest.approx(1 / (1 + np.exp(-2)))
    table = tmp_path / "game.json"
    table.write_text(json.dumps({"P": PAPER.tolist(), "labels": ["a", "b", "c"]}))
    assert said(f"table:{table}", "a", "c") == pytest.approx(0.8)
    (tmp_path / "other.py").write_text((place / "judge.py").read_text() + "\n# another\n")
    names = {oracle_of(f"python:{path}:prefer").oracle.name for path in (place / "judge.py", tmp_path / "other.py")}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("coin", "found oracle 'coin'; expected one of rule, words"),
        ("rule", "needs a value after the colon"),
        ("rule:tallest", "There is no rule 'tallest'"),
        ("majority:rule:longer+coin", "found oracle 'coin'"),
        ("python:judge.py", r"expected FILE.py:NAME"),
        ("python:nowhere.py:prefer", "found no such file"),
        ("python:{place}/judge.py:NUMBER", "has no function 'NUMBER'; it has .*prefer"),
        ("words:nowhere.json", "could not be read"),
        ("table:nowhere.json", "could not be read"),
        ("reward:nowhere", "there is no such folder"),
        ("reward:{place}/model", "is not a reward model; score.weight would be random"),
        ("judge:nowhere/at/all", "no such folder"),
        ("head", "The oracle head needs a COALA run"),
        ("head:{place}/model", "The oracle head needs a COALA run"),
    ],
)
def test_oracles_that_cannot_be(place: Path, spec: str, message: str) -> None:
    with pytest.raises(CoalaError, match=message):
        oracle_of(spec.format(place=place))


def test_a_function_that_fails_says_so(place: Path) -> None:
    named = oracle_of(f"python:{place / 'judge.py'}:broken")
    with pytest.raises(CoalaError, match="raised ValueError: out of order"):
        ask(named.oracle, [{"prompt": user("q1")}], ["a"], ["b"])


def test_a_run_needs_prompts_and_a_model(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="Found no prompts"):
        run("train", place / "model", "--oracle", "rule:longer", "--out", tmp_path / "run")
    with pytest.raises(CoalaError, match="no such folder"):
        run("train", "nowhere/at/all", place / "prompts.txt", "--oracle", "rule:longer", "--out", tmp_path / "run")
    words = ["train", place / "model", place / "prompts.txt", "--oracle", "rule:longer", "--out", tmp_path / "run"]
    wrong = CliRunner().invoke(comal.app, [*map(str, words), "--dtype", "int8"])
    assert wrong.exit_code == 2
    assert "'int8' is not one of 'float32'" in wrong.output
    assert not (tmp_path / "run").exists()
    (tmp_path / "run.json").write_text('{"command": "survey"}')
    with pytest.raises(CoalaError, match="a run folder of another command"):
        start_of(str(tmp_path))


def test_answers_of_other_prompts_are_refused(place: Path, tmp_path: Path) -> None:
    from coala.store import save_generations

    save_generations(tmp_path / "answers.jsonl", [Generation("elsewhere", "a", "m", 1, 0, 0.0, 0.0)])
    with pytest.raises(CoalaError, match="2 of 2 prompts have fewer than 1 answer"):
        run(
            *("matrix", f"x={tmp_path / 'answers.jsonl'}", f"y={tmp_path / 'answers.jsonl'}"),
            *("-p", place / "prompts.txt", "--oracle", "rule:longer", "--out", tmp_path / "matrix"),
        )
    assert list(load_lines(tmp_path / "answers.jsonl"))


def test_a_wrong_oracle_is_refused_before_anything_is_generated_or_deleted(place: Path, tmp_path: Path) -> None:
    model, prompts = place / "model", place / "prompts.txt"
    for oracle in ("coin", "head", "majority:rule:longer+coin", f"head:{model}"):
        with pytest.raises(CoalaError, match="--oracle"):
            run("matrix", f"x={model}", f"y={model}", "-p", prompts, "--oracle", oracle, "--out", tmp_path / "matrix")
    assert not (tmp_path / "matrix").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(CoalaError, match="found oracle 'coin'"):
        run("train", model, prompts, "--oracle", "coin", "--restart", "--out", tmp_path / "run")
    assert (tmp_path / "run/run.json").exists()


def test_help_names_every_oracle_and_entrant() -> None:
    words = CliRunner().invoke(comal.app, ["train", "--help"]).stdout
    for kind in ("rule:", "words:", "scores:", "python:", "majority:", "reward:", "judge:", "table:", "head[:RUN]"):
        assert kind in words
    assert "RUN@start" in CliRunner().invoke(comal.app, ["matrix", "--help"]).stdout
