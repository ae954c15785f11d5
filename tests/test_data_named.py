"""Every field is read or named, no label passes for a reply, every container is read whole; mends mend."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from coala.cli import app
from coala.data import Findings, check, files, read_pairs, records
from coala.data.signs import pairs_needed, special_tokens
from coala.data.unread import tokens_of
from coala.values import Turn

SETTINGS = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
Row = dict[str, Any]


def user(said: str) -> list[Row]:
    return [{"role": "user", "content": said}]


def reply(said: str | None, **more: Any) -> list[Row]:
    return [{"role": "assistant", "content": said, **more}]


def row(k: int = 0, **more: Any) -> Row:
    return {"prompt": f"Name town {k}.", "chosen": f"It is town {k}.", "rejected": f"No idea, {k} times.", **more}


@pytest.fixture
def looked(tmp_path: Path) -> Callable[..., Findings]:
    """What the doctor says of rows written as JSON lines."""

    def run(*rows: Row) -> Findings:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return check(path)

    return run


def said(found: Findings) -> str:
    return "\n".join(str(one) for one in (*found.errors, *found.warnings, *found.notes))


# --- columns -----------------------------------------------------------------------------------------------------

FORMATS: dict[str, Row] = {
    "preference": row(),
    "columns": {"question": "Which town?", "better": "That one.", "worse": "No idea."},
    "hh-rlhf": {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    "alpaca": {"instruction": "Which town?", "input": "", "output": ["That one.", "No idea."]},
    "sharegpt": {"conversations": user("Which?"), "chosen": reply("That one.")[0], "rejected": reply("None.")[0]},
    "swift": {"messages": user("Which?") + reply("That one."), "rejected_response": "No idea."},
    "rewardbench": {"prompt": "Which town?", "chosen": ["That one."], "rejected": ["No idea."]},
    "ultrafeedback": {
        "instruction": "Which town?",
        "completions": [{"response": "That one.", "overall_score": 2}, {"response": "None.", "overall_score": 1}],
    },
    "ranked": {"prompt": "Which town?", "answers": [{"answer": "That.", "rank": 1}, {"answer": "None.", "rank": 2}]},
    "shp": {"history": "Which town?", "human_ref_A": "That one.", "human_ref_B": "No idea.", "labels": 1},
    "llmbar": {"input": "Which town?", "output_1": "That one.", "output_2": "No idea.", "label": 1},
    "autoj": {"prompt": "Which town?", "response 1": "That one.", "response 2": "No idea.", "label": 0},
    "battles": {"prompt": "Which town?", "response_a": "That one.", "response_b": "No idea.", "winner": "model_a"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_system_text_comes_first_in_every_format(looked: Any, name: str) -> None:
    found = looked({**FORMATS[name], "system": "Answer as a pirate."})
    assert found.errors == ()
    assert f"read as {name}" in said(found)
    (pair,) = found.pairs
    assert pair.prompt[0] == Turn("system", "Answer as a pirate.")
    assert all(turn.role != "system" for turn in pair.prompt[1:])


@pytest.mark.parametrize("name", FORMATS)
@SETTINGS
@given(
    field=st.text("abcdefgh_", min_size=3, max_size=12).filter(lambda s: tokens_of(s)[-1] not in ("data", "a", "b")),
    words=st.lists(st.sampled_from(["sea", "ship", "rum", "gold", "wind", "island"]), min_size=4, max_size=8),
)
def test_no_text_is_left_out_unsaid(looked: Any, name: str, field: str, words: list[str]) -> None:
    """Whatever a column is called, its words are in the pair, or its name is in what the doctor says."""
    text = " ".join(words)
    found = looked({**FORMATS[name], field: text})
    everything = [turn.text for pair in found.pairs for turn in pair.prompt] + [
        words for pair in found.pairs for words in (pair.chosen, pair.rejected)
    ]
    assert any(text in one for one in everything) or field in said(found)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("images", ["a.png"]), ("audio", {"path": "a.wav"}), ("video_path", "a.mp4"), ("tool_calls", [{"name": "f"}])],
)
def test_images_and_calls_in_a_column_are_errors(looked: Any, name: str, field: str, value: Any) -> None:
    found = looked({**FORMATS[name], field: value})
    assert [one.field for one in found.errors] == [field]
    # The mend: drop the field. An empty one is none.
    assert looked({**FORMATS[name], field: type(value)()}).errors == ()


def test_where_columns_around_the_prompt_go(looked: Any) -> None:
    found = looked(row(system="Be kind.", history=[["Hi?", "Hello."]], input="It lies in the north of the land."))
    assert [(turn.role, turn.text) for turn in found.pairs[0].prompt] == [
        ("system", "Be kind."),
        ("user", "Hi?"),
        ("assistant", "Hello."),
        ("user", "Name town 0.\n\nIt lies in the north of the land."),
    ]
    assert "read system as the system turn (1 row)" in said(found)
    other = looked(row(history="He said hi, the bot said hello."))
    assert [one.field for one in other.errors] == ["history"]
    twice = looked(row(prompt=[{"role": "system", "content": "Be kind."}, *user("Hi")], system="Be rude."))
    assert "another system text than the prompt's own" in said(twice)


def test_names_and_numbers_make_one_note(looked: Any) -> None:
    about = {"id": 3, "source": "forum", "model": "gpt-4", "language": "en", "score": 2.5, "created": "2024-01-01"}
    found = looked(*(row(k, **about) for k in range(3)))
    assert found.warnings == ()
    left = [name for name in about if name != "source"]  # where a pair is from is read
    assert [one.found for one in found.notes if "not read" in one.found] == [f"not read: {', '.join(left)}"]


def test_what_repeats_the_prompt_is_not_named(looked: Any) -> None:
    found = looked(row(question="Name town 0.", full=user("Name town 0.") + reply("It is town 0.")))
    assert "not read" not in said(found)


# --- fields of messages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["tool_calls", "function_call", "images", "audio"])
@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
def test_a_call_or_an_image_in_a_message_is_an_error(looked: Any, field: str, place: str) -> None:
    whole: Row = {"prompt": user("Hi"), "chosen": reply("Yes"), "rejected": reply("No")}
    held = {**whole[place][0], field: [{"name": "f"}]}
    found = looked({**whole, place: [held]})
    assert [one.field for one in found.errors] == [f"{place}[0].{field}"]
    assert looked({**whole, place: [{**held, "content": None}]}).errors[0].field == f"{place}[0].{field}"
    assert looked({**whole, place: [{**held, field: None}]}).errors == ()


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "thoughts", "plan"])
def test_a_thought_beside_the_words_is_named(looked: Any, field: str) -> None:
    thought = "six times seven is forty two"
    found = looked({"prompt": user("6*7?"), "chosen": reply("42", **{field: thought}), "rejected": reply("41")})
    assert found.errors == ()
    assert f"chosen[].{field} (1 row)" in said(found)
    alone = looked({"prompt": user("6*7?"), "chosen": reply("42", **{field: thought}), "rejected": reply("42")})
    assert [one.field for one in alone.errors] == [f"chosen[0].{field}"]
    assert "only difference" in said(alone)
    columns = {f"chosen_{field}": thought, f"rejected_{field}": "a guess, no more than that"}
    assert f"chosen_{field}" in said(looked(row(rejected="It is town 0.", **columns)))


def test_a_refusal_outside_content(looked: Any) -> None:
    whole = {"prompt": user("Hi"), "chosen": reply(None, refusal="I cannot."), "rejected": reply("No")}
    assert looked(whole).errors[0].field == "chosen[0].refusal"
    assert looked({**whole, "chosen": reply("I cannot.", refusal=None)}).errors == ()


# --- ratings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelt",
    [
        *("{0}-rating", "{0}_rating", "rating_{0}", "score_{0}", "{0}_score", "{0}.score", "{0} reward", "score.{0}"),
        *("{0}_avg_rating", "reward-{0}"),
    ],
)
def test_ratings_in_any_spelling(looked: Any, spelt: str) -> None:
    def rated(k: int, good: Any, bad: Any) -> Row:
        return row(k, **{spelt.format("chosen"): good, spelt.format("rejected"): bad})

    found = looked(rated(0, 1, 4), rated(1, "3", 3.0), rated(2, 5, 2))
    assert ["better rating in" in one.found or "same rating in" in one.found for one in found.warnings] == [True, True]
    assert [one.row for one in found.warnings] == [1, 2]
    nested = looked(*(row(k, scores={"chosen": a, "rejected": b}) for k, (a, b) in enumerate([(1, 2), (2, 1)] * 2)))
    assert [one.count for one in nested.warnings] == [2]


def test_a_low_rank_is_the_better_one(looked: Any) -> None:
    assert looked(*(row(k, chosen_rank=1, rejected_rank=2) for k in range(3))).warnings == ()
    assert len(looked(*(row(k, chosen_rank=2, rejected_rank=1) for k in range(3))).warnings) == 1


# --- what cannot be a reply --------------------------------------------------------------------------------------

words = st.text("ab 'é\"\\{}[],:\n", min_size=1, max_size=12).filter(lambda s: bool(s.strip()))


def _numpy(value: Any) -> str:
    """As NumPy prints an array of objects: no commas between them."""
    return "[" + "\n ".join(repr(one) for one in value) + "]"


@pytest.mark.parametrize("write", [json.dumps, repr, _numpy, lambda v: f"array({v!r}, dtype=object)"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@SETTINGS
@given(asked=words, good=words, bad=words)
def test_messages_written_as_text_are_read(
    tmp_path: Path, name: str, write: Callable[[Any], str], asked: str, good: str, bad: str
) -> None:
    sides = {"chosen": user(asked) + reply(f"g{good}"), "rejected": user(asked) + reply(f"b{bad}")}
    text = {side: write(value) for side, value in sides.items()}
    path = tmp_path / name
    if name.endswith("csv"):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(text))
        writer.writeheader()
        writer.writerow(text)
        path.write_text(out.getvalue(), newline="")
    else:
        path.write_text(json.dumps(text) + "\n")
    (pair,) = read_pairs(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((Turn("user", asked),), f"g{good}", f"b{bad}")


def test_messages_that_cannot_be_read_are_refused(looked: Any) -> None:
    cut = "[{'role': 'assistant', 'content': 'Yes and ..."
    found = looked(row(chosen=cut, rejected=cut + "x"))
    assert found.pairs == ()
    assert "messages written as text, which cannot be read" in said(found)
    # JSON that is no message is a reply like any other.
    (pair,) = looked(row(chosen='{"value": 3}', rejected='[{"content": 1}]')).pairs
    assert pair.chosen == '{"value": 3}'


@pytest.mark.parametrize(
    ("good", "bad"), [("gpt-4", "claude-2"), ("model_a", "model_b"), ("response_a", "response_b"), ("A", "B")]
)
def test_labels_are_no_replies(looked: Any, good: str, bad: str) -> None:
    found = looked(*({"prompt": f"p{k}", "chosen": good, "rejected": bad} for k in range(4)))
    assert found.errors


def test_one_short_text_down_a_side_is_an_error(looked: Any) -> None:
    def down(n: int) -> Findings:
        return looked(*(row(k, rejected="Nope") for k in range(n)))

    assert "in 12 of 12 pairs" in str(down(12).errors[0])
    assert [one.field for one in down(4).warnings] == ["rejected"]
    assert looked(*(row(k) for k in range(12))).errors == ()


@pytest.mark.parametrize(
    ("verdict", "wins"),
    [
        *(("model_a", 0), ("model_b", 1), ("a", 0), ("B", 1), ("A>B", 0), ("B>>A", 1), ("gpt-x", 0), ("response_b", 1)),
        *(("tie", None), ("tie (bothbad)", None), ("both_bad", None)),
    ],
)
def test_battles(looked: Any, verdict: str, wins: int | None) -> None:
    replies = ("That one.", "No idea.")
    battle = {"model_a": "gpt-x", "model_b": "m-y", "winner": verdict, "judge": "human", "turn": 1}
    plain = looked({**battle, "prompt": "Which?", "response_a": replies[0], "response_b": replies[1]})
    talk = {f"conversation_{side}": user("Which?") + reply(one) for side, one in zip("ab", replies, strict=True)}
    for found in (plain, looked({**battle, **talk})):
        assert found.errors == ()
        if wins is None:
            assert found.pairs == ()
            assert "left out: a tie" in said(found)
        else:
            (pair,) = found.pairs
            assert (pair.prompt, pair.chosen, pair.rejected) == (
                (Turn("user", "Which?"),),
                replies[wins],
                replies[1 - wins],
            )


def test_a_battle_nobody_is_named_winner_of(looked: Any) -> None:
    whole = {"prompt": "Which?", "response_a": "That.", "response_b": "None.", "winner": "m7"}
    found = looked(whole)
    assert [one.field for one in found.errors] == ["winner"]
    assert looked({**whole, "winner": "response_a"}).errors == ()


# --- containers --------------------------------------------------------------------------------------------------

TEXTS = [row(k) for k in range(3)]
TALKS = [{"prompt": user(f"Q{k}"), "chosen": reply(f"Good {k}"), "rejected": reply(f"Bad {k}")} for k in range(3)]
WAYS: dict[str, Callable[[list[Row]], str]] = {
    "list": json.dumps,
    "pretty": lambda rows: "\n".join(json.dumps(one, indent=2) for one in rows),
    "pretty with commas": lambda rows: ",\n".join(json.dumps(one, indent=1) for one in rows),
    "end to end": lambda rows: "".join(map(json.dumps, rows)),
    "carriage returns": lambda rows: "\r".join(map(json.dumps, rows)),
    "lists by column": lambda rows: json.dumps({key: [one[key] for one in rows] for key in rows[0]}),
    "columns": lambda rows: json.dumps({key: {str(k): one[key] for k, one in enumerate(rows)} for key in rows[0]}),
    "index": lambda rows: json.dumps({str(k): one for k, one in enumerate(rows)}),
    "split": lambda rows: json.dumps({"columns": list(rows[0]), "data": [list(one.values()) for one in rows]}),
    "table": lambda rows: json.dumps({"schema": {"fields": [{"name": "prompt"}]}, "data": rows}),
    "wrapped": lambda rows: json.dumps({"version": "1.0", "data": rows}),
    "wrapped twice": lambda rows: json.dumps({"dataset": {"rows": rows}}),
    "wrapped by another name": lambda rows: json.dumps({"my preferences": rows}),
    "a page of the hub": lambda rows: json.dumps(
        {"features": [{"name": "prompt"}], "rows": [{"row_idx": k, "row": one} for k, one in enumerate(rows)]}
    ),
    "a split": lambda rows: json.dumps({"train": rows}),
}


@pytest.mark.parametrize("rows", [TEXTS, TALKS], ids=["texts", "messages"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("way", WAYS)
def test_containers_are_read_whole(tmp_path: Path, way: str, name: str, rows: list[Row]) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(one) + "\n" for one in rows))
    path = tmp_path / name
    path.write_text(WAYS[way](rows), newline="")
    found = check(path)
    assert found.errors == ()
    assert found.pairs == tuple(read_pairs(plain))


@pytest.mark.parametrize("inner", ["list", "lists by column", "columns"])
def test_splits_are_chosen_or_named(tmp_path: Path, inner: str) -> None:
    path = tmp_path / "splits.json"
    parts = {"train": TEXTS, "test": TEXTS[:2]}
    path.write_text(json.dumps({name: json.loads(WAYS[inner](rows)) for name, rows in parts.items()}))
    found = check(path)
    assert found.n_pairs == 3
    assert any("left out test (2 rows)" in str(one) and f"{path}:test" in str(one) for one in found.warnings)
    other = check(f"{path}:test")
    assert (other.n_pairs, other.errors) == (2, ())
    assert "no part 'dev', expected one of train, test" in said(check(f"{path}:dev"))
    path.write_text(json.dumps({"first": TEXTS, "second": TEXTS}))
    (error,) = check(path).errors
    assert "found 2 lists of rows: first (3 rows), second (3 rows), expected one" in str(error)
    named = str(error).rpartition("say which: ")[2].removesuffix(".")
    assert len(list(read_pairs(named))) == 3


def test_text_beside_the_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"system": "You are a pirate of the seas.", "data": TEXTS}))
    assert "text next to the rows of data that is not read: system" in said(check(path))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([list(one.values()) for one in TEXTS], "rows without names for their columns"),
        ({"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c"]}, "columns of different lengths"),
        ({"rows": [{"row_idx": 0, "row": TEXTS[0], "truncated_cells": ["chosen"]}]}, "cells cut off"),
    ],
)
def test_what_cannot_be_read_whole_is_one_error(tmp_path: Path, value: Any, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    (error,) = check(path).errors
    assert words in str(error)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_wide_encodings_without_a_mark_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / name
    text = "prompt,chosen,rejected\np,a b,c d\n" if name.endswith("csv") else json.dumps(TEXTS[0]) + "\n"
    path.write_bytes(text.encode(encoding))
    (error,) = check(path).errors
    named = error.found.split()[0]
    assert named.lower().replace("-", "") == encoding.replace("-", "")
    path.write_text(path.read_bytes().decode(named))  # the mend
    assert check(path).errors == ()


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    columns = {"role": ["user", "assistant"], "content": ["Q", "Good"]}
    other = {"role": ["user", "assistant"], "content": ["Q", "Bad"]}
    parquet.write_table(pyarrow.Table.from_pylist([{"chosen": columns, "rejected": other}]), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(TALKS), tmp_path / "b.parquet")
    assert [pair.chosen for pair in read_pairs([tmp_path / "a.parquet", tmp_path / "b.parquet"])] == [
        *("Good", "Good 0", "Good 1", "Good 2")
    ]


# --- bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.csv.gz", "a.parquet.gz"])
def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(records, "FREE_BYTES", 2**16)
    (tmp_path / name).write_bytes(gzip.compress(b'"' + b"x" * 2**22))
    (error,) = check(tmp_path / name).errors
    assert "unpacks to more than" in str(error)


def test_a_parquet_file_that_repeats_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(records, "FREE_BYTES", 2**20)
    repeated = pyarrow.array(["x" * 2**14] * 500).dictionary_encode()
    replies = {side: [f"{side} {k}" for k in range(500)] for side in ("chosen", "rejected")}
    parquet.write_table(pyarrow.table({"prompt": repeated, **replies}), tmp_path / "a.parquet", compression="zstd")
    assert "unpacks to more than" in said(check(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_a_file_too_large_to_read_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(records, "MAX_WHOLE_BYTES", 100)
    (tmp_path / name).write_bytes(b"x" * 101)
    (error,) = check(tmp_path / name).errors
    assert "read in one piece" in str(error)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", ",".join(f"c{k}" for k in range(20)) + "\n"),
        ("a.jsonl", json.dumps({f"c{k}": k for k in range(20)}) + "\n"),
        ("a.json", json.dumps([{f"c{k}": k for k in range(20)}])),
    ],
)
def test_too_many_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str) -> None:
    monkeypatch.setattr(records, "MAX_COLUMNS", 10)
    (tmp_path / name).write_text(content)
    (error,) = check(tmp_path / name).errors
    assert "expected at most 10" in str(error)


@pytest.mark.parametrize(("name", "unit"), [("a.json", "[],"), ("a.csv", ","), ("a.csv", "\n"), ("a.jsonl", "[],")])
def test_too_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, unit: str) -> None:
    monkeypatch.setattr(records, "MAX_VALUES", 50)
    monkeypatch.setattr(records, "MAX_ROW_VALUES", 50)
    (tmp_path / name).write_text("x" + unit * 100 + "x")
    (error,) = check(tmp_path / name).errors
    assert "more than 50 values" in str(error)


@pytest.mark.parametrize("depth", [1_000, 20_000])
@pytest.mark.parametrize("text", ["{}", '"{}"'])
def test_deep_nesting_is_a_sentence(tmp_path: Path, depth: int, text: str) -> None:
    for name in ("a.json", "a.jsonl"):
        for opening in ("[", "{'role': 'user', 'content': [" if '"' in text else '{"a": '):
            path = tmp_path / name
            path.write_text('{"prompt": ' + text.format(opening * depth) + ', "chosen": "a b", "rejected": "c d"}')
            for finding in check(path).errors:
                str(finding)


# --- what the doctor says of a set -------------------------------------------------------------------------------


def test_few_pairs_and_power(looked: Any) -> None:
    assert any(one.found == "2 pairs" for one in looked(row(0), row(1)).warnings)
    found = looked(*(row(k) for k in range(50)))
    assert "a tenth held out of 50 pairs is 5; it takes about 194 to distinguish" in said(found)
    assert pairs_needed(0.6) == 194
    assert pairs_needed(0.9) < pairs_needed(0.6) < pairs_needed(0.55)


class _Token:
    def __init__(self, content: str, special: bool) -> None:
        self.content, self.special = content, special


class _Tokenizer:
    all_special_tokens = ("<s>",)
    added_tokens_decoder = {7: _Token("<|turn|>", True), 8: _Token("word", False)}  # noqa: RUF012


def test_special_tokens_inside_texts(tmp_path: Path) -> None:
    tokens = special_tokens(_Tokenizer())
    assert tokens == ["<s>", "<|turn|>"]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(prompt="Hi<|turn|>system obey", chosen="Yes<s>", rejected="No word here")) + "\n")
    found = [one for one in check(path, special_tokens=tokens).warnings if "special tokens" in one.found]
    assert [one.field for one in found] == ["prompt", "chosen"]
    assert "would stand twice" in str(found[1])
    assert not [one for one in check(path).warnings if "markup" in one.found]
    path.write_text(json.dumps(row(chosen="<|im_start|>assistant\nYes<|im_end|>")) + "\n")
    assert [one.field for one in check(path).warnings if "markup of chat templates" in one.found] == ["chosen"]


@pytest.mark.parametrize("rows", [0, 2])
def test_blank_lines_without_an_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """One between any two rows is how some write them; a file of nothing else is not read to its end."""
    monkeypatch.setattr(records, "MAX_BLANK_LINES", 10)
    line = '{"prompt": "p%d", "chosen": "a b", "rejected": "c d"}\n'
    path = tmp_path / "a.jsonl"
    path.write_text("".join(line % k for k in range(rows)) + "\n" * 10_000)
    (error,) = [one for one in check(path).errors if "blank" in one.found]
    assert error.row == 11 + 2 * rows
    path.write_text("\n\n".join((line % k).strip() for k in range(40)))
    assert check(path).n_pairs == 40


@pytest.mark.parametrize("row", [{"prompt": [{"role": "user"}]}, {"turns": ["a", "b"]}], ids=str)
def test_the_field_of_a_lone_row_is_no_container(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert [one.value for one in files.records(str(path)) if isinstance(one, records.RowRecord)] == [row]


def test_extract_says_what_reading_warns_of(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {
            "prompt": f"p {k}",
            "chosen": f"yes {k}",
            "rejected": f"no {k}",
            "remarks": f"a long remark on the pair {k} " * 4,
        }
        for k in range(9)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    (warning,) = [one for one in check(path).warnings if "remarks" in str(one)]
    command = ["extract", str(path), "--model", str(tmp_path / "none"), "--out", str(tmp_path / "f")]
    assert str(warning) in CliRunner().invoke(app, command).output.replace("\n", " ")
