"""Features: what one-row-at-a-time encoding gives, in any order and batch, and the same bytes after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coala.backbone.network
import coala.features.prefix_tree
from coala.backbone import POOLINGS, BackboneError, LanguageModel, load_backbone
from coala.backbone.network import Network
from coala.features import distinct_tokens, extract, survey
from coala.features.prefix_tree import _forest
from coala.store import FeatureStore, StoreError
from coala.values import CoalaError, FeatureSet, Pair, SpecMismatch, Turn, user
from tests.menagerie import BACKBONES, tiny_backbone
from tests.tolerances import NETWORK
from tests.waiting import wait_for

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "tells",
    "good",
    "story",
    "to",
    "little",
    "girl",
    "who",
    "liked",
    "it",
]


def some_pairs(n: int, seed: int = 0) -> list[Pair]:
    """Prompts are shared by two pairs each; every fifth pair repeats an earlier reply."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    pairs: list[Pair] = []
    for i in range(n):
        prompt = pairs[-1].prompt if i % 2 else user(words(20))
        chosen = pairs[-1].chosen if i % 5 == 4 and i % 2 else words(30)
        pairs.append(Pair(prompt, chosen, words(12), f"group {i // 2}"))
    return pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> LanguageModel:
    return load_backbone(folder)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coala.features.prefix_tree, "SHARD_ROWS", 8)


def naive(pairs: list[Pair], backbone: LanguageModel, spec: Any) -> np.ndarray[Any, Any]:
    """(n, 2, d): every reply rendered and encoded by itself."""
    features = []
    for pair in pairs:
        for reply in (pair.chosen, pair.rejected):
            row = backbone.render(pair.prompt, reply, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
            states = backbone.hidden([row.tokens], spec.layer, scored=POOLINGS[spec.pooling].scored)
            pooled = POOLINGS[spec.pooling].pool(states, torch.tensor([row.start]), torch.tensor([row.stop]))
            features.append(pooled[0].numpy())
    return np.array(features).reshape(len(pairs), 2, -1)


def same(a: FeatureSet, b: FeatureSet) -> bool:
    def bits(features: FeatureSet) -> list[bytes | None]:
        arrays = (features.chosen, features.rejected, features.prompt, features.log_ratio)
        return [None if array is None else array.tobytes() for array in arrays]

    return bits(a) == bits(b) and a.group.tolist() == b.group.tolist() and a.spec == b.spec


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "last", "layer": 1},
        {"pooling": "mean_all", "max_tokens": 20},
        {"pooling": "attn"},
        {"pooling": "attn", "layer": 1, "max_tokens": 20},
        {"ends_with_eos": True},
    ],
)
@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_features_are_those_of_rows_by_themselves(
    backbone: LanguageModel, options: dict[str, Any], batch_tokens: int
) -> None:
    pairs = some_pairs(12)
    spec = backbone.spec(**options)
    features = extract(pairs, backbone, spec, batch_tokens=batch_tokens)
    expected = naive(pairs, backbone, spec)
    np.testing.assert_allclose(features.chosen, expected[:, 0], rtol=NETWORK, atol=NETWORK)
    np.testing.assert_allclose(features.rejected, expected[:, 1], rtol=NETWORK, atol=NETWORK)
    assert features.group.tolist() == [pair.group for pair in pairs]
    assert features.spec == spec


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_other_backbones(tmp_path: Path, name: str) -> None:
    backbone = load_backbone(tiny_backbone(name, tmp_path))
    pairs = [*some_pairs(6), Pair(user("hello"), "", "fine", "g")]
    spec = backbone.spec(max_tokens=40)
    features = extract(pairs, backbone, spec, batch_tokens=120)
    expected = naive(pairs, backbone, spec)
    np.testing.assert_allclose(features.chosen, expected[:, 0], rtol=NETWORK, atol=NETWORK)
    np.testing.assert_allclose(features.rejected, expected[:, 1], rtol=NETWORK, atol=NETWORK)
    assert survey(pairs, backbone, spec).facts["empty_replies"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "last", "layer": 1},
        {"pooling": "mean_all", "max_tokens": 20},
        {"pooling": "attn"},
        {"pooling": "attn", "layer": 1, "max_tokens": 20},
        {"ends_with_eos": True},
    ],
)
def test_prompts_are_pooled_as_rows_by_themselves(backbone: LanguageModel, options: dict[str, Any]) -> None:
    pairs, spec = some_pairs(8), backbone.spec(**options)
    features = extract(pairs, backbone, spec, prompt_features=True, batch_tokens=150)
    plain = extract(pairs, backbone, spec, batch_tokens=150)
    np.testing.assert_allclose(features.chosen, plain.chosen, rtol=NETWORK, atol=NETWORK)
    assert features.prompt is not None
    for pair, found in zip(pairs, features.prompt, strict=True):
        tokens = backbone.render(pair.prompt, max_tokens=spec.max_tokens).tokens
        states = backbone.hidden([tokens], spec.layer, scored=spec.pooling == "attn")[0].numpy()
        if spec.pooling == "attn":
            expected = np.average(states[:, :-1], axis=0, weights=np.exp(states[:, -1]))
        else:
            expected = states[-1] if spec.pooling == "last" else states.mean(0)
        np.testing.assert_allclose(found, expected, rtol=NETWORK, atol=NETWORK)


