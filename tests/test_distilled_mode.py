"""The distilled policy in decoding: a mode of its own, and what the head guides in place of the model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import coala
from coala.alignment.answers import PromptRow, ReplySettings, answer
from coala.alignment.policy import Guided, policy_accuracy
from coala.backbone import BackboneError, LanguageModel, load_backbone
from coala.cli import app
from coala.comal.entrants import AnswerSampling, entrants_of
from coala.decoding import Engine, Guidance, Request, generate
from coala.distil.matrix import output_matrix
from coala.export.policy import export_checkpoint
from coala.policies import DistilledPolicy
from coala.store import RunFolder, StoreError
from coala.values import CoalaError, ConvexHead, Pair, SpecMismatch, user

from .menagerie import tiny_backbone
from .test_decoding_engine import alone, run, same, some_requests
from .test_decoding_naive import make_head
from .test_distil import policy_of, with_layer

PROMPTS = [user(text) for text in ("once upon a time", "a dog", "the film was")]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}
OVER = [
    Guidance("token", 3.0, over="distilled"),
    Guidance("shift", 2.0, candidates=4, over="distilled"),
    Guidance("block", 6.0, candidates=3, block_tokens=3, over="distilled"),
    Guidance("best_of", 6.0, candidates=3, over="distilled"),
]
BEAM = Guidance("beam", 3.0, width=2, candidates=3, over="distilled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> LanguageModel:
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def policy(plain: LanguageModel) -> DistilledPolicy:
    return policy_of(plain, 0.2)


@pytest.fixture(scope="module")
def backbone(plain: LanguageModel, policy: DistilledPolicy) -> LanguageModel:
    return plain.with_policy(policy)


@pytest.fixture(scope="module")
def head(plain: LanguageModel) -> ConvexHead:
    return make_head(plain)


@pytest.fixture(scope="module")
def changed(folder: Path, plain: LanguageModel, policy: DistilledPolicy) -> LanguageModel:
    """A model of its own whose output layer is the policy's."""
    layer = plain.transformer.get_output_embeddings().weight.numpy()
    return with_layer(folder, layer + layer @ policy.change)


def texts(*arguments: Any, **settings: Any) -> list[str]:
    return [one.text for one in generate(PROMPTS, *arguments, **{**SETTINGS, **settings})]


def test_strength_0_is_the_model_and_strength_1_another_model(
    backbone: LanguageModel, head: ConvexHead, changed: LanguageModel
) -> None:
    unguided = texts(backbone, head, Guidance("none"))
    assert texts(backbone, head, Guidance("distilled", 0.0)) == unguided
    assert texts(backbone, None, Guidance("distilled", 0.0)) == unguided
    assert texts(backbone, None, Guidance("distilled")) == texts(changed) != unguided
    between = texts(backbone, None, Guidance("distilled", 0.5))
    assert between not in (unguided, texts(changed))


@pytest.mark.parametrize("guidance", [*OVER, BEAM], ids=lambda one: one.mode)
def test_the_head_guides_the_policy_as_it_guides_any_model(
    backbone: LanguageModel, head: ConvexHead, changed: LanguageModel, guidance: Guidance
) -> None:
    found = generate(PROMPTS, backbone, head, guidance, with_base=True, **SETTINGS)
    wanted = generate(PROMPTS, changed, head, replace(guidance, over="model"), **SETTINGS)
    assert [one.text for one in found] == [one.text for one in wanted]
    assert [one.score for one in found] == pytest.approx([one.score for one in wanted], rel=1e-3)
    assert found[0].method == f"{wanted[0].method} over the distilled policy"
    if guidance.samples:
        assert texts(backbone, head, replace(guidance, strength=0.0)) == texts(backbone, None, Guidance("distilled"))


@pytest.mark.parametrize("guidance", [Guidance("distilled", 0.7), OVER[0], BEAM], ids=lambda one: one.mode)
def test_what_the_base_model_says_of_each_step(
    backbone: LanguageModel, head: ConvexHead, policy: DistilledPolicy, guidance: Guidance
) -> None:
    """Against logits W h and W (h + s A h) in double precision, of the tokens that were written."""
    (reply,) = generate(PROMPTS[:1], backbone, head, guidance, with_base=True, **SETTINGS)
    engine = Engine(backbone, head)
    job = engine.submit(Request(PROMPTS[0], guidance, SETTINGS["max_new_tokens"], SETTINGS["seed"]))
    while engine.step():
        pass
    assert job.generation is not None
    assert job.generation.text == reply.text
    row, n = backbone.render(PROMPTS[0]).tokens, len(job.tokens)
    steps = n + (job.finish == "stop")
    final = backbone.hidden([row + job.tokens], -1)[0, len(row) - 1 :][:steps].double().numpy()
    W = output_matrix(backbone).astype(float)
    logits = [states @ W.T for states in (final + guidance.change * final @ policy.change.T.astype(float), final)]
    changed, base = (z - np.logaddexp.reduce(z, axis=1, keepdims=True) for z in logits)
    taken = np.arange(n), job.tokens
    assert reply.log_prob == pytest.approx(base[taken].sum(), rel=1e-4)
    assert sum(job.log_probs) == pytest.approx(changed[taken].sum(), rel=1e-4)
    if guidance.mode == "distilled":
        assert reply.divergence == pytest.approx((np.exp(changed) * (changed - base)).sum(), rel=1e-4)
    else:
        assert reply.divergence is None


