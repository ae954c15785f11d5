"""Recipes, draws and journals: the laws of the draws, and readers that meet anything with one clear error."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from coala.data.agents import (
    Agent,
    SynthesisError,
    SynthesisLimits,
    SynthesisRecipe,
    draw,
    messages,
    parse_recipe,
    read_recipe,
)
from coala.data.journal import Usage, line, read_journal

RECIPES = Path(__file__).resolve().parent.parent / "src" / "coala" / "recipes"
AGENT = Agent(system="You study {field}; you are {persona}, {mood}, {language}, {turns}.", personas=("a", "b"))
RECIPE = SynthesisRecipe(
    student=AGENT, tutor=AGENT, fields=tuple("abcdefghijk"), moods=("calm", "cross", "gay"), conversations=20_000
)


# --- draws -------------------------------------------------------------------------------------------------------


def test_draws_are_as_they_are_said_to_be() -> None:
    drawn = [draw(RECIPE, k) for k in range(20_000)]
    for values, n in (
        ([one.field for one in drawn], 11),
        ([one.mood for one in drawn], 3),
        ([str(one.turns) for one in drawn], 5),
        ([one.field + one.mood for one in drawn], 33),
        ([one.student_persona + one.tutor_persona for one in drawn], 4),
    ):
        counts = Counter(values)
        assert len(counts) == n
        assert chisquare(list(counts.values())).pvalue > 1e-4
    assert kstest([(one.temperature - 0.2) / 0.7 for one in drawn], "uniform").pvalue > 1e-4
    assert len({one.seed for one in drawn}) > 19_990
    assert {one.turns for one in drawn} == {4, 5, 6, 7, 8}


def test_a_longer_list_of_moods_leaves_all_else_as_it_was() -> None:
    more = replace(RECIPE, moods=(*RECIPE.moods, "sad"))
    for k in range(200):
        assert replace(draw(more, k), mood="") == replace(draw(RECIPE, k), mood="")


def test_a_later_attempt_keeps_the_design() -> None:
    for k in range(100):
        first, second = draw(RECIPE, k), draw(RECIPE, k, 1)
        assert (first.temperature, first.seed) != (second.temperature, second.seed)
        assert replace(second, attempt=0, temperature=0, seed=0) == replace(first, temperature=0, seed=0)


def test_lengths_can_be_weighted() -> None:
    weighted = replace(RECIPE, turns={6: 0.5356, 8: 0.4644, 7: 0.0})
    counts = Counter(draw(weighted, k).turns for k in range(20_000))
    assert set(counts) == {6, 8}
    assert counts[6] / 20_000 == pytest.approx(0.5356, abs=0.015)


def test_each_agent_sees_itself_as_the_assistant() -> None:
    drawn = draw(RECIPE, 0)
    said = ["s1", "t1", "s2", "t2"]
    for n in range(5):
        student = messages(RECIPE, drawn, "student", said[:n])
        assert [m["role"] for m in student] == ["system", "user", *(["assistant", "user"] * 2)[:n]]
        tutor = messages(RECIPE, drawn, "tutor", said[:n])
        assert [m["content"] for m in tutor[1:]] == said[:n]
        assert [m["role"] for m in tutor[1:]] == (["user", "assistant"] * 2)[:n]
    system = student[0]["content"]
    assert all(part in system for part in (drawn.field, drawn.mood, "English", str(drawn.turns)))


def test_identity_leaves_out_how_fast_and_how_many() -> None:
    faster = replace(RECIPE, limits=SynthesisLimits(concurrency=1, tokens=5), conversations=3)
    elsewhere = replace(faster, student=replace(AGENT, base_url="http://x", key="K", input_price=3.0))
    assert elsewhere.identity == RECIPE.identity
    assert replace(RECIPE, seed=1).identity != RECIPE.identity
    assert replace(RECIPE, tutor=replace(AGENT, model="m")).identity != RECIPE.identity


# --- reading recipes ---------------------------------------------------------------------------------------------


def test_the_shipped_recipe_is_the_published_set() -> None:
    recipe = read_recipe((RECIPES / "edufeedback.yaml").read_text())
    assert recipe.conversations == 26_621
    assert len(recipe.fields) == 11
    assert {"science", "philosophy"} <= set(recipe.fields)
    assert recipe.temperature == (0.2, 0.9)
    assert list(recipe.lengths) == [4, 5, 6, 7, 8]


def document(**changes: Any) -> dict[str, Any]:
    agent = {"system": "You are {mood}."}
    return {"student": agent, "tutor": agent, "fields": ["a"], "moods": ["b"], **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fields": []}, "fields: found [], expected at least 1 item"),
        ({"moods": "calm"}, "moods: found 'calm', expected a list"),
        ({"mods": ["x"]}, "unknown setting mods; did you mean moods?"),
        ({"student": {"system": "I am {moods}"}}, "student: system holds {moods}; expected one of {field}, {mood}"),
        ({"student": {"system": "a {mood:>99}"}}, "student: system holds {mood:>99}"),
        ({"student": {"system": "a } b"}}, "student: system is not a template"),
        ({"tutor": {"system": "x", "base_url": "localhost"}}, "tutor: base_url must begin with http:// or https://"),
        ({"tutor": {"system": "x", "options": {"seed": 1}}}, "tutor: options.seed is set by the recipe itself"),
        ({"tutor": {}}, "tutor.system is missing"),
        ({"turns": [8, 4]}, "turns are from 2 to 200 with low <= high; found (8, 4)"),
        ({"turns": [1, 4]}, "turns are from 2 to 200"),
        ({"turns": {4: 0.0}}, "the weights of turns are at least 0 and not all 0"),
        ({"turns": [4, 10**12]}, "turns are from 2 to 200"),
        ({"temperature": [0.9, 0.2]}, "temperature is drawn from [low, high] with low <= high <= 2; found [0.9, 0.2]"),
        ({"limits": {"concurrency": 0}}, "limits.concurrency: found 0, expected at least 1"),
        ({"limits": {"token": 5}}, "unknown setting limits.token; did you mean limits.tokens?"),
        ({"conversations": 0}, "conversations: found 0, expected at least 1"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit_are_explained(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SynthesisError) as raised:
        parse_recipe(document(**changes), "r.yaml")
    assert str(raised.value).startswith("r.yaml: invalid settings: ")
    assert said in str(raised.value)


def test_flags_replace_limits() -> None:
    recipe = parse_recipe(document(limits={"retries": 2}), "r", 7, tokens=9, dollars=None)
    assert (recipe.conversations, recipe.limits.tokens, recipe.limits.retries) == (7, 9, 2)
    with pytest.raises(SynthesisError, match=r"dollars: found 0\.0, expected more than 0"):
        parse_recipe(document(), "r", dollars=0.0)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
names = st.sampled_from([*document(), "turns", "temperature", "limits", "languages", "seed", "system", "options", "x"])
trees = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | plain, inner, max_size=4), max_leaves=12
)


@given(tree=trees, field=names)
def test_any_document_is_a_recipe_or_one_error(tree: Any, field: str) -> None:
    for given_document in (tree, {**document(), field: tree}):
        try:
            recipe = parse_recipe(given_document)
        except SynthesisError:
            continue
        assert draw(recipe, 3).turns in recipe.lengths
        for speaker in ("student", "tutor"):
            assert messages(recipe, draw(recipe, 0), speaker, ["a"])  # type: ignore[arg-type]


@given(text=st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"% \n#ab", max_size=60))
def test_any_text_is_a_recipe_or_one_error(text: str) -> None:
    with pytest.raises(SynthesisError):
        read_recipe(text)


# --- journals ----------------------------------------------------------------------------------------------------

usages = st.builds(Usage, *[st.integers(0, 10**6)] * 4).map(lambda one: dict(vars(one)))


@st.composite
def journals(draw_value: Any) -> list[bytes]:
    """Sound journals: what a run could have written."""
    lines = [line("begun", version=1, identity={"seed": 0}, prompts="x")]
    left = list(range(draw_value(st.integers(0, 6))))
    for _ in range(draw_value(st.integers(0, 12))):
        kind = draw_value(st.sampled_from(["kept", "dropped", "given up", "lease", "resumed", "ended"]))
        usage = draw_value(usages)
        if kind == "lease":
            lines.append(line(kind, tokens=usage["prompt"], nanodollars=usage["nanodollars"]))
        elif kind == "ended":
            lines.append(line(kind))
        elif kind == "resumed":
            lines.append(line(kind, usage=usage))
        elif left and kind == "dropped":
            reason = draw_value(st.sampled_from(["refusal", "budget"]))
            lines.append(line(kind, index=left[0], attempt=0, reason=reason, usage=usage))
        elif left and kind == "given up":
            lines.append(line(kind, index=left.pop(), usage=usage))
        elif left:
            index = left.pop()
            lines.append(
                line(kind, index=index, digest=f"{index:032x}", usage=usage, conversation={"turns": ["\u00e9"]})
            )
    return lines


@given(lines=journals(), cut=st.integers(0, 10**6), junk=st.sampled_from([b"", b"\0\0", b"\xff", b'{"kind":"kept"']))
def test_a_journal_cut_anywhere_says_what_its_whole_lines_say(lines: list[bytes], cut: int, junk: bytes) -> None:
    raw = b"".join(lines)
    cut %= len(raw) + 1
    whole, size = [], 0
    for one in lines:
        if size + len(one) > cut:
            break
        whole.append(one)
        size += len(one)
    torn = raw[:cut] + (junk if cut == size and (size or junk == b"\0\0") else b"")
    found = read_journal(torn)
    assert found.size == size
    events = [json.loads(one) for one in whole]
    assert list(found.kept) == [e["index"] for e in events if e["kind"] == "kept"]
    for index, (place, length) in found.kept.items():
        assert json.loads(raw[place : place + length])["index"] == index
    assert found.given_up == {e["index"] for e in events if e["kind"] == "given up"}
    spent = [e["usage"] for e in events if "usage" in e]
    assert found.spent.tokens == sum(u["prompt"] + u["completion"] + u["uncertain"] for u in spent)
    assert found.spent.nanodollars == sum(u["nanodollars"] for u in spent)
    # What a killed run may have spent is the rest of its last lease, unless it ended or was resumed since.
    marks = [e for e in events if e["kind"] in ("lease", "ended", "resumed")]
    lease = marks[-1]["tokens"] if marks and marks[-1]["kind"] == "lease" else 0
    assert found.lost().tokens == max(0, lease - found.spent.tokens)


@given(raw=st.binary(max_size=80) | st.lists(st.sampled_from([
    line("begun", version=1, identity={}), line("begun", version=2, identity={}), line("begun"), line("kept"),
    line("kept", index=-1, digest="", usage={}), line("kept", index=True, digest="00", usage={}),
    line("dropped", index=1, attempt=0, reason=3, usage={"prompt": 1.5}), line("lease", tokens="x", nanodollars=0),
    line("given up", index=10**30, usage={"x": 1}), line("resumed", usage=[]), line("ended"), b"\n", b"[]\n", b"{}\n",
    b"NaN\n", b'{"kind":["kept"]}\n', b"[" * 5000 + b"\n", b"\xff\xfe\n",
]), max_size=6).map(b"".join))  # fmt: skip
def test_any_bytes_are_a_journal_or_one_error(raw: bytes) -> None:
    try:
        journal = read_journal(raw, "j")
    except SynthesisError:
        return
    assert 0 <= journal.size <= len(raw)
    assert read_journal(raw[: journal.size]).size == journal.size


def test_damage_in_the_middle_and_foreign_files_are_refused() -> None:
    begun, ended = line("begun", version=1, identity={}), line("ended")
    with pytest.raises(SynthesisError, match=r"j:2: is not a line of a journal \(.*\) although valid lines follow"):
        read_journal(begun + b"oops\n" + ended, "j")
    with pytest.raises(SynthesisError, match="is not a journal of conversations"):
        read_journal(b"dear diary\n", "j")
    with pytest.raises(SynthesisError, match="is not a journal of conversations"):
        read_journal(b"dear diary", "j")
    kept = line("kept", index=0, digest="00", usage={}, conversation={})
    with pytest.raises(SynthesisError, match=r"j:3: .*conversation 0 was finished before"):
        read_journal(begun + kept + kept, "j")
    assert read_journal(b'{"kind":"beg', "j").size == 0
    assert read_journal(b"\0" * 64, "j").size == 0
