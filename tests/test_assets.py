"""What the repository bundles: sound, our own, and enough for the demo's claim."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest

from coala.alignment import align_recipe
from coala.data import check, position_cues, read_pairs
from coala.evaluation import WordJudge
from coala.evaluation.house_style import rules_kept
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


CHAT = ASSETS / "chat"


def chat_prompts() -> list[dict[str, str]]:
    return [json.loads(line) for line in (CHAT / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_chat_prompts_are_apart_from_one_another() -> None:
    rows = chat_prompts()
    assert len(rows) == 300
    assert len({row["field"] for row in rows}) == 12  # eleven of school, and everyday
    assert sum(row["split"] == "test" for row in rows) == 60
    words = [set(re.findall(r"\w+", row["prompt"].lower())) for row in rows]
    for i, one in enumerate(words):
        for j in range(i):
            assert len(one & words[j]) <= 0.75 * len(one | words[j]), (rows[i]["prompt"], rows[j]["prompt"])


def test_the_chat_pairs_are_sound_and_labelled_by_the_rules() -> None:
    split = {row["prompt"]: row["split"] for row in chat_prompts()}
    for name, part, at_least in (("pairs", "train", 150), ("pairs_test", "test", 40)):
        found = check(CHAT / f"{name}.jsonl.gz", against=CHAT / "pairs_test.jsonl.gz" if part == "train" else None)
        assert not found.errors
        assert len(found.pairs) >= at_least
        assert len({pair.prompt for pair in found.pairs}) == len(found.pairs)
        for pair in found.pairs:
            assert split[pair.prompt[0].text] == part
            assert sum(rules_kept(pair.chosen).values()) > sum(rules_kept(pair.rejected).values())


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def test_no_row_of_the_shared_data_is_bundled(shared: Path) -> None:
    pairs = [ASSETS / f"{name}.jsonl.gz" for name in ("film_pairs", "film_pairs_test", "chat/pairs", "chat/pairs_test")]
    mine = {
        text.strip() for path in pairs for p in read_pairs(path) for text in (p.prompt[0].text, p.chosen, p.rejected)
    }
    for name in ("tutor_conversations.jsonl", "chat/prompts.jsonl", "chat/questions.jsonl"):
        for line in (ASSETS / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            mine |= {turn["text"].strip() for turn in row.get("turns", ())} | {row.get("prompt", "").strip()}
    mine.discard("")
    for path in (shared / "data").rglob("*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                assert not mine.intersection(_texts(json.loads(line))), path


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
    from transformers import AutoModelForCausalLM

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
    # The last step: a checkpoint that plain transformers loads, whose replies win as well.
    rows = {row["name"]: row for row in content["distilled"]["rows"]}
    assert rows["distilled"]["wins"]["low"] > 0.6
    assert rows["distilled"]["forwards"] == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run-served")
    assert not model.config.tie_word_embeddings
