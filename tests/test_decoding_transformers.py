"""The loop for ``model.generate``: transformers' own text at strength 0, this package's own text otherwise."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import coala
from coala.backbone import BackboneError, LanguageModel, load_backbone
from coala.decoding import Guidance, generate
from coala.values import CoalaError, SpecMismatch, user
from tests.menagerie import tiny_backbone
from tests.test_decoding_naive import PROMPTS, make_head
from tests.waiting import PATIENCE

TEXTS = [prompt[0].text for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any, Any]:
    folder = tiny_backbone(request.param, tmp_path_factory.mktemp(request.param), seed=3)
    backbone = load_backbone(folder, device="cpu")
    return backbone, AutoModelForCausalLM.from_pretrained(folder).eval(), backbone._renderer.tokenizer


def inputs(backbone: LanguageModel, prompts: Any = PROMPTS) -> dict[str, torch.Tensor]:
    rows = [backbone.render(prompt).tokens for prompt in prompts]
    width = max(map(len, rows))
    pad = [[0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor([p + row for p, row in zip(pad, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * len(p) + [1] * len(row) for p, row in zip(pad, rows, strict=True)]),
    }


def own(model: Any, found: torch.Tensor, given: dict[str, torch.Tensor]) -> list[list[int]]:
    """The replies' tokens up to their first stop token."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = found[:, given["input_ids"].shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def own_all(found: torch.Tensor, given: dict[str, torch.Tensor]) -> list[int]:
    tokens: list[int] = found[0, given["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}], ids=str)
def test_greedy_text_at_strength_zero_is_that_of_transformers(both: Any, options: dict[str, Any]) -> None:
    backbone, model, _ = both
    given, settings = inputs(backbone), {"do_sample": False, "max_new_tokens": 15, "pad_token_id": 0, **options}
    expected = model.generate(**given, **settings)
    head = make_head(backbone)
    found = model.generate(**given, **settings, custom_generate=coala.guide(head, Guidance("token", strength=0.0)))
    assert torch.equal(found, expected)
    told = model.generate(
        **given,
        **settings,
        custom_generate=coala.guide(head, Guidance("token", strength=0.0)),
        return_dict_in_generate=True,
    )
    assert torch.equal(told.sequences, expected)
    # Greedy samples are all the same: the best of them means the best token.
    best = [
        model.generate(**given, **settings, custom_generate=coala.guide(head, Guidance(mode, strength=5.0)))
        for mode in ("token", "block")
    ]
    assert torch.equal(*best)
    # Asking the head changes the text, and the options go on to be obeyed.
    guided = model.generate(**given, **settings, custom_generate=coala.guide(head, Guidance("token", strength=5.0)))
    assert not torch.equal(guided, expected)
    if "no_repeat_ngram_size" in options:
        for row in own(model, guided, given):
            pairs = list(itertools.pairwise(row))
            assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance("token"),
        Guidance.paper(),
        Guidance("shift", budget=4.0),
        Guidance("block", candidates=3, block_tokens=4),
        Guidance("best_of", candidates=3),
        Guidance("beam", width=2, candidates=3, strength=0.3),
    ],
    ids=str,
)
def test_sampled_text_is_that_of_generate(both: Any, guidance: Guidance) -> None:
    backbone, model, _ = both
    head, given = make_head(backbone), inputs(backbone, PROMPTS[:1])
    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()).item())
    settings = {"max_new_tokens": 12, "temperature": 0.8}
    wanted = generate(PROMPTS[:1], backbone, head, guidance, seed=seed, prompt_ids=["0"], **settings)  # type: ignore[arg-type]
    torch.manual_seed(11)
    found = model.generate(
        **given,
        **settings,
        do_sample=True,
        top_k=guidance.top_k,
        top_p=guidance.top_p,
        pad_token_id=0,
        custom_generate=coala.guide(head, guidance),
    )
    assert backbone._renderer.decode(own(model, found, given)[0]).removeprefix(" ") == wanted[0].text
    again = model.generate(
        **given, **settings, do_sample=True, pad_token_id=0, custom_generate=coala.guide(head, guidance)
    )
    if guidance.samples:
        assert not torch.equal(again, found), "the seed goes on"


