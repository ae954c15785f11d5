"""Any model: over the families of transformers, states and decoding are the model's own, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import POOLINGS, BackboneError, LanguageModel, load_backbone
from coala.values import user
from tests.menagerie import DECODERS, ENCODERS, FAMILIES, REFUSED, tiny_backbone

Load = Callable[..., LanguageModel]
LENGTHS = (17, 4, 9, 1)
# Their lists of hidden states begin behind the first layer.
SHIFTED = {"mamba", "mamba2"}
# Their attention does not go through transformers' attention interface, or they have none.
UNHEARD = {"gptj", "codegen", "mpt", "xglm", "mamba2", "mpnet", "deberta-v2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny_backbone(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def load(folder: Callable[[str], Path]) -> Load:
    loaded: dict[tuple[str, str], LanguageModel] = {}

    def get(name: str, dtype: str = "float32") -> LanguageModel:
        if (name, dtype) not in loaded:
            loaded[name, dtype] = load_backbone(folder(name), dtype=dtype)
        return loaded[name, dtype]

    return get


def some_rows(backbone: LanguageModel, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, backbone.shape.vocabulary, length).tolist() for length in lengths]


def naive(backbone: LanguageModel, row: list[int], name: str) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
    """Hidden states (T, d) by layer and next-token log-probabilities: one row, no cache, no mask of ours."""
    model: Any = backbone._network.causal
    options = {} if name in ENCODERS else {"use_cache": False}
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row]), output_hidden_states=True, **options)
    states = {
        layer: out.hidden_states[layer - (name in SHIFTED and layer < backbone.n_layers)][0]
        for layer in range(name in SHIFTED, backbone.n_layers + 1)
    }
    return states, out.logits[0, -1].log_softmax(-1) if hasattr(out, "logits") else None


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_states_and_decoding_are_the_model_s_own(load: Load, name: str) -> None:
    backbone = load(name)
    rows = some_rows(backbone)
    alone = [naive(backbone, row, name) for row in rows]
    for layer in range(name in SHIFTED, backbone.n_layers + 1):
        hidden = backbone.hidden(rows, layer)
        for b, row in enumerate(rows):
            close(hidden[b, : len(row)], alone[b][0][layer])
            close(backbone.hidden([row], layer)[0], alone[b][0][layer])
    if name in ENCODERS:
        return
    prefix = backbone.start(rows[:3], 1)
    for step in range(3):
        candidates = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]]) + step
        peeked = prefix.peek(candidates)
        # The second step pushes tokens that nobody peeked.
        chosen = candidates[:, 1] if step != 1 else candidates[:, 1] + 7
        prefix.push(chosen)
        rows = [[*row, int(token)] for row, token in zip(rows, chosen, strict=False)]
        for b, row in enumerate(rows):
            states, log_probs = naive(backbone, row, name)
            assert log_probs is not None
            close(prefix.state()[b], states[1][-1])
            close(prefix.log_probs()[b], log_probs)
            if step != 1:
                close(peeked[b, 1], states[1][-1])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_whose_states_depend_on_the_batch_are_refused(folder: Callable[[str], Path], name: str) -> None:
    _, said = REFUSED[name]
    with pytest.raises(BackboneError, match=said):
        load_backbone(folder(name))
    if "front" in said:  # as features they are sound: padding behind a row is never seen
        backbone = load_backbone(folder(name), generation=False)
        rows = some_rows(backbone)
        for layer in range(backbone.n_layers + 1):
            hidden = backbone.hidden(rows, layer)
            for b, row in enumerate(rows):
                close(hidden[b, : len(row)], backbone.hidden([row], layer)[0])


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(ENCODERS)))
def test_attention_is_heard_where_there_is_any_or_refused(load: Load, name: str) -> None:
    """Whatever family: decoding pools by attention as extraction does, at one layer at least."""
    backbone = load(name)
    rows, pooling, found = some_rows(backbone)[:3], POOLINGS["attn"], 0
    starts = torch.tensor([len(row) for row in rows])
    for layer in range(1, backbone.n_layers + 1):
        hears = True
        try:
            backbone.spec(layer, "attn")
        except BackboneError:
            hears = False
        # In a model of several kinds of layers each answers for itself.
        kinds = getattr(backbone._network.config, "layer_types", None) or []
        if kinds:
            assert hears == (kinds[layer - 1] in {"full_attention", "sliding_attention", "chunked_attention"})
        if not hears:
            continue
        found += 1
        prefix = backbone.start(rows, layer, scored=True)
        state, grown = pooling.begin(prefix), rows
        for token in (11, 12):
            prefix.push(torch.full((3,), token))
            state.push(prefix.state())
            grown = [[*row, token] for row in grown]
        expected = pooling.pool(backbone.hidden(grown, layer, scored=True), starts, starts + 2)
        close(state.value, expected)
    assert bool(found) == (name not in UNHEARD)


def test_a_token_s_share_of_a_mixture_of_experts_is_what_costs(load: Load) -> None:
    # Attention, two of four experts with three matrices each, and the router.
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert load("mixtral").shape.body_matmul_parameters == 3 * (attention + 2 * 3 * 32 * 48 + 4 * 32)
    sparse, dense = 2 * 3 * 32 * 16 + 4 * 32, 3 * 32 * 48
    assert load("qwen3-moe").shape.body_matmul_parameters == 3 * attention + 2 * sparse + dense


# --- encoders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_score_and_do_not_generate(load: Load, name: str) -> None:
    backbone = load(name)
    assert not backbone.generates
    assert backbone.template.startswith("continuation:")
    short, long = (backbone.render(user("a good film"), reply) for reply in (" yes", " a bad film is a long evening"))
    rows = [short.tokens, long.tokens]
    start, stop = torch.tensor([short.start, long.start]), torch.tensor([short.stop, long.stop])
    for pooling in POOLINGS.values():
        if pooling.scored and name in UNHEARD:
            with pytest.raises(BackboneError, match="attention interface"):
                backbone.hidden(rows, scored=True)
            continue
        pooled = pooling.pool(backbone.hidden(rows, scored=pooling.scored), start, stop)
        assert pooled.shape == (2, backbone.width)
        for b, row in enumerate(rows):
            alone = backbone.hidden([row], scored=pooling.scored)
            close(pooled[b], pooling.pool(alone, start[b : b + 1], stop[b : b + 1])[0])
    with pytest.raises(BackboneError, match="only makes features"):
        backbone.start(rows)
    with pytest.raises(BackboneError, match="need a language-model head"):
        backbone.require_head("Log-probabilities")


# --- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 16 * 2**-8), ("float16", 16 * 2**-11)])
@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_half_precision_rounds_and_no_more(load: Load, name: str, dtype: str, tolerance: float) -> None:
    """Final states in 8 (bfloat16) and 11 (float16) bits are those of float32 up to 16 units of rounding."""
    full, half = load(name), load(name, dtype)
    assert half.dtype == getattr(torch, dtype)
    rows = some_rows(full, (17,))
    expected, found = full.hidden(rows)[0], half.hidden(rows)[0]
    distance = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # The median: where two experts are nearly tied, rounding may choose the other one.
    assert float(distance.median()) < tolerance
    assert full.weights == half.weights
