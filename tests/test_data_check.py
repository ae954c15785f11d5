"""The data doctor: hostile inputs and what is said of each, and the counted warnings."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from coala.data import DataError, Finding, check, read_pairs, records
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
    ("empty.jsonl", "", ": found no rows, expected at least one. Fix: check that the file was written to its end."),
    (
        "blank.jsonl",
        "\n  \n\n",
        ": found no rows, expected at least one. Fix: check that the file was written to its end.",
    ),
    ("empty.json", "", ": found no rows, expected at least one. Fix: check that the file was written to its end."),
    ("none.json", "[]", ": found no rows, expected at least one. Fix: check that the file was written to its end."),
    ("empty.csv", "", ": found no rows, expected at least one. Fix: check that the file was written to its end."),
    (
        "header.csv",
        "prompt,chosen,rejected\n",
        ": found no rows, expected at least one. Fix: check that the file was written to its end.",
    ),
    (
        "a.txt",
        GOOD,
        ": found the ending .txt, expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, or one of the",
    ),
    (
        "noending",
        GOOD,
        ": found a name without an ending, expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, or o",
    ),
    (
        "a.gz",
        gzip.compress(GOOD.encode()),
        ": found the ending .gz, expected one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet, or one of thes",
    ),
    (
        "a.jsonl.gz",
        GOOD,
        ": found plain data under a name that ends in .gz, expected gzip data. Fix: take .gz off the name.",
    ),
    (
        "cut.jsonl.gz",
        gzip.compress(GOOD.encode() * 99)[:-12],
        ": found a truncated gzip stream, expected a whole file. Fix: fetch or copy the file again.",
    ),
    (
        "crc.jsonl.gz",
        gzip.compress(GOOD.encode())[:-8] + b"\0" * 8,
        ": found damaged gzip data (CRC check failed 0x0 != 0x9fdfbae8), expected a sound file. Fix: fetch or",
    ),
    (
        "utf16.jsonl",
        GOOD.encode("utf-16"),
        ": found UTF-16, expected UTF-8. Fix: save it as UTF-8, e.g. iconv -f UTF-16 -t UTF-8.",
    ),
    ("nul.json", b"[\0\0]", ": found NUL bytes, expected text. Fix: fetch the file again: it is damaged or no text."),
    (
        "open.json",
        f"[{GOOD},{GOOD}",
        ": found truncated JSON, expected a closed list. Fix: fetch or write the file ag",
    ),
    (
        "half.json",
        f'[{GOOD}, {{"prompt": "a',
        ": found truncated JSON, expected a closed list. Fix: fetch or write the file ag",
    ),
    (
        "bad.json",
        f"[{GOOD} {GOOD}]",
        ": found invalid JSON at line 2 column 2 (Expecting ',' delimiter), expected a list of objects. Fix: ",
    ),
    (
        "lone.json",
        '"text"',
        ': found the text "text" alone, expected a list of objects. Fix: write one object per pair.',
    ),
    (
        "junk.parquet",
        b"PAR1junkPAR1",
        ": found data not readable as parquet (Parquet file size is 12 bytes, smaller than the size reported ",
    ),
    (
        "twice.csv",
        "prompt,chosen,chosen\np,a,b\n",
        ": chosen: found two columns of this name, expected each column once. Fix: rename or drop one of them",
    ),
    (
        "semi.csv",
        "prompt;chosen;rejected\np;a;b\n",
        ": found one column named 'prompt;chosen;rejected', expected columns separated by commas. Fix: save i",
    ),
    (
        "latin.csv",
        "prompt,chosen,rejected\np,é,b\n".encode("latin-1"),
        ": found the byte 0xe9 at position 26, which is not UTF-8, expected UTF-8 text. Fix: convert the file",
    ),
    # columns
    (
        "cols.jsonl",
        '{"foo": 1, "bar": 2}\n',
        ": found the columns foo, bar, expected prompt, chosen, rejected, or a known format. Fix: rename the ",
    ),
    (
        "keyless.jsonl",
        "{}\n",
        ": found the columns (none), expected prompt, chosen, rejected, or a known format. Fix: rename the co",
    ),
    (
        "norej.jsonl",
        without("rejected"),
        ": rejected: found no such field in any row (there are prompt, chosen), expected both replies. Fix: a",
    ),
    (
        "nocho.jsonl",
        without("chosen"),
        ": chosen: found no such field in any row (there are prompt, rejected), expected both replies. Fix: a",
    ),
    (
        "chat.jsonl",
        '{"messages": [{"role": "user", "content": "hi"}]}\n',
        ": found conversations, not pairs, expected a chosen and a rejected reply per row. Fix: make pairs of",
    ),
    # rows that cannot be read
    (
        "half.jsonl",
        GOOD + GOOD[:20],
        ":2: found a truncated line, expected a whole JSON object. Fix: complete or delet",
    ),
    (
        "json.jsonl",
        GOOD + "{'prompt': 1}\n" + GOOD,
        ":2: found invalid JSON at column 2 (Expecting property name enclosed in double quotes), expected one",
    ),
    (
        "nul.jsonl",
        GOOD.encode() + b"\0\0\0\n",
        ":2: found NUL bytes, expected text. Fix: fetch the file again: it is damaged or no text.",
    ),
    (
        "latin.jsonl",
        GOOD.encode() + '{"prompt": "é"}\n'.encode("latin-1"),
        ":2: found the byte 0xe9 at position 13, which is not UTF-8, expected UTF-8 text. Fix: convert the fi",
    ),
    (
        "list.jsonl",
        GOOD + '["p", "a", "b"]\n',
        ":2: found a list of 3, expected an object with named fields. Fix: write each pair as an object.",
    ),
    (
        "text.jsonl",
        GOOD + '"p"\n',
        ':2: found the text "p", expected an object with named fields. Fix: write each pair as an object.',
    ),
    (
        "number.json",
        f"[{GOOD}, 3]",
        ":2: found the number 3, expected an object with named fields. Fix: write each pair as an object.",
    ),
    (
        "null.jsonl",
        GOOD + "null\n",
        ":2: found null, expected an object with named fields. Fix: write each pair as an object.",
    ),
    (
        "deep.jsonl",
        GOOD + DEEP,
        ":2: found JSON nested too deep, expected a flat object of fields. Fix: keep the fields of a pair onl",
    ),
    (
        "digits.jsonl",
        GOOD + '{"prompt": ' + "9" * 5000 + "}\n",
        ":2: found an integer of thousands of digits, expected ordinary numbers. Fix: correct or delete the row.",
    ),
    (
        "key.jsonl",
        GOOD + '{"chosen": "a", "chosen": "b"}\n',
        ":2: chosen: found two fields of this name, expected each field once. Fix: keep one of the two.",
    ),
    (
        "ragged.csv",
        "prompt,chosen,rejected\np,a,b\np,a\n",
        ":2: found 2 fields under 3 columns, expected as many fields as columns. Fix: put fields that hold th",
    ),
    (
        "quote.csv",
        'prompt,chosen,rejected\np,a,b\np,"a,b\n',
        ":2: found broken quoting (unexpected end of data), expected closed quotes. Fix: close the quote that",
    ),
    # fields
    (
        "missing.jsonl",
        GOOD + without("rejected"),
        ":2: rejected: found no such field (there are prompt, chosen), expected text. Fix: add or rename the ",
    ),
    (
        "nulled.jsonl",
        GOOD + row(rejected=None),
        ":2: rejected: found null, expected text. Fix: fill it in or delete the row.",
    ),
    (
        "nothing.jsonl",
        GOOD + row(chosen=""),
        ":2: chosen: found empty text, expected text. Fix: fill it in or delete the row.",
    ),
    (
        "white.jsonl",
        GOOD + row(chosen=" \n\t\u00a0"),
        ":2: chosen: found only white space, expected text. Fix: fill it in or delete the row.",
    ),
    (
        "zero.jsonl",
        GOOD + row(prompt="\u200b\ufeff"),
        ":2: prompt: found only white space, expected text. Fix: fill it in or delete the row.",
    ),
    ("num.jsonl", GOOD + row(chosen=3), ":2: chosen: found the number 3, expected text. Fix: write it as one string."),
    (
        "nan.jsonl",
        GOOD + row(rejected=float("nan")),
        ":2: rejected: found NaN, expected text. Fix: write it as one string.",
    ),
    ("bool.jsonl", GOOD + row(prompt=True), ":2: prompt: found true, expected text. Fix: write it as one string."),
    (
        "dict.jsonl",
        GOOD + row(prompt={"text": "p"}),
        ":2: prompt: found an object with text, expected text. Fix: write it as one string.",
    ),
    (
        "same.jsonl",
        GOOD + row(rejected="a"),
        ":2: rejected: found the same text as in chosen, expected two different replies. Fix: delete the row.",
    ),
    (
        "same2.jsonl",
        GOOD + row(rejected=" a\n"),
        ":2: rejected: found the same text as in chosen, expected two different replies. Fix: delete the row.",
    ),
    (
        "surrogate.jsonl",
        GOOD + row(chosen="x\ud800"),
        ":2: chosen: found a lone surrogate \\ud800 at character 2, expected text that UTF-8 can hold. Fix: wr",
    ),
    (
        "nulchar.jsonl",
        GOOD + row(chosen="a\0"),
        ":2: chosen: found a NUL character at 2, expected text. Fix: delete the character.",
    ),
    (
        "group.jsonl",
        GOOD + row(group=["a"]),
        ":2: group: found a list of 1, expected a name or a number. Fix: write it as text, or drop the field.",
    ),
    (
        "apart.jsonl",
        '{"chosen": "yes", "rejected": "no"}\n',
        ":1: prompt: found no prompt, and no beginning that chosen and rejected share, expected a prompt. Fix",
    ),
    # messages
    (
        "role.jsonl",
        GOOD + row(prompt=[{"role": "tool", "content": "x"}]),
        ":2: prompt[0].role: found a tool's turn (tool), expected a user, an assistant or a system. Fix: leav",
    ),
    (
        "turn.jsonl",
        GOOD + row(prompt=["hi"]),
        ':2: prompt[0]: found the text "hi", expected a message {role, content}. Fix: write it as such an obj',
    ),
    (
        "keys.jsonl",
        GOOD + row(prompt=[{"who": "user", "said": "x"}]),
        ":2: prompt[0]: found an object with who, said, expected a message {role, content} or {from, value}. ",
    ),
    (
        "turns.jsonl",
        GOOD + row(prompt=[]),
        ":2: prompt: found an empty list, expected at least one message. Fix: fill it in or delete the row.",
    ),
    (
        "said.jsonl",
        GOOD + row(prompt=[{"role": "user", "content": None}]),
        ":2: prompt[0].content: found null, expected text. Fix: fill it in or delete the row.",
    ),
    (
        "image.jsonl",
        GOOD + row(prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        ":2: prompt[0].content: found a part that is an object with type, expected parts of text. Fix: leave ",
    ),
    (
        "end.jsonl",
        GOOD + row(chosen=[{"role": "user", "content": "x"}], rejected=[{"role": "assistant", "content": "y"}]),
        ":2: chosen: found a user turn at the end, expected one assistant turn. Fix: end both sides with one ",
    ),
    (
        "long.jsonl",
        GOOD + row(chosen=[{"role": r, "content": r} for r in ("user", "assistant", "user")], rejected=TALK),
        ":2: prompt: found no first turn that chosen and rejected share, expected the same prompt on both sid",
    ),
    # other formats
    (
        "hh.jsonl",
        json.dumps({"chosen": HUMAN + " a", "rejected": HUMAN}) + "\n",
        ":1: rejected: found an empty last Assistant turn, expected a reply. Fix: fill it in or delete the ro",
    ),
    (
        "hh2.jsonl",
        json.dumps({"chosen": HUMAN + " a", "rejected": "\n\nHuman: \n\nAssistant: b"}) + "\n",
        ":1: rejected: found an empty turn 1 (user), expected text. Fix: fill it in or delete the row.",
    ),
    (
        "alpaca.jsonl",
        '{"instruction": "i", "input": "", "output": ["a"]}\n',
        ":1: output: found a list of 1, expected a list [good, bad]. Fix: write the preferred reply, then the",
    ),
    (
        "alpaca2.jsonl",
        '{"instruction": "i", "output": ["a", null]}\n',
        ":1: output[1]: found null, expected text. Fix: fill it in or delete the row.",
    ),
    (
        "share.jsonl",
        json.dumps({"conversations": TALK, "chosen": {"from": "gpt", "value": ""}, "rejected": "b"}) + "\n",
        ":1: chosen[0]",
    ),
    (
        "shp.jsonl",
        '{"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}\n',
        ":1: labels: found the number 2, expected one of 1, 0. Fix: correct the label or delete the row.",
    ),
    (
        "llmbar.jsonl",
        '{"input": "h", "output_1": "a", "output_2": "b", "label": NaN}\n',
        ":1: label: found NaN, expected one of 1, 2. Fix: correct the label or delete the row.",
    ),
    (
        "imdb.jsonl",
        '{"text": "t", "label": -1}\n',
        ":1: label: found the number -1, expected one of 1, pos, positive, 0, neg, negative. Fix: correct the la",
    ),
    (
        "uf.jsonl",
        '{"instruction": "i", "completions": [{"response": "a"}]}\n',
        ":1: completions[0].overall_score: found null, expected a finite number. Fix: correct the score or delet",
    ),
    (
        "uf2.jsonl",
        '{"instruction": "i", "completions": [{"response": "a", "overall_score": Infinity}]}\n',
        ":1: completions[0].over",
    ),
    (
        "steer.jsonl",
        '{"prompt": "p", "response": "r", "helpfulness": NaN}\n',
        ":1: helpfulness: found NaN, expected a finite number. Fix: correct the score or delete the row.",
    ),
    (
        "bench.jsonl",
        '{"prompt": "p", "chosen": ["a"], "rejected": ["b", ""]}\n',
        ":1: rejected[1]: found empty text, expected text. Fix: fill it in or delete the row.",
    ),
]


@pytest.mark.parametrize(("name", "content", "said"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_hostile_input(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    found = check(path)
    assert len(found.errors) == 1, [str(e) for e in found.errors]
    message = str(found.errors[0])
    assert message.startswith(f"{path}{said}")
    assert re.search(r": found .+, expected .+\. Fix: .+\.$", message, re.DOTALL), message
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
    assert str(raised.value).count("\n") == 3
    assert str(raised.value).endswith(
        "3 bad rows, 2 sound pairs. Fix: correct the bad rows, or skip them with --skip-bad."
    )
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
    assert "nothing readable in the first 100 lines" in str(errors[-1])


def test_places_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(source: Any) -> str:
        (error,) = check(source).errors
        return str(error)

    monkeypatch.chdir(tmp_path)
    assert (
        said("none.jsonl")
        == "none.jsonl: found no such file, expected a file or a hub data set owner/name. Fix: check the path."
    )
    (tmp_path / "folder").mkdir()
    assert said("folder/none.jsonl").startswith("folder/none.jsonl: found no such file")
    assert said("folder") == "folder: found a folder, expected a file. Fix: name a data file; this folder holds none."
    (tmp_path / "folder/train.jsonl").touch()
    assert said("folder").endswith("expected a file. Fix: name its files: train.jsonl.")
    assert "an unreadable file (embedded null byte)" in said("a\0.jsonl")
    with pytest.raises(DataError, match="found no file, expected at least one"):
        check([])
    if os.geteuid():
        (tmp_path / "locked.jsonl").touch(mode=0)
        assert "an unreadable file (Permission denied)" in said("locked.jsonl")


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"found 'hh', expected auto or one of sharegpt, swift, bridge, hh-rlhf, .*--format"
    ):
        check(tmp_path, "hh")


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_ROW_BYTES", 2**20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"x" * (2**20 + 9) + b'"}\n' + GOOD.encode(), 1))
    found = check(path)
    assert [str(e) for e in found.errors] == [
        f"{path}:1: found a line of over 1 MiB, expected one pair per line. Fix: break the file into lines."
    ]
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
        f"{path}:61: found the same pair as in {path}:4 (1 of 62 pairs are such repeats), expected each pair once. "
        "Fix: delete the repeats, which count double."
    )
    assert conflict.startswith(
        f"{path}:62: found the preferred reply rejected in {path}:6; 3.2% of the pairs contradict another"
    )


def test_many_conflicts_are_an_error(tmp_path: Path) -> None:
    pairs = [(f"p{k}", f"a{k}", f"b{k}") for k in range(10)]
    found = check(write(tmp_path / "a.jsonl", pairs + [(p, b, a) for p, a, b in pairs[:4]]))
    assert found.counts["conflicts"] == 4
    assert "check whether chosen and rejected are swapped" in str(found.errors[0])


def test_the_same_replies_to_another_prompt_are_no_duplicate(tmp_path: Path) -> None:
    found = check(write(tmp_path / "a.jsonl", [("p", "a", "b"), ("q", "a", "b"), ("r", "b", "a")]))
    assert (found.counts["duplicates"], found.counts["conflicts"]) == (0, 0)


@pytest.mark.parametrize(("longer", "way"), [(54, "longer"), (6, "shorter"), (30, "")])
def test_length_bias(tmp_path: Path, longer: int, way: str) -> None:
    pairs = [(f"p{k}", *((f"good one {k}", "bad") if k < longer else ("yes", f"not this {k}"))) for k in range(60)]
    found = check(write(tmp_path / "a.jsonl", pairs))
    assert found.counts["chosen_longer"] == pytest.approx(longer / 60)
    assert found.counts["length_rule_accuracy"] == pytest.approx(max(longer, 60 - longer) / 60)
    said = [w for w in kinds(found.warnings) if "the longer reply chosen in" in w]
    assert len(said) == bool(way)
    assert all(f"taking the {way} one is right for 90.0%" in w and "of 60 pairs" in w for w in said)


def test_equal_lengths_leave_the_length_rule_at_chance(tmp_path: Path) -> None:
    found = check(write(tmp_path / "a.jsonl", [(f"p{k}", f"a{k:02}", f"b{k:02}") for k in range(40)]))
    assert found.counts["length_rule_accuracy"] == 0.5
    assert found.warnings == ()


def test_leaks_are_found_by_prompt_and_by_group(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [("p", "a1", "b1"), ("q", "a2", "b2"), ("t", "a3", "b3")])
    test = write(tmp_path / "test.jsonl", [("p", "c", "d"), ("r", "a1", "b1")])
    found = check(train, against=test)
    assert found.counts["shared_prompts"] == found.counts["shared_groups"] == 1
    assert (
        f"{test}:1: prompt: found 1 of 2 pairs with a prompt that the training pairs have too, expected none. Fix: take"
        in kinds(found.warnings)[1]
    )
    assert found.n_pairs == 3
    apart = write(tmp_path / "apart.jsonl", [("s", "a", "b")])
    assert check(train, against=[apart]).warnings == ()


def test_one_fixed_prompt_is_no_leak_but_a_shared_reply_is(tmp_path: Path) -> None:
    reviews = [{"text": f"{word} {k}", "label": label} for k in range(7) for label, word in enumerate(("bad", "good"))]
    for name, part in (("train", reviews[:6]), ("test", reviews[6:]), ("leak", [*reviews[6:], *reviews[:2]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    assert check(tmp_path / "train.json", against=tmp_path / "test.json").warnings == ()
    (leak, *_) = kinds(check(tmp_path / "train.json", against=tmp_path / "leak.json").warnings)
    assert "with a group" in leak or "with a reply" in leak


def test_errors_of_the_other_file_are_listed(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [("p", "a", "b")])
    found = check(train, against=tmp_path / "none.jsonl")
    assert [e.file for e in found.errors] == [str(tmp_path / "none.jsonl")]


def characters(pair: Pair) -> int:
    return sum(len(t.text) for t in pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def test_pairs_longer_than_the_model_takes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [(f"p{k}", "a" * k, f"b {k}") for k in (2, 20, 30)])
    found = check(path, count_tokens=characters, max_tokens=10)
    assert found.counts["too_long"] == 2
    assert kinds(found.warnings) == [
        f"{path}:3: found 33 tokens, the longest of 2 of 3 pairs that are too long (rows 2, 3), expected at most 10. "
        "Fix: shorten or drop them, or they will be cut."
    ]
    every = check(path, count_tokens=characters, max_tokens=1)
    assert "raise max_tokens or take a model with a longer context" in str(every.errors[0])
    assert check(path, count_tokens=characters, max_tokens=33).warnings == ()
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
        return row(
            prompt=f"p{k}",
            chosen=f"yes {k}",
            rejected=f"no {k}",
            **(scores if place == "columns" else {"metadata": scores}),
        )

    path = tmp_path / "a.jsonl"
    path.write_text(scored(1, 2, 0) + scored(2, 1, 1) + scored(1, 1, 2) + scored(0, 2, 3) + scored(float("nan"), 2, 4))
    inside = "" if place == "columns" else "metadata."
    assert kinds(check(path).warnings) == [
        f"{path}:1: {inside}score_chosen: found the better rating in {inside}score_rejected (2 rows in all), "
        f"expected the better one in {inside}score_chosen. Fix: check whether chosen and rejected are swapped.",
        f"{path}:3: {inside}score_chosen: found the same rating in {inside}score_chosen and {inside}score_rejected, "
        f"expected the better one in {inside}score_chosen. Fix: leave such pairs out: they carry no preference.",
    ]


def test_ties_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": f"p{k}", "response 1": f"a {k}", "response 2": f"b {k}", "label": k % 3} for k in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = check(path)
    assert found.n_pairs == 6
    assert kinds(found.warnings) == [f"{path}:3: label: left out: a tie (3 rows in all)"]


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

    same = "the same text as in chosen"
    assert errors("hh_rlhf_harmless/train") == [(601, "chosen", "an empty last Assistant turn")]
    assert errors("hh_rlhf_harmless/test") == [(79, "chosen", "an empty last Assistant turn")]
    assert errors("ultrafeedback_sample/train") == [
        (28, "rejected", "only white space"),
        (258, "rejected", same),
        (552, "rejected", same),
        (710, "chosen", "empty text"),
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


@pytest.mark.nightly
def test_imdb_is_read_whole(shared: Path) -> None:
    found = check(shared / "data/imdb/train.jsonl.gz")
    assert found.errors == ()
    assert found.n_pairs == 9955
    assert found.counts["groups"] == 1180
