"""The whole line on a tiny random model: what a run leaves, resuming, refusing, and the commands around it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.alignment import align_recipe, load_parts, make_report, processes, summary_rows
from coala.alignment.replies import unguided_replies
from coala.data import DataError
from coala.decoding import generate
from coala.export import score_replies
from coala.recipe import Recipe, RecipeError, load_recipe, recipe_of, set_option
from coala.settings import GuidanceSettings
from coala.statistics.scores import accuracy_of_margins
from coala.store import (
    RunFolder,
    StoreError,
    file_digest,
    load_features,
    load_generations,
    load_head,
    load_pairs,
    save_head,
)
from coala.values import CoalaError, Estimate, one_per_prompt, prompt_id, user

from .menagerie import tiny_backbone
from .waiting import PATIENCE, wait_for

GOOD = ["good", "fine", "lovely", "sharp", "warm", "bright"]
BAD = ["dull", "weak", "tired", "cold", "flat", "grey"]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def pair_rows(n: int, groups: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        better = " ".join(draw.choice(GOOD, 5))
        worse = " ".join(draw.choice(BAD, 5))
        rows.append({"prompt": f"tell me story {i % groups}", "chosen": f"{better} {i}", "rejected": f"{worse} {i}"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows(60, 20))


def recipe(pairs: Path, model: Path, /, **changes: Any) -> Recipe:
    base = {
        "pairs": [str(pairs)],
        "eval_fraction": 0.25,
        "model": {"name": str(model), "device": "cpu"},
        "evaluation": {"prompts": 3, "max_new_tokens": 5},
    }
    return load_recipe(None, base, changes)


@pytest.fixture(scope="session")
def finished(pairs: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    align_recipe(recipe(pairs, model), run)
    return run


def values_of(run: Path) -> dict[str, str]:
    """Digests of everything a run computes; timings are left out."""
    names = ("pairs-train.jsonl", "pairs-eval.jsonl", "features", "head", "generations-guided.jsonl")
    return {name: file_digest(run / name) for name in (*names, "generations-unguided.jsonl")}


def command(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coala", *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=PATIENCE,
        check=False,
        **options,
    )


def invoked(*words: str | Path, said: str | None = None) -> tuple[dict[str, Any], str]:
    """A command in this process, which is told ``said``: its JSON and what it said on stderr."""
    from typer.testing import CliRunner

    from coala.cli import app

    done = CliRunner().invoke(app, [*map(str, words)], input=said)
    assert done.exit_code == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return result, done.stderr


def test_a_run_holds_every_value_and_learns(finished: RunFolder) -> None:
    content = json.loads((finished.path / "report.json").read_text())
    assert content["summary"]["n_train"] + content["summary"]["n_eval"] == 60
    # Chosen and rejected replies share no word: any sound head ranks nearly all of them right.
    assert content["summary"]["accuracy_eval"]["value"] > 0.9
    assert content["summary"]["certified_gap"] < 1e-4
    certificate = load_head(finished.path / "head").certificate
    assert certificate is not None
    assert content["summary"]["program"] == certificate.program
    assert content["head"]["certificate"]["relative_gap"] == pytest.approx(certificate.relative_gap)
    assert sum(row["observed"]["n"] for row in content["reliability"]["bins"]) == content["summary"]["n_eval"]
    assert content["summary"]["calibration_error"] == content["reliability"]["error"]
    assert sum(row["selected"] for row in content["path"]) == 1
    assert content["summary"]["gflops"] > 0
    assert len(content["samples"]) == 3
    page = (finished.path / "report.html").read_text()
    assert "coala align --recipe" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    train, held_out = (load_features(finished.path / f"features/{part}") for part in ("train", "eval"))
    assert not set(train.group) & set(held_out.group)
    assert load_head(finished.path / "head").spec == train.spec


def test_a_second_run_skips_everything(finished: RunFolder, pairs: Path, model: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.path.rglob("*") if p.is_file() and "report" not in p.name}
    notes: list[str] = []
    align_recipe(recipe(pairs, model), finished, on_progress=lambda stage, done, total, note="": notes.append(note))
    assert set(notes) == {"already done"}
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_gates_on_the_prompt_from_pairs_to_report(
    finished: RunFolder, pairs: Path, model: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    settings = {"gate_on": "prompt", "method": "direct", "n_patterns": 2, "reference_scale": 0.01}
    content = align_recipe(recipe(pairs, model, head=settings, evaluation={"prompts": 2, "max_new_tokens": 4}), run)
    assert len(content["samples"]) == 2
    train, held_out = (load_features(run.path / f"features/{part}") for part in ("train", "eval"))
    assert train.log_ratio is not None
    counts = run.facts("features-train")
    assert counts["prompts"] == len({pair.prompt for pair in load_pairs(run.path / "pairs-train.jsonl")})
    # Log-probabilities cost the language-model head at every token of a reply.
    assert counts["flops"] > 1.2 * finished.facts("features-train")["flops"]
    # Validation may have kept no gate: put some in, so that all that follows has to ask the prompt.
    fitted = load_head(run.path / "head")
    draw = np.random.default_rng(0).normal(size=(2, 3, fitted.width + 1))
    head = replace(fitted, gates=draw[0], weights=draw[1], gate_on="prompt")
    save_head(run.path / "head", head)
    content = make_report(run)
    np.testing.assert_allclose(content["scores"]["chosen"], head.score(held_out.chosen, held_out.prompt))
    expected = accuracy_of_margins(head.margins(held_out), held_out.group)
    assert content["summary"]["accuracy_eval"] == expected
    assert ["neurons", "3, gates on the prompt"] in summary_rows(content)
    backbone, loaded, guidance = load_parts(run.path)
    reply = generate([user("tell me story 1")], backbone, loaded, guidance, max_new_tokens=4, seed=0)[0]
    assert np.isfinite(reply.score)


def test_changed_pairs_are_noticed(pairs: Path, model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "pairs.jsonl"
    mine.write_bytes(pairs.read_bytes())
    run = RunFolder(tmp_path / "run")
    settings = recipe(mine, model, head={"method": "linear"}, evaluation={"prompts": 0})
    align_recipe(settings, run)
    first = values_of(run.path)
    write_rows(mine, pair_rows(60, 20, seed=1))
    align_recipe(settings, run)
    assert values_of(run.path)["head"] != first["head"]
    assert values_of(run.path)["pairs-train.jsonl"] != first["pairs-train.jsonl"]


def test_bad_pairs_leave_nothing_behind_and_can_be_skipped(pairs: Path, model: Path, tmp_path: Path) -> None:
    rows = pair_rows(40, 10)
    rows[6]["rejected"] = rows[6]["chosen"]
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(DataError, match=r"bad\.jsonl:7: "):
        align_recipe(recipe(bad, model), run)
    assert not run.path.exists()
    linear = {"method": "linear"}
    content = align_recipe(recipe(bad, model, skip_bad=True, head=linear, evaluation={"prompts": 0}), run)
    assert content["summary"]["n_train"] + content["summary"]["n_eval"] == 39
    assert any("bad.jsonl:7" in finding["text"] for finding in content["data_findings"])


def test_a_model_that_is_not_there_leaves_nothing_behind(pairs: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(CoalaError, match="nowhere"):
        align_recipe(recipe(pairs, tmp_path / "nowhere"), run)
    assert not run.path.exists()


def test_a_head_is_refused_on_another_model(finished: RunFolder, tmp_path: Path) -> None:
    other = tiny_backbone("llama", tmp_path / "other", seed=1)
    run = tmp_path / "run"
    run.mkdir()
    settings = json.loads((finished.path / "run.json").read_text())
    settings["model"]["name"] = str(other)
    (run / "run.json").write_text(json.dumps(settings))
    (run / "head").symlink_to(finished.path / "head")
    with pytest.raises(CoalaError, match="weights"):
        load_parts(run)


@pytest.mark.nightly
def test_a_stage_in_a_process_of_its_own_gives_the_same_bytes(
    finished: RunFolder, pairs: Path, model: Path, tmp_path: Path
) -> None:
    run, told, notes = RunFolder(tmp_path / "run"), Counter[str](), []
    shutil.copytree(finished.path, run.path)
    shutil.rmtree(run.path / "head")
    settings = recipe(pairs, model)
    processes._in_a_process("head", settings, run, lambda stage, *_: told.update([stage]), notes.append, None, 1)
    assert set(told) == {"head"}
    assert values_of(run.path) == values_of(finished.path)


@pytest.mark.slow
@pytest.mark.nightly
def test_stages_in_processes_of_their_own_give_the_same_bytes(
    finished: RunFolder, pairs: Path, model: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    align_recipe(recipe(pairs, model), run, separate=True)
    assert values_of(run.path) == values_of(finished.path)


def test_interrupted_twice_in_every_stage_it_gives_the_same_bytes(
    finished: RunFolder, pairs: Path, model: Path, tmp_path: Path
) -> None:
    run, met = RunFolder(tmp_path / "run"), Counter[str]()

    def interrupt(stage: str, *told: Any) -> None:
        met[stage] += 1
        if met[stage] <= 2:
            raise KeyboardInterrupt

    for _ in range(50):
        try:
            align_recipe(recipe(pairs, model), run, on_progress=interrupt)
        except KeyboardInterrupt:
            continue
        break
    assert {"features-train", "features-eval", "head", "replies-guided"} <= set(met)
    assert values_of(run.path) == values_of(finished.path)


@pytest.mark.slow
@pytest.mark.release  # guarded by the test above, and test_features.py by a kill
def test_kill_minus_nine_and_resume_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    # Enough rows for several shards, so that the kill falls between two of them.
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(2600, 300))
    words = ["align", source, "--model", model, "--prompts", "2", "--max-new-tokens", "4", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "coala", *map(str, words), str(killed)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    shards = killed / "features/train/shards"
    wait_for(lambda: list(shards.glob("shard-*.safetensors")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.html").exists(), "the run was over before it could be killed"
    # Once more, while the head is fitted.
    process = subprocess.Popen(
        [sys.executable, "-m", "coala", *map(str, words), str(killed)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    wait_for((killed / "features/eval/features.json").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "head/head.json").exists()
    for run in (killed, whole):
        done = command(*words, run)
        assert done.returncode == 0, done.stderr
    assert values_of(killed) == values_of(whole)


class TestCommands:
    @pytest.mark.nightly
    def test_ctrl_c_says_that_work_is_kept(self, pairs: Path, model: Path, tmp_path: Path) -> None:
        words = ["align", str(pairs), "--model", str(model), "--out", str(tmp_path / "run")]
        process = subprocess.Popen(
            [sys.executable, "-m", "coala", *words], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        wait_for((tmp_path / "run/stages/pairs.json").exists, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert "finished work is saved" in said
        assert "Traceback" not in said
        assert (tmp_path / "run/pairs-train.jsonl").exists()

    def test_generate_prints_the_reply_and_json_last(self, finished: RunFolder) -> None:
        result, _ = invoked("generate", finished.path, "tell me story", "--max-new-tokens", "6", "--compare")
        assert len(result["guided"]) == len(result["unguided"]) == 1
        assert result["guided"][0]["n_tokens"] <= 6

    def test_chat_answers_and_obeys(self, finished: RunFolder) -> None:
        script = "/help\ntell me story\n/guide off\n/strength nonsense\n/new\nand another\n/quit\n"
        result, told = invoked("chat", finished.path, "--max-new-tokens", "4", said=script)
        assert result == {"replies": 2}
        assert "could not convert" in told

    def test_report_is_made_again(self, finished: RunFolder) -> None:
        (finished.path / "report.html").unlink()
        assert invoked("report", finished.path)[0]["n_train"] > 0
        assert (finished.path / "report.html").exists()

    def test_extract_and_fit_are_the_stages_of_align(self, finished: RunFolder, model: Path, tmp_path: Path) -> None:
        pairs = finished.path / "pairs-train.jsonl"
        invoked("extract", pairs, "--model", model, "--out", tmp_path / "features")
        mine, theirs = load_features(tmp_path / "features"), load_features(finished.path / "features/train")
        np.testing.assert_array_equal(mine.chosen, theirs.chosen)
        invoked("fit", tmp_path / "features", "--out", tmp_path / "head")
        assert file_digest(tmp_path / "head/head.safetensors") == file_digest(finished.path / "head/head.safetensors")

    def test_fit_says_what_it_proved(self, finished: RunFolder, model: Path, tmp_path: Path) -> None:
        pairs = finished.path / "pairs-train.jsonl"
        words = ["extract", pairs, "--model", model, "--out", tmp_path / "f", "--prompt-features", "--log-ratios"]
        assert invoked(*words)[0]["prompts"] > 0
        features = load_features(tmp_path / "f")
        assert features.prompt is not None
        assert features.log_ratio is not None
        options = ["--method", "direct", "--gate-on", "prompt", "--reference-scale", "0.01", "--n-patterns", "2"]
        result, said = invoked("fit", tmp_path / "f", "--eval", tmp_path / "f", "--out", tmp_path / "head", *options)
        certificate = load_head(tmp_path / "head").certificate
        assert certificate is not None
        assert str(certificate) in said
        assert result["program"] == certificate.program
        assert result["relative_gap"] == pytest.approx(certificate.relative_gap) == pytest.approx(0, abs=1e-4)
        assert result["facts"]["method"] == "direct"
        assert result["accuracy"]["value"] > 0.9
        assert 0 <= result["calibration_error"]["low"] <= result["calibration_error"]["value"] < 1
        assert 0 < result["calibration_error_by_chance"] < 1

    @pytest.mark.parametrize(
        ("options", "method", "neurons"),
        [
            (["--method", "linear"], "linear", range(1)),
            # test_convex_fit.py fits it so too
            pytest.param(
                ["--method", "two-phase", "--paper"], "two-phase", range(99), marks=pytest.mark.nightly, id="published"
            ),
        ],
    )
    def test_fit_s_methods(
        self, finished: RunFolder, tmp_path: Path, options: list[str], method: str, neurons: range
    ) -> None:
        result, _ = invoked("fit", finished.path / "features/train", "--out", tmp_path / "head", *options)
        assert result["facts"]["method"] == method
        assert result["facts"].get("paper", False) == ("--paper" in options)
        assert result["n_neurons"] in neurons

    def test_data_commands(self, pairs: Path, tmp_path: Path) -> None:
        assert invoked("data", "check", pairs)[0]["pairs"] == 60
        invoked("data", "convert", pairs, "--out", tmp_path / "plain.jsonl")
        done = command("data", "show", tmp_path / "plain.jsonl", "--n", "1")
        assert "rejected" in done.stdout
        turns = [{"role": r, "text": f"{r} says {i}"} for i, r in enumerate(["user", "assistant"] * 3)]
        write_rows(tmp_path / "talk.jsonl", [{"id": "a", "turns": turns}])
        assert invoked("data", "alternate", tmp_path / "talk.jsonl", "--out", tmp_path / "made.jsonl")[0]["pairs"] == 2

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["align", "nowhere.jsonl", "--model", "MODEL", "--out", "run"], "nowhere.jsonl"),
            (["align", "nowhere.jsonl", "--model", "also-nowhere", "--out", "run"], "also-nowhere"),
            (["align", "--out", "run"], "pairs"),
            (["align", "x.jsonl", "-m", "m", "--set", "guidance.strenght=3"], "guidance.strenght"),
            (["align", "x.jsonl", "-m", "m", "--set", "nonsense"], "NAME=VALUE"),
            (["align", "x.jsonl", "-m", "m", "--pooling", "max"], "pooling"),
            (["generate", "nowhere", "hello"], "not a run folder"),
            (["generate", "nowhere", "hello", "--mode", "blocks"], "'blocks' is not one of 'token', 'block'"),
            (["chat", "nowhere", "--rule", "minmax"], "'minmax' is not one of 'calibrated', 'min-max'"),
            (["report", "nowhere"], "not a run folder"),
            (["fit", "nowhere", "--out", "head"], "features.json"),
            (
                ["fit", "nowhere", "--out", "head", "--paper"],
                "head.paper is a setting of head.method two-phase; found learnt",
            ),
            (["align", "x.jsonl", "-m", "m", "--method", "pairwise"], "'pairwise' is not one of 'learnt', 'direct'"),
            (["align", "x.jsonl", "-m", "m", "--set", "head.method=pairwise"], "head.method"),
            (["align", "x.jsonl", "-m", "m", "--paper"], "head.paper"),
            (["data", "check", "nowhere.jsonl"], "nowhere.jsonl"),
        ],
        ids=" ".join,
    )
    def test_wrong_input_ends_with_code_two_and_a_reason(
        self,
        words: list[str],
        message: str,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        from coala.cli import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["coala", *(str(model) if word == "MODEL" else word for word in words)])
        monkeypatch.setattr(os, "environ", {**os.environ})  # the command sets some for itself
        with pytest.raises(SystemExit) as end:
            main()
        told = capfd.readouterr()
        assert end.value.code == 2, told
        assert message in told.out + told.err
        assert "Traceback" not in told.err
        assert not list(tmp_path.iterdir())


def test_every_command_helps_with_an_example() -> None:
    from typer.testing import CliRunner

    from coala.cli import app

    names = [["align"], ["generate"], ["chat"], ["report"], ["extract"], ["fit"], ["demo"]]
    for words in [*names, *(["data", name] for name in ("check", "convert", "alternate", "show"))]:
        shown = CliRunner().invoke(app, [*words, "--help"])
        assert shown.exit_code == 0
        assert "Example" in shown.output, words


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv=['coala','--help']\nfrom coala.cli import app\ntry: app()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('numpy','torch','jax','transformers','pydantic','matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "content", ["x", *(pytest.param(text, marks=pytest.mark.nightly) for text in ("{}", "[]", "null", ""))]
)
def test_a_file_that_was_damaged_is_told_by_its_name_or_does_not_matter(
    finished: RunFolder, tmp_path: Path, content: str
) -> None:
    kinds = (".json", ".jsonl", ".safetensors")
    names = [f.relative_to(finished.path) for f in sorted(finished.path.rglob("*")) if f.suffix in kinds]
    assert len(names) > 12
    told = {}
    for name in names:
        broken = tmp_path / "run"
        shutil.copytree(finished.path, broken)
        (broken / name).write_text(content)
        try:
            make_report(RunFolder(broken))
        except CoalaError as error:
            told[name] = str(error)
        shutil.rmtree(broken)
    assert len(told) > 8
    assert [(name, text) for name, text in told.items() if name.stem.split("-")[0] not in text] == []


class TestRecipe:
    def test_flags_win_over_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text("pairs: a.jsonl\nseed: 3\nmodel: {name: m, pooling: last}\n")
        made = load_recipe(path, {"model": {"name": "other", "pooling": None}}, set_option("guidance.strength=5"))
        assert (made.seed, made.model.name, made.model.pooling, made.guidance.strength) == (3, "other", "last", 5)
        assert made.pairs == ("a.jsonl",)

    @pytest.mark.parametrize("text", ["seeds=[0", "a=b: [", "x={1", "nothing", "=3", "a='"])
    def test_an_option_that_is_no_setting_is_told(self, text: str) -> None:
        with pytest.raises(RecipeError, match=r"--set .*(is not YAML|expected NAME=VALUE)"):
            set_option(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- a\n- b\n", "expected a mapping"),
            ("pairs: [a\n", "is not YAML"),
            ("pairs: [a]\nmodel: {name: m}\nseed: -1\n", "seed"),
            ("pairs: [a]\nmodel: {name: m}\ncolour: red\n", "colour"),
            ("pairs: [a]\n", "model"),
        ],
    )
    def test_faults_are_named(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)

    @pytest.mark.parametrize(
        ("head", "model", "prompts", "log_ratios"),
        [
            ({}, {}, False, False),
            ({"gate_on": "reply"}, {}, False, False),
            ({"gate_on": "prompt"}, {}, True, False),
            ({"gate_on": "auto"}, {}, True, False),
            ({"gate_on": "auto"}, {"prompt_features": False}, False, False),
            ({}, {"prompt_features": True, "log_ratios": True}, True, True),
            ({"reference_scale": 0.1}, {}, False, True),
        ],
    )
    def test_what_a_head_reads_is_extracted(
        self, head: dict[str, Any], model: dict[str, Any], prompts: bool, log_ratios: bool
    ) -> None:
        made = load_recipe(None, {"pairs": ["p"], "model": {"name": "m", **model}, "head": head})
        assert (made.prompt_features, made.log_ratios) == (prompts, log_ratios)

    @pytest.mark.parametrize(
        ("head", "model", "message"),
        [
            ({"paper": True}, {}, "head.paper is a setting of head.method two-phase; found learnt"),
            ({"gate_on": "prompt", "method": "linear"}, {}, "needs head.method learnt or direct; found linear"),
            ({"gate_on": "prompt"}, {"prompt_features": False}, "needs model.prompt_features, which is false"),
            ({"reference_scale": 1.0}, {"log_ratios": False}, "needs model.log_ratios, which is false"),
        ],
    )
    def test_settings_that_contradict(self, head: dict[str, Any], model: dict[str, Any], message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            load_recipe(None, {"pairs": ["p"], "model": {"name": "m", **model}, "head": head})

    def test_bundled_recipes_are_valid(self) -> None:
        folder = Path(__file__).resolve().parent.parent / "src/coala/recipes"
        # The recipe of conversations to be made is another kind, with a reader and tests of its own.
        for path in {*folder.glob("*.yaml")} - {*folder.glob("edufeedback*.yaml")}:
            load_recipe(path, {"pairs": ["p"], "model": {"name": "m"}})


def test_a_layer_that_cannot_be_chosen_is_the_last_and_the_head_is_fitted_on_prefixes(
    pairs: Path, model: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    settings = recipe(pairs, model, head={"method": "linear"}, evaluation={"prompts": 0})
    asked = {**asdict(settings.model), "layer": "auto", "prefixes": 3}
    content = align_recipe(replace(settings, model=type(settings.model)(**asked)), run)
    # 45 pairs; test_depth.py has enough to choose by.
    choice = json.loads((run.path / "layer.json").read_text())
    assert content["layers"] == choice["scores"] == []
    assert "too few to compare layers" in choice["why"]
    for part in ("train", "eval"):
        assert load_features(run.path / "features" / part).spec.layer == choice["n_layers"] == choice["layer"]
    train = load_features(run.path / "features" / "train")
    assert len(train) == 3 * content["summary"]["n_train"] == 3 * len(load_pairs(run.path / "pairs-train.jsonl"))
    assert load_head(run.path / "head").spec.layer == choice["layer"]
    assert "too few to compare layers" in (run.path / "report.html").read_text()


def test_features_are_reused_across_runs(pairs: Path, model: Path, tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    cache = tmp_path / "cache"
    quick = {"evaluation": {"prompts": 0}}
    align_recipe(recipe(pairs, model, head={"method": "linear", "tolerance": 1e-3}, **quick), first, cache=cache)
    assert "reused" not in first.facts("features-train")
    again = align_recipe(recipe(pairs, model, head={"method": "linear"}, **quick), second, cache=cache)
    assert second.facts("features-train")["reused"].startswith(str(cache))
    for part in ("train", "eval"):
        one, two = (run.path / "features" / part / "features.safetensors" for run in (first, second))
        assert file_digest(one) == file_digest(two)
    assert again["head"]["n_neurons"] == 0
    bound = [row for row in make_report(first)["costs"] if "flops_bound" in row]
    assert [row["stage"] for row in bound] == ["features-train", "features-eval"]
    assert all(1 <= row["flops"] / row["flops_bound"] < 2 for row in bound)


# --- settings that change --------------------------------------------------------------------------------------------


def stamps(run: RunFolder) -> dict[str, int]:
    """When each stage's record was written."""
    return {path.stem: path.stat().st_mtime_ns for path in (run.path / "stages").glob("*.json")}


