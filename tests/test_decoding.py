"""Guided decoding against a naive implementation that encodes everything anew, and its laws."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.backbone import POOLINGS, LanguageModel, load_backbone
from coala.decoding import Guidance, generate, log_likelihood, reweight
from coala.decoding.guidance import RULES
from coala.decoding.replies import Reply, Stream
from coala.decoding.sampling import gumbel, restrict, stream_key
from coala.features import extract
from coala.values import CoalaError, ConvexHead, Generation, Pair, SpecMismatch, Turn, user
from tests.menagerie import CONTEXT, tiny_backbone

ARCHITECTURES = ["gpt2", "llama", "qwen2"]  # Llama and Qwen2 share keys and values among query heads
PROMPTS = [user("tell me a story"), user("what do you think of a good film? the end"), user("hello")]
GUIDED = [Guidance(), Guidance(every=2, candidates=3, rule="raw", strength=3.0), Guidance.paper()]
GUIDED += [Guidance("block", candidates=3, block_tokens=4)]


# --- the naive implementation ---------------------------------------------------------------------------------------


def naive_noise(seed: int, prompt_id: str, branch: int, step: int, token: int) -> float:
    """The documented noise in plain integers."""
    key = hashlib.blake2b(repr((seed, prompt_id, branch, step)).encode(), digest_size=8).digest()
    z = (int.from_bytes(key, "little") + (token + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return -math.log(-math.log(((z >> 12) + 0.5) / 2**52))


@dataclass
class Naive:
    """Plain transformers calls without a cache: every prefix and every candidate is encoded from its first token."""

    model: Any
    stop_tokens: frozenset[int]
    head: ConvexHead
    guidance: Guidance
    seed: int
    temperature: float = 1.0
    known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def encode(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        if tuple(tokens) not in self.known:
            self.known[tuple(tokens)] = self.encode_anew(tokens)
        return self.known[tuple(tokens)]

    def encode_anew(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        states = out.hidden_states[self.head.spec.layer][0].numpy()
        return states, torch.log_softmax(out.logits[0, -1].float(), -1).numpy()

    def score(self, prompt: list[int], reply: list[int]) -> float:
        states = self.encode(prompt + reply)[0]
        before = self.encode(prompt)[0]
        last = self.head.spec.pooling == "last"
        about = before[-1] if last else before.mean(0)
        if self.head.spec.pooling == "mean_all":
            return float(self.head.score(states.mean(0), about))
        if not reply:
            return float(self.head.score(states[-1], about))
        own = states[len(prompt) :]
        return float(self.head.score(own[-1] if last else own.mean(0), about))

    def nucleus(self, log_probs: np.ndarray) -> dict[int, float]:
        """By the warpers of transformers, which are another implementation of the same definition."""
        import torch
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        scores = torch.tensor(log_probs, dtype=torch.float64)[None] / (self.temperature or 1.0)
        scores = TopKLogitsWarper(self.guidance.top_k)(None, scores) if self.guidance.top_k else scores
        scores = TopPLogitsWarper(self.guidance.top_p)(None, scores) if self.guidance.top_p < 1 else scores
        normal = torch.log_softmax(scores, -1)[0]
        return {int(token): float(normal[token]) for token in torch.nonzero(torch.isfinite(normal))[:, 0]}

    def perturbed(self, prompt: list[int], reply: list[int], prompt_id: str, branch: int) -> dict[int, float]:
        def noise(token: int) -> float:
            step = len(reply)
            return naive_noise(self.seed, prompt_id, branch, step, token) if self.temperature else 0.0

        allowed = self.nucleus(self.encode(prompt + reply)[1])
        return {token: value + noise(token) for token, value in allowed.items()}

    def preview(self, prompt: list[int], reply: list[int], token: int) -> float:
        ends = token in self.stop_tokens and not self.head.spec.ends_with_eos
        return self.score(prompt, reply if ends else [*reply, token])

    def choose(self, prompt: list[int], reply: list[int], prompt_id: str) -> int:
        weights = self.perturbed(prompt, reply, prompt_id, 0)
        if len(reply) % self.guidance.interval == 0:
            candidates = sorted(weights, key=lambda token: -weights[token])[: self.guidance.candidates]
            scores = [self.preview(prompt, reply, token) for token in candidates]
            if self.guidance.rule == "min-max" and len(set(scores)) > 1:
                scores = [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]
            weights = {
                token: weights[token] + self.guidance.strength * score
                for token, score in zip(candidates, scores, strict=True)
            }
        return max(weights, key=lambda token: weights[token])

    def reply(self, prompt: list[int], prompt_id: str, length: int) -> tuple[list[int], bool]:
        """Generated tokens, and whether a stop token ended them."""
        reply: list[int] = []
        while len(reply) < length:
            if self.guidance.mode == "block":
                blocks = []
                for branch in range(self.guidance.candidates):
                    block, ended = list(reply), False
                    while not ended and len(block) < min(len(reply) + self.guidance.block_tokens, length):
                        weights = self.perturbed(prompt, block, prompt_id, branch)
                        token = max(weights, key=lambda token: weights[token])
                        ended = token in self.stop_tokens
                        block = block if ended else [*block, token]
                    blocks.append((self.score(prompt, block), block, ended))
                _, reply, ended = max(blocks, key=lambda block: block[0])
            else:
                token = self.choose(prompt, reply, prompt_id)
                ended = token in self.stop_tokens
                reply = reply if ended else [*reply, token]
            if ended:
                return reply, True
        return reply, False

    def log_prob(self, prompt: list[int], reply: list[int]) -> float:
        return sum(float(self.encode(prompt + reply[:t])[1][token]) for t, token in enumerate(reply))


# --- backbones and heads --------------------------------------------------------------------------------------------


@dataclass
class Model:
    folder: Path
    backbone: LanguageModel
    plain: Any

    def naive(self, head: ConvexHead, guidance: Guidance, seed: int, temperature: float = 1.0) -> Naive:
        return Naive(self.plain, self.backbone.stop_tokens, head, guidance, seed, temperature)

    def prompt(self, turns: tuple[Turn, ...]) -> list[int]:
        return self.backbone.render(turns).tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """The architectures with one token in eight a stop token, so that replies do end."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name in ARCHITECTURES:
        folder = tiny_backbone(name, tmp_path_factory.mktemp("tiny") / name)
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(range(5, vocabulary, 8))}))
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        found[name] = Model(folder, load_backbone(folder, device="cpu"), plain)
    return found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model that all but never stops."""
    return load_backbone(tiny_backbone("gpt2", tmp_path_factory.mktemp("tiny"), seed=3), device="cpu")


def make_head(
    backbone: LanguageModel,
    pooling: str = "mean",
    layer: int = 2,
    seed: int = 0,
    ends_with_eos: bool = False,
    gate_on: Any = "reply",
) -> ConvexHead:
    rng = np.random.default_rng(seed)
    d = backbone.width
    gates, weights, linear = rng.normal(size=(4, d + 1)), rng.normal(size=(4, d + 1)), rng.normal(size=d + 1)
    return ConvexHead(gates, weights * 0.3, linear, backbone.spec(layer, pooling, ends_with_eos), gate_on=gate_on)


def texts(replies: list[Generation]) -> list[str]:
    return [reply.text for reply in replies]


# --- the same choices as the naive implementation -------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDED, ids=str)
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_encoding_everything_anew(models: dict[str, Model], name: str, pooling: str, guidance: Guidance) -> None:
    model = models[name]
    head = make_head(model.backbone, pooling)
    _compare(model, head, guidance, seed=2)


@pytest.mark.parametrize(
    ("pooling", "layer", "ends_with_eos", "temperature"),
    [("mean_all", -1, False, 0.7), ("mean", -1, True, 1.3), ("last", 1, True, 1.0), ("mean", 0, False, 0.0)],
)
def test_equals_naive_for_other_features_and_temperatures(
    models: dict[str, Model], pooling: str, layer: int, ends_with_eos: bool, temperature: float
) -> None:
    model = models["llama"]
    head = make_head(model.backbone, pooling, layer, ends_with_eos=ends_with_eos)
    guidance = Guidance(top_k=0, top_p=0.8) if temperature == 1.3 else Guidance(top_k=20, top_p=1.0)
    _compare(model, head, guidance, seed=5, temperature=temperature)


@pytest.mark.parametrize("guidance", GUIDED, ids=str)
@pytest.mark.parametrize("pooling", ["mean", "last", "mean_all"])
def test_gates_on_the_prompt_equal_naive(models: dict[str, Model], pooling: str, guidance: Guidance) -> None:
    head = make_head(models["llama"].backbone, pooling, gate_on="prompt")
    _compare(models["llama"], head, guidance, seed=2)


@pytest.mark.parametrize("pooling", ["mean", "last", "mean_all"])
def test_prompts_are_pooled_as_at_extraction(models: dict[str, Model], pooling: str) -> None:
    backbone = models["qwen2"].backbone
    spec = backbone.spec(1, pooling)
    found = extract([Pair(p, "a", "b", "g") for p in PROMPTS], backbone, spec, prompt_features=True).prompt
    prefix = backbone.start([backbone.render(prompt).tokens for prompt in PROMPTS], spec.layer)
    assert found is not None
    np.testing.assert_allclose(POOLINGS[pooling].prompt(prefix).numpy(), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [*GUIDED, Guidance("none")], ids=str)
def test_a_prompt_s_head_is_its_linear_head(models: dict[str, Model], guidance: Guidance) -> None:
    """Also for a prompt that extraction cuts and decoding does not, and one whose beginning decoding cuts."""
    backbone = models["llama"].backbone
    head = make_head(backbone, gate_on="prompt")
    head = replace(head, spec=replace(head.spec, max_tokens=24))
    prompts = [*PROMPTS, user("the quick brown fox " * 8), user("tell me a story " * 40)]
    lengths = [len(backbone.render(prompt).tokens) for prompt in prompts]
    assert min(lengths) < 24 < lengths[3] < CONTEXT - 8 < lengths[4]
    features = extract([Pair(p, "a", "b", "g") for p in prompts], backbone, head.spec, prompt_features=True)
    assert features.prompt is not None
    settings: dict[str, Any] = {"max_new_tokens": 8, "seed": 4}
    together = generate(prompts, backbone, head, guidance, prompt_ids="abcde", **settings)
    for prompt, name, about, found in zip(prompts, "abcde", features.prompt, together, strict=True):
        own = head.given(about)
        assert not own.n_neurons
        assert not np.allclose(own.linear, head.linear)
        alone = generate([prompt], backbone, own, guidance, prompt_ids=[name], **settings)[0]
        assert alone.text == found.text
        assert alone.score == pytest.approx(found.score, rel=1e-4, abs=1e-4)


def _compare(model: Model, head: ConvexHead, guidance: Guidance, *, seed: int, temperature: float = 1.0) -> None:
    found = generate(
        PROMPTS, model.backbone, head, guidance, max_new_tokens=9, seed=seed, temperature=temperature, prompt_ids="abc"
    )
    naive = model.naive(head, guidance, seed, temperature)
    for turns, reply in zip(PROMPTS, found, strict=True):
        prompt = model.prompt(turns)
        tokens, ended = naive.reply(prompt, reply.prompt_id, 9)
        assert reply.n_tokens == len(tokens)
        assert reply.text == model.backbone.decode(tokens).removeprefix(" ")
        assert reply.log_prob == pytest.approx(naive.log_prob(prompt, tokens), abs=1e-3)
        if not (ended and head.spec.ends_with_eos):  # else the feature holds the stop token, whichever it was
            assert reply.score == pytest.approx(naive.score(prompt, tokens), abs=1e-3)
        assert reply.method == str(guidance)
        assert reply.seed == seed


def test_naive_comparison_covers_every_way_to_end(models: dict[str, Model]) -> None:
    lengths = set()
    for name in ARCHITECTURES:
        replies = generate(PROMPTS, models[name].backbone, max_new_tokens=9, seed=2)
        lengths |= {reply.n_tokens for reply in replies}
    assert 9 in lengths
    assert min(lengths) < 9


# --- coupling to unguided text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDED, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_strength_zero_is_unguided(models: dict[str, Model], name: str, guidance: Guidance) -> None:
    backbone = models[name].backbone
    head = make_head(backbone)
    plain = generate(PROMPTS, backbone, max_new_tokens=20, seed=1)
    zero = generate(PROMPTS, backbone, head, replace(guidance, strength=0.0), max_new_tokens=20, seed=1)
    assert texts(zero) == texts(plain)
    assert {reply.method for reply in zero} == {"unguided"}
    assert texts(generate(PROMPTS, backbone, None, guidance, max_new_tokens=20, seed=1)) == texts(plain)
    assert texts(generate(PROMPTS, backbone, head, Guidance("none"), max_new_tokens=20, seed=1)) == texts(plain)
    if guidance.mode != "block":
        # The limit along the guided path, which asks the head and peeks at candidates.
        limit = generate(PROMPTS, backbone, head, replace(guidance, strength=1e-12), max_new_tokens=20, seed=1)
        assert texts(limit) == texts(plain)
    constant = replace(head, gates=head.gates * 0, weights=head.weights * 0, linear=head.linear * 0)
    assert texts(generate(PROMPTS, backbone, constant, guidance, max_new_tokens=20, seed=1)) == texts(plain)


def test_one_candidate_is_unguided(endless: LanguageModel) -> None:
    head = make_head(endless)
    one = generate(PROMPTS, endless, head, Guidance(candidates=1), max_new_tokens=12, seed=1)
    assert texts(one) == texts(generate(PROMPTS, endless, max_new_tokens=12, seed=1))


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED], ids=str)
def test_batches_and_order_change_nothing(models: dict[str, Model], guidance: Guidance) -> None:
    backbone = models["llama"].backbone
    head = make_head(backbone)
    prompts = [*PROMPTS, user("a"), user("the quick brown fox jumps over the lazy dog")]
    ids = ["v", "w", "x", "y", "z"]

    def run(order: list[int], batch_size: int) -> dict[str, str]:
        replies = generate(
            [prompts[i] for i in order],
            backbone,
            head,
            guidance,
            max_new_tokens=14,
            seed=4,
            prompt_ids=[ids[i] for i in order],
            batch_size=batch_size,
        )
        assert [reply.prompt_id for reply in replies] == [ids[i] for i in order]
        return {reply.prompt_id: reply.text for reply in replies}

    together = run([0, 1, 2, 3, 4], 16)
    assert run([0, 1, 2, 3, 4], 1) == together
    assert run([4, 2, 0, 3, 1], 2) == together
    assert run([3], 8) == {"y": together["y"]}


def test_seeds_reproduce_and_differ(endless: LanguageModel) -> None:
    head = make_head(endless)
    runs = [texts(generate(PROMPTS, endless, head, max_new_tokens=12, seed=seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(runs[0], runs[2], strict=True))
    same = generate([PROMPTS[0]] * 2, endless, max_new_tokens=12, seed=0)
    assert same[0].text != same[1].text, "one prompt at two places gets two replies"


# --- distributions --------------------------------------------------------------------------------------------------


def _chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """p-value of observed ``counts`` under ``probs``; rare outcomes are merged."""
    from scipy import stats

    n = counts.sum()
    order = np.argsort(-probs)
    counts, probs = counts[order], probs[order]
    common = int((probs * n >= 8).sum())
    observed = np.append(counts[:common], counts[common:].sum())
    expected = np.append(probs[:common], probs[common:].sum()) * n
    kept = expected > 0
    return float(stats.chisquare(observed[kept], expected[kept] * observed[kept].sum() / expected[kept].sum()).pvalue)


def _first_token_counts(
    backbone: LanguageModel, head: ConvexHead | None, guidance: Guidance, tokens: list[int], n: int
) -> np.ndarray:
    replies = generate([PROMPTS[0]] * n, backbone, head, guidance, max_new_tokens=1, seed=9, batch_size=400)
    row = backbone.render(PROMPTS[0]).tokens
    log_probs = backbone.start([row]).log_probs()[0].numpy()
    # Tokens are told apart by their log-probability under the base model.
    values = np.array([log_probs[token] for token in tokens])
    found = [int(np.abs(values - reply.log_prob).argmin()) for reply in replies if reply.n_tokens]
    return np.bincount(found, minlength=len(tokens))


def test_strength_zero_samples_the_restricted_base_distribution(endless: LanguageModel) -> None:
    naive_nucleus = Naive(None, frozenset(), None, Guidance(), 0).nucleus  # type: ignore[arg-type]
    allowed = naive_nucleus(endless.start([endless.render(PROMPTS[0]).tokens]).log_probs()[0].numpy())
    tokens = list(allowed)
    probs = np.exp([allowed[token] for token in tokens])
    for guidance in (Guidance(strength=1e-12), Guidance("none")):
        counts = _first_token_counts(endless, make_head(endless), guidance, tokens, 1200)
        assert _chi_square(counts, probs) > 1e-3


def test_with_the_whole_nucleus_the_choice_is_an_exact_tilt(endless: LanguageModel) -> None:
    """p(c) exp(strength * score(c)), the optimum of a KL-regularised reward."""
    guidance = Guidance(strength=0.5, rule="raw", candidates=6, top_k=6, top_p=1.0)
    head = make_head(endless)
    prefix = endless.start([endless.render(PROMPTS[0]).tokens], head.spec.layer)
    nucleus = restrict(prefix.log_probs(), temperature=1.0, top_k=6, top_p=1.0)
    import torch

    scores = head.score(prefix.peek(torch.from_numpy(nucleus.tokens))[0].numpy())
    tilted = np.exp(nucleus.log_probs[0]) * np.exp(0.5 * scores)
    counts = _first_token_counts(endless, head, guidance, nucleus.tokens[0].tolist(), 1200)
    assert _chi_square(counts, tilted / tilted.sum()) > 1e-3
    assert _chi_square(counts, np.exp(nucleus.log_probs[0])) < 1e-6, "and not the base distribution"


def test_noise_is_gumbel_and_independent() -> None:
    keys = [stream_key(7, str(i // 50), i % 5, i % 50) for i in range(4000)]
    assert len(set(keys)) == 4000
    noise = gumbel(keys, np.tile(np.arange(20), (4000, 1)))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)
    assert np.abs(np.corrcoef(noise.T) - np.eye(20)).max() < 0.08
    assert np.abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 0.06
    assert noise[3, 4] == pytest.approx(naive_noise(7, "0", 3, 3, 4), rel=1e-12)
    shuffled = np.array([[4, 0, 19]])
    assert np.array_equal(gumbel(keys[:1], shuffled)[0], noise[0, [4, 0, 19]]), "a token keeps its noise"


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(50, 0.9, 1.0), (0, 0.5, 1.5), (3, 1.0, 0.5), (0, 1.0, 1)])
def test_nucleus_is_that_of_transformers(top_k: int, top_p: float, temperature: float) -> None:
    import torch

    log_probs = torch.log_softmax(torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) * 3, -1)
    found = restrict(log_probs, temperature=temperature, top_k=top_k, top_p=top_p)
    naive = Naive(None, frozenset(), None, Guidance(top_k=top_k, top_p=top_p), 0, temperature)  # type: ignore[arg-type]
    for row in range(4):
        inside = np.isfinite(found.log_probs[row])
        mine = dict(zip(found.tokens[row, inside].tolist(), found.log_probs[row, inside].tolist(), strict=True))
        assert mine == pytest.approx(naive.nucleus(log_probs[row].numpy()), abs=1e-6)


def test_nan_log_probabilities_are_refused() -> None:
    import torch

    with pytest.raises(CoalaError, match="not finite"):
        restrict(torch.full((1, 5), float("nan")), temperature=1.0, top_k=3, top_p=0.9)


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(RULES))
def test_rule_contract(rule: Any) -> None:
    rng = np.random.default_rng(0)
    base = np.log(rng.dirichlet(np.ones(5), size=40))
    base[::4, 3:] = -np.inf  # a nucleus of three tokens
    scores = rng.normal(size=(40, 5)) * 10 ** rng.uniform(-3, 3, size=(40, 1))
    normal = base - np.log(np.exp(base).sum(-1, keepdims=True))
    assert reweight(base, scores, 0.0, rule) == pytest.approx(normal)
    for strength in (0.5, 2.0):
        tilted = reweight(base, scores, strength, rule)
        assert np.exp(tilted).sum(-1) == pytest.approx(1)
        assert (np.isneginf(tilted) == np.isneginf(base)).all()
        gained = tilted - np.where(np.isfinite(normal), normal, 0.0)
        for row in range(40):
            seen = np.isfinite(base[row])
            by_score = gained[row, seen][np.argsort(scores[row, seen])]
            assert (np.diff(by_score) >= -1e-9).all(), "a better score never gains less"
    same = reweight(base, np.ones_like(scores), 3.0, rule)
    assert same == pytest.approx(normal), "equal scores change nothing"


def test_min_max_is_scale_free_and_ignores_rounding() -> None:
    base = np.log(np.full((1, 3), 1 / 3))
    scores = np.array([[1.0, 2.0, 4.0]])
    assert reweight(base, scores, 2.0) == pytest.approx(reweight(base, 1e-4 * scores - 0.01, 2.0))
    # The scores of the head are float32; a difference in the last bit is none.
    assert reweight(base, np.float32([[7, np.nextafter(np.float32(7), np.float32(8)), 7]]), 2.0) == pytest.approx(base)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance("prefix"), Guidance(rule="raw")], ids=str)
def test_more_strength_never_lowers_the_mean_score(endless: LanguageModel, guidance: Guidance) -> None:
    head = make_head(endless)
    means = [
        np.mean(
            [
                reply.score
                for reply in generate(
                    PROMPTS * 8, endless, head, replace(guidance, strength=s), max_new_tokens=11, seed=0, batch_size=24
                )
            ]
        )
        for s in (0.0, 1.0, 4.0, 16.0)
    ]
    assert (np.diff(means) > 0).all(), means


def test_the_best_block_beats_the_first(endless: LanguageModel) -> None:
    head = make_head(endless)
    # One block: the reply with the best score of five, the first of which is the unguided one.
    best = generate(PROMPTS, endless, head, Guidance("block"), max_new_tokens=10, seed=0)
    plain = generate(PROMPTS, endless, head, Guidance("none"), max_new_tokens=10, seed=0)
    # Where the first is the best of the five, the scores differ by rounding: the batches had different shapes.
    assert all(b.score >= p.score - 1e-5 * abs(p.score) for b, p in zip(best, plain, strict=True))
    assert any(b.score > p.score + 1e-3 for b, p in zip(best, plain, strict=True))


# --- where a reply ends ---------------------------------------------------------------------------------------------


def _inner(text: str) -> str:
    """Some characters from the middle of ``text``, none of them half a character."""
    return next(text[i : i + 2] for i in range(6, len(text) - 2) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 2])


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED], ids=str)
def test_stop_strings(endless: LanguageModel, guidance: Guidance) -> None:
    head = make_head(endless)
    whole = generate(PROMPTS, endless, head, guidance, max_new_tokens=20, seed=6)
    for index, (prompt, reply) in enumerate(zip(PROMPTS, whole, strict=True)):
        stop = _inner(reply.text)
        pieces: list[str] = []

        def run(
            length: int,
            *,
            prompt: tuple[Turn, ...] = prompt,
            index: int = index,
            stop: tuple[str, ...] = (),
            on_token: Callable[[int, str], None] | None = None,
        ) -> Generation:
            options: dict[str, Any] = {"max_new_tokens": length, "seed": 6, "prompt_ids": [str(index)]}
            return generate([prompt], endless, head, guidance, stop=stop, on_token=on_token, **options)[0]

        cut = run(20, stop=(stop, "never seen"), on_token=lambda _, piece, pieces=pieces: pieces.append(piece))
        assert stop not in cut.text
        assert "".join(pieces) == cut.text
        if guidance.mode == "block":
            continue  # a block that stops early may win or lose by it
        assert cut.text == reply.text[: reply.text.find(stop)]
        assert 0 < cut.n_tokens < reply.n_tokens
        # Score and log-probability are those of just the tokens that the text needs.
        same = run(cut.n_tokens)
        assert same.text.startswith(cut.text)
        assert (cut.score, cut.log_prob) == pytest.approx((same.score, same.log_prob), abs=1e-5)
        assert not run(cut.n_tokens - 1).text.startswith(cut.text) or cut.n_tokens == 1


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED], ids=str)
def test_a_full_context_ends_a_reply(endless: LanguageModel, guidance: Guidance) -> None:
    head = make_head(endless)
    long = user("tell me a story about a quick brown fox " * 20)
    (reply, short) = generate([long, user("a")], endless, head, guidance, max_new_tokens=1000, seed=0)
    assert reply.n_tokens <= CONTEXT // 2
    assert short.n_tokens <= CONTEXT - len(endless.render(user("a")).tokens)
    if not guidance.active:
        assert short.n_tokens > CONTEXT // 2
    (reply,) = generate([long], endless, head, guidance, max_new_tokens=3, seed=0)
    assert 0 < reply.n_tokens <= 3


def test_a_reply_that_stops_at_once_is_empty(models: dict[str, Model]) -> None:
    model = models["gpt2"]
    head = make_head(model.backbone)
    replies = generate([PROMPTS[0]] * 60, model.backbone, head, Guidance("none"), max_new_tokens=1, seed=0)
    empty = [reply for reply in replies if reply.n_tokens == 0]
    assert empty
    last = model.backbone.start([model.prompt(PROMPTS[0])], head.spec.layer).state()[0].numpy()
    for reply in empty:
        assert (reply.text, reply.log_prob) == ("", 0)
        assert reply.score == pytest.approx(float(head.score(last)), abs=1e-4)


# --- text as a stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED], ids=str)
def test_pieces_add_up(models: dict[str, Model], guidance: Guidance) -> None:
    # Byte-level tokenizers: with byte fallback, one bad byte undoes the good ones decoded before it.
    for model in (models["gpt2"], models["qwen2"]):
        pieces: dict[int, list[str]] = {}
        replies = generate(
            PROMPTS,
            model.backbone,
            make_head(model.backbone),
            guidance,
            max_new_tokens=15,
            seed=0,
            on_token=lambda index, piece, pieces=pieces: pieces.setdefault(index, []).append(piece),
        )
        assert ["".join(pieces.get(index, [])) for index in range(len(PROMPTS))] == texts(replies)


@pytest.mark.parametrize("stop", [(), ("ok!", "okay"), ("\n\nHuman:",)], ids=repr)
def test_no_piece_is_half_a_character_or_half_a_stop_string(stop: tuple[str, ...]) -> None:
    text = "naïve 🎬 films: o, ok, 好电影\n\nok?"
    pieces: list[str] = []
    stream = Stream(lambda _, piece: pieces.append(piece), stop)
    reply = Reply(0, "0", 1000, lambda tokens: bytes(tokens).decode(errors="replace"))
    for token in text.encode():
        reply.tokens.append(token)
        assert not reply.cut_at(stop)
        stream.send(reply)
        assert not any("".join(pieces).endswith(s[:1]) for s in stop)
    stream.send(reply, last=True)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    if not stop:
        assert len(pieces) == len(text), "nothing is held back without need"


def test_continuations_keep_the_space_that_parts_them(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_backbone("llama", tmp_path / "llama"), device="cpu", template="continuation")
    prompts = [user(f"the {word}") for word in ("quick", "lazy", "good", "bad", "long", "little")] * 4
    replies = generate(prompts, backbone, max_new_tokens=4, seed=0)
    assert any(reply.text.startswith(" ") for reply in replies)


# --- plain decoding and likelihood against transformers -------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_that_of_transformers(models: dict[str, Model], name: str) -> None:
    import torch

    model = models[name]
    replies = generate(PROMPTS, model.backbone, max_new_tokens=12, seed=0, temperature=0.0)
    for turns, reply in zip(PROMPTS, replies, strict=True):
        row = torch.tensor([model.prompt(turns)])
        out = model.plain.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        tokens = [token for token in out[0, row.shape[1] :].tolist() if token not in model.backbone.stop_tokens]
        assert reply.text == model.backbone.decode(tokens).removeprefix(" ")
        assert reply.n_tokens == len(tokens)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_likelihood_is_that_of_transformers(models: dict[str, Model], name: str) -> None:
    model = models[name]
    answers = ["a good film", "", "once upon a time there was a little girl who liked to read"]
    found = log_likelihood(PROMPTS, answers, model.backbone)
    assert log_likelihood(PROMPTS, answers, model.backbone, batch_size=1) == [
        (pytest.approx(value, abs=1e-4), n) for value, n in found
    ]
    naive = model.naive(make_head(model.backbone), Guidance(), 0)
    for turns, answer, (value, n) in zip(PROMPTS, answers, found, strict=True):
        row = model.backbone.render(turns, answer)
        tokens = row.tokens[row.start :]
        assert n == len(tokens)
        assert value == pytest.approx(naive.log_prob(row.tokens[: row.start], tokens), abs=1e-3)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "beam"}, "mode is 'beam'; expected one of token, block, prefix, none"),
        ({"rule": "softmax"}, "rule is 'softmax'; expected one of min-max, raw"),
        ({"strength": -1.0}, "strength is -1.0; expected a finite number of at least 0"),
        ({"strength": math.nan}, "strength is nan"),
        ({"every": 0}, "every is 0; expected a whole number of at least 1"),
        ({"candidates": 2.5}, "candidates is 2.5; expected a whole number"),
        ({"top_k": -1}, "top_k is -1; expected a whole number of at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a number in \(0, 1\]"),
        ({"top_p": "0.9"}, "top_p is '0.9'"),
        ({"block_tokens": True}, "block_tokens is True"),
    ],
)
def test_guidance_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoalaError, match=message):
        Guidance(**settings)


def test_guidance_of_the_paper() -> None:
    paper = Guidance.paper()
    assert (paper.mode, paper.interval, paper.candidates, paper.top_k, paper.top_p) == ("prefix", 5, 5, 50, 0.9)
    assert replace(Guidance(), mode="prefix").interval == 5
    assert replace(Guidance(), mode="prefix") == replace(paper, every=None)


def test_mistakes_are_named(endless: LanguageModel, models: dict[str, Model]) -> None:
    def run(head: ConvexHead | None = None, guidance: Guidance = Guidance(), **settings: Any) -> None:  # noqa: B008
        generate(PROMPTS, endless, head, guidance, **{"max_new_tokens": 3, "seed": 0, **settings})

    with pytest.raises(CoalaError, match="max_new_tokens is 0"):
        run(max_new_tokens=0)
    with pytest.raises(CoalaError, match="temperature is -1"):
        run(temperature=-1.0)
    with pytest.raises(CoalaError, match="stop is the string"):
        run(stop="end")
    with pytest.raises(CoalaError, match="empty"):
        run(stop=["a", ""])
    with pytest.raises(CoalaError, match="3 prompts need as many prompt ids; found 1"):
        run(prompt_ids=["a"])
    with pytest.raises(CoalaError, match="batch_size is 0"):
        run(batch_size=0)
    with pytest.raises(CoalaError, match="temperature 0 makes all the same"):
        run(make_head(endless), Guidance("block"), temperature=0.0)
    with pytest.raises(CoalaError, match="3 prompts need as many texts"):
        log_likelihood(PROMPTS, ["a"], endless)
    with pytest.raises(SpecMismatch) as caught:
        run(make_head(models["gpt2"].backbone))
    assert "gpt2" in str(caught.value)
    assert str(endless.name) in str(caught.value)
    assert generate([], endless, max_new_tokens=3, seed=0) == []


def test_overflowing_hidden_states_are_named(endless: LanguageModel) -> None:
    head = make_head(endless)
    huge = replace(head, linear=np.full_like(head.linear, 3e38))
    with pytest.raises(CoalaError, match="scores are not finite"):
        generate(PROMPTS, endless, huge, max_new_tokens=3, seed=0)


# --- a trained model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance(), Guidance("block")], ids=str)
def test_a_trained_model_is_guided(shared: Path, guidance: Guidance) -> None:
    backbone = load_backbone(shared / "data/models/stories260K-hf", device="cpu", template="continuation")
    width = backbone.width
    linear = np.append(np.random.default_rng(0).normal(size=width), 0)
    head = ConvexHead(np.zeros((0, width + 1)), np.zeros((0, width + 1)), linear, backbone.spec(3, "mean"))
    prompts = [user(text) for text in ("Once upon a time", "The dog was", "Lily and Ben", "One day")] * 2
    plain = generate(prompts, backbone, head, Guidance("none"), max_new_tokens=24, seed=0)
    guided = generate(prompts, backbone, head, guidance, max_new_tokens=24, seed=0)
    assert np.mean([reply.score for reply in guided]) > np.mean([reply.score for reply in plain]) + 0.5
    found = log_likelihood(prompts, texts(plain), backbone)
    same = [(value, reply) for (value, n), reply in zip(found, plain, strict=True) if n == reply.n_tokens]
    assert len(same) > 3, "the text of most replies has the tokens it was generated with"
    for value, reply in same:
        assert value == pytest.approx(reply.log_prob, abs=0.05)
