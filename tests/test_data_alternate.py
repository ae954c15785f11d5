"""Conversations: the laws of alternating pairs, the shapes that are read, and the cues that give places away."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.data import DataError, alternate, position_cues, read_conversations, read_pairs
from coala.values import CoalaError, Pair, Turn, user

FLIP = {"user": "assistant", "assistant": "user", "system": "system"}
roles = st.sampled_from(["system", "user", "assistant"])
chats = st.lists(st.builds(Turn, roles, st.text("ab", min_size=1, max_size=2)), max_size=12)
# Speakers in turn, no reply twice: what the strategy is made for.
proper = st.tuples(st.booleans(), st.integers(0, 9)).map(
    lambda c: [Turn("user" if (k + c[0]) % 2 else "assistant", f"turn {k}") for k in range(c[1])]
)


def naive(said: list[Turn], role: str) -> list[tuple[list[tuple[str, str]], str, str]]:
    """The definition, word for word: merge neighbours, then every reply against the next of that speaker."""
    merged: list[list[str]] = []
    for turn in said:
        if merged and merged[-1][0] == turn.role:
            merged[-1][1] += "\n" + turn.text
        else:
            merged.append([turn.role, turn.text])
    pairs = []
    for k, (speaker, text) in enumerate(merged):
        later = [t for s, t in merged[k + 1 :] if s == speaker]
        before = merged[:k]
        if speaker == role and later and any(s != "system" for s, _ in before) and text.strip() != later[0].strip():
            pairs.append(([(FLIP[s] if role == "user" else s, t) for s, t in before], text, later[0]))
    return pairs


@given(said=chats, role=st.sampled_from(["user", "assistant"]))
def test_equal_to_the_definition(said: list[Turn], role: Any) -> None:
    found = [([(t.role, t.text) for t in p.prompt], p.chosen, p.rejected) for p in alternate(said, "g", role=role)]
    assert found == naive(said, role)


@given(said=proper, role=st.sampled_from(["user", "assistant"]))
def test_k_replies_give_one_pair_less(said: list[Turn], role: Any) -> None:
    pairs = alternate(said, "g", role=role)
    k = sum(turn.role == role for turn in said)
    answered = k - 1 if not said or said[0].role != role else k - 2  # the first of all turns answers nothing
    assert len(pairs) == max(0, answered)
    assert {pair.group for pair in pairs} <= {"g"}
    for pair in pairs:
        assert pair.prompt
        assert pair.prompt[-1].role == "user"
    for one, after in itertools.pairwise(pairs):
        assert one.rejected == after.chosen
        assert after.prompt[: len(one.prompt)] == one.prompt
        assert after.prompt[len(one.prompt)] == Turn("assistant", one.chosen)


@given(said=chats)
def test_the_other_speaker_is_the_flipped_conversation(said: list[Turn]) -> None:
    flipped = [Turn(FLIP[turn.role], turn.text) for turn in said]  # type: ignore[arg-type]
    assert alternate(said, "g", role="user") == alternate(flipped, "g")


def test_neighbours_are_one_reply_and_sameness_is_no_preference() -> None:
    said = [
        Turn("user", "q"),
        Turn("assistant", "a"),
        Turn("assistant", "b"),
        Turn("user", "r"),
        Turn("assistant", "c"),
    ]
    assert alternate(said, "g") == [Pair(user("q"), "a\nb", "c", "g")]
    assert alternate([*said[:2], said[3], Turn("assistant", " a ")], "g") == []


def test_a_system_turn_alone_is_no_prompt() -> None:
    said = [Turn("system", "s"), Turn("assistant", "a"), Turn("user", "u"), Turn("assistant", "b")]
    assert alternate(said, "g") == []


def test_only_speakers_have_replies() -> None:
    with pytest.raises(CoalaError, match="'system' cannot be compared; expected 'assistant' or 'user'"):
        alternate([], "g", role="system")


@given(said=chats, role=st.sampled_from(["user", "assistant"]), n=st.integers(1, 5))
def test_a_window_is_the_end_of_the_whole_prompt(said: list[Turn], role: Any, n: int) -> None:
    whole, windows = alternate(said, "g", role=role), alternate(said, "g", role=role, context=n)
    assert [(p.chosen, p.rejected) for p in windows] == [(p.chosen, p.rejected) for p in whole]
    for full, cut in zip(whole, windows, strict=True):
        spoken = [turn for turn in full.prompt if turn.role != "system"]
        kept = [turn for turn in cut.prompt if turn.role != "system"]
        assert kept == spoken[len(spoken) - len(kept) :]
        assert [t for t in cut.prompt if t.role == "system"] == [t for t in full.prompt if t.role == "system"]
        asked = sum(turn.role == "user" for turn in spoken)
        assert sum(turn.role == "user" for turn in kept) == min(n, asked)
        if n < asked:
            assert kept[0].role == "user"
    assert alternate(said, "g", role=role, context=99) == whole


@given(said=chats, role=st.sampled_from(["user", "assistant"]))
def test_the_first_utterance_makes_one_pair(said: list[Turn], role: Any) -> None:
    pairs = alternate(said, "g", role=role, context="first")
    assert len(pairs) <= 1
    for pair in pairs:
        # It is one of the whole prompt's pairs: the first reply to something said, against the one after it.
        same = [p for p in alternate(said, "g", role=role) if (p.chosen, p.rejected) == (pair.chosen, pair.rejected)]
        assert same
        assert sum(turn.role == "user" for turn in pair.prompt) == 1
    talk = [t for k in range(4) for t in (Turn("user", f"q{k}"), Turn("assistant", f"a{k}"))]
    assert alternate(talk, "g", context="first") == [Pair(user("q0"), "a0", "a1", "g")]


def test_a_context_that_is_none_is_refused() -> None:
    for context in ("last", 0, -1):
        with pytest.raises(CoalaError, match="expected 'all', 'first' or a number of turns from 1"):
            alternate([], "g", context=context)  # type: ignore[arg-type]


def test_the_published_counts_follow_from_three_and_four_replies(tmp_path: Path) -> None:
    # "A conversation of 3-4 turns will populate 2-3 triplets": k replies give k - 1 pairs. Two unknowns, two equations:
    # n3 + n4 = 26,621 and 2 n3 + 3 n4 = 65,606.
    n_conversations, n_pairs = 26_621, 65_606
    n4 = n_pairs - 2 * n_conversations
    n3 = n_conversations - n4
    assert (n3, n4) == (14_257, 12_364)
    # Of each hundred conversations one is written out.
    n_conversations, n3, n4 = 143 + 124, 143, 124
    n_pairs = 2 * n3 + 3 * n4
    path = tmp_path / "talk.jsonl"
    with path.open("w") as file:
        for k in range(n_conversations):
            replies = 4 if k < n4 else 3
            turns = [{"role": who, "text": f"{who} {k} {i}"} for i in range(replies) for who in ("user", "assistant")]
            file.write(json.dumps({"group": str(k), "turns": turns}) + "\n")
    assert sum(1 for _ in read_pairs(path, "conversations")) == n_pairs
    assert sum(1 for _ in read_pairs(path, "conversations", context="first")) == n_conversations


def test_a_file_that_cannot_be_read_twice_is_held(tmp_path: Path) -> None:
    import os
    import threading

    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    row = json.dumps({"group": "g", "turns": [{"role": w, "text": f"{w} {k}"} for k in "ab" for w in ("user", "bot")]})
    writer = threading.Thread(target=lambda: path.write_text(row + "\n"))
    writer.start()
    assert [(p.chosen, p.rejected) for p in read_pairs(path, "conversations")] == [("bot a", "bot b")]
    writer.join()


# --- reading -----------------------------------------------------------------------------------------------------

TALK = [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r")]


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SHAPES: list[tuple[str, dict[str, Any], str]] = [
    ("turns", {"group": "g", "field": "maths", "turns": [{"role": t.role, "text": t.text} for t in TALK]}, "g"),
    ("turns", {"id": 7, "turns": [{"role": t.role, "text": t.text} for t in TALK]}, "7"),
    ("messages", {"conversation_id": "g", "messages": [{"role": t.role, "content": t.text} for t in TALK]}, "g"),
    (
        "sharegpt",
        {
            "id": "g",
            "conversations": [{"from": w, "value": v} for w, v in (("human", "q"), ("gpt", "a"), ("human", "r"))],
        },
        "g",
    ),
    ("mathdial", {"qid": 5, "conversation": "Student: q|EOM|Teacher: (focus)a|EOM|Steven: r"}, "5"),
    (
        "bridge",
        {
            "c_id": "12_3",
            "c_h": [{"user": "student", "text": "q"}, {"user": "tutor", "text": ""}, {"user": "tutor", "text": "a"}],
            "c_r": [{"user": "student", "text": "r"}],
        },
        "12",
    ),
]


@pytest.mark.parametrize(("shape", "row", "group"), SHAPES, ids=[f"{s[0]}-{s[2]}" for s in SHAPES])
def test_shapes(tmp_path: Path, shape: str, row: Any, group: str) -> None:
    path = written(tmp_path, row)
    assert list(read_conversations(path)) == [(group, TALK)]
    assert list(read_conversations(path, shape)) == [(group, TALK)]


def test_mathdial_opens_with_the_exercise(tmp_path: Path) -> None:
    row = {
        "question": "1+1?",
        "student_incorrect_solution": "3",
        "qid": 1,
        "conversation": "Teacher: (generic)Hm?|EOM|Ann: 2",
    }
    ((_, said),) = read_conversations(written(tmp_path, row))
    assert said == [Turn("user", "1+1?\n\n3"), Turn("assistant", "Hm?"), Turn("user", "2")]


def test_cima_alternates_from_the_tutor_on(tmp_path: Path) -> None:
    row = {"past_convo": ["a ", "b", "c", "d"], "engPrep": "is behind the", "engColor": "red", "engObj": "tree"}
    ((_, said),) = read_conversations(written(tmp_path, row))
    assert said[0] == Turn("user", 'In Italian: "is behind the red tree"')
    assert [(t.role, t.text) for t in said[1:]] == list(zip(["assistant", "user"] * 2, "abcd", strict=True))
    assert [(p.chosen, p.rejected) for p in alternate(said, "g")] == [("a", "c")]


def test_snapshots_and_copies_of_a_conversation_come_once(tmp_path: Path) -> None:
    def row(n: int) -> dict[str, Any]:
        return {"turns": [{"role": t.role, "text": t.text} for t in TALK[:n]], "group": "g"}

    assert list(read_conversations(written(tmp_path, row(2), row(3), row(1), row(3)))) == [("g", TALK)]


def test_without_a_name_the_first_words_are_the_group(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ("Qa", "qb", "rc")
    ]
    first, second, third = (group for group, _ in read_conversations(written(tmp_path, *rows)))
    assert first == second != third


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"turns": [{"role": "user", "text": ""}]},
            ":1: turns[0].text: found empty text, expected text. Fix: fill it in or delete the row.",
        ),
        (
            {"turns": []},
            ":1: turns: found an empty list, expected a list of messages. Fix: write [{role, content}, ...].",
        ),
        ({"turns": "hello"}, ':1: turns: found the text "hello", expected a list of messages'),
        ({"messages": [{"role": "judge", "content": "x"}]}, ":1: messages[0].role: found a speaker that is the text"),
        (
            {"messages": [{"role": "system", "content": ""}]},
            ":1: messages: found no turns, expected a conversation. Fix: delete the row.",
        ),
        ({"past_convo": [1]}, ":1: past_convo[0]: found the number 1, expected text"),
        ({"past_convo": {}}, ":1: past_convo: found an empty object, expected a list of texts"),
        (
            {"conversation": "hello"},
            ':1: conversation[0]: found the text "hello", expected Teacher: ... or Student: ...',
        ),
        ({"c_h": 3, "c_r": []}, ":1: c_h: found the number 3, expected a list of messages"),
        (
            {"text": "x"},
            ":1: found the fields text, expected messages, conversations, turns, c_h and c_r, past_convo",
        ),
        (3, ":1: found the number 3, expected an object with named fields"),
    ],
)
def test_bad_conversations_are_refused(tmp_path: Path, row: Any, said: str) -> None:
    path = written(tmp_path, row)
    with pytest.raises(DataError) as raised:
        list(read_conversations(path))
    assert str(raised.value).startswith(f"{path}{said}")


def test_an_unknown_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CoalaError, match="no conversation format 'dialog'; expected auto or one of bridge, cima, turns"
    ):
        list(read_conversations(written(tmp_path, {}), "dialog"))
    with pytest.raises(DataError, match="found no such file"):
        list(read_conversations(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match=r"turns: found no such field \(there are messages\)"):
        list(read_conversations(written(tmp_path, {"messages": []}), "turns"))


# --- cues --------------------------------------------------------------------------------------------------------


def numbered(chosen: str, rejected: str, n: int = 200) -> list[Pair]:
    return [Pair(user(f"p{k}"), f"{chosen} {k}", f"{rejected} {k}", f"g{k}") for k in range(n)]


def test_a_question_gives_the_place_away() -> None:
    cues = position_cues(numbered("what is it?", "well done!!"))
    assert cues["question mark"].value == cues["first word"].value == cues["all together"].value == 1.0
    assert cues["length"].value == cues["digits"].value == 0.5
    assert cues["question mark"].low > 0.97


def test_which_way_a_cue_points_does_not_matter() -> None:
    pairs = numbered("short", "much longer!")
    swapped = [Pair(p.prompt, p.rejected, p.chosen, p.group) for p in pairs]
    for name, cue in position_cues(pairs).items():
        assert cue.value == pytest.approx(position_cues(swapped)[name].value), name


def test_labels_by_coin_leave_the_cues_at_chance() -> None:
    pairs = numbered("what is it?", "well done, all of you", 400)
    coin = [
        pair if (k * 7919) % 13 % 2 else Pair(pair.prompt, pair.rejected, pair.chosen, pair.group)
        for k, pair in enumerate(pairs)
    ]
    for name, cue in position_cues(coin).items():
        assert abs(cue.value - 0.5) < 0.12, name


def test_clustering_widens_the_interval() -> None:
    pairs = [*numbered("what?", "well done", 150), *numbered("well done", "what?", 50)]
    alone = position_cues([Pair(p.prompt, p.chosen, p.rejected, f"g{k}") for k, p in enumerate(pairs)])["question mark"]
    together = position_cues([Pair(p.prompt, p.chosen, p.rejected, f"g{k // 10}") for k, p in enumerate(pairs)])[
        "question mark"
    ]
    assert together.high - together.low > alone.high - alone.low
    assert position_cues([]) == {}
    assert position_cues(numbered("a?", "b", 1))["question mark"].value == 0.5


# --- real dialogues ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_conversations", "n_pairs", "at_least", "at_most"),
    [("mathdial", 463, 2265, 0.6, 0.75), ("bridge", 447, 234, 0.93, 1.0), ("cima", 419, 795, 0.65, 0.85)],
)
def test_real_dialogues(
    shared: Path, name: str, n_conversations: int, n_pairs: int, at_least: float, at_most: float
) -> None:
    path = shared / "data" / name / "dialogues.jsonl.gz"
    talks = list(read_conversations(path))
    pairs = [pair for group, said in talks for pair in alternate(said, group)]
    assert (len(talks), len(pairs)) == (n_conversations, n_pairs)
    assert list(read_pairs(path, "conversations")) == pairs
    assert all(pair.prompt[-1].role == "user" for pair in pairs)
    # Place shows through surface cues: nearly always in bridge, partly in mathdial.
    assert at_least < position_cues(pairs)["all together"].value <= at_most
