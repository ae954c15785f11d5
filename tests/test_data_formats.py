"""Every format: generated values written as the format's rows come back as the pairs they stand for."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import string
import sys
import types
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coala.data import READERS, DataError, check, read_pairs, source_digest
from coala.data.doctor import gather
from coala.data.turns import INVISIBLE
from coala.data.unread import is_empty
from coala.store import load_pairs, save_pairs
from coala.values import Pair, Turn, user

SETTINGS = settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
Rows = list[dict[str, Any]]

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30).filter(
    lambda s: bool(s.strip(INVISIBLE)) and not is_empty(s)  # "None" in a column is none
)
plain = (
    st.text(string.ascii_letters + " .,?!é漢\n", min_size=1, max_size=30)
    .map(str.strip)
    .filter(lambda s: not is_empty(s) and "Human" not in s and "Assistant" not in s)
)
words = st.text(string.ascii_letters + ".,?!é漢", min_size=1, max_size=10).filter(lambda s: not is_empty(s))
roles = st.sampled_from(["system", "user", "assistant"])
names = st.text(string.ascii_letters + string.digits + "é-", min_size=1, max_size=8)


def two(of: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, str]]:
    return st.tuples(of, of).filter(lambda ab: ab[0].strip() != ab[1].strip())


def naive_group(said: str) -> str:
    folded = unicodedata.normalize("NFKC", said).casefold()
    return hashlib.sha256(" ".join(folded.split()).encode()).hexdigest()[:16]


def make(prompt: tuple[Turn, ...], chosen: str, rejected: str, group: str | None = None) -> Pair:
    first = next((t.text for t in prompt if t.role == "user"), prompt[0].text)
    return Pair(prompt, chosen, rejected, naive_group(first) if group is None else group)


def messages(turns: tuple[Turn, ...], who: str = "role", what: str = "content") -> list[dict[str, str]]:
    return [{who: t.role, what: t.text} for t in turns]


@pytest.fixture
def read_back(tmp_path: Path) -> Callable[..., list[Pair]]:
    """Write rows as JSON lines, check that ``reader`` is recognised and finds no fault, and read the pairs."""

    def run(rows: Rows, reader: str) -> list[Pair]:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        # The doctor would object that generated rows contradict one another or look like labels.
        found = gather(path)
        assert [str(e) for e in found.errors if e.row is not None] == []
        assert f"read as {reader}" in {note.found for note in found.notes}
        pairs = list(read_pairs(path))
        assert pairs == list(found.pairs)
        assert pairs == list(read_pairs(path, reader))
        return pairs

    return run


turn = st.builds(Turn, roles, texts)
canonical = st.builds(
    lambda prompt, ab, group: Pair(tuple(prompt), *ab, group),
    st.lists(turn, min_size=1, max_size=4),
    two(texts),
    texts,
)


@SETTINGS
@given(pairs=st.lists(canonical, min_size=1, max_size=5))
def test_canonical_file_round_trip(tmp_path: Path, pairs: list[Pair]) -> None:
    path = tmp_path / "pairs.jsonl"
    save_pairs(path, pairs)
    assert list(read_pairs(path)) == load_pairs(path) == pairs


@SETTINGS
@given(items=st.lists(st.tuples(texts, two(texts)), min_size=1, max_size=4), explicit=st.booleans())
def test_preference_standard(read_back: Any, items: list[Any], explicit: bool) -> None:
    rows = [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in items]
    assert read_back(rows, "preference") == [make(user(p), a, b) for p, (a, b) in items]


@SETTINGS
@given(prompt=plain, good=words, bad=words)
def test_preference_implicit_text_prompt(read_back: Any, prompt: str, good: str, bad: str) -> None:
    good, bad = f" a{good}", f" b{bad}"
    rows = [{"chosen": prompt + good, "rejected": prompt + bad}]
    assert read_back(rows, "preference") == [make(user(prompt), good, bad)]


@SETTINGS
@given(first=texts, second=texts)
def test_an_implicit_prompt_never_loses_text(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chosen": "x " + first, "rejected": "x " + second}) + "\n")
    for pair in check(path).pairs:
        assert pair.prompt[0].text + pair.chosen == "x " + first
        assert pair.prompt[0].text + pair.rejected == "x " + second


turns_then_user = st.lists(turn, max_size=3).flatmap(lambda ts: texts.map(lambda t: (*ts, Turn("user", t))))


@SETTINGS
@given(prompt=turns_then_user, ab=two(texts), shape=st.sampled_from(["explicit", "implicit", "prompt text", "both"]))
def test_preference_conversational(read_back: Any, prompt: tuple[Turn, ...], ab: tuple[str, str], shape: str) -> None:
    shared = [] if shape == "explicit" else messages(prompt)
    row: dict[str, Any] = {
        side: [*shared, {"role": "assistant", "content": said}]
        for side, said in zip(("chosen", "rejected"), ab, strict=True)
    }
    row |= {
        "explicit": {"prompt": messages(prompt)},
        "implicit": {},
        "prompt text": {"prompt": prompt[-1].text},
        "both": {"prompt": messages(prompt)},
    }[shape]
    assert read_back([row], "preference") == [make(prompt, *ab)]


@SETTINGS
@given(
    asked=st.lists(st.tuples(plain, plain), max_size=2),
    last=plain,
    ab=two(plain),
    form=st.sampled_from(["both", "prompt", "own"]),
)
def test_hh_transcripts(
    read_back: Any, asked: list[tuple[str, str]], last: str, ab: tuple[str, str], form: str
) -> None:
    prompt = tuple(t for q, a in asked for t in (Turn("user", q), Turn("assistant", a))) + user(last)
    written = (
        "".join(f"\n\n{'Human' if t.role == 'user' else 'Assistant'}: {t.text}" for t in prompt) + "\n\nAssistant:"
    )
    row = {
        "both": {"chosen": f"{written} {ab[0]}", "rejected": f"{written} {ab[1]}"},
        "prompt": {"prompt": written, "chosen": f" {ab[0]}", "rejected": ab[1]},
        "own": {"prompt": written, "chosen_response": ab[0], "rejected_response": ab[1]},
    }[form]
    # The group is the first thing said: one conversation cut at several depths stays together.
    assert read_back([row], "hh-rlhf") == [make(prompt, *ab, naive_group(prompt[0].text))]


@SETTINGS
@given(asked=texts, replies=st.lists(st.tuples(st.integers(0, 10), texts), min_size=2, max_size=4), fine=st.booleans())
def test_ultrafeedback_best_against_each_lower(read_back: Any, asked: str, replies: list[Any], fine: bool) -> None:
    score = "fine-grained_score" if fine else "overall_score"
    extra = {"overall_score": 10} if fine else {}
    row = {"instruction": asked, "completions": [{"response": r, **extra, score: s} for s, r in replies]}
    top = max(s for s, _ in replies)
    best = next(r for s, r in replies if s == top)
    expected = [make(user(asked), best, r) for s, r in replies if s < top and r.strip() != best.strip()]
    assert read_back([row], "ultrafeedback") == expected


@SETTINGS
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["p", "q"]), texts, st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=6
    )
)
def test_helpsteer_rows_of_a_prompt(read_back: Any, rows: list[Any]) -> None:
    written = [{"prompt": p, "response": r, "helpfulness": h, "correctness": c, "verbosity": 1} for p, r, h, c in rows]
    expected = []
    for asked in dict.fromkeys(p for p, *_ in rows):
        mine = [(r, (h, c)) for p, r, h, c in rows if p == asked]
        top = max(s for _, s in mine)
        best = next(r for r, s in mine if s == top)
        expected += [make(user(asked), best, r) for r, s in mine if s < top and r.strip() != best.strip()]
    assert read_back(written, "helpsteer") == expected


def test_helpsteer_earlier_turns(read_back: Any) -> None:
    asked = "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nA joke?"
    rows = [{"prompt": asked, "response": str(k), "helpfulness": k} for k in range(2)]
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "A joke?"))
    assert read_back(rows, "helpsteer") == [make(turns, "1", "0")]


@pytest.mark.parametrize(
    ("reader", "fields", "first_label", "second_label"),
    [
        ("shp", ("history", "human_ref_A", "human_ref_B", "labels"), 1, 0),
        ("llmbar", ("input", "output_1", "output_2", "label"), 1, 2),
        ("autoj", ("prompt", "response 1", "response 2", "label"), 0, 1),
    ],
)
@SETTINGS
@given(asked=texts, ab=two(texts), first=st.booleans(), kind=st.sampled_from([int, float, str]))
def test_two_answers_and_a_label(
    read_back: Any,
    reader: str,
    fields: Any,
    first_label: int,
    second_label: int,
    asked: str,
    ab: Any,
    first: bool,
    kind: Any,
) -> None:
    row = dict(zip(fields, (asked, *ab, kind(first_label if first else second_label)), strict=True))
    assert read_back([row], reader) == [make(user(asked), *(ab if first else ab[::-1]))]


@SETTINGS
@given(
    asked=texts,
    more=st.one_of(st.just(""), texts),
    ab=two(texts),
    system=st.one_of(st.just(""), texts),
    columns=st.booleans(),
)
def test_alpaca(read_back: Any, asked: str, more: str, ab: Any, system: str, columns: bool) -> None:
    replies = {"chosen": ab[0], "rejected": ab[1]} if columns else {"output": list(ab)}
    row = {"instruction": asked, "input": more, "system": system, "history": [["q", "a"]], **replies}
    prompt = ((Turn("system", system),) if system else ()) + (Turn("user", "q"), Turn("assistant", "a"))
    assert read_back([row], "alpaca") == [make((*prompt, Turn("user", f"{asked}\n\n{more}" if more else asked)), *ab)]


@SETTINGS
@given(prompt=turns_then_user, ab=two(texts), form=st.sampled_from(["object", "list", "text"]))
def test_sharegpt(read_back: Any, prompt: tuple[Turn, ...], ab: Any, form: str) -> None:
    who = {"user": "human", "assistant": "gpt", "system": "system"}
    row: dict[str, Any] = {"conversations": [{"from": who[t.role], "value": t.text} for t in prompt]}
    for side, said in zip(("chosen", "rejected"), ab, strict=True):
        row[side] = {"object": {"from": "gpt", "value": said}, "list": [{"from": "gpt", "value": said}], "text": said}[
            form
        ]
    assert read_back([row], "sharegpt") == [make(prompt, *ab)]


@SETTINGS
@given(asked=texts, good=st.lists(texts, min_size=1, max_size=2), bad=st.lists(texts, min_size=1, max_size=3))
def test_rewardbench_lists(read_back: Any, asked: str, good: list[str], bad: list[str]) -> None:
    good, bad = [f"good {g}" for g in good], [f"bad {b}" for b in bad]
    expected = [replace(make(user(asked), g, b), source="Math") for g in good for b in bad]
    assert read_back([{"prompt": asked, "chosen": good, "rejected": bad, "subset": "Math"}], "rewardbench") == expected


def test_rewardbench_version_1_is_the_preference_format(read_back: Any) -> None:
    row = {
        "prompt": "p",
        "chosen": "a",
        "chosen_model": "m",
        "rejected": "b",
        "rejected_model": "n",
        "subset": "s",
        "id": 3,
    }
    assert read_back([row], "preference") == [replace(make(user("p"), "a", "b"), source="s")]


def test_a_source_is_a_short_name_and_not_a_text(read_back: Any) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    named = [{"domain": "law"}, {"source": "a/b", "dataset": "koala"}, {"subset": 3}, {"source": "many words " * 9}]
    found = read_back([{**row, **one} for one in named], "preference")
    assert [one.source for one in found] == ["law", "koala", "3", ""]


ALIASES = [("question", "better", "worse"), ("query", "preferred", "dispreferred"), ("Question", "Chosen", "Rejected")]


@pytest.mark.parametrize("columns", ALIASES, ids="/".join)
@SETTINGS
@given(asked=texts, ab=two(texts), system=st.one_of(st.sampled_from([None, "", "None", "null"]), texts))
def test_other_column_names(read_back: Any, columns: Any, asked: str, ab: Any, system: str | None) -> None:
    row = {**dict(zip(columns, (asked, *ab), strict=True)), "system": system}
    turns = (() if system is None or is_empty(system) else (Turn("system", system),)) + user(asked)
    assert read_back([row], "columns") == [make(turns, *ab)]


def test_the_mapping_of_columns_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "p", "better": "a", "worse": "b"}\n' * 2)
    notes = [str(note) for note in check(path).notes]
    assert notes[1:] == [f"{path}:1: read question as prompt, better as chosen, worse as rejected"]


@SETTINGS
@given(
    chat=st.lists(st.tuples(st.sampled_from(["student", "tutor"]), plain), min_size=1, max_size=4).filter(
        lambda c: c[-1][0] == "student"
    ),
    ab=two(plain),
    session=st.integers(1, 99),
)
def test_bridge_rewrites(read_back: Any, chat: list[tuple[str, str]], ab: Any, session: int) -> None:
    row = {
        "c_id": f"{session}_4",
        "c_h": [{"user": who, "text": said} for who, said in chat],
        "c_r": [{"user": "tutor", "text": ab[1]}],
        "c_r_": [{"user": "tutor", "text": ab[0]}],
    }
    (pair,) = read_back([row], "bridge")
    assert (pair.chosen, pair.rejected, pair.group) == (*ab, str(session))
    assert "\n".join(t.text for t in pair.prompt) == "\n".join(said for _, said in chat)


@SETTINGS
@given(
    reviews=st.lists(st.tuples(plain, st.booleans(), st.sampled_from("abcdef")), min_size=1, max_size=30),
    films=st.booleans(),
)
def test_imdb_laws(tmp_path: Path, reviews: list[tuple[str, bool, str]], films: bool) -> None:
    """Positive over negative, each review once, one film in one group, few left over, the same every time."""
    path = tmp_path / "reviews.jsonl"
    rows = [
        {"text": f"{k}<br />{said}", "label": int(good), **({"movie": film} if films else {})}
        for k, (said, good, film) in enumerate(reviews)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = list(check(path).pairs)
    assert pairs == list(check(path).pairs)
    used = [int(said.split("\n")[0]) for pair in pairs for said in (pair.chosen, pair.rejected)]
    assert len(used) == len(set(used))
    assert len({pair.prompt for pair in pairs}) <= 1
    group_of_film: dict[str, set[str]] = {}
    for pair in pairs:
        good, bad = (int(said.split("\n")[0]) for said in (pair.chosen, pair.rejected))
        assert reviews[good][1]
        assert not reviews[bad][1]
        assert pair.chosen == f"{good}\n{reviews[good][0]}"
        for k in (good, bad):
            group_of_film.setdefault(reviews[k][2], set()).add(pair.group)
    if films:
        assert all(len(groups) == 1 for groups in group_of_film.values())
        same = {
            f: min(sum(g and f == film for _, g, film in reviews), sum(not g and f == film for _, g, film in reviews))
            for f in "abcdef"
        }
        assert len(pairs) >= sum(same.values())
    else:
        positive = sum(good for _, good, _ in reviews)
        assert len(pairs) == min(positive, len(reviews) - positive)
        assert len({pair.group for pair in pairs}) == len(pairs)


def test_conversations_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    said = [{"role": who, "content": c} for who, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    path.write_text(json.dumps({"messages": said}) + "\n")
    assert list(read_pairs(path, "conversations")) == [make(user("a"), "b", "d")]
    # The user's first reply has nothing before it.
    assert list(read_pairs(path, "conversations", role="user")) == []
    with pytest.raises(DataError, match=r"found conversations, not pairs.*coala data alternate"):
        list(read_pairs(path))


@pytest.mark.parametrize("name", ["group", "conversation_id", "prompt_id", "post_id", "movie"])
def test_a_group_that_is_named(read_back: Any, name: str) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert [p.group for p in read_back([{**row, name: "G"}, {**row, name: 7}, {**row, name: None}], "preference")] == [
        "G",
        "7",
        naive_group("p"),
    ]


# --- containers --------------------------------------------------------------------------------------------------

FLAT: Rows = [
    {"prompt": 'a, "quoted"\nline', "chosen": "good\t1", "rejected": "bad é", "group": "x"},
    {"prompt": "second", "chosen": "[not json", "rejected": "\u2028 odd \x85 breaks", "group": "y"},
]
EXPECTED = [make(user(r["prompt"]), r["chosen"], r["rejected"], r["group"]) for r in FLAT]


def _csv(rows: Rows, delimiter: str) -> bytes:
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rows: Rows) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


CONTAINERS: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": lambda rows: "\n".join(json.dumps(r) for r in rows).encode(),
    "utf8.jsonl": lambda rows: "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode(),
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + "\n".join(json.dumps(r) for r in rows).encode(),
    "a.ndjson": lambda rows: "\n".join(json.dumps(r) for r in rows).encode(),
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "list.jsonl": lambda rows: json.dumps(rows).encode(),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "lines.json": lambda rows: "\n".join(json.dumps(r) for r in rows).encode(),
    "a.csv": lambda rows: _csv(rows, ","),
    "a.tsv": lambda rows: _csv(rows, "\t"),
    "a.parquet": _parquet,
}


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_hold_the_same_pairs(tmp_path: Path, name: str, zipped: bool) -> None:
    data = CONTAINERS[name](FLAT)
    path = tmp_path / (name + ".gz" if zipped else name)
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert list(read_pairs(path)) == EXPECTED
    assert check(path).errors == ()


def test_messages_in_a_table(tmp_path: Path) -> None:
    row = {
        "prompt": json.dumps([{"role": "user", "content": "p"}]),
        "chosen": json.dumps([{"role": "assistant", "content": "a"}]),
        "rejected": json.dumps([{"role": "assistant", "content": "b"}]),
    }
    (tmp_path / "a.csv").write_bytes(_csv([row], ","))
    assert list(read_pairs(tmp_path / "a.csv")) == [make(user("p"), "a", "b")]


def test_several_files_are_recognised_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"input": "q", "output_1": "x", "output_2": "y", "label": 2}\n')
    pairs = list(read_pairs([tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")]))
    assert pairs == [make(user("p"), "a", "b"), make(user("q"), "y", "x")]


def test_a_long_cell_and_the_process_wide_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np," + "a" * 200_000 + ",b\n")
    assert len(next(read_pairs(tmp_path / "a.csv")).chosen) == 200_000
    assert csv.field_size_limit() == before


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(name: str, **options: Any) -> Rows:
        asked.append((name, options))
        if name == "no/such":
            raise ConnectionError("offline")
        return FLAT

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    assert list(read_pairs("owner/pairs:test")) == EXPECTED
    assert asked == [("owner/pairs", {"split": "test", "streaming": True})]
    with pytest.raises(DataError, match=r"could not be read \(offline\).*downloaded file"):
        list(read_pairs("no/such"))


def test_hub_data_set_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file.*pip install 'coala-align\[hub\]'"):
        list(read_pairs("owner/pairs"))


def test_parquet_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'coala-align\[parquet\]'"):
        list(read_pairs(tmp_path / "a.parquet"))


def test_source_digest_follows_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert source_digest(tmp_path / "a") == source_digest(str(tmp_path / "b")) == hashlib.sha256(b"1").hexdigest()
    (tmp_path / "b").write_bytes(b"2")
    assert source_digest(tmp_path / "a") != source_digest(tmp_path / "b")
    with pytest.raises(DataError, match="found no such file"):
        source_digest(tmp_path / "c")


# --- nothing but DataError ---------------------------------------------------------------------------------------

FIELDS = [
    *(
        "prompt",
        "chosen",
        "rejected",
        "group",
        "conversations",
        "instruction",
        "input",
        "output",
        "completions",
        "history",
    ),
    *(
        "human_ref_A",
        "human_ref_B",
        "labels",
        "output_1",
        "output_2",
        "label",
        "text",
        "movie",
        "response",
        "helpfulness",
    ),
    *("question", "better", "worse", "c_h", "c_r", "c_r_", "c_id", "messages", "past_convo", "conversation", "system"),
    *(
        "role",
        "content",
        "from",
        "value",
        "response 1",
        "response 2",
        "metadata",
        "chosen_score",
        "rejected_score",
        "turns",
    ),
]
anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=6),
        st.just("\n\nHuman: a\n\nAssistant: b"),
    )
    | st.sampled_from(["user", "assistant", "\ud800", "\0", "a|EOM|b", "Teacher: x|EOM|Student: y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


def refuses_cleanly(path: Path, format: str = "auto") -> None:
    found = check(path, format)
    for finding in (*found.errors, *found.warnings, *found.notes):
        str(finding).encode()
    try:
        pairs = list(read_pairs(path, format))
    except DataError as error:
        assert found.errors
        str(error).encode()
    else:
        # What is wrong with the set as a whole is no fault of a row.
        assert not [f for f in found.errors if "contradict" not in f.found and not f.found.endswith("pairs")]
        assert tuple(pairs) == found.pairs


@settings(SETTINGS, max_examples=60)
@given(rows=st.lists(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=6), min_size=1, max_size=3))
def test_any_json_is_read_or_refused(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refuses_cleanly(path)


@pytest.mark.parametrize("reader", READERS)
@SETTINGS
@given(data=st.data())
def test_any_row_named_a_format_is_read_or_refused(tmp_path: Path, reader: str, data: st.DataObject) -> None:
    """The fields the format speaks of, with anything in them."""
    about = READERS[reader].about
    fields = [field for field in FIELDS if field in about] or FIELDS
    rows = data.draw(st.lists(st.dictionaries(st.sampled_from(fields), anything), min_size=1, max_size=3))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    refuses_cleanly(path, reader)


@settings(SETTINGS, max_examples=60)
@given(
    data=st.binary(max_size=60),
    name=st.sampled_from(
        ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.parquet.gz"]
    ),
    wrap=st.sampled_from(["raw", "gzip", "cut", "after a row"]),
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes, name: str, wrap: str) -> None:
    row = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
    (tmp_path / name).write_bytes(
        {"raw": data, "gzip": gzip.compress(data), "cut": gzip.compress(row + data)[:-9], "after a row": row + data}[
            wrap
        ]
    )
    refuses_cleanly(tmp_path / name)


# --- real sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "reader", "n_pairs"),
    [
        ("hh_rlhf_harmless/test", "hh-rlhf", 333),
        ("mrbench/pairs_test", "preference", 402),
        ("ultrafeedback_sample/test", "preference", 168),
        ("alpaca_eval_pairs/test", "preference", 1216),
        ("imdb/test", "imdb", 3961),
        ("llmbar/test", "llmbar", 418),
        ("autoj_pairwise/test", "autoj", 1015),
        ("bridge/dialogues", "bridge", 679),
    ],
)
def test_real_sets(shared: Path, file: str, reader: str, n_pairs: int) -> None:
    found = check(shared / "data" / f"{file}.jsonl.gz")
    assert (found.notes[0].found, found.n_pairs) == (f"read as {reader}", n_pairs)


def test_the_transcripts_agree_with_the_replies_given_beside_them(shared: Path) -> None:
    path = shared / "data/hh_rlhf_harmless/test.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    found = check(path)
    beside = {(row["chosen_response"].strip(), row["rejected_response"].strip()) for row in rows}
    assert sum((p.chosen, p.rejected) in beside for p in found.pairs) >= 0.99 * len(rows)
    assert {p.prompt[0].role for p in found.pairs} == {"user"}


def test_a_pair_keeps_who_rated_it(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a?", "chosen": "b", "rejected": "c", "annotator_id": 7},
        {"prompt": "a?", "chosen": "c", "rejected": "b", "rater": "Ann"},
        {"prompt": "d?", "chosen": "e", "rejected": "f"},
    ]
    path = tmp_path / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = list(read_pairs(str(path)))
    assert [pair.rater for pair in pairs] == ["7", "Ann", ""]
    save_pairs(tmp_path / "kept.jsonl", pairs)
    assert load_pairs(tmp_path / "kept.jsonl") == list(read_pairs(str(tmp_path / "kept.jsonl"))) == pairs
