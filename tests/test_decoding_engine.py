"""The engine: every reply is the one ``generate`` writes, whoever comes, goes or fails beside it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import LanguageModel
from coala.decoding import Engine, Guidance, Job, Request, generate
from coala.values import CoalaError, Generation, SpecMismatch, user
from tests.test_decoding_naive import GUIDED, Model, endless_model, make_head, tiny_models

WORDS = ["tell", "me", "a story", "about", "good film", "the end", "hello", "what do you think"]


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return tiny_models()


@pytest.fixture(scope="module")
def endless() -> LanguageModel:
    return endless_model()


def some_requests(n: int, guidances: list[Guidance], rng: random.Random, **settings: Any) -> list[Request]:
    return [
        Request(
            user(" ".join(rng.choices(WORDS, k=rng.randint(1, 6)))),
            rng.choice(guidances),
            max_new_tokens=rng.randint(1, 20),
            seed=rng.randrange(10),
            prompt_id=str(i),
            **settings,
        )
        for i in range(n)
    ]


def alone(request: Request, backbone: LanguageModel, head: Any) -> Generation:
    return generate(
        [request.prompt],
        backbone,
        head,
        request.guidance,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        temperature=request.temperature,
        stop=request.stop,
        prompt_ids=[request.prompt_id],
    )[0]


def run(engine: Engine, requests: list[Request], rng: random.Random) -> list[Job]:
    """Hand the requests in at random moments and step until nothing is left to do."""
    jobs: list[Job] = []
    while len(jobs) < len(requests) or engine.running or engine.waiting:
        while len(jobs) < len(requests) and rng.random() < 0.5:
            jobs.append(engine.submit(requests[len(jobs)]))
        engine.step()
    assert not engine.step()
    return jobs


def same(found: Generation | None, expected: Generation) -> None:
    assert found is not None
    apart = replace(found, score=expected.score, log_prob=expected.log_prob, divergence=expected.divergence)
    assert apart == expected
    for mine, theirs in (
        (found.score, expected.score),
        (found.log_prob, expected.log_prob),
        (found.divergence or 0.0, expected.divergence or 0.0),
    ):
        assert mine == pytest.approx(theirs, abs=1e-3, nan_ok=True)


BEAM = Guidance("beam", width=2, candidates=3, strength=0.3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "guidances"),
    [
        ("llama", [Guidance("token")]),
        ("gpt2", [Guidance.paper()]),
        ("qwen2", [Guidance("block", candidates=3, block_tokens=4)]),
        ("llama", [Guidance("shift", budget=3.0), Guidance("none"), Guidance("best_of", candidates=3), BEAM]),
    ],
    ids=["token", "prefix", "block", "mixed"],
)
def test_replies_are_those_of_generate(
    models: dict[str, Model], name: str, guidances: list[Guidance], seed: int
) -> None:
    backbone, rng = models[name].backbone, random.Random(seed)
    head = make_head(backbone, pooling=rng.choice(["mean", "last"]))
    requests = some_requests(8, guidances, rng, stop=("z",))
    for request, job in zip(requests, run(Engine(backbone, head, max_rows=6), requests, rng), strict=True):
        same(job.generation, alone(request, backbone, head))
        assert job.generation is not None
        assert job.generation.n_tokens == len(job.tokens) == len(job.log_probs)


@pytest.mark.parametrize("gate_on", ["reply", "prompt"])
def test_temperatures_seeds_and_gates_of_each_reply_are_its_own(models: dict[str, Model], gate_on: Any) -> None:
    backbone, rng = models["llama"].backbone, random.Random(4)
    head = make_head(backbone, pooling="mean_all", gate_on=gate_on)
    requests = [
        replace(request, temperature=rng.choice([0.0, 0.7, 1.0]))
        for request in some_requests(8, [Guidance("token"), Guidance("none")], rng)
    ]
    for request, job in zip(requests, run(Engine(backbone, head), requests, rng), strict=True):
        same(job.generation, alone(request, backbone, head))


def test_models_whose_memory_cannot_be_joined_take_turns(models: dict[str, Model]) -> None:
    """Every candidate has a copy of the cache: nobody enters a batch that has begun, and all is as it would be."""
    backbone, rng = models["llama"].backbone, random.Random(5)
    head = make_head(backbone)
    requests = some_requests(6, [Guidance("token")], rng)
    expected = [alone(request, backbone, head) for request in requests]
    obstacle = vars(backbone).get("_obstacle", "")
    vars(backbone)["_obstacle"] = "made up for the test"
    try:
        jobs = run(Engine(backbone, head), requests, rng)
    finally:
        vars(backbone)["_obstacle"] = obstacle
    for job, one in zip(jobs, expected, strict=True):
        same(job.generation, one)


def test_like_requests_share_their_forward_passes(endless: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        Request(user("a story"), Guidance("none"), max_new_tokens=20, seed=i, prompt_id=str(i)) for i in range(8)
    ]
    assert endless.shares  # found out by trying, before passes are counted
    seen: list[int] = []
    whole = type(endless._network).run

    def counting(self: Any, tokens: torch.Tensor, *args: Any, **settings: Any) -> Any:
        seen.append(len(tokens))
        return whole(self, tokens, *args, **settings)

    monkeypatch.setattr(type(endless._network), "run", counting)
    engine = Engine(endless, max_rows=8)
    jobs = [engine.submit(request) for request in requests[:4]]
    for _ in range(5):
        engine.step()
    jobs += [engine.submit(request) for request in requests[4:]]
    while engine.step():
        pass
    assert all(job.done for job in jobs)
    # Two prompts' worth of reading and, for each token, one pass: those of the first four, then those of the last.
    assert len(seen) <= 2 + 19 + 5 + 1
    assert max(seen) == 8


def test_rows_are_bounded_and_the_rest_waits_its_turn(endless: LanguageModel) -> None:
    head = make_head(endless)
    engine = Engine(endless, head, max_rows=5)
    block = Guidance("block", candidates=3, block_tokens=2)
    jobs = [engine.submit(Request(user("hello"), block, 6, seed=i, prompt_id=str(i))) for i in range(4)]
    most = 0
    while engine.step():
        rows = sum(job.rows for job in jobs if not job.done) if engine.waiting == 0 else 3 * engine.running
        most = max(most, rows)
        assert engine.running <= 1, "two requests of three rows do not fit five"
    assert [job.generation is not None for job in jobs] == [True] * 4
    wide = engine.submit(Request(user("hello"), replace(block, candidates=9), 4, seed=0))
    while engine.step():
        pass
    assert wide.generation is not None, "what never fits goes alone"


def test_pieces_and_alternatives(endless: LanguageModel) -> None:
    head = make_head(endless)
    pieces: dict[int, list[str]] = {}
    jobs = []
    engine = Engine(endless, head)
    for i, guidance in enumerate([Guidance("none"), *GUIDED, BEAM]):
        pieces[i] = []
        jobs.append(
            engine.submit(Request(user("a film"), guidance, 8, seed=i, n_top=3, on_text=pieces[i].append, stop=("q",)))
        )
    while engine.step():
        pass
    for i, job in enumerate(jobs):
        assert job.generation is not None
        assert "".join(pieces[i]) == job.generation.text
        if job.guidance.mode == "beam":
            continue
        assert len(job.alternatives) == len(job.tokens)
        for token, log_prob, top in zip(job.tokens, job.log_probs, job.alternatives, strict=True):
            assert len(top) == 3
            values = [value for _, value in top]
            assert values == sorted(values, reverse=True)
            assert log_prob <= values[0] + 1e-9
            assert dict(top).get(token, log_prob) == log_prob


def test_a_cancelled_reply_ends_and_leaves_the_others_alone(endless: LanguageModel) -> None:
    head = make_head(endless)
    for guidance in (Guidance("token"), Guidance("best_of", candidates=3), BEAM, Guidance("block", candidates=2)):
        engine = Engine(endless, head, max_rows=7)
        requests = [Request(user("hello"), guidance, 30, seed=i, prompt_id=str(i)) for i in range(3)]
        jobs = [engine.submit(request) for request in requests]
        late = engine.submit(replace(requests[0], prompt_id="late"))
        late.cancel()
        for _ in range(3):
            engine.step()
        jobs[1].cancel()
        while engine.step():
            pass
        assert jobs[1].finish == "cancelled"
        assert late.finish == "cancelled"
        assert late.done
        assert jobs[1].generation is not None
        assert jobs[1].generation.n_tokens < 30
        for i in (0, 2):
            same(jobs[i].generation, alone(requests[i], endless, head))


def test_a_failing_step_fails_its_own_requests_alone(endless: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(endless)
    engine = Engine(endless, head)
    guided = engine.submit(Request(user("hello"), Guidance("token"), 10, seed=0))
    plain = engine.submit(Request(user("hello"), Guidance("none"), 10, seed=0))
    engine.step()

    def broken(*_: Any) -> np.ndarray:
        raise RuntimeError("the device is gone")

    for lane in engine._lanes.values():
        if lane.jobs == [guided]:
            monkeypatch.setattr(lane._decoder, "score", broken)
    while engine.step():
        pass
    assert isinstance(guided.error, RuntimeError)
    assert guided.done
    assert plain.error is None
    assert plain.generation is not None
    again = engine.submit(Request(user("hello"), Guidance("token"), 10, seed=0))
    while engine.step():
        pass
    assert again.generation is not None


def test_what_cannot_be_carried_out_is_refused_at_once(endless: LanguageModel, models: dict[str, Model]) -> None:
    head = make_head(endless)
    with pytest.raises(SpecMismatch):
        Engine(models["llama"].backbone, head)
    with pytest.raises(CoalaError, match="temperature 0"):
        Engine(endless, head).submit(Request(user("a"), Guidance("best_of"), 5, seed=0, temperature=0.0))
    for settings, message in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"stop": "abc"}, "stop is the string"),
        ({"stop": ("",)}, "is empty"),
        ({"n_top": -1}, "n_top is -1"),
    ):
        with pytest.raises(CoalaError, match=message):
            Request(**{"prompt": user("a"), "guidance": Guidance("token"), "max_new_tokens": 5, "seed": 0, **settings})
