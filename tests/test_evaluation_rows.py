"""Every reader of judgement files on hostile input: a CoalaError that can be printed, or a value that can be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coala.evaluation import alpaca, arena, arena_style, length_control, mtbench, reward_benchmarks
from coala.evaluation.rows import read_rows
from coala.values import CoalaError
from tests.evaluation_helpers import write_lines

SETTINGS = settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CALIBRATION = length_control.Calibration(np.array([1.0, -2]), np.array([0.0, 1]), np.zeros(2), np.array([0.2, 0.7]))


def alpaca_rows(path: Path) -> None:
    found = alpaca.read_annotations(path)
    alpaca.win_rate(found)
    difficulty = length_control.Difficulty(np.zeros(len(found)), {})
    if np.isfinite(found.preference).any():
        length_control.length_controlled(found, difficulty, CALIBRATION, penalty=1.0, draws=2)


def arena_rows(path: Path) -> None:
    battles = arena.read_battles(path, model="mine", baseline="b")
    arena.score(battles, battles.models[0], draws=3)
    arena.bradley_terry(battles, battles.models[0])


def scores_of(form: str, path: Path) -> None:
    for scored in reward_benchmarks.read_scores(path, form).values():
        reward_benchmarks.FORMS[form].rank(scored)
        reward_benchmarks.score_rows(scored)


def replies_of(form: str, path: Path) -> None:
    benchmark = reward_benchmarks.FORMS[form].read(path)
    benchmark.ranking(np.arange(len(benchmark.replies)))
    benchmark.rank(benchmark.by_rule("longer"))


# A sound row of each form of a benchmark of reward models.
REWARD_ROWS: dict[str, dict[str, Any]] = {
    "rewardbench scores": {"subset": "donotanswer", "chosen_score": 1, "rejected_score": 0},
    "rewardbench2 scores": {"id": "tied:1", "subset": "Ties", "scores": [1, [2], 0], "num_correct": 2},
    "rmbench scores": {"domain": "chat", "score_chosen": [1, 2, 3], "score_rejected": [0, 1, 4]},
    "judgebench scores": {"pair_id": "a", "label": "B>A", "scores": {"m": [1, 2]}},
    "rewardbench": {"subset": "donotanswer", "prompt": "p", "chosen": "a", "rejected": "b"},
    "rewardbench2": {"id": 3, "subset": "Focus", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"]},
    "rmbench": {"domain": "chat", "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]},
    "judgebench": {
        "pair_id": "x",
        "question": "p",
        "response_A": "a",
        "response_B": "b",
        "source": "livecodebench",
        "label": "A>B",
    },
}

READERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "annotations": (
        alpaca_rows,
        ("generator_1", "generator_2", "len_1", "len_2", "output_1", "preference", "instruction", "top_logprobs"),
    ),
    "outputs": (alpaca.read_output_lengths, ("output",)),
    "difficulty": (length_control.read_difficulty, ("instruction_difficulty", "index", "instruction_sha256_16")),
    "calibration": (
        length_control.read_calibration,
        ("preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"),
    ),
    "ratings": (
        lambda path: mtbench.scores(mtbench.read_ratings(path)[0]),
        ("question_id", "model", "turn", "judgment", "score", "judge", "category"),
    ),
    "matches": (
        lambda path: mtbench.contests(mtbench.read_matches(path)[0]),
        ("question_id", "turn", "model_1", "model_2", "g1_winner", "g2_winner", "g1_judgment", "g2_judgment"),
    ),
    "categories": (mtbench.read_categories, ("question_id", "category")),
    "arena": (arena_rows, ("question", "uid", "model", "baseline", "games", "winner", "model_a", "model_b")),
    "styles": (arena_style.read_styles, ("uid", "conv_metadata", "metadata", "messages", "output")),
    **{
        f"{form} scores": (partial(scores_of, form), fields)
        for form, fields in {
            "rewardbench": ("subset", "chosen_score", "rejected_score", "prompt"),
            "rewardbench2": ("id", "subset", "scores", "num_correct", "chosen_score", "rejected_score"),
            "rmbench": ("id", "domain", "score_chosen", "score_rejected", "prompt_id"),
            "judgebench": ("pair_id", "label", "scores", "source", "chosen_score", "rejected_score"),
        }.items()
    },
    **{
        form: (partial(replies_of, form), fields)
        for form, fields in {
            "rewardbench": ("id", "subset", "prompt", "chosen", "rejected"),
            "rewardbench2": ("id", "subset", "prompt", "chosen", "rejected", "num_correct"),
            "rmbench": ("id", "domain", "prompt", "chosen", "rejected"),
            "judgebench": ("pair_id", "question", "response_A", "response_B", "source", "label"),
        }.items()
    },
}

words = st.sampled_from(
    [
        "a",
        "b",
        "mine",
        "",
        " ",
        "tie",
        "model",
        "baseline",
        "model_1",
        "[[A]]",
        "[[5]]",
        "[[A>>B]]",
        "donotanswer",
        "\ud800",
    ]
)
simple = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**30, 10**400, -1, 1.5, 1e308, -1e308]),
    st.floats(),
    words,
    st.text(max_size=8),
)
keys = st.sampled_from(["judgment", "score", "answer", "token", "logprob", "token_len", "list_count", "content", "x"])
values = st.recursive(
    simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


def usable(read: Callable[[Path], Any], path: Path) -> None:
    try:
        read(path)
    except CoalaError as error:
        str(error).encode()  # the message can be printed


@pytest.mark.parametrize("name", READERS)
@SETTINGS
@given(data=st.data())
def test_rows_of_anything(tmp_path: Path, name: str, data: st.DataObject) -> None:
    read, fields = READERS[name]
    rows = data.draw(st.lists(st.dictionaries(st.sampled_from(fields), values), min_size=1, max_size=4))
    path = tmp_path / "rows.jsonl"
    as_list = data.draw(st.booleans())
    text = json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    usable(read, path)


@pytest.mark.parametrize("name", READERS)
@SETTINGS
@given(data=st.data())
def test_rows_that_are_nearly_right(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """One field of a sound row is replaced, which gets past the first checks."""
    read, fields = READERS[name]
    sound: dict[str, Any] = {
        "generator_1": "b",
        "generator_2": "mine",
        "len_1": 3,
        "len_2": 5,
        "preference": 1.25,
        "instruction": "x",
        "output": "o",
        "instruction_difficulty": 0.5,
        "std_delta_len": 1.0,
        "model": "mine",
        "baseline": "b",
        "w_tanh_std_delta_len": 1,
        "w_instruction_difficulty": 2,
        "w_bias": 3,
        "question_id": 1,
        "turn": 1,
        "judgment": "[[5]]",
        "model_1": "a",
        "model_2": "b",
        "g1_winner": "tie",
        "g2_winner": "model_1",
        "category": "c",
        "winner": "tie",
        "uid": 1,
        "question": 1,
    }
    if name == "calibration":
        sound["preference"] = 0.5
    sound |= REWARD_ROWS.get(name, {})
    rows = [dict(sound) for _ in range(data.draw(st.integers(1, 3)))]
    for number, row in enumerate(rows):
        row |= {key: f"{row[key]}{number}" for key in ("id", "pair_id") if key in row}
    rows[-1][data.draw(st.sampled_from(fields))] = data.draw(values)
    path = tmp_path / "rows.jsonl"
    write_lines(path, rows)
    usable(read, path)


@pytest.mark.parametrize("name", READERS)
def test_the_sound_row_is_sound(tmp_path: Path, name: str) -> None:
    """The property above starts from rows that every reader takes."""
    rows: dict[str, dict[str, Any]] = REWARD_ROWS | {
        "annotations": {"generator_1": "b", "generator_2": "m", "len_1": 3, "len_2": 5, "preference": 1.25},
        "outputs": {"output": "o"},
        "difficulty": {"instruction_difficulty": 0.5},
        "calibration": {"preference": 0.5, "std_delta_len": 1.0, "instruction_difficulty": 0.5},
        "weights": {"model": "m", "w_tanh_std_delta_len": 1, "w_instruction_difficulty": 2, "w_bias": 3},
        "ratings": {"question_id": 1, "turn": 1, "model": "m", "judgment": "[[5]]"},
        "matches": {
            "question_id": 1,
            "turn": 1,
            "model_1": "a",
            "model_2": "b",
            "g1_winner": "tie",
            "g2_winner": "tie",
        },
        "categories": {"question_id": 1, "category": "c"},
        "arena": {"question": 1, "model": "m", "winner": "tie"},
        "styles": {"uid": 1, "output": "o"},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[name]))
    READERS[name][0](path)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz"])
@SETTINGS
@given(raw=st.binary(max_size=60), prefix=st.sampled_from([b"", b"[", b"{", b"a,b\n", b"\xef\xbb\xbf", b"\x1f\x8b"]))
def test_files_of_anything(tmp_path: Path, ending: str, raw: bytes, prefix: bytes) -> None:
    path = tmp_path / f"rows{ending}"
    path.write_bytes(prefix + raw)
    usable(read_rows, path)


@SETTINGS
@given(st.binary(max_size=200), st.integers(0, 60))
def test_damaged_gzip(tmp_path: Path, raw: bytes, cut: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(raw)
    path.write_bytes(whole[:cut] + bytes(b ^ 1 for b in whole[cut : cut + 1]) + whole[cut + 1 :])
    usable(read_rows, path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "a.jsonl: found no rows, expected at least one"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.jsonl", b'{"a": 1}\n{', r"a.jsonl:2: found a truncated line"),
        ("a.jsonl", b'{"a": 1}\nx\n', r"a.jsonl:2: found invalid JSON at column 1"),
        ("a.jsonl", b'{"a": 1, "a": 2}', r"a.jsonl:1: a: found two fields of this name"),
        ("a.jsonl", b'{"a": 1}\n3', r"a.jsonl:2: found 3, expected an object"),
        ("a.jsonl", b"[1]", r"a.jsonl:1: found 1, expected an object"),
        ("a.jsonl", b"[" * 200000, "nested too deep|breaks off"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "an integer of thousands of digits"),
        ("a.jsonl", b'{"a": "\xff"}', "byte 0xff at position 8, which is not UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "truncated gzip stream"),
        ("a.csv", b"x,y\n1\n", r"a.csv:1: found 1 fields under 2 columns"),
        ("a.csv", b"x,x\n1,2\n", "two columns of this name"),
        ("a.csv", b"x,y\n", "no rows"),
        ("a.txt", b"{}", "found the ending .txt"),
    ],
)
def test_faults_are_explained(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CoalaError, match=words):
        read_rows(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="found no such file, expected a file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(CoalaError, match="found a folder, expected a file"):
        read_rows(tmp_path)
    # Neither is looked for on the hub.
    for name in ("a\0b", "runs/judgements"):
        with pytest.raises(CoalaError, match="found no such file, expected a file"):
            read_rows(name)


def test_rows_are_the_same_in_every_container(tmp_path: Path) -> None:
    rows = [{"a": "x\u2028y", "b": 1.5}, {"a": "é", "b": 2}]
    files = {
        "a.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "b.json": " \n" + json.dumps(rows),
        "c.csv": "\ufeffa, b\nx\u2028y,1.5\né,2\n",
        "d.tsv": "a\tb\nx\u2028y\t1.5\né\t2",
    }
    for name, text in files.items():
        for zipped in (False, True):
            path = tmp_path / (name + (".gz" if zipped else ""))
            path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
            found = read_rows(path)
            assert [(row.text("a"), row.value("b")) for row in found] == [(r["a"], r["b"]) for r in rows], name
