"""What one request may cost the others: texts are read once and not in full, bodies are bounded before they are
checked, and long work is done in turns, off the event loop, no longer than somebody waits for it."""

from __future__ import annotations

import asyncio
import json
import threading
import typing
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from coala.alignment import load_parts
from coala.backbone import load_backbone
from coala.serve import bodies, schemas
from coala.serve.answers import Answering, Gone
from coala.serve.contract import TAKEN
from coala.serve.errors import Refusal
from coala.serve.prompts import TooLong, rendered
from coala.serve.reading import TokenReader
from coala.serve.scoring import read
from coala.serve.work import Busy, Ended, Failed, News, Ticket
from coala.values import user

from .menagerie import tiny_backbone
from .serving import Here

USER = {"role": "user", "content": "hello"}
WHOLE: dict[str, dict[str, Any]] = {
    "ChatRequest": {"model": "tiny", "messages": [USER]},
    "CompletionRequest": {"model": "tiny", "prompt": "hello"},
    "ScoreRequest": {"model": "tiny", "prompt": "hello", "replies": ["x"]},
    "RerankRequest": {"model": "tiny", "query": "hello", "documents": ["x"]},
}


def finish(work: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


# --- bodies ---------------------------------------------------------------------------------------------------------


def lists(model: type[BaseModel]) -> list[str]:
    """Fields that may be a list of more than nothing."""
    return [name for name, field in model.model_fields.items() if "list" in str(field.annotation)]


EVERY = [(model, name) for model in TAKEN.values() for name in lists(model)]
WRONG = {"numbers": 0, "fractions": 0.5, "nulls": None, "lists": [], "truths": True, "objects": {"no": "field"}}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize(("model", "name"), EVERY, ids=lambda one: getattr(one, "__name__", one))
def test_many_wrong_entries_cost_as_many_errors_as_one(model: type[BaseModel], name: str, wrong: Any) -> None:
    assert {"messages", "stop", "prompt", "replies", "query", "documents"} <= {name for _, name in EVERY}
    counts = []
    for n in (1, 1000):
        with pytest.raises(ValidationError) as refused:
            model.model_validate({**WHOLE[model.__name__], name: [wrong] * n})
        counts.append(refused.value.error_count())
    assert counts[0] == counts[1] or name == "stop"  # of which there may be no thousand, which is told as well
    assert max(counts) <= 8


class Unasked(schemas.ScoreRequest):
    """What must not be checked."""

    @classmethod
    def model_validate(cls, *_: Any, **__: Any) -> Any:
        raise AssertionError("it was checked")


LARGE: dict[str, Callable[[], Any]] = {
    "numbers": lambda: {"replies": [0] * 500_000},
    "texts": lambda: {"replies": [""] * 300_000},
    "objects": lambda: {"prompt": [{}] * 300_000},
    "lists of lists": lambda: {"prompt": [[0] * 500] * 500},
    "names": lambda: {f"{at}": 0 for at in range(100_000)},
    "names inside": lambda: {"prompt": [{f"{at}": 0 for at in range(2000)}]},
    "depth": lambda: {"prompt": json.loads("[" * 40 + "]" * 40)},
    "depth of objects": lambda: {"prompt": json.loads('{"a":' * 40 + "0" + "}" * 40)},
}


@pytest.mark.parametrize("made", LARGE.values(), ids=LARGE)
def test_what_is_too_much_is_refused_before_it_is_checked(made: Callable[[], Any]) -> None:
    with pytest.raises(Refusal) as refused:
        bodies.parse(json.dumps(made()).encode(), Unasked)
    assert refused.value.status == 400
    assert "expected at most" in refused.value.message
    assert len(refused.value.message) < 200


def test_the_largest_conversation_that_makes_sense_is_taken() -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "a", "refusal": None, "audio": None}
    asked = {"model": "tiny", "messages": [turn] * schemas.MOST_MESSAGES}
    assert len(bodies.parse(json.dumps(asked).encode(), schemas.ChatRequest).messages) == schemas.MOST_MESSAGES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "messages", "prompt", "n", "guidance", "query", "documents", "role", "content"])
            | st.text(max_size=4),
            some,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FOREIGN = ("Input should", "after validation", "pydantic", "Extra inputs", "List should", "String should", "Error")


