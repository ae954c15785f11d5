"""What the repository bundles: sound, our own, and enough for the demo's claim."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest

from coala.alignment import align_recipe
from coala.data import check, position_cues, read_pairs
from coala.evaluation import WordJudge
from coala.recipe import load_recipe
from coala.store import RunFolder

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"


def test_film_model_is_small_and_safe() -> None:
    files = [p for p in (ASSETS / "film-lm").iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 8 * 2**20
    assert not [p for p in files if p.suffix in {".bin", ".pt", ".pkl", ".py"}]


def test_film_pairs_are_sound_and_their_prompts_do_not_overlap() -> None:
    train = check(ASSETS / "film_pairs.jsonl.gz", against=ASSETS / "film_pairs_test.jsonl.gz")
    test = check(ASSETS / "film_pairs_test.jsonl.gz")
    assert not train.errors
    assert not test.errors
    assert not {p.group for p in train.pairs} & {p.group for p in test.pairs}
    assert len({p.prompt for p in test.pairs}) >= 200


def test_the_labels_are_the_labellers() -> None:
    labeller = WordJudge.load(ASSETS / "film-labeller.json")
    for pair in read_pairs(ASSETS / "film_pairs.jsonl.gz"):
        assert labeller.score(pair.chosen) > labeller.score(pair.rejected)


def test_judge_and_labeller_share_no_word() -> None:
    judge, labeller = (WordJudge.load(ASSETS / f"film-{name}.json") for name in ("judge", "labeller"))
    assert len(judge.weights) > 2000
    assert not set(judge.weights) & set(labeller.weights)


def test_tutor_conversations() -> None:
    rows = [json.loads(line) for line in (ASSETS / "tutor_conversations.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    assert len({row["field"] for row in rows}) == 11
    for row in rows:
        roles = [turn["role"] for turn in row["turns"]]
        assert 4 <= len(roles) <= 8
        assert roles[0] == "user"
        assert all(a != b for a, b in pairwise(roles))
    pairs = list(read_pairs(ASSETS / "tutor_conversations.jsonl", "conversations"))
    # Every conversation with k replies gives k - 1 pairs.
    assert len(pairs) == sum(len(row["turns"]) // 2 - 1 for row in rows)
    assert all(0 <= cue.value <= 1 for cue in position_cues(pairs).values())


def test_no_row_of_the_shared_data_is_bundled(shared: Path) -> None:
    known: set[str] = set()
    for path in (shared / "data").rglob("*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                known |= {v.strip() for v in json.loads(line).values() if isinstance(v, str) and len(v) > 40}
    mine = [p for name in ("film_pairs", "film_pairs_test") for p in read_pairs(ASSETS / f"{name}.jsonl.gz")]
    texts = {text.strip() for p in mine for text in (p.prompt[0].text, p.chosen, p.rejected)}
    rows = [json.loads(line) for line in (ASSETS / "tutor_conversations.jsonl").read_text().splitlines()]
    texts |= {turn["text"].strip() for row in rows for turn in row["turns"]}
    assert not texts & known


def test_the_demo_aligns_what_is_bundled(tmp_path: Path) -> None:
    """With a few pairs, a linear head and a few replies; the claim is the next test's."""
    for name in ("film_pairs", "film_pairs_test"):
        with (
            gzip.open(ASSETS / f"{name}.jsonl.gz", "rb") as whole,
            gzip.open(tmp_path / f"{name}.jsonl.gz", "wb") as few,
        ):
            few.writelines(islice(whole, 60))
    for path in ASSETS.iterdir():
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    settings = load_recipe(
        ASSETS.parent / "recipes" / "demo.yaml",
        {
            "pairs": [str(tmp_path / "film_pairs.jsonl.gz")],
            "eval_pairs": [str(tmp_path / "film_pairs_test.jsonl.gz")],
            "model": {"name": str(ASSETS / "film-lm")},
            "evaluation": {"judge": str(ASSETS / "film-judge.json"), "labeller": str(ASSETS / "film-labeller.json")},
        },
        {"evaluation": {"prompts": 4, "max_new_tokens": 8}, "head": {"method": "linear"}},
    )
    content = align_recipe(settings, RunFolder(tmp_path / "run"))
    assert content["summary"]["certified_gap"] < 1e-4
    assert content["summary"]["accuracy_eval"].value > 0.5
    assert [rate["judge"] for rate in content["win_rates"]] == ["film-judge", "film-labeller"]
    assert set(content["perplexity"]) == {"unguided", "guided"}


@pytest.mark.slow
@pytest.mark.nightly
def test_the_demo_and_its_claim(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coala", "demo", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert content["summary"]["certified_gap"] < 1e-4
    assert content["summary"]["accuracy_eval"]["low"] > 0.5
    judge, labeller = content["win_rates"]
    assert judge["judge"] == "film-judge"
    assert judge["estimate"]["n"] >= 200
    assert judge["estimate"]["value"] >= 0.65
    assert judge["estimate"]["low"] > 0.5
    assert labeller["judge"] == "film-labeller"
    assert set(content["perplexity"]) == {"unguided", "guided"}
    assert done.stdout.count("unguided") >= 3