def test_nothing_is_asked_of_the_base_model_unless_it_is_wanted(backbone: LanguageModel, head: ConvexHead) -> None:
    asked = []
    without = backbone.transformer.get_output_embeddings().register_forward_hook(lambda *_: asked.append(1))
    try:
        (reply,) = generate(PROMPTS[:1], backbone, head, Guidance("distilled"), **SETTINGS)
    finally:
        without.remove()
    assert len(asked) == reply.n_tokens + (reply.n_tokens < SETTINGS["max_new_tokens"])
    assert np.isnan(reply.log_prob)
    assert reply.divergence is None
    (beside,) = generate(PROMPTS[:1], backbone, head, Guidance("distilled"), with_base=True, **SETTINGS)
    assert beside.text == reply.text
    assert beside.divergence > 0 > beside.log_prob


def test_a_policy_that_is_not_there_or_of_other_weights_is_refused(
    plain: LanguageModel, policy: DistilledPolicy, head: ConvexHead
) -> None:
    with pytest.raises(BackboneError, match=r"Found no distilled policy .* expected one\. Fix"):
        generate(PROMPTS, plain, head, Guidance("distilled"), **SETTINGS)
    other = plain.with_policy(replace(policy, spec=replace(policy.spec, weights="0" * 64)))
    assert generate(PROMPTS, other, head, Guidance("token"), **SETTINGS)  # it is not needed here
    for guidance in (Guidance("distilled"), OVER[0]):
        with pytest.raises(SpecMismatch, match="load the model it was distilled from"):
            generate(PROMPTS, other, head, guidance, **SETTINGS)
    with pytest.raises(CoalaError, match="mode 'distilled' samples the policy itself"):
        Guidance("none", over="distilled")


def test_another_mode_brings_what_belongs_to_it() -> None:
    own = Guidance("block", 30.0)
    assert own.changed(mode="distilled") == Guidance("distilled", 1.0)
    assert own.changed(mode="distilled", strength=0.5).change == 0.5
    assert OVER[2].changed(mode="none").change == 0
    assert Guidance("distilled", 0.5).changed(mode="block") == Guidance("block")
    assert OVER[2].changed(mode="token").over == "distilled"
    assert Guidance("shift", budget=3.0).changed(mode="distilled").budget is None
    assert [str(one) for one in (Guidance("distilled"), Guidance("distilled", 0.5), Guidance("distilled", 0.0))] == [
        "distilled",
        "distilled, strength 0.5",
        "unguided",
    ]
    assert str(replace(OVER[0], strength=0.0)) == "distilled"


def test_the_engine_writes_what_generate_writes(backbone: LanguageModel, head: ConvexHead) -> None:
    rng = random.Random(1)
    guidances = [Guidance("distilled"), Guidance("distilled", 0.4), Guidance("none"), *OVER[:3]]
    requests = some_requests(14, guidances, rng)
    engine = Engine(backbone, head, max_rows=8)
    for job, request in zip(run(engine, requests, rng), requests, strict=True):
        same(job.generation, alone(request, backbone, head))
    with pytest.raises(BackboneError, match="Found no distilled policy"):
        Engine(load_backbone(Path(backbone.name), device="cpu"), head).submit(requests[0])