@pytest.fixture
def copied(finished: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


UPSTREAM = {"pairs", "features-train", "features-eval"}
REPLIES = {"replies-unguided", "replies-guided"}


@pytest.mark.parametrize(
    ("changes", "redone", "kept"),
    [
        ({"guidance": {"strength": 1.0}}, REPLIES, {*UPSTREAM, "head"}),
        pytest.param({"guidance": {"mode": "token"}}, REPLIES, {*UPSTREAM, "head"}, marks=pytest.mark.nightly),
        pytest.param({"guidance": {"mode": "shift"}}, {*REPLIES, "policy"}, {*UPSTREAM, "head"},
                     marks=pytest.mark.nightly),
        pytest.param({"evaluation": {"prompts": 2, "max_new_tokens": 5}}, REPLIES, {*UPSTREAM, "head"},
                     marks=pytest.mark.nightly),
        pytest.param({"evaluation": {"prompts": 3, "max_new_tokens": 4}}, REPLIES, {*UPSTREAM, "head"},
                     marks=pytest.mark.nightly),
        ({"evaluation": {"prompts": 3, "max_new_tokens": 5, "judge": "rule:longer"}},
         {"judgements-judge"}, {*UPSTREAM, "head", *REPLIES}),
        ({"head": {"method": "linear"}}, {"head", *REPLIES}, UPSTREAM),
        pytest.param({"head": {"tolerance": 1e-3}}, {"head", *REPLIES}, UPSTREAM, marks=pytest.mark.nightly),
    ],
    ids=["strength", "mode", "policy", "prompts", "length", "judge", "method", "tolerance"],
)  # fmt: skip
def test_what_a_setting_does_not_decide_is_kept(
    copied: RunFolder, pairs: Path, model: Path, changes: dict[str, Any], redone: set[str], kept: set[str]
) -> None:
    before, notes = stamps(copied), []
    wanted = recipe(pairs, model, **changes)
    align_recipe(wanted, copied, on_note=notes.append)
    after = stamps(copied)
    assert {stage for stage in after if after[stage] != before.get(stage)} == redone
    assert {stage for stage in after if after[stage] == before.get(stage)} == kept
    assert copied.settings == json.loads(json.dumps(wanted.located().plain()))
    assert any(" -> " in note for note in notes)
    assert any("keeps pairs" in note and "features" in note.partition(";")[0] for note in notes)
    # A mode with likelihoods has a policy accuracy, of as many pairs as prompts are answered; the others say why not.
    content = make_report(copied)
    row = dict(summary_rows(content))["policy accuracy"]
    assert "n = 3" in row if "policy" in redone else "likelihood not known in mode" in row
    # The same again is a resume that does nothing.
    align_recipe(wanted, copied)
    assert stamps(copied) == after


def test_what_is_distilled_of_a_head_goes_with_it(copied: RunFolder, pairs: Path, model: Path) -> None:
    for name in ("distilled", "distilled-adapter"):
        (copied.path / name).mkdir()
        (copied.path / name / "policy.json").write_text("{}")
    align_recipe(recipe(pairs, model), copied)
    assert (copied.path / "distilled" / "policy.json").exists()
    (copied.path / "head" / "head.safetensors").unlink()  # fitted again, as after other pairs
    notes: list[str] = []
    align_recipe(recipe(pairs, model), copied, on_note=notes.append)
    assert not any((copied.path / name).exists() for name in ("distilled", "distilled-adapter"))
    assert sum("of another head" in note for note in notes) == 2


def test_a_head_that_reads_prompts_has_them_extracted(copied: RunFolder, pairs: Path, model: Path) -> None:
    assert load_features(copied.path / "features/train").prompt is None
    align_recipe(recipe(pairs, model, head={"gate_on": "prompt", "n_patterns": 2}, evaluation={"prompts": 0}), copied)
    assert load_features(copied.path / "features/train").prompt is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "\n  seed: 0 -> 1\n"),
        ({"model": {"layer": 1}}, "\n  model.layer: -1 -> 1\n"),
        ({"model": {"layer": 1}, "guidance": {"strength": 1.0}}, "\n  model.layer: -1 -> 1\n"),
        ({"eval_fraction": 0.5, "model": {"pooling": "last"}},
         "\n  eval_fraction: 0.25 -> 0.5\n  model.pooling: mean -> last\n"),
    ],
)  # fmt: skip
def test_what_decides_the_features_is_refused_by_its_name_alone(
    finished: RunFolder, pairs: Path, model: Path, changes: dict[str, Any], said: str
) -> None:
    before = stamps(finished)
    with pytest.raises(StoreError) as caught:
        align_recipe(recipe(pairs, model, **changes), finished)
    assert said in str(caught.value)
    assert "--restart" in str(caught.value)
    assert "guidance" not in str(caught.value)
    assert stamps(finished) == before


