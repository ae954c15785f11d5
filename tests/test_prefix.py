"""Prefixes: cached decoding equals the uncached model, however rows are padded, peeked, selected and pushed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import coala.backbone.attention
from coala.backbone import POOLINGS, BackboneError, LanguageModel, load_backbone
from tests.menagerie import CONTEXT, DECODERS, tiny_backbone
from tests.tolerances import NETWORK

TREELESS = {"gpt-neo", "bloom", "mamba"}
# Their attention is a loop of their own, or none.
UNHEARD = {"gpt-neo", "bloom", "mamba", "falcon"}
# Longer than every sliding window of the menagerie, and of three lengths.
LENGTHS = [19, 3, 11]
Load = Callable[[str], LanguageModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    loaded: dict[str, LanguageModel] = {}

    def get(name: str) -> LanguageModel:
        if name not in loaded:
            loaded[name] = load_backbone(tiny_backbone(name, tmp_path_factory.mktemp(name)))
        return loaded[name]

    return get


def some_rows(backbone: LanguageModel, lengths: list[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, backbone.shape.vocabulary, length).tolist() for length in lengths]


def naive(backbone: LanguageModel, row: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (T, d) at ``layer`` and next-token log-probabilities (V,): one row, no cache, no mask of ours."""
    model: Any = backbone._network.causal
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False)
    # Mamba's list alone begins behind the first layer.
    shift = model.config.model_type == "mamba" and 0 < layer < backbone.n_layers
    return out.hidden_states[layer - shift][0], out.logits[0, -1].log_softmax(-1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))


def agrees(prefix: Any, backbone: LanguageModel, rows: list[list[int]], layer: int) -> None:
    """The prefix knows of ``rows`` what the uncached model knows."""
    assert prefix.lengths.tolist() == [len(row) for row in rows]
    assert prefix.room == backbone.max_tokens - max(map(len, rows))
    for b, row in enumerate(rows):
        states, log_probs = naive(backbone, row, layer)
        close(prefix.state()[b], states[-1])
        close(prefix.log_probs()[b], log_probs)