@given(model=st.sampled_from(list(TAKEN.values())), change=st.dictionaries(st.text(max_size=3), JSON), value=JSON)
def test_any_body_is_a_request_or_a_refusal_in_plain_words(
    model: type[BaseModel], change: dict[str, Any], value: Any
) -> None:
    names = list(model.model_fields)
    for body in (value, {**WHOLE[model.__name__], names[len(change) % len(names)]: value, **change}):
        found = outcome(model, body)
        if not isinstance(found, Refusal):
            assert isinstance(found, model)
            continue
        assert found.status == 400
        assert found.message.endswith(".")
        assert len(found.message) < 300
        assert not any(word in found.message for word in FOREIGN), found.message
        assert "another value" not in found.message, found.message
        json.dumps(found.body, ensure_ascii=False).encode()


def outcome(model: type[BaseModel], body: Any) -> BaseModel | Refusal:
    try:
        return bodies.parse(json.dumps(body).encode(), model)
    except Refusal as refusal:
        return refusal


@pytest.mark.parametrize("count", ["every", "candidates", "top_k", "block_tokens", "width"])
@pytest.mark.parametrize("value", [2**31, 2**63, 2**64, 10**30, 1e300])
def test_counts_beyond_all_use_are_refused_by_name(count: str, value: float) -> None:
    asked = {**WHOLE["ChatRequest"], "guidance": {count: value}}
    with pytest.raises(Refusal) as refused:
        bodies.parse(json.dumps(asked).encode(), schemas.ChatRequest)
    assert refused.value.param == f"guidance.{count}"


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen2"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A template of each kind, and tokenizers of both."""
    return load_backbone(tiny_backbone(request.param, tmp_path_factory.mktemp("b") / request.param), device="cpu")