class _Recorder(BaseStreamer):
    """What a streamer was handed, and where it ended."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamers_hear_every_token_and_the_end(both: Any) -> None:
    backbone, model, tokenizer = both
    head, given = make_head(backbone), inputs(backbone, PROMPTS[:1])
    for guidance in (
        Guidance("token"),
        Guidance("block", candidates=2, block_tokens=3),
        Guidance("best_of", candidates=2),
    ):
        text, recorder = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=PATIENCE), _Recorder()
        for streamer in (text, recorder):
            torch.manual_seed(5)
            found = model.generate(
                **given,
                max_new_tokens=10,
                do_sample=True,
                pad_token_id=0,
                custom_generate=coala.guide(head, guidance, streamer=streamer),
            )
        assert recorder.heard == [given["input_ids"][0].tolist(), *([token] for token in own_all(found, given))]
        assert recorder.ended == 1
        assert "".join(text)


class _UpTo(StoppingCriteria):
    """Ends a reply once it has a token of some kind."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids[:, self.start :] % 7 == 0).any(1)


@pytest.mark.parametrize("guidance", [Guidance("token"), Guidance("block", candidates=2, block_tokens=3)], ids=str)
def test_stopping_criteria_end_replies(both: Any, guidance: Guidance) -> None:
    backbone, model, _ = both
    given = inputs(backbone)
    found = model.generate(
        **given,
        max_new_tokens=30,
        do_sample=True,
        pad_token_id=0,
        num_return_sequences=2,
        stopping_criteria=StoppingCriteriaList([_UpTo(given["input_ids"].shape[1])]),
        custom_generate=coala.guide(make_head(backbone), guidance),
    )
    assert len(found) == 2 * len(PROMPTS)
    assert len({tuple(row.tolist()) for row in found}) > len(PROMPTS), "two replies to a prompt are two samples"
    for row in own(model, found, given):
        at = [i for i, token in enumerate(row) if token % 7 == 0]
        assert not at or set(row[at[0] + 1 :]) <= {0}


def test_what_a_guided_loop_does_not_have_is_refused(both: Any) -> None:
    backbone, model, tokenizer = both
    head, given = make_head(backbone), inputs(backbone)
    for settings, message in (
        ({"num_beams": 2}, "num_beams is 2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ):
        with pytest.raises(CoalaError, match=message):
            model.generate(**given, max_new_tokens=3, custom_generate=coala.guide(head), **settings)
    with pytest.raises(CoalaError, match="one reply; found 3"):
        model.generate(
            **given, max_new_tokens=3, custom_generate=coala.guide(head, streamer=TextIteratorStreamer(tokenizer))
        )
    cache = model(**given, use_cache=True).past_key_values
    longer = {name: torch.cat([ids, torch.ones_like(ids[:, :1])], dim=1) for name, ids in given.items()}
    with pytest.raises(CoalaError, match="holds tokens already"):
        model.generate(**longer, max_new_tokens=3, past_key_values=cache, custom_generate=coala.guide(head))
    narrow = replace(head, **{name: getattr(head, name)[..., 1:] for name in ("gates", "weights", "linear")})
    deep = replace(head, spec=replace(head.spec, layer=99))
    for wrong in (narrow, deep):
        with pytest.raises(SpecMismatch, match="wide"):
            model.generate(**given, max_new_tokens=3, custom_generate=coala.guide(wrong))
    changed = replace(head, spec=replace(head.spec, weights="0" * 64))
    with pytest.raises(SpecMismatch, match="now holds"):
        model.generate(**given, max_new_tokens=3, custom_generate=coala.guide(changed))


def test_a_held_model_has_no_text(both: Any) -> None:
    from coala.backbone.external_model import hold

    held = hold(both[1], [1])
    for use in (lambda: held.render(user("a")), lambda: held.decode([1]), lambda: held.template):
        with pytest.raises(BackboneError, match="no text"):
            use()