def test_an_exported_checkpoint_greedy_in_transformers_is_the_mode_and_so_is_the_loop_there(
    folder: Path, backbone: LanguageModel, head: ConvexHead, policy: DistilledPolicy, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    export_checkpoint(policy, backbone, tmp_path / "checkpoint")
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    base = AutoModelForCausalLM.from_pretrained(folder)
    greedy: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    loops = {
        "without a head": coala.guide(None, Guidance("distilled"), policy=policy),
        "a silent head over it": coala.guide(head, replace(OVER[0], strength=0.0), policy=policy),
    }
    for prompt in PROMPTS:
        row = torch.tensor([backbone.render(prompt).tokens])
        wanted = checkpoint.generate(row, **greedy)
        for name, loop in loops.items():
            assert torch.equal(base.generate(row, custom_generate=loop, **greedy), wanted), name
        (ours,) = generate([prompt], backbone, head, Guidance("distilled"), temperature=0, **SETTINGS)
        assert ours.text == backbone.decode(wanted[0, row.shape[1] :].tolist())
    with pytest.raises(CoalaError, match="without a distilled policy"):
        coala.guide(head, Guidance("distilled"))


def test_policy_accuracy_is_that_of_the_model_with_its_layer_changed(
    backbone: LanguageModel, head: ConvexHead, changed: LanguageModel
) -> None:
    pairs = [
        Pair(prompt, one, other, str(n))
        for n, (prompt, one, other) in enumerate(
            zip(PROMPTS, ("a story", "good film", "the end"), ("hello", "what do you", "tell me"), strict=True)
        )
    ]
    wanted = policy_accuracy(pairs, backbone.changed(0), changed)
    assert policy_accuracy(pairs, backbone, Guided(head, Guidance("distilled"))) == wanted
    assert policy_accuracy(pairs, backbone, Guided(head, replace(OVER[0], strength=0.0))) == wanted
    assert Guided(head, OVER[1]).unknown == "likelihood not known of a head over the distilled policy"


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .serving import tiny_run

    path = tiny_run(tmp_path_factory.mktemp("distilled"))
    policy_of(coala.load_run(path).backbone, 0.5).save(path / "distilled")
    return path


def test_a_run_generates_answers_and_plays_by_its_policy(distilled_run: Path, served_run: Path) -> None:
    own = coala.load_run(distilled_run)
    settings: dict[str, Any] = {"max_new_tokens": 6, "seed": 1}
    (wanted,) = own.generate(["tell me"], Guidance("distilled"), **settings)
    assert wanted.text != own.generate(["tell me"], Guidance("none"), **settings)[0].text
    line = ["generate", str(distilled_run), "tell me", "--mode", "distilled", "--max-new-tokens", "6", "--seed", "1"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert wanted.text in result.stdout
    manner = ReplySettings(max_new_tokens=6, seed=1, guidance={"mode": "distilled"})
    (answered,) = answer(RunFolder.open(distilled_run), [PromptRow("0", "0", user("tell me"))], manner)
    assert (answered.text, answered.method) == (wanted.text, "distilled")
    (entrant,) = entrants_of(f"{distilled_run}@distilled", "auto", "cpu")
    sampling = AnswerSampling(max_new_tokens=6)
    played = entrant.answer([{"prompt": user("tell me")}], sampling, 1, distilled_run / "played", lambda *_: None)
    assert [one.method for one in played] == ["distilled"]
    # A run that was not distilled says what to do.
    bare = CliRunner().invoke(app, ["generate", str(served_run), "tell me", "--mode", "distilled"])
    assert bare.exit_code
    for words in ("found no distilled policy", "policy.json", f"Fix: coala distil {served_run}"):
        assert words in str(bare.exception)
    with pytest.raises(StoreError, match="Fix: coala distil"):
        next(entrants_of(f"{served_run}@distilled", "auto", "cpu"))


def test_served_replies_of_the_policy_are_those_of_the_library(distilled_run: Path, served_run: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    openai = pytest.importorskip("openai", reason="the client that is served is not installed")
    import httpx

    from .serving import Here

    def offered(server: Here, field: str) -> list[str]:
        """What the server's own document has for a setting of guidance."""
        held = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]["GuidanceSettings"]
        return [word for option in held["properties"][field]["anyOf"] for word in option.get("enum", ())]

    own, bare = coala.load_run(distilled_run), coala.load_run(served_run)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 2}
    asked["messages"] = [{"role": "user", "content": "tell me a story"}]
    settings: dict[str, Any] = {"max_new_tokens": 6, "seed": 2}
    with Here(own.backbone, own.head, guidance=Guidance("distilled")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for given, guidance in (
            ({}, Guidance("distilled")),
            ({"strength": 0.5}, Guidance("distilled", 0.5)),
            ({"mode": "token", "strength": 4.0, "over": "distilled"}, Guidance("token", 4.0, over="distilled")),
            ({"mode": "token", "strength": 4.0}, Guidance("token", 4.0)),
        ):
            (wanted,) = own.generate(["tell me a story"], guidance, **settings)
            body = {"extra_body": {"guidance": given}} if given else {}
            found = client.chat.completions.create(**asked, **body)
            assert found.choices[0].message.content == wanted.text
            assert found.coala["guidance"] == wanted.method
            stream = client.chat.completions.create(**asked, **body, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted.text
        assert "distilled" in offered(server, "mode")
        assert ">distilled<" in httpx.get(server.url).text
        unguided = client.chat.completions.create(**{**asked, "model": "tiny-unguided"})
        assert (
            unguided.choices[0].message.content
            == own.generate(["tell me a story"], Guidance("none"), **settings)[0].text
        )
    with Here(bare.backbone, bare.head, guidance=Guidance("token")) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="Fix: coala distil"):
            client.chat.completions.create(**asked, extra_body={"guidance": {"mode": "distilled"}})
        assert "distilled" not in offered(server, "mode") + offered(server, "over")
        assert ">distilled<" not in httpx.get(server.url).text
    with pytest.raises(StoreError, match="Fix: coala distil"):
        Here(bare.backbone, bare.head, guidance=Guidance("distilled"))