class Counted:
    """A tokenizer's work in characters, as a renderer of ``backbone`` asks for it."""

    def __init__(self, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.characters = 0
        for renderer in (backbone._renderer, backbone._plain):
            encode = renderer._encode

            def counted(text: str, encode: Any = encode) -> Any:
                self.characters += len(text)
                return encode(text)

            monkeypatch.setattr(renderer, "_encode", counted)


class Head:
    """What reading asks of a head."""

    needs_prompt = True

    def __init__(self, backbone: Any) -> None:
        self.spec = backbone.spec()


LONG = {"words": "the quick brown fox ", "letters": "a", "spaces": " ", "half": "\u65e5", "marks": "<|im_end|>"}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_text_of_a_million_characters_is_refused_after_its_beginning(
    backbone: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = text * (1_000_000 // len(text))
    counted = Counted(backbone, monkeypatch)
    turns = tuple(user(long))
    for work in (
        rendered([turns] * 16, Head(backbone), backbone),
        rendered([long] * 16, Head(backbone), backbone),
        read([turns] * 64, ["good"] * 64, Head(backbone), backbone, cut=False),
        read([tuple(user("a"))] * 64, [long] * 64, Head(backbone), backbone, cut=False),
    ):
        counted.characters = 0
        with pytest.raises(TooLong, match="context holds"):
            finish(work)
        assert counted.characters <= 16 * (8 * backbone.max_tokens) + 2000


def test_a_prompt_is_read_once_for_any_number_of_replies(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a head whose gates act on it, too; and what is told apart is read apart."""
    head, prompt = Head(backbone), tuple(user("tell me a story"))
    alone = backbone.render(prompt, "x")
    counted = Counted(backbone, monkeypatch)

    def cost(act: Callable[[], Any]) -> int:
        counted.characters = 0
        act()
        return counted.characters

    def reading(n: int) -> int:
        return cost(lambda: finish(read([prompt] * n, ["x"] * n, head, backbone)))

    assert finish(read([prompt] * 3, ["x"] * 3, head, backbone)).rows == [alone] * 3
    # Each reply is tokenised as it follows the prompt, and the prompt by itself once.
    assert reading(20) - reading(1) == 19 * cost(lambda: backbone.render(prompt, "x"))
    made = finish(rendered([prompt, "once upon"], head, backbone))
    assert [one.raw for one in made] == [False, True]
    assert list(made[0].row) == backbone.render(prompt).tokens
    assert list(made[1].row) == backbone.raw("once upon").tokens == backbone.tokenizer.encode("once upon")


def test_what_just_fits_is_taken_and_one_token_more_is_not(backbone: Any) -> None:
    """The bound that saves the work never refuses what the model could read."""
    head = Head(backbone)
    sizes = []
    for n in range(0, 3 * backbone.max_tokens, 7):
        text = "it's a good film. " * (n // 4) + "a" * (n % 11)
        tokens = len(backbone.tokenizer.encode(text))
        try:
            (found,) = finish(rendered([text], head, backbone))
        except TooLong:
            assert tokens >= backbone.max_tokens
            continue
        sizes.append(len(found.row))
        assert len(found.row) == max(tokens, 1)
    assert max(sizes) < backbone.max_tokens


@given(piece=st.text(min_size=1, max_size=8), times=st.integers(1, 400), most=st.integers(1, 60))
def test_a_surplus_is_never_told_of_a_text_that_fits(backbone_once: Any, piece: str, times: int, most: int) -> None:
    text = piece * times
    least = backbone_once.surplus(text, most)
    assert least == 0 or len(backbone_once.tokenizer.encode(text, add_special_tokens=False)) > most


@pytest.fixture(scope="module")
def backbone_once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_backbone(tiny_backbone("llama", tmp_path_factory.mktemp("o") / "llama"), device="cpu")


# --- turns ----------------------------------------------------------------------------------------------------------


class Heard:
    """A ticket and what is told of it."""

    def __init__(self, chore: Generator[None, None, Any]) -> None:
        self.told: asyncio.Queue[News] = asyncio.Queue()
        self.ticket = Ticket(self.told.put_nowait, chore=chore)


def with_reading(act: Callable[[TokenReader], typing.Coroutine[Any, Any, None]], capacity: int = 4) -> None:
    async def run() -> None:
        reading = TokenReader(capacity)
        reading.start()
        await act(reading)
        await reading.close()
        assert reading.unfinished == 0

    asyncio.run(run())


def test_a_short_text_does_not_wait_for_a_long_one() -> None:
    """Which goes on until the short one is done; both off the event loop's thread."""
    seen = threading.Event()
    threads = []

    def long() -> Generator[None, None, str]:
        while not seen.is_set():
            threads.append(threading.get_ident())
            yield
        return "long"

    def short() -> Generator[None, None, str]:
        yield
        return "short"

    async def act(reading: TokenReader) -> None:
        first, second = Heard(long()), Heard(short())
        reading.take([first.ticket])
        reading.take([second.ticket])
        assert await second.told.get() == Ended("short")
        assert first.told.empty()
        seen.set()
        assert await first.told.get() == Ended("long")
        assert set(threads).isdisjoint({threading.get_ident()})

    with_reading(act)


def test_failures_are_told_and_the_thread_goes_on() -> None:
    def fails(error: Exception) -> Generator[None, None, None]:
        yield
        raise error

    async def act(reading: TokenReader) -> None:
        for error, refused in ((TooLong("x"), True), (RuntimeError("x"), False)):
            heard = Heard(fails(error))
            reading.take([heard.ticket])
            assert await heard.told.get() == Failed(error, refused)

    with_reading(act)


def test_there_is_a_bound_on_what_waits() -> None:
    go = threading.Event()

    def waits() -> Generator[None, None, None]:
        go.wait()
        yield

    async def act(reading: TokenReader) -> None:
        heard = [Heard(waits()) for _ in range(2)]
        reading.take([one.ticket for one in heard])
        with pytest.raises(Busy):
            reading.take([Heard(waits()).ticket])
        go.set()
        for one in heard:
            assert await one.told.get() == Ended(None)
        late = Heard(waits())
        reading.take([late.ticket])
        await late.told.get()

    with_reading(act, capacity=2)


@pytest.mark.parametrize("leaves", [True, False], ids=["the client leaves", "the deadline passes"])
def test_nobody_reads_for_one_who_no_longer_waits(leaves: bool) -> None:
    """The work stands still at its next piece, whichever way the wait has ended."""
    started, ended, pieces = threading.Event(), threading.Event(), []

    def endless() -> Generator[None, None, None]:
        try:
            while True:
                started.set()
                pieces.append(0)
                yield
        finally:
            ended.set()

    async def act(reading: TokenReader) -> None:
        async def receive() -> dict[str, str]:
            if not leaves:
                await asyncio.Event().wait()
            await asyncio.to_thread(started.wait)
            return {"type": "http.disconnect"}

        async with Answering(receive, 3600.0 if leaves else 1e-9) as answering:
            with pytest.raises(Gone if leaves else Refusal) as over:
                await answering.done(endless(), reading)
        assert leaves or over.value.status == 408
        # A deadline may pass before the first piece: then there is nothing to stand still.
        if started.is_set():
            await asyncio.to_thread(ended.wait)

    with_reading(act)
    assert len(pieces) >= leaves
    assert ended.is_set() == started.is_set()


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(served_run: Path) -> Iterator[Here]:
    backbone, head, guidance = load_parts(served_run)
    with Here(backbone, head, guidance=guidance) as server:
        yield server


def test_others_are_served_while_a_tokenizer_is_at_work(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held up until the others have their answers."""
    held, go = threading.Event(), threading.Event()
    renderer = here.served.backbone._renderer
    encode = renderer._encode

    def slow(text: str) -> Any:
        if "MARK" in text:
            held.set()
            assert go.wait(300)
        return encode(text)

    monkeypatch.setattr(renderer, "_encode", slow)
    chat = {"model": "tiny", "messages": [USER], "max_tokens": 300, "stream": True}
    with httpx.Client(timeout=300) as one, httpx.Client(timeout=300) as two:
        with one.stream("POST", f"{here.url}/v1/chat/completions", json=chat) as answer:
            lines = answer.iter_lines()
            next(lines)
            body = {"model": "tiny", "prompt": "MARK", "replies": ["x"]}
            found: list[int] = []
            asking = threading.Thread(
                target=lambda: found.append(two.post(f"{here.url}/v1/score", json=body).status_code)
            )
            asking.start()
            assert held.wait(300)
            assert [line for line in lines if line][-1] == "data: [DONE]"
            assert one.get(f"{here.url}/healthz").status_code == 200
            assert found == []
        go.set()
        asking.join(300)
    assert found == [200]


@pytest.mark.parametrize("n", [1, 16])
def test_a_refused_prompt_costs_no_place(here: Here, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of replies, nothing of it reaches the model's thread, and it is looked at once."""
    asked: list[str] = []
    backbone = here.served.backbone
    surplus = backbone.surplus
    monkeypatch.setattr(backbone, "surplus", lambda prompt, most: (asked.append(prompt), surplus(prompt, most))[1])
    monkeypatch.setattr(here.worker, "take", lambda _: pytest.fail("it was taken"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a good film " * 80_000}], "n": n}
    answer = httpx.post(f"{here.url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert len(asked) == 1