@pytest.mark.parametrize(
    ("layer", "tree"),
    [
        (-1, "auto"),
        (1, "never"),
        pytest.param(1, "auto", marks=pytest.mark.nightly),
        pytest.param(-1, "never", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("name", DECODERS)
def test_cached_decoding_equals_the_uncached_model(load: Load, name: str, layer: int, tree: Any) -> None:
    backbone = load(name)
    rows = some_rows(backbone)
    prefix = backbone.start(rows, layer, tree=tree)
    assert prefix.tree == (tree == "auto" and name not in TREELESS)
    assert bool(prefix.note) != prefix.tree
    agrees(prefix, backbone, rows, layer)
    for b, row in enumerate(rows):
        close(prefix.prompt_mean()[b], naive(backbone, row, layer)[0].mean(0))

    rng = np.random.default_rng(1)
    for step in range(8):
        candidates = torch.from_numpy(rng.integers(3, backbone.shape.vocabulary, (len(rows), 4)))
        if step % 3 == 0:  # a token nobody peeked
            chosen = (candidates[:, 0] + 1) % backbone.shape.vocabulary
        else:
            peeked = prefix.peek(candidates)
            for b, row in enumerate(rows):
                for j, token in enumerate(candidates[b].tolist()):
                    close(peeked[b, j], naive(backbone, [*row, token], layer)[0][-1])
            chosen = candidates[torch.arange(len(rows)), torch.from_numpy(rng.integers(0, 4, len(rows)))]
        if step == 5:  # one row peeked, the others not: all go through a plain forward
            chosen = torch.where(torch.arange(len(rows)) == 0, chosen, (candidates.max(1).values + 1) % 300)
        if step == 4:  # after a peek: drop the longest row, repeat and reorder the others
            order = [2, 1, 2, 1]
            prefix, rows, chosen = prefix.select(order), [list(rows[b]) for b in order], chosen[order]
        prefix.push(chosen)
        rows = [[*row, token] for row, token in zip(rows, chosen.tolist(), strict=True)]
        agrees(prefix, backbone, rows, layer)


@pytest.mark.parametrize("tree", ["auto", "never"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "mamba"])
def test_branches_grow_on_their_own(load: Load, name: str, tree: Any) -> None:
    backbone = load(name)
    rows = some_rows(backbone, [9, 4])
    prefix = backbone.start(rows, tree=tree)
    branch = prefix.select([1, 0, 1])
    branch.push(torch.tensor([5, 6, 7]))
    branch.push(torch.tensor([8, 9, 10]))
    agrees(prefix, backbone, rows, -1)
    prefix.peek(torch.tensor([[11, 12], [13, 14]]))
    other = prefix.select([0])
    prefix.push(torch.tensor([12, 13]))
    other.push(torch.tensor([11]))
    agrees(prefix, backbone, [[*rows[0], 12], [*rows[1], 13]], -1)
    agrees(other, backbone, [[*rows[0], 11]], -1)
    agrees(branch, backbone, [[*rows[1], 5, 8], [*rows[0], 6, 9], [*rows[1], 7, 10]], -1)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in TREELESS])
def test_joined_rows_grow_as_they_would_by_themselves(load: Load, name: str) -> None:
    """Rows of other lengths, some of which have grown and have candidates, whose freed memory is full of nan."""
    backbone = load(name)
    rows = some_rows(backbone, [6, 13, 2])
    grown, fresh = backbone.start(rows[:2], 1), backbone.start(rows[2:], 1)
    grown.push(torch.tensor([5, 6]))
    grown.peek(torch.tensor([[7, 8], [9, 10]]))
    for columns in grown._memory.layers:  # type: ignore[attr-defined]
        columns.keys[:, :, columns.used :] = columns.values[:, :, columns.used :] = torch.nan
    both = type(grown).joined([fresh, grown])
    rows = [rows[2], [*rows[0], 5], [*rows[1], 6]]
    agrees(both, backbone, rows, 1)
    for step in range(3):
        candidates = torch.tensor([[11, 12], [13, 14], [15, 16]]) + step
        both.peek(candidates)
        both.push(candidates[:, step % 2])
        rows = [[*row, int(token)] for row, token in zip(rows, candidates[:, step % 2], strict=True)]
        agrees(both, backbone, rows, 1)
    agrees(grown, backbone, [rows[1][:7], rows[2][:14]], 1)
    never = backbone.start(rows, 1, tree="never")
    assert both.joins
    assert not never.joins
    with pytest.raises(BackboneError, match="can be joined"):
        type(both).joined([both, never])


def test_a_peeked_token_costs_nothing_more(load: Load) -> None:
    backbone = load("llama")
    prefix = backbone.start(some_rows(backbone))
    shapes: list[tuple[int, ...]] = []
    layer = backbone._network.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    try:
        prefix.peek(torch.tensor([[4, 5, 6]] * 3))
        prefix.push(torch.tensor([6, 4, 5]))
        prefix.log_probs()
        assert shapes == [(3, 3)]
        prefix.push(torch.tensor([6, 4, 5]))
        assert shapes == [(3, 3), (3, 1)]
    finally:
        handle.remove()


def test_a_tree_step_copies_no_cache(load: Load) -> None:
    backbone = load("gpt2")
    prefix = backbone.start(some_rows(backbone))
    columns = prefix._memory.layers[0]  # type: ignore[attr-defined]
    before = columns.keys.data_ptr()
    for token in range(4, 20):
        prefix.peek(torch.tensor([[token, token + 1]] * 3))
        prefix.push(torch.tensor([token] * 3))
    assert columns.keys.data_ptr() == before


def test_a_full_context_is_an_error(load: Load) -> None:
    backbone = load("gpt2")
    rows = some_rows(backbone, [CONTEXT - 1, 4])
    prefix = backbone.start(rows)
    assert prefix.room == 1
    prefix.push(torch.tensor([5, 5]))
    for act in (lambda: prefix.push(torch.tensor([5, 5])), lambda: prefix.peek(torch.tensor([[5], [5]]))):
        with pytest.raises(BackboneError, match=f"context of {CONTEXT} tokens is full"):
            act()
    short = prefix.select([1])
    assert short.room == CONTEXT - 5
    short.push(torch.tensor([6]))
    agrees(short, backbone, [[*rows[1], 5, 6]], -1)


def test_what_cannot_be_decoded_is_refused(load: Load) -> None:
    with pytest.raises(BackboneError, match="cannot share a forward"):
        load("bloom").start([[1, 2]], tree="always")
    with pytest.raises(BackboneError, match="only makes features"):
        load("bert").start([[1, 2]])
    with pytest.raises(BackboneError, match="without tokens"):
        load("gpt2").start([[1], []])
    with pytest.raises(BackboneError, match="another model"):
        load("gpt2").start([[100_000]])
    prefix = load("gpt2").start([[1, 2], [3]])
    with pytest.raises(BackboneError, match=r"\(B, k\)"):
        prefix.peek(torch.tensor([1, 2]))
    with pytest.raises(BackboneError, match="as many tokens"):
        prefix.push(torch.tensor([1]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_tree_in_every_attention_and_precision(tmp_path: Path, name: str, dtype: str, attention: str) -> None:
    backbone = load_backbone(tiny_backbone(name, tmp_path), dtype=dtype)
    backbone._network.config._attn_implementation = attention
    rows = some_rows(backbone)
    candidates = torch.tensor([[4, 5, 6]] * 3)
    tree, copied = backbone.start(rows), backbone.start(rows, tree="never")
    assert tree.tree
    assert not copied.tree
    scale = 1e-4 if dtype == "float32" else 0.1
    found, expected = tree.peek(candidates), copied.peek(candidates)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < scale


# --- pooling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(POOLINGS))
def test_pooling_ignores_padding(name: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 6, 4)
    start, length = torch.tensor([2, 0, 3]), torch.tensor([5, 6, 3])
    expected = POOLINGS[name].pool(hidden, start, length)
    padded = torch.cat([hidden, torch.full((3, 5, 4), torch.nan)], dim=1)
    for b in range(3):
        padded[b, length[b] :] = torch.inf
    torch.testing.assert_close(POOLINGS[name].pool(padded, start, length), expected)
    for b in range(3):
        s, n = int(start[b]), int(length[b])
        reply = hidden[b, s:n] if n > s else hidden[b, n - 1 : n]
        weights = reply[:, -1:].exp()
        naive_value = {
            "mean": reply.mean(0),
            "mean_all": hidden[b, :n].mean(0),
            "last": hidden[b, n - 1],
            "attn": (weights * reply[:, :-1]).sum(0) / weights.sum(),
        }[name]
        torch.testing.assert_close(expected[b], naive_value)


def test_attention_scores_of_any_size_are_weighed(load: Load) -> None:
    """A running mean of weights exp(score) neither overflows nor forgets."""
    backbone, pooling = load("llama"), POOLINGS["attn"]
    torch.manual_seed(0)
    for scores in ([-300.0, -302.0, -301.0], [300.0, -300.0, 298.0], [-60.0, 0.0, -69.0]):
        hidden = torch.cat([torch.randn(1, 3, 4), torch.tensor(scores)[None, :, None]], dim=-1)
        state = pooling.begin(backbone.start([[1, 2]], scored=True))
        state.total, state.empty = torch.zeros(1, 4), torch.zeros(1, 4)  # type: ignore[attr-defined]
        for t in range(3):
            expected = pooling.pool(hidden, torch.tensor([0]), torch.tensor([t + 1]))
            torch.testing.assert_close(state.peek(hidden[:, t : t + 1])[:, 0], expected)
            state.push(hidden[:, t])
            torch.testing.assert_close(state.value, expected)


CASES = [
    *(("llama", pooling, tree) for pooling in POOLINGS for tree in ("auto", "never")),
    *((name, "attn", tree) for name in DECODERS if name not in {*UNHEARD, "llama"} for tree in ("auto", "never")),
]


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize(("name", "pooled", "tree"), CASES)
def test_pooling_while_decoding_is_pooling_at_extraction(
    load: Load, name: str, pooled: str, tree: Any, layer: int
) -> None:
    backbone, pooling = load(name), POOLINGS[pooled]
    rows = some_rows(backbone)
    prefix = backbone.start(rows, layer, tree=tree, scored=pooling.scored)
    read = backbone.hidden(rows, layer, scored=pooling.scored)
    close(pooling.prompt(prefix), pooling.pool(read, torch.zeros(3, dtype=torch.long), torch.tensor(LENGTHS)))
    state = pooling.begin(prefix)
    starts = torch.tensor(LENGTHS)

    def extracted(rows: list[list[int]]) -> torch.Tensor:
        lengths = torch.tensor([len(row) for row in rows])
        return pooling.pool(backbone.hidden(rows, layer, scored=pooling.scored), starts, lengths)

    close(state.value, extracted(rows))
    for step in range(5):
        candidates = torch.tensor([[10, 20], [30, 40], [50, 60]]) + step
        features = state.peek(prefix.peek(candidates))
        for j in range(2):
            close(features[:, j], extracted([[*row, int(c)] for row, c in zip(rows, candidates[:, j], strict=True)]))
        prefix.push(candidates[:, 1])
        state.push(prefix.state())
        rows = [[*row, int(c)] for row, c in zip(rows, candidates[:, 1], strict=True)]
        close(state.value, features[:, 1])
        if step == 2:
            order = [2, 0, 0]
            prefix, state, rows, starts = (
                prefix.select(order),
                state.select(order),
                [rows[b] for b in order],
                starts[order],
            )
            close(state.value, extracted(rows))


# --- attention scores --------------------------------------------------------------------------------------------


def told(backbone: LanguageModel, row: list[int], layer: int) -> torch.Tensor:
    """The attention (T,) that each token pays itself in the layer that makes hidden state ``layer``, by the model."""
    model, config = backbone._network.causal, backbone._network.config
    kernel, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            weights = model(input_ids=torch.tensor([row]), output_attentions=True, use_cache=False).attentions
    finally:
        config._attn_implementation = kernel
    return weights[layer - 1][0].diagonal(dim1=-2, dim2=-1).mean(0)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in DECODERS if name not in UNHEARD])
def test_scores_are_the_attention_that_the_model_tells(
    load: Load, name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(name)
    if backbone._network.config._attn_implementation == "eager" and kernel == "sdpa":
        pytest.skip(f"{name} has no fused attention")
    rows = some_rows(backbone)
    expected = [{layer: told(backbone, row, layer) for layer in (1, 2, backbone.n_layers)} for row in rows]
    monkeypatch.setattr(backbone._network.config, "_attn_implementation", kernel)
    for portion in (1 << 24, 200):  # all queries at once, and a few at a time
        monkeypatch.setattr(coala.backbone.attention, "WEIGHTS", portion)
        for layer in expected[0]:
            plain, scored = backbone.hidden(rows, layer), backbone.hidden(rows, layer, scored=True)
            for b, row in enumerate(rows):
                assert torch.equal(scored[b, : len(row), :-1], plain[b, : len(row)])
                weights = scored[b, : len(row), -1].exp()
                torch.testing.assert_close(weights, expected[b][layer], rtol=NETWORK, atol=NETWORK)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_only_the_layer_that_is_heard_is_changed_and_only_for_a_while(
    load: Load, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(name)
    network = backbone._network
    configs = [(module, module.config) for module in network.body.modules() if "config" in vars(module)]
    heard: list[Any] = []
    attend = coala.backbone.attention._attend

    def counted(module: Any, *args: Any, **options: Any) -> Any:
        heard.append(module)
        return attend(module, *args, **options)

    monkeypatch.setattr(coala.backbone.attention, "_attend", counted)
    backbone.hidden([[4, 5, 6]], 2, scored=True)
    assert [m for m in heard if m not in list(network.layers[1].modules())] == []
    assert len(heard) == 1
    backbone.hidden([[4, 5, 6]], 2)
    backbone.start([[4, 5, 6]]).push(torch.tensor([7]))
    assert len(heard) == 1
    assert all(module.config is config for module, config in configs)


def test_a_layer_without_attention_scores_is_refused(load: Load) -> None:
    for name in sorted(UNHEARD):
        with pytest.raises(BackboneError, match="attention interface"):
            load(name).spec(pooling="attn")
    with pytest.raises(BackboneError, match="no attention made"):
        load("llama").spec(0, "attn")
    load("llama").spec(1, "attn")