@pytest.mark.parametrize("steps", range(12))
def test_a_kill_while_settings_change_leaves_them_those_of_what_is_there(
    copied: RunFolder, pairs: Path, model: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Killed after any number of files, the run says its old settings, or its new ones and holds nothing of the old."""
    from coala.alignment.changes import adopt

    class Killed(BaseException):
        pass

    left = steps
    unlink, rmtree = Path.unlink, shutil.rmtree

    def counted(act: Any) -> Any:
        def acting(*args: Any, **kwargs: Any) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            act(*args, **kwargs)

        return acting

    old = copied.settings
    wanted = recipe(pairs, model, head={"method": "linear"}).located()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", counted(unlink))
        patched.setattr(shutil, "rmtree", counted(rmtree))
        try:
            adopt(wanted, copied)
        except Killed:
            assert copied.settings == old
    stages = set(stamps(copied))
    if copied.settings == old:
        # What is recorded as done is there.
        for stage in stages:
            record = copied.record(stage)
            assert record is not None
            assert all((copied.path / name).exists() for name in record["outputs"])
    else:
        assert stages == UPSTREAM
        assert not any((copied.path / name).exists() for name in ("head", "generations-guided.jsonl", "report.html"))


def test_a_run_of_before_a_setting_existed_goes_on(copied: RunFolder, pairs: Path, model: Path) -> None:
    settings = copied.settings
    del settings["evaluation"]["labeller"], settings["guidance"]["width"]
    (copied.path / "run.json").write_text(json.dumps(settings))
    before = stamps(copied)
    align_recipe(recipe(pairs, model), copied)
    assert stamps(copied) == before


# --- what is known to fail is refused first --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"judge": "nosuch.json"}}, "--judge nosuch.json: found no such file. Expected head:RUN"),
        ({"evaluation": {"judge": "head:nosuch"}}, "nosuch: is not a run folder"),
        ({"evaluation": {"judge": "rule:longest"}}, "There is no rule 'longest'"),
        ({"evaluation": {"judge": "rule:regex:("}}, "is not a regular expression"),
        ({"evaluation": {"judge": "words:nosuch"}}, "nosuch: the judge's file could not be read"),
        ({"evaluation": {"judge": "longer"}}, "did you mean rule:longer?"),
        ({"evaluation": {"judge": "head:"}}, "names none; expected one such as head:runs/mine"),
        ({"evaluation": {"judge": "replay:x"}}, "new replies have no stored judgements"),
        ({"evaluation": {"judge": "gpt:4"}}, "found no judge of kind 'gpt'"),
        ({"evaluation": {"labeller": "nosuch"}}, "found no such file"),
        ({"model": {"layer": 99}}, "--layer is 99; .* has hidden states 0 .* to 3"),
        ({"model": {"max_tokens": 10**9}}, "--max-tokens is 1,000,000,000; the context of"),
        ({"evaluation": {"max_new_tokens": 10**6}}, "--max-new-tokens is 1,000,000; the context of"),
        ({"model": {"quantise": "4bit"}}, "bitsandbytes"),
        ({"model": {"adapter": "no/such/adapter"}}, "no/such/adapter"),
        ({"model": {"device": "toaster"}}, "toaster"),
        ({"guidance": {"strength": float("inf")}}, "strength"),
    ],
)
def test_settings_are_checked_before_pairs_are_read(
    model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    run = RunFolder(tmp_path / "run")
    # The pairs do not exist: whoever read them first would say so.
    with pytest.raises(CoalaError, match=said):
        align_recipe(recipe(tmp_path / "nowhere.jsonl", model, **changes), run)
    assert not run.path.exists()


def test_a_folder_that_is_no_run_is_refused_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").write_text("data")
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path, tmp_path / "precious", tmp_path / "precious" / "run"):
        with pytest.raises(
            StoreError, match=r"Fix: use another --out|Fix: give another --out|choose another folder with --out"
        ):
            align_recipe(recipe(tmp_path / "nowhere.jsonl", model), RunFolder(out))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_restart_deletes_nothing_that_cannot_be_begun(finished: RunFolder, pairs: Path, model: Path) -> None:
    from coala.cli.align import run_and_show

    before = values_of(finished.path)
    with pytest.raises(CoalaError, match="--layer is 99"):
        run_and_show(recipe(pairs, model, model={"layer": 99}), finished.path, restart=True)
    assert values_of(finished.path) == before


def test_a_head_judges_the_replies_of_another_run(
    finished: RunFolder, copied: RunFolder, pairs: Path, model: Path
) -> None:
    changes = {"evaluation": {"prompts": 3, "max_new_tokens": 5, "judge": f"head:{finished.path}"}}
    content = align_recipe(recipe(pairs, model, **changes), copied)
    assert content["win_rates"][0]["judge"] == f"head {finished.path.name}"
    rate = content["win_rates"][0]["estimate"]
    # What the head says of the texts as a reward model says it; decoding saw their tokens, which may be others.
    backbone, head, _ = load_parts(finished.path)
    prompts = {prompt_id(pair.prompt): pair.prompt for pair in load_pairs(copied.path / "pairs-eval.jsonl")}
    guided, unguided = (load_generations(copied.path / f"generations-{how}.jsonl") for how in ("guided", "unguided"))
    asked = [prompts[reply.prompt_id] for reply in guided]
    ours, theirs = (
        score_replies(asked, [reply.text for reply in replies], head, backbone) for replies in (guided, unguided)
    )
    assert rate.value == pytest.approx(np.mean((ours > theirs) + (ours == theirs) / 2))
    assert rate.n == 3


def test_a_runs_unguided_replies_are_those_that_would_be_written_or_none(copied: RunFolder) -> None:
    as_it_is = recipe_of(copied.settings)
    found = unguided_replies(copied, as_it_is)
    assert found is not None
    (backbone, _, guidance), settings = load_parts(copied.path), as_it_is.evaluation
    prompts = [pair.prompt for pair in one_per_prompt(load_pairs(copied.path / "pairs-eval.jsonl"))[:3]]
    ids = [prompt_id(prompt) for prompt in prompts]
    plain = generate(prompts, backbone, None, guidance.plain, max_new_tokens=5, seed=as_it_is.seed, prompt_ids=ids)
    assert [(one.prompt_id, one.text) for one in found] == [(one.prompt_id, one.text) for one in plain]
    assert [one.log_prob for one in found] == pytest.approx([one.log_prob for one in plain], rel=1e-5)
    # What does not decide them may change, and what does may not.
    assert unguided_replies(copied, replace(as_it_is, guidance=GuidanceSettings(mode="token", strength=9.0))) == found
    for changed in (
        replace(as_it_is, seed=1),
        replace(as_it_is, evaluation=replace(settings, prompts=2)),
        replace(as_it_is, evaluation=replace(settings, max_new_tokens=4)),
        replace(as_it_is, evaluation=replace(settings, temperature=0.5)),
        replace(as_it_is, guidance=GuidanceSettings(top_k=3)),
        replace(as_it_is, model=replace(as_it_is.model, template="continuation")),
    ):
        assert unguided_replies(copied, changed) is None
    path = copied.path / "generations-unguided.jsonl"
    path.write_text(path.read_text() + "\n")
    assert unguided_replies(copied, as_it_is) is None


# --- replies are kept as they are written ----------------------------------------------------------------------------


def test_replies_resume_with_the_portion_that_was_lost(
    copied: RunFolder, pairs: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coala.alignment import replies

    monkeypatch.setattr(replies, "PORTION", 2)
    wanted = recipe(pairs, model, evaluation={"prompts": 9, "max_new_tokens": 5}, guidance={"mode": "token"})
    whole, told = copied.path.parent / "whole", []
    shutil.copytree(copied.path, whole)
    align_recipe(wanted, RunFolder(whole))

    class Killed(Exception):
        pass

    def kill(stage: str, done: float, total: float | None, note: str = "") -> None:
        if (stage, done) == ("replies-guided", 4):
            raise Killed

    with pytest.raises(Killed):
        align_recipe(wanted, copied, on_progress=kill)
    assert not (copied.path / "generations-guided.jsonl").exists()
    align_recipe(wanted, copied, on_progress=lambda stage, done, total, note="": told.append((stage, done)))
    assert [done for stage, done in told if stage == "replies-guided"][:3] == [0, 4, 5]
    assert values_of(copied.path) == values_of(whole)
    assert not (copied.path / "portions").exists()


# --- what the table says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (
            Estimate(0.467, 0.248, 0.699, 15, "share"),
            "46.7 % [24.8, 69.9], n = 15: not distinguishable from chance (50 %)",
        ),
        (Estimate(0.9, 0.8, 0.95, 50, "share"), "90.0 % [80.0, 95.0], n = 50: better than chance"),
        (Estimate(0.1, 0.05, 0.2, 50, "share"), "10.0 % [5.0, 20.0], n = 50: worse than chance"),
        (Estimate(float("nan"), 0.0, 1.0, 0, "no pairs"), "unknown: there is nothing to compare it with (no pairs)"),
    ],
)
def test_the_table_says_what_an_interval_leaves_open(finished: RunFolder, accuracy: Estimate, said: str) -> None:
    content = make_report(finished)
    content["summary"]["accuracy_eval"] = accuracy
    rows = dict(map(tuple, summary_rows(content)))
    assert rows["ranking accuracy"] == said
    assert rows["calibration error"].endswith(" % by chance alone)")
    assert "(perfect: 0 %; on so few pairs " in rows["calibration error"]
    assert "(perfect: 0; a coin: 0.693" in rows["NLL per pair"]
    linear = content["summary"]["linear_accuracy_eval"]
    told = "better than" if linear.low > 0.5 else "worse than" if linear.high < 0.5 else "not distinguishable from"
    assert rows["a linear head"].partition(": ")[2].startswith(f"{told} chance")


def test_few_held_out_pairs_are_said_to_tell_little(pairs: Path, model: Path, copied: RunFolder) -> None:
    from coala.alignment.stages import power_of

    some = load_pairs(copied.path / "pairs-eval.jsonl")
    lines = power_of(some, recipe(pairs, model, evaluation={"prompts": 50}))
    assert "held-out pairs" in lines[0]
    assert "--eval-fraction is 0.25" in lines[0]
    assert "held out: all of these are answered" in lines[1]
    many = [replace(some[0], group=str(i), prompt=user(str(i))) for i in range(2000)]
    assert power_of(many, recipe(pairs, model)) == []