def test_each_prompt_is_encoded_once(backbone: LanguageModel) -> None:
    pairs, spec = some_pairs(8), backbone.spec()
    plain, plan = survey(pairs, backbone, spec), survey(pairs, backbone, spec, prompt_features=True)
    assert plan.facts["prompts"] == len({pair.prompt for pair in pairs}) == 4
    assert plan.facts["rows"] == plain.facts["rows"] + 4
    assert {**plan.facts, **{n: plain.facts[n] for n in ("rows", "tokens")}} == {**plain.facts, "prompts": 4}
    assert sorted(plan.reply_lengths) == sorted(plain.reply_lengths)
    seen: list[tuple[int, int, int]] = []
    extract(
        pairs, backbone, spec, prompt_features=True, batch_tokens=1, plan=plan, on_batch=lambda *now: seen.append(now)
    )
    assert seen[-1] == (8, 8, plan.facts["tokens"])


@pytest.mark.parametrize("options", [{}, {"layer": 1, "max_tokens": 20}, {"ends_with_eos": True}])
def test_log_ratios_are_those_of_transformers(folder: Path, backbone: LanguageModel, options: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    pairs, spec = [*some_pairs(6), Pair(user("dog"), "fox", "", "g")], backbone.spec(**options)

    def log_prob(pair: Pair, reply: str) -> float:
        row = backbone.render(pair.prompt, reply, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
        with torch.no_grad():
            logs = plain(input_ids=torch.tensor([row.tokens])).logits[0].double().log_softmax(-1)
        return sum(float(logs[t - 1, row.tokens[t]]) for t in range(row.start, row.stop))

    features = extract(pairs, backbone, spec, log_ratios=True, prompt_features=True, batch_tokens=150)
    expected = [log_prob(pair, pair.chosen) - log_prob(pair, pair.rejected) for pair in pairs]
    np.testing.assert_allclose(features.log_ratio, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(features.chosen, naive(pairs, backbone, spec)[:, 0], rtol=NETWORK, atol=NETWORK)


def test_logits_are_computed_in_chunks(backbone: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, spec = some_pairs(6), backbone.spec()
    whole = extract(pairs, backbone, spec, log_ratios=True)
    asked: list[int] = []
    log_probs = Network.log_probs

    def counted(self: Network, final: torch.Tensor) -> torch.Tensor:
        asked.append(len(final))
        return log_probs(self, final)

    monkeypatch.setattr(coala.backbone.network, "LOGITS", 5 * backbone.shape.vocabulary)
    monkeypatch.setattr(Network, "log_probs", counted)
    chunked = extract(pairs, backbone, spec, log_ratios=True)
    np.testing.assert_allclose(chunked.log_ratio, whole.log_ratio, rtol=NETWORK, atol=NETWORK)
    assert max(asked) == 5
    assert sum(asked) == survey(pairs, backbone, spec).reply_lengths.sum()


def test_log_ratios_need_a_language_model_head(tmp_path: Path, folder: Path) -> None:
    for model in (load_backbone(tiny_backbone("bert", tmp_path)), load_backbone(folder, generation=False)):
        with pytest.raises(BackboneError, match="Log ratios need a language-model head"):
            extract(some_pairs(2), model, model.spec(max_tokens=40), log_ratios=True)


def test_prompts_of_an_encoder_leave_its_closing_token_out(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_backbone("bert", tmp_path))
    spec = backbone.spec(pooling="last", max_tokens=40)
    features = extract([Pair(user("hello there"), "fine", "no", "g")], backbone, spec, prompt_features=True)
    row = backbone.render(user("hello there"), max_tokens=40)
    assert features.prompt is not None
    expected = backbone.hidden([row.tokens], spec.layer)[0, row.stop - 1].numpy()
    assert row.stop == len(row.tokens) - 1
    np.testing.assert_allclose(features.prompt[0], expected, rtol=NETWORK, atol=NETWORK)


@pytest.mark.parametrize("more", [{}, {"prompt_features": True, "log_ratios": True}], ids=["plain", "all"])
def test_order_and_duplicates_change_nothing(backbone: LanguageModel, more: dict[str, bool]) -> None:
    pairs, spec = some_pairs(10), backbone.spec()
    features = extract(pairs, backbone, spec, **more)
    order = np.random.default_rng(0).permutation(10)
    assert same(extract([pairs[i] for i in order], backbone, spec, **more), features.take(order))
    twice = extract([*pairs, *pairs], backbone, spec, **more)
    assert same(twice.take(np.arange(10)), features)
    assert same(twice.take(np.arange(10, 20)), features)


def test_the_survey_counts_what_is_encoded(backbone: LanguageModel) -> None:
    pairs = [
        Pair(user("dog"), "fox", "cat", "a"),
        Pair(user("dog"), "fox", "", "b"),
        Pair(user("dog " * 40), "fox", "cat " * 40, "c"),
    ]
    spec = backbone.spec(max_tokens=40)
    plan = survey(pairs, backbone, spec)
    rendered = [backbone.render(p.prompt, r, max_tokens=40) for p in pairs for r in (p.chosen, p.rejected)]
    rows = {tuple(row.tokens) for row in rendered}
    prefixes = {row[:length] for row in rows for length in range(1, len(row) + 1)}
    assert plan.facts == {
        "pairs": 3,
        "replies": 6,
        "rows": len(rows),
        "tokens": int(plan.own_lengths.sum()),
        "distinct_tokens": len(prefixes),
        "reply_tokens": sum(len(row.tokens) for row in rendered),
        "longest_row": 40,
        "truncated_replies": 2,
        "dropped_tokens": sum(row.dropped for row in rendered),
        "empty_replies": 1,
    }
    seen: list[tuple[int, int, int]] = []
    extract(pairs, backbone, spec, batch_tokens=1, on_batch=lambda *now: seen.append(now))
    assert seen[-1] == (3, 3, plan.facts["tokens"])
    assert seen == sorted(seen)
    # Once with what is there before anything is read, then after every pass.
    assert len(seen) == 1 + len(plan.trees())


@pytest.mark.parametrize("batch_tokens", [1, 60, 500])
def test_batches_and_shards_partition_the_rows(backbone: LanguageModel, small_shards: None, batch_tokens: int) -> None:
    plan = survey(some_pairs(30), backbone, backbone.spec())
    shards = plan.shards(batch_tokens)
    rows = [row for shard in shards for batch in shard for row in batch]
    assert rows == list(range(len(plan.tokens)))
    heads = {tree.start for tree in plan.trees()}
    for shard in shards:
        assert sum(map(len, shard[:-1])) < 8
        for batch in shard:
            trunks = [row for row in batch if row in heads]
            branched = sum(plan.own_lengths[row] for row in batch if row not in heads)
            assert batch.start in heads
            assert len(trunks) == 1 or branched <= batch_tokens
            assert len(trunks) == 1 or len(trunks) * max(len(plan.tokens[row]) for row in trunks) <= batch_tokens


# --- sharing -----------------------------------------------------------------------------------------------------


def conversation_pairs(turns: int = 3, opening: str = "", seed: int = 3) -> list[Pair]:
    """Every reply of a conversation against another: prompts are prefixes of one another."""
    rng = np.random.default_rng(seed)
    said: tuple[Turn, ...] = ()
    pairs = []
    for i in range(turns):
        said = (*said, Turn("user", ("" if i else opening) + " ".join(rng.choice(WORDS, 2))))
        chosen, rejected = (" ".join(rng.choice(WORDS, 2)) for _ in range(2))
        pairs.append(Pair(said, chosen, rejected, f"turn {i}"))
        said = (*said, Turn("assistant", chosen))
    return pairs


def two_conversations() -> list[Pair]:
    """About one problem: what branches off their beginning is branched off itself."""
    opening = "the quick brown fox and the lazy dog "
    return [*conversation_pairs(2, opening, 1), *conversation_pairs(2, opening, 2)]


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_sharing_changes_nothing(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load_backbone(tiny_backbone(name, tmp_path_factory.mktemp("tiny")))
    pairs = [*some_pairs(5), *conversation_pairs(), *two_conversations()]
    longest = min(120, model.max_tokens)
    spec = model.spec(layer=1, max_tokens=longest)
    last = model.spec(pooling="last", max_tokens=longest)
    plan = survey(pairs, model, spec, prompt_features=True)
    found = extract(pairs, model, [spec, last], prompt_features=True, batch_tokens=200)
    for features, asked in zip(found, (spec, last), strict=True):
        expected = naive(pairs, model, asked)
        np.testing.assert_allclose(features.chosen, expected[:, 0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(features.rejected, expected[:, 1], rtol=1e-4, atol=1e-4)
    assert model.shares == (plan.facts["tokens"] < plan.facts["reply_tokens"] - 50)
    if model.shares and longest == 120:
        assert plan.depth.max() == 2


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=9), st.integers(1, 4))
def test_a_forest_holds_every_row_and_never_costs_more_than_no_sharing(rows: list[list[int]], least: int) -> None:
    ordered = [np.array(row, dtype=np.int32) for row in sorted(rows)]
    trees = _forest(ordered, least=least)
    assert sorted(row for tree in trees for row, _, _ in tree) == list(range(len(rows)))
    cost = 0
    for tree in trees:
        assert tree[0] == (tree[0][0], tree[0][0], 0)
        before = {tree[0][0]}
        for row, parent, shared in tree:
            assert parent in before
            before.add(row)
            assert ordered[parent][:shared].tolist() == ordered[row][:shared].tolist()
            cost += len(ordered[row]) - shared
            assert shared >= least or row == tree[0][0]
    prefixes = {tuple(row[:length]) for row in rows for length in range(1, len(row) + 1)}
    assert distinct_tokens(ordered) == len(prefixes)
    assert len(prefixes) <= cost <= sum(map(len, rows))
    if least == 1:
        # Rows of a dozen tokens: what they share is always worth it, so that the tree is the prefix tree.
        assert cost == len(prefixes)
    assert [[(row, row, 0)] for row in range(len(rows))] == _forest(ordered, least=None)


def test_what_can_be_shared_is_shared(backbone: LanguageModel) -> None:
    """A conversation is one trunk with a branch for every reply that was not given, and computes each token once."""
    plan = survey(conversation_pairs(), backbone, backbone.spec())
    assert len(plan.trees()) == 1
    assert plan.depth.max() == 1
    assert plan.facts["distinct_tokens"] == plan.facts["tokens"]
    plan = survey(two_conversations(), backbone, backbone.spec())
    assert len(plan.trees()) == 1
    assert plan.depth.max() == 2
    assert plan.facts["tokens"] <= 1.01 * plan.facts["distinct_tokens"]


def test_a_large_tree_is_cut_into_shards(backbone: LanguageModel, small_shards: None) -> None:
    pairs = [Pair(user("tell me a good story " * 3), f"{a} {b}", "no", "g") for a in WORDS for b in WORDS[:3]]
    plan = survey(pairs, backbone, backbone.spec())
    assert max(map(len, plan.trees())) <= 8
    assert plan.facts["tokens"] < plan.facts["reply_tokens"] / 2


@pytest.mark.parametrize("pooling", sorted(POOLINGS))
def test_features_at_prefixes_are_those_of_shorter_replies(backbone: LanguageModel, pooling: str) -> None:
    pairs, spec, k = [*some_pairs(5), Pair(user("dog"), "fox", "", "g")], backbone.spec(pooling=pooling), 3
    features = extract(pairs, backbone, spec, prefixes=k, prompt_features=True)
    plain = extract(pairs, backbone, spec, prompt_features=True)
    assert features.group.tolist() == [group for group in plain.group.tolist() for _ in range(k)]
    assert plain.prompt is not None
    np.testing.assert_array_equal(features.prompt, np.repeat(plain.prompt, k, axis=0))
    np.testing.assert_array_equal(features.chosen[k - 1 :: k], plain.chosen)
    for i, pair in enumerate(pairs):
        for side, reply in ((features.chosen, pair.chosen), (features.rejected, pair.rejected)):
            row = backbone.render(pair.prompt, reply)
            for j in range(1, k + 1):
                end = row.start + -(-(row.stop - row.start) * j // k)
                states = backbone.hidden([row.tokens[:end]], spec.layer, scored=POOLINGS[pooling].scored)
                expected = POOLINGS[pooling].pool(states, torch.tensor([row.start]), torch.tensor([end]))
                np.testing.assert_allclose(side[i * k + j - 1], expected[0], rtol=1e-4, atol=1e-4)


def test_several_layers_come_from_one_pass(backbone: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = some_pairs(6)
    specs = [backbone.spec(layer=layer, pooling=p) for layer in (1, 2) for p in ("mean", "last", "attn")]
    assert backbone.shares  # found out by trying, before passes are counted
    asked: list[int] = []
    run = Network.run

    def counted(self: Network, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(tokens.numel())
        return run(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Network, "run", counted)
    many = extract(pairs, backbone, specs)
    once = sum(asked)
    for features, spec in zip(many, specs, strict=True):
        alone = extract(pairs, backbone, spec)
        np.testing.assert_allclose(features.chosen, alone.chosen, rtol=NETWORK, atol=NETWORK)
        assert features.spec == spec
    assert sum(asked) == 7 * once
    with pytest.raises(CoalaError, match="differ in more than layer and pooling"):
        extract(pairs, backbone, [specs[0], replace(specs[0], max_tokens=20)])


@pytest.mark.parametrize("more", [{}, {"prompt_features": True, "log_ratios": True}], ids=["plain", "all"])
def test_no_pairs_no_features(backbone: LanguageModel, tmp_path: Path, more: dict[str, bool]) -> None:
    features = extract([], backbone, backbone.spec(), store=FeatureStore(tmp_path / "none"), **more)
    assert features.chosen.shape == (0, backbone.width)
    assert (features.prompt is not None) == (features.log_ratio is not None) == bool(more)


# --- shards ------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("more", [{}, {"prompt_features": True, "log_ratios": True}], ids=["plain", "all"])
def test_a_resumed_extraction_is_the_unbroken_one(
    backbone: LanguageModel, small_shards: None, tmp_path: Path, more: dict[str, bool]
) -> None:
    pairs, spec = some_pairs(24), backbone.spec()
    store = FeatureStore(tmp_path / "features")
    unbroken = extract(pairs, backbone, spec, batch_tokens=200, store=store, **more)
    before = contents(store.folder)
    asked = survey(pairs, backbone, spec, prompt_features=bool(more))
    assert json.loads(before["facts.json"]) == asked.facts
    shards = sorted(name for name in before if name.startswith("shard"))
    assert len(shards) >= 4
    (store.folder / shards[1]).unlink()
    (store.folder / shards[2]).write_bytes(b"half")
    kept = (store.folder / shards[0]).stat()
    resumed = extract(pairs, backbone, spec, batch_tokens=200, store=store, **more)
    assert same(resumed, unbroken)
    assert same(unbroken, extract(pairs, backbone, spec, batch_tokens=200, **more))
    assert contents(store.folder) == before
    assert (store.folder / shards[0]).stat().st_mtime_ns == kept.st_mtime_ns


class Killed(Exception):
    pass


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that is so much later whenever it is asked."""
    return count(0.0, seconds).__next__


@pytest.mark.parametrize("seconds", [0.0, 8.0, 30.0], ids=["fast", "medium", "slow"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_slow_extraction_loses_a_few_passes_and_no_bit(
    backbone: LanguageModel, tmp_path: Path, seconds: float, at: int
) -> None:
    """One shard of many passes, killed after ``at`` of them: what was older than 20 seconds is there."""
    pairs, spec = some_pairs(24), backbone.spec()
    unbroken = FeatureStore(tmp_path / "unbroken")
    expected = extract(pairs, backbone, spec, batch_tokens=90, store=unbroken)
    assert len(contents(unbroken.folder)) == 4  # the shard, the plan, the counts and the lock
    store, told = FeatureStore(tmp_path / "killed"), []

    def kill(done: int, total: int, tokens: int) -> None:
        told.append(tokens)
        if len(told) == at + 1:  # the first tells what is there
            raise Killed

    with pytest.raises(Killed):
        extract(pairs, backbone, spec, batch_tokens=90, store=store, clock=ticking(seconds), on_batch=kill)
    told_again: list[int] = []
    resumed = extract(
        pairs, backbone, spec, batch_tokens=90, store=store, on_batch=lambda d, t, tokens: told_again.append(tokens)
    )
    n_passes: list[int] = []
    extract(pairs, backbone, spec, batch_tokens=90, on_batch=lambda done, total, tokens: n_passes.append(done))
    # The clock is asked once at the start and once after each pass; the pass at which the kill falls is lost.
    every = {0.0: len(n_passes), 8.0: 3, 30.0: 1}[seconds]
    kept = (at - 1) // every * every
    assert len(told_again) == len(n_passes) - kept
    assert told_again[0] == told[kept]
    assert same(resumed, expected)
    assert contents(store.folder) == contents(unbroken.folder)


def test_a_piece_that_is_not_what_was_written_is_made_again(backbone: LanguageModel, tmp_path: Path) -> None:
    pairs, spec, store = some_pairs(24), backbone.spec(), FeatureStore(tmp_path / "store")

    def kill(done: int, total: int, tokens: int) -> None:
        if len(list(store.folder.glob("piece-*"))) == 4:
            raise Killed

    for damage in (b"", b"half", None):
        with pytest.raises(Killed):
            extract(pairs, backbone, spec, batch_tokens=150, store=store, clock=ticking(30.0), on_batch=kill)
        pieces = sorted(store.folder.glob("piece-*"))
        if damage is None:
            pieces[1].unlink()
        else:
            pieces[1].write_bytes(damage)
        notes: list[str] = []
        found = extract(pairs, backbone, spec, batch_tokens=150, store=store, on_note=notes.append)
        assert same(found, extract(pairs, backbone, spec, batch_tokens=150))
        # Those behind it do not follow on what is there any more.
        assert len(notes) == (2 if damage is None else 3)
        assert not list(store.folder.glob("piece-*"))
        store.discard()


def test_a_store_keeps_to_one_extraction(backbone: LanguageModel, tmp_path: Path) -> None:
    pairs, spec = some_pairs(4), backbone.spec()
    store = FeatureStore(tmp_path)
    extract(pairs, backbone, spec, store=store)
    with pytest.raises(StoreError, match="batch_tokens: 4096 there, 99 now"):
        extract(pairs, backbone, spec, store=store, batch_tokens=99)
    with pytest.raises(StoreError, match="rows"):
        extract(some_pairs(4, seed=1), backbone, spec, store=store)
    with pytest.raises(StoreError, match="spec"):
        extract(pairs, backbone, backbone.spec(pooling="last"), store=store)
    with pytest.raises(StoreError, match="log_ratios: None there, True now"):
        extract(pairs, backbone, spec, store=store, log_ratios=True)
    with pytest.raises(StoreError, match="rows"):
        extract(pairs, backbone, spec, store=store, prompt_features=True)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[3]))
import coala.features.prefix_tree
from coala.backbone import load_backbone
from coala.store import FeatureStore
from tests.test_features import some_pairs
from tests.waiting import linger
coala.features.prefix_tree.SHARD_ROWS = 8
backbone = load_backbone(sys.argv[1])
coala.features.extract(
    some_pairs(40), backbone, backbone.spec(), batch_tokens=150, store=FeatureStore(Path(sys.argv[2])),
    on_batch=lambda *_: linger(0.2),
)
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_a_killed_extraction_goes_on_where_it_was(
    folder: Path, backbone: LanguageModel, small_shards: None, tmp_path: Path
) -> None:
    here = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join([str(here / "src"), str(here)])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"

    def whole(store: Path) -> dict[str, bytes]:
        extract(some_pairs(40), backbone, backbone.spec(), batch_tokens=150, store=FeatureStore(store))
        # What a kill may leave beside them is a temporary file that nothing reads.
        return {name: content for name, content in contents(store).items() if not name.endswith(".tmp")}

    command = [sys.executable, "-c", SCRIPT, str(folder), str(killed), str(torch.get_num_threads())]
    victim = subprocess.Popen(command, env=environment)
    wait_for(lambda: len(list(killed.glob("shard-*.safetensors"))) >= 2, victim)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    left = len(list(killed.glob("shard-*.safetensors")))
    expected = whole(unbroken)
    assert 2 <= left < len([name for name in expected if name.startswith("shard-")])
    assert whole(killed) == expected


# --- what is refused ---------------------------------------------------------------------------------------------


def test_another_model_s_spec_is_refused(backbone: LanguageModel, tmp_path: Path) -> None:
    spec = backbone.spec()
    other = load_backbone(tiny_backbone("llama", tmp_path, seed=1))
    with pytest.raises(SpecMismatch, match="features are those of"):
        extract(some_pairs(2), other, spec)
    with pytest.raises(SpecMismatch):
        survey(some_pairs(2), backbone, replace(spec, template="chat:0"))
    with pytest.raises(CoalaError, match="expected at least 1"):
        extract(some_pairs(2), backbone, spec, batch_tokens=0)


def test_hidden_states_that_are_not_finite_are_refused(folder: Path) -> None:
    broken = load_backbone(folder)
    with torch.no_grad():
        broken._network.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(CoalaError, match="not finite in"):
        extract(some_pairs(2), broken, broken.spec())


def test_passes_are_halved_when_memory_is_short(backbone: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, spec = some_pairs(10), backbone.spec()
    expected = extract(pairs, backbone, spec)
    run = Network.run
    most, asked = 100, []

    def small(self: Network, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(tokens.numel())
        if asked[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Network, "run", small)
    notes: list[str] = []
    features = extract(pairs, backbone, spec, on_note=notes.append)
    np.testing.assert_allclose(features.chosen, expected.chosen, rtol=NETWORK, atol=NETWORK)
    failures = [tokens for tokens in asked if tokens > most]
    assert failures
    assert failures == sorted(failures, reverse=True)  # never asked again for what did not fit
    assert len(notes) == len(failures)
    assert f"a pass of {failures[0]} tokens: passes now have {failures[0] // 2}" in notes[0]
    most = 5
    with pytest.raises(CoalaError, match="does not fit the device's memory"):
        extract(pairs, backbone, spec)
