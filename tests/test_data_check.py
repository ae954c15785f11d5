"""The data doctor: hostile inputs and what is said of each, and the counted warnings."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from coala.data import DataError, Finding, check, read_pairs
from coala.data.files import MAX_ROW_BYTES
from coala.values import Pair

GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


def row(**fields: Any) -> str:
    return json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"} | fields) + "\n"


def without(*fields: str) -> str:
    return json.dumps({k: v for k, v in json.loads(GOOD).items() if k not in fields}) + "\n"


DEEP = '{"prompt": ' + "[" * 20_000 + "]" * 20_000 + "}\n"
TALK = [{"from": "human", "value": "p"}]
HUMAN = "\n\nHuman: hi\n\nAssistant:"

# file name, its content, what the one error says after "FILE"
HOSTILE: list[tuple[str, str | bytes, str]] = [
    # whole files
    ("empty.jsonl", "", ": no rows; at least one; was the file written to its end?"),
    ("blank.jsonl", "\n  \n\n", ": no rows; at least one; was the file written to its end?"),
    ("empty.json", "", ": no rows; at least one"),
    ("none.json", "[]", ": no rows; at least one"),
    ("empty.csv", "", ": no rows; at least one"),
    ("header.csv", "prompt,chosen,rejected\n", ": no rows; at least one"),
    (
        "a.txt",
        GOOD,
        ": the ending .txt is not known; one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, or these with",
    ),
    ("noending", GOOD, ": the ending none is not known"),
    ("a.gz", gzip.compress(GOOD.encode()), ": the ending .gz is not known"),
    ("a.jsonl.gz", GOOD, ": is not gzip although its name ends in .gz; gzip data; take .gz off the name"),
    (
        "cut.jsonl.gz",
        gzip.compress(GOOD.encode() * 99)[:-12],
        ": the gzip stream breaks off; a whole file; fetch or copy",
    ),
    ("crc.jsonl.gz", gzip.compress(GOOD.encode())[:-8] + b"\0" * 8, ": the gzip data are damaged (CRC check failed"),
    ("utf16.jsonl", GOOD.encode("utf-16"), ": is UTF-16; UTF-8; save it as UTF-8"),
    ("nul.json", b"[\0\0]", ": NUL bytes; text; the file is damaged or not text"),
    ("open.json", f"[{GOOD},{GOOD}", ": the JSON breaks off before its end; a closed list; fetch or write it again"),
    ("half.json", f'[{GOOD}, {{"prompt": "a', ": the JSON breaks off before its end"),
    (
        "bad.json",
        f"[{GOOD} {GOOD}]",
        ": not JSON at line 2 column 2 (Expecting ',' delimiter); a list of objects; mend the file",
    ),
    ("lone.json", '"text"', ": a lone JSON str; a list of objects; write one object per pair"),
    ("junk.parquet", b"PAR1junkPAR1", ": not readable as parquet ("),
    (
        "twice.csv",
        "prompt,chosen,chosen\np,a,b\n",
        ": chosen: the column is there twice; each column once; rename or drop one",
    ),
    (
        "semi.csv",
        "prompt;chosen;rejected\np;a;b\n",
        ": one column named 'prompt;chosen;rejected'; columns parted by commas",
    ),
    (
        "latin.csv",
        "prompt,chosen,rejected\np,é,b\n".encode("latin-1"),
        ": byte 0xe9 at position 26 is not UTF-8; UTF-8 text; conv",
    ),
    # columns
    (
        "cols.jsonl",
        '{"foo": 1, "bar": 2}\n',
        ": the columns foo, bar; prompt, chosen, rejected, or a known format; rename",
    ),
    ("keyless.jsonl", "{}\n", ": the columns (none); prompt, chosen, rejected"),
    (
        "norej.jsonl",
        without("rejected"),
        ": rejected: the field is missing in every row (there are prompt, chosen); both replies",
    ),
    (
        "nocho.jsonl",
        without("chosen"),
        ": chosen: the field is missing in every row (there are prompt, rejected); both replies",
    ),
    (
        "chat.jsonl",
        '{"messages": [{"role": "user", "content": "hi"}]}\n',
        ": these are conversations, not pairs; a chosen",
    ),
    # rows that cannot be read
    (
        "half.jsonl",
        GOOD + GOOD[:20],
        ":2: the line breaks off in the middle; a whole JSON object; complete or delete the line",
    ),
    (
        "json.jsonl",
        GOOD + "{'prompt': 1}\n" + GOOD,
        ":2: not JSON at column 2 (Expecting property name enclosed in double",
    ),
    ("nul.jsonl", GOOD.encode() + b"\0\0\0\n", ":2: NUL bytes; text; the file is damaged or not text: fetch it again"),
    (
        "latin.jsonl",
        GOOD.encode() + '{"prompt": "é"}\n'.encode("latin-1"),
        ":2: byte 0xe9 at position 13 is not UTF-8; UTF-8",
    ),
    (
        "list.jsonl",
        GOOD + '["p", "a", "b"]\n',
        ":2: a list of 3; an object with named fields; write each pair as an object",
    ),
    ("text.jsonl", GOOD + '"p"\n', ':2: the text "p"; an object with named fields'),
    ("number.json", f"[{GOOD}, 3]", ":2: the number 3; an object with named fields"),
    ("null.jsonl", GOOD + "null\n", ":2: null; an object with named fields"),
    ("deep.jsonl", GOOD + DEEP, ":2: JSON nested too deep; a flat object of fields; keep the fields of a pair only"),
    ("digits.jsonl", GOOD + '{"prompt": ' + "9" * 5000 + "}\n", ":2: not readable as JSON (Exceeds the limit"),
    ("key.jsonl", GOOD + '{"chosen": "a", "chosen": "b"}\n', ":2: chosen: the field is there twice; each field once"),
    (
        "ragged.csv",
        "prompt,chosen,rejected\np,a,b\np,a\n",
        ":2: 2 fields under 3 columns; as many fields as columns; mend",
    ),
    (
        "quote.csv",
        'prompt,chosen,rejected\np,a,b\np,"a,b\n',
        ":2: unexpected end of data; closed quotes; mend the quoting",
    ),
    # fields
    (
        "missing.jsonl",
        GOOD + without("rejected"),
        ":2: rejected: the field is missing (there are prompt, chosen); text; add",
    ),
    ("nulled.jsonl", GOOD + row(rejected=None), ":2: rejected: null; text; fill it in or delete the row"),
    ("nothing.jsonl", GOOD + row(chosen=""), ":2: chosen: empty; text; fill it in or delete the row"),
    (
        "white.jsonl",
        GOOD + row(chosen=" \n\t\u00a0"),
        ":2: chosen: white space only; text; fill it in or delete the row",
    ),
    ("zero.jsonl", GOOD + row(prompt="\u200b\ufeff"), ":2: prompt: white space only; text"),
    ("num.jsonl", GOOD + row(chosen=3), ":2: chosen: the number 3; "),
    ("nan.jsonl", GOOD + row(rejected=float("nan")), ":2: rejected: NaN; "),
    ("bool.jsonl", GOOD + row(prompt=True), ":2: prompt: true; text; write it as one string"),
    ("dict.jsonl", GOOD + row(prompt={"text": "p"}), ":2: prompt: an object with text; text; write it as one string"),
    (
        "same.jsonl",
        GOOD + row(rejected="a"),
        ":2: rejected: the same text as chosen; two different replies; delete the row",
    ),
    ("same2.jsonl", GOOD + row(rejected=" a\n"), ":2: rejected: the same text as chosen"),
    (
        "surrogate.jsonl",
        GOOD + row(chosen="x\ud800"),
        r":2: chosen: a lone surrogate \ud800 at character 2; text that UTF-8",
    ),
    ("nulchar.jsonl", GOOD + row(chosen="a\0"), ":2: chosen: a NUL character at 2; text; delete the character"),
    (
        "group.jsonl",
        GOOD + row(group=["a"]),
        ":2: group: a list of 1; a name or a number; write it as text, or drop the field",
    ),
    (
        "apart.jsonl",
        '{"chosen": "yes", "rejected": "no"}\n',
        ":1: prompt: none, and chosen and rejected share no beginning",
    ),
    # messages
    (
        "role.jsonl",
        GOOD + row(prompt=[{"role": "tool", "content": "x"}]),
        ':2: prompt[0].role: a speaker that is the text "tool"',
    ),
    (
        "turn.jsonl",
        GOOD + row(prompt=["hi"]),
        ':2: prompt[0]: the text "hi"; a message {role, content}; write it as such',
    ),
    (
        "keys.jsonl",
        GOOD + row(prompt=[{"who": "user", "said": "x"}]),
        ":2: prompt[0]: an object with who, said; a message",
    ),
    (
        "turns.jsonl",
        GOOD + row(prompt=[]),
        ":2: prompt: an empty list; at least one message; fill it in or delete the row",
    ),
    (
        "said.jsonl",
        GOOD + row(prompt=[{"role": "user", "content": None}]),
        ":2: prompt[0].content: null; text; fill it in",
    ),
    (
        "image.jsonl",
        GOOD + row(prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        ":2: prompt[0].content: a part that is",
    ),
    (
        "end.jsonl",
        GOOD + row(chosen=[{"role": "user", "content": "x"}], rejected=[{"role": "assistant", "content": "y"}]),
        ":2: chosen: a user turn at the end; one assistant turn; end both sides with one reply",
    ),
    (
        "long.jsonl",
        GOOD + row(chosen=[{"role": r, "content": r} for r in ("user", "assistant", "user")], rejected=TALK),
        ":2: prompt: chosen and rejected share no first turn; the same prompt on both sides; add a prompt column",
    ),
    # other formats
    (
        "hh.jsonl",
        json.dumps({"chosen": HUMAN + " a", "rejected": HUMAN}) + "\n",
        ":1: rejected: the last Assistant turn is empty",
    ),
    (
        "hh2.jsonl",
        json.dumps({"chosen": HUMAN + " a", "rejected": "\n\nHuman: \n\nAssistant: b"}) + "\n",
        ":1: rejected: turn 1 (user) is empty; text; fill it in or delete the row",
    ),
    (
        "alpaca.jsonl",
        '{"instruction": "i", "input": "", "output": ["a"]}\n',
        ":1: output: a list of 1; a list [good, bad]; write",
    ),
    ("alpaca2.jsonl", '{"instruction": "i", "output": ["a", null]}\n', ":1: output[1]: null; text"),
    (
        "share.jsonl",
        json.dumps({"conversations": TALK, "chosen": {"from": "gpt", "value": ""}, "rejected": "b"}) + "\n",
        ":1: chosen[0]",
    ),
    (
        "shp.jsonl",
        '{"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}\n',
        ":1: labels: the number 2; one of 1, 0",
    ),
    (
        "llmbar.jsonl",
        '{"input": "h", "output_1": "a", "output_2": "b", "label": NaN}\n',
        ":1: label: NaN; one of 1, 2; mend the",
    ),
    (
        "imdb.jsonl",
        '{"text": "t", "label": -1}\n',
        ":1: label: the number -1; one of 1, pos, positive, 0, neg, negative",
    ),
    (
        "uf.jsonl",
        '{"instruction": "i", "completions": [{"response": "a"}]}\n',
        ":1: completions[0].overall_score: null; a finite",
    ),
    (
        "uf2.jsonl",
        '{"instruction": "i", "completions": [{"response": "a", "overall_score": Infinity}]}\n',
        ":1: completions[0].over",
    ),
    (
        "steer.jsonl",
        '{"prompt": "p", "response": "r", "helpfulness": NaN}\n',
        ":1: helpfulness: NaN; a finite number; mend the",
    ),
    ("bench.jsonl", '{"prompt": "p", "chosen": ["a"], "rejected": ["b", ""]}\n', ":1: rejected[1]: empty; text"),
]


@pytest.mark.parametrize(("name", "content", "said"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_hostile_input(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    found = check(path)
    assert len(found.errors) == 1, [str(e) for e in found.errors]
    message = str(found.errors[0])
    assert message.startswith(f"{path}{said}")
    assert len([part for part in message.split("; ") if part]) >= 3, "found; expected; mend"
    with pytest.raises(DataError) as raised:
        list(read_pairs(path))
    assert str(raised.value) == message
    with pytest.raises(DataError):
        found.raise_for_errors()


def test_the_table_is_long_enough() -> None:
    assert len(HOSTILE) >= 40


def test_one_bad_row_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(row(chosen="") + GOOD + "{\n" + row(rejected=None) + row(prompt="q"))
    found = check(path)
    assert [e.row for e in found.errors] == [1, 3, 4]
    assert found.n_pairs == 2
    with pytest.raises(DataError) as raised:
        found.raise_for_errors()
    assert str(raised.value).count("\n") == 2
    assert raised.value.findings == found.errors


def test_many_errors_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(row(chosen="") * 25)
    with pytest.raises(DataError, match="and 15 more; `coala data check` lists them all"):
        check(path).raise_for_errors()


def test_a_file_of_noise_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"noise\n" * 100_000)
    errors = check(path).errors
    assert len(errors) == 101
    assert "the first 100 lines are all unreadable" in str(errors[-1])


def test_places_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(source: Any) -> str:
        (error,) = check(source).errors
        return str(error)

    monkeypatch.chdir(tmp_path)
    assert (
        said("none.jsonl") == "none.jsonl: there is no such file; a file or a hub data set owner/name; check the path"
    )
    (tmp_path / "folder").mkdir()
    assert said("folder/none.jsonl").startswith("folder/none.jsonl: there is no such file")
    assert said("folder") == "folder: this is a folder; a file; it holds no data file"
    (tmp_path / "folder/train.jsonl").touch()
    assert said("folder").endswith("a file; name its files: train.jsonl")
    assert "cannot be read (embedded null byte)" in said("a\0.jsonl")
    with pytest.raises(DataError, match="no file was named"):
        check([])
    if os.geteuid():
        (tmp_path / "locked.jsonl").touch(mode=0)
        assert "cannot be read (Permission denied)" in said("locked.jsonl")


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'hh'; auto or one of sharegpt, bridge, hh-rlhf, .*--format"):
        check(tmp_path, "hh")


def test_a_line_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"x" * (MAX_ROW_BYTES + 9) + b'"}\n' + GOOD.encode(), 1))
    found = check(path)
    assert [str(e) for e in found.errors] == [f"{path}:1: a line of over 64 MiB; one pair per line; break the lines"]
    assert found.n_pairs == 1


# --- warnings ----------------------------------------------------------------------------------------------------


def write(path: Path, pairs: list[tuple[str, str, str]], **more: Any) -> Path:
    path.write_text("".join(row(prompt=p, chosen=a, rejected=b, **more) for p, a, b in pairs))
    return path


def kinds(findings: tuple[Finding, ...]) -> list[str]:
    return [str(f) for f in findings]


def test_duplicates_and_few_conflicts_are_warnings(tmp_path: Path) -> None:
    pairs = [(f"p{k}", f"a{k}", f"b{k}") for k in range(60)]
    path = write(tmp_path / "a.jsonl", [*pairs, pairs[3], ("p5", "b5", "a5")])
    found = check(path)
    assert found.errors == ()
    assert (found.counts["duplicates"], found.counts["conflicts"]) == (1, 1)
    duplicate, conflict = kinds(found.warnings)
    assert duplicate == (
        f"{path}:61: the same pair as {path}:4; 1 of 62 pairs are such repeats; each pair once; "
        "delete the repeats: they count double"
    )
    assert conflict.startswith(
        f"{path}:62: prefers the reply that {path}:6 rejects; 3.2% of the pairs contradict another"
    )


def test_many_conflicts_are_an_error(tmp_path: Path) -> None:
    pairs = [(f"p{k}", f"a{k}", f"b{k}") for k in range(10)]
    found = check(write(tmp_path / "a.jsonl", pairs + [(p, b, a) for p, a, b in pairs[:4]]))
    assert found.counts["conflicts"] == 4
    assert "was a column swapped" in str(found.errors[0])


def test_the_same_replies_to_another_prompt_are_no_duplicate(tmp_path: Path) -> None:
    found = check(write(tmp_path / "a.jsonl", [("p", "a", "b"), ("q", "a", "b"), ("r", "b", "a")]))
    assert (found.counts["duplicates"], found.counts["conflicts"]) == (0, 0)


@pytest.mark.parametrize(("longer", "way"), [(54, "longer"), (6, "shorter"), (30, "")])
def test_length_bias(tmp_path: Path, longer: int, way: str) -> None:
    pairs = [(f"p{k}", *(("good one", "bad") if k < longer else ("yes", "not this"))) for k in range(60)]
    found = check(write(tmp_path / "a.jsonl", pairs))
    assert found.counts["chosen_longer"] == pytest.approx(longer / 60)
    assert found.counts["length_rule_accuracy"] == pytest.approx(max(longer, 60 - longer) / 60)
    said = [w for w in kinds(found.warnings) if "the longer reply in" in w]
    assert len(said) == bool(way)
    assert all(f"taking the {way} one is right for 90.0%" in w and "of 60 pairs" in w for w in said)


def test_equal_lengths_leave_the_length_rule_at_chance(tmp_path: Path) -> None:
    found = check(write(tmp_path / "a.jsonl", [(f"p{k}", "aa", "bb") for k in range(40)]))
    assert found.counts["length_rule_accuracy"] == 0.5
    assert found.warnings == ()


def test_leaks_are_found_by_prompt_and_by_group(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [("p", "a", "b"), ("q", "a", "b")])
    test = write(tmp_path / "test.jsonl", [("p", "c", "d"), ("r", "a", "b")])
    found = check(train, against=test)
    assert found.counts["shared_prompts"] == found.counts["shared_groups"] == 1
    assert (
        f"{test}:1: prompt: 1 of 2 pairs have a prompt that the training pairs have too; none; take"
        in kinds(found.warnings)[1]
    )
    assert found.n_pairs == 2
    apart = write(tmp_path / "apart.jsonl", [("s", "a", "b")])
    assert check(train, against=[apart]).warnings == ()


def test_one_fixed_prompt_is_no_leak_but_a_shared_reply_is(tmp_path: Path) -> None:
    reviews = [{"text": f"{word} {k}", "label": label} for k in range(4) for label, word in enumerate(("bad", "good"))]
    for name, part in (("train", reviews[:4]), ("test", reviews[4:]), ("leak", [*reviews[4:], *reviews[:2]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    assert check(tmp_path / "train.json", against=tmp_path / "test.json").warnings == ()
    (leak, *_) = kinds(check(tmp_path / "train.json", against=tmp_path / "leak.json").warnings)
    assert "have a group" in leak or "have a reply" in leak


def test_errors_of_the_other_file_are_listed(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [("p", "a", "b")])
    found = check(train, against=tmp_path / "none.jsonl")
    assert [e.file for e in found.errors] == [str(tmp_path / "none.jsonl")]


def characters(pair: Pair) -> int:
    return sum(len(t.text) for t in pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def test_pairs_longer_than_the_model_takes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("p", "a" * k, "b") for k in (2, 20, 30)])
    found = check(path, count_tokens=characters, max_tokens=10)
    assert found.counts["too_long"] == 2
    assert kinds(found.warnings) == [
        f"{path}:3: 31 tokens, the longest of 2 of 3 pairs that are too long (rows 2, 3); at most 10; "
        "they will be cut; shorten or drop them"
    ]
    every = check(path, count_tokens=characters, max_tokens=1)
    assert "raise max_tokens or take a model with a longer context" in str(every.errors[0])
    assert check(path, count_tokens=characters, max_tokens=31).warnings == ()
    with pytest.raises(DataError, match="a limit without a way to count"):
        check(path, max_tokens=10)


def test_swapped_labels_are_suspected(tmp_path: Path) -> None:
    refusal, answer = "I'm sorry, but I cannot help.", "Here is how you plant a young tree."
    pairs = [(f"p{k}", refusal, answer) for k in range(40)]
    (said,) = [w for w in kinds(check(write(tmp_path / "a.jsonl", pairs)).warnings) if "suspicion" in w]
    assert "chosen refuses in 40 of 40" in said
    proper = check(write(tmp_path / "b.jsonl", [(p, b, a) for p, a, b in pairs]))
    assert not [w for w in kinds(proper.warnings) if "suspicion" in w]
    babble = [(f"p{k}", "so " * 30, answer * 2) for k in range(40)]
    (said,) = [w for w in kinds(check(write(tmp_path / "c.jsonl", babble)).warnings) if "suspicion" in w]
    assert "chosen is broken or repeats itself in 40 of 40" in said


@pytest.mark.parametrize("place", ["columns", "metadata"])
def test_scores_against_the_columns(tmp_path: Path, place: str) -> None:
    def scored(good: float, bad: float, k: int) -> str:
        scores = {"score_chosen": good, "score_rejected": bad}
        return row(prompt=f"p{k}", **(scores if place == "columns" else {"metadata": scores}))

    path = tmp_path / "a.jsonl"
    path.write_text(scored(1, 2, 0) + scored(2, 1, 1) + scored(1, 1, 2) + scored(0, 2, 3) + scored(float("nan"), 2, 4))
    assert kinds(check(path).warnings) == [
        f"{path}:1: score_chosen: score_rejected is the higher (2 rows in all); score_chosen above score_rejected; "
        "are the columns swapped?",
        f"{path}:3: score_chosen: chosen and rejected score the same; score_chosen above score_rejected; "
        "such pairs carry no preference: leave them out?",
    ]


def test_ties_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": f"p{k}", "response 1": "a", "response 2": "b", "label": k % 3} for k in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = check(path)
    assert found.n_pairs == 6
    assert kinds(found.warnings) == [f"{path}:3: label: a tie (3 rows in all); a preference; it was left out"]


def test_messages_can_be_printed_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + '{"\\ud800\\u001b[31m": 1}\n')
    (error,) = check(path).errors
    str(error).encode()
    assert "\x1b" not in str(error)


# --- real sets ---------------------------------------------------------------------------------------------------


def test_real_sets_have_true_findings_only(shared: Path) -> None:
    def errors(name: str) -> list[tuple[int | None, str, str]]:
        found = check(shared / "data" / f"{name}.jsonl.gz")
        return [(e.row, e.field, e.found) for e in found.errors]

    same = "the same text as chosen"
    assert errors("hh_rlhf_harmless/train") == [(601, "chosen", "the last Assistant turn is empty")]
    assert errors("hh_rlhf_harmless/test") == [(79, "chosen", "the last Assistant turn is empty")]
    assert errors("ultrafeedback_sample/train") == [
        (28, "rejected", "white space only"),
        (258, "rejected", same),
        (552, "rejected", same),
        (710, "chosen", "empty"),
        (777, "rejected", same),
        (851, "rejected", same),
    ]
    for name in (
        "ultrafeedback_sample/test",
        "alpaca_eval_pairs/test",
        "llmbar/test",
        "mrbench/pairs_train",
        "mrbench/pairs_test",
    ):
        assert errors(name) == []


def test_the_splits_of_the_real_sets_do_not_leak(shared: Path) -> None:
    for name in ("hh_rlhf_harmless/{}", "mrbench/pairs_{}", "ultrafeedback_sample/{}"):
        train, test = (shared / "data" / f"{name.format(part)}.jsonl.gz" for part in ("train", "test"))
        counts = check(train, against=test).counts
        assert not [key for key in counts if key.startswith("shared_")], name


def test_imdb_is_read_whole(shared: Path) -> None:
    found = check(shared / "data/imdb/train.jsonl.gz")
    assert found.errors == ()
    assert found.n_pairs == 9955
    assert found.counts["groups"] == 1180
