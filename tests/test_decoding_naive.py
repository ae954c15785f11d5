"""Guided decoding equals a naive implementation that encodes everything anew, in every mode.

The implementation, the models and the heads are those of the other decoding tests too.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.backbone import POOLINGS, LanguageModel, load_backbone
from coala.decoding import Guidance, generate
from coala.features import extract
from coala.values import ConvexHead, Generation, Pair, Turn, user
from tests.menagerie import CONTEXT, tiny_backbone
from tests.tolerances import NETWORK

ARCHITECTURES = ["gpt2", "llama", "qwen2"]  # Llama and Qwen2 share keys and values among query heads
PROMPTS = [user("tell me a story"), user("what do you think of a good film? the end"), user("hello")]
# Sampled modes, coupled to unguided text ...
GUIDED = [Guidance("token", strength=2), Guidance("token", every=2, candidates=3, rule="raw", strength=3.0)]
GUIDED += [Guidance.paper(), Guidance("token", rule="z-score", strength=1.5)]
GUIDED += [Guidance("block", candidates=3, block_tokens=4, strength=2), Guidance("best_of", candidates=3, strength=2)]
GUIDED += [Guidance("shift", rule="min-max", budget=3.0), Guidance("shift", strength=1.5, budget=6.0)]
GUIDED += [Guidance("shift", strength=3.0, rule="z-score", every=2, candidates=3)]
GUIDED += [Guidance("block", candidates=3, block_tokens=4, rule="min-max")]
# ... and those without chance.
BEAMS = [Guidance("beam", width=3, candidates=3, strength=3.0), Guidance("beam", width=2, rule="raw", strength=0.1)]
BEAMS += [Guidance("beam", width=2, rule="min-max", strength=0.3)]


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
    spent: float = 0.0
    costs: list[list[float]] = field(default_factory=list)

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

    def attention(self, tokens: list[int]) -> np.ndarray:
        """What each token's attention gives itself in the layer that makes the head's hidden state."""
        import torch

        config = self.model.config
        kernel, config._attn_implementation = config._attn_implementation, "eager"
        try:
            with torch.no_grad():
                out = self.model(input_ids=torch.tensor([tokens]), output_attentions=True, use_cache=False)
        finally:
            config._attn_implementation = kernel
        layer = self.head.spec.layer % (len(out.attentions) + 1)
        return out.attentions[layer - 1][0].diagonal(dim1=-2, dim2=-1).mean(0).numpy()

    def score(self, prompt: list[int], reply: list[int]) -> float:
        states = self.encode(prompt + reply)[0]
        before = self.encode(prompt)[0]
        if self.head.spec.pooling == "attn":
            about = np.average(before, axis=0, weights=self.attention(prompt))
            own = self.attention(prompt + reply)[len(prompt) :]
            rest = states[len(prompt) :]
            return float(self.head.score(np.average(rest, axis=0, weights=own) if reply else states[-1], about))
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

    def scale(self, scores: list[float]) -> list[float]:
        low, high = min(scores), max(scores)
        if self.guidance.rule == "raw":
            return scores
        if self.guidance.rule == "calibrated":
            return [score * self.head.evidence for score in scores]
        if high == low:
            return [0.0] * len(scores)
        if self.guidance.rule == "min-max":
            return [(score - low) / (high - low) for score in scores]
        return list((np.array(scores) - np.mean(scores)) / np.std(scores))

    def choose(self, prompt: list[int], reply: list[int], prompt_id: str, room: int) -> int:
        weights = self.perturbed(prompt, reply, prompt_id, 0)
        if len(reply) % self.guidance.interval == 0 and len(weights) > 1:
            if self.guidance.mode == "shift":
                shifts = self.shifts(prompt, reply, room)
            else:
                candidates = sorted(weights, key=lambda token: -weights[token])[: self.guidance.candidates]
                scores = self.scale([self.preview(prompt, reply, token) for token in candidates])
                weights = {token: weights[token] for token in candidates}
                shifts = {t: self.guidance.strength * score for t, score in zip(candidates, scores, strict=True)}
            weights = {token: value + shifts.get(token, 0.0) for token, value in weights.items()}
        return max(weights, key=lambda token: weights[token])

    def shifts(self, prompt: list[int], reply: list[int], room: int) -> dict[int, float]:
        """What is added to log p, by a budget that is kept by sums over all tokens of the definition of KL."""
        base = self.nucleus(self.encode(prompt + reply)[1])
        scored = sorted(base, key=lambda token: -base[token])[: self.guidance.candidates]
        scores = self.scale([self.preview(prompt, reply, token) for token in scored])
        share = [math.exp(base[token]) for token in scored]
        mean = sum(p * score for p, score in zip(share, scores, strict=True)) / sum(share)
        tilt = {token: score - mean for token, score in zip(scored, scores, strict=True)}

        def cost(strength: float) -> float:
            tokens = list(base)
            p = np.array([base[token] for token in tokens])
            q = p + strength * np.array([tilt.get(token, 0.0) for token in tokens])
            q = q - (q.max() + math.log(np.exp(q - q.max()).sum()))
            return float((np.exp(q) * (q - p)).sum())

        budget = self.guidance.budget
        strength = self.guidance.strength
        if budget is not None:
            if self.spent >= 0.999 * budget:
                return {}
            left = budget - self.spent
            steps_left = math.ceil((room - len(reply)) / self.guidance.interval)
            grid = [2 ** (j / 4) for j in range(-24, 41)]
            self.costs.append([cost(s) for s in grid])
            means = np.mean(self.costs, axis=0)
            fits = [j for j in range(len(grid)) if means[j] <= left / steps_left and self.costs[-1][j] <= left]
            within = grid[max(fits)] if fits else 0.0
            strength = min(within, strength) if self.guidance.rule == "calibrated" else within
        self.spent += cost(strength)
        return {token: strength * value for token, value in tilt.items()}

    def reply(self, prompt: list[int], prompt_id: str, length: int) -> tuple[list[int], bool]:
        """Generated tokens, and whether a stop token ended them."""
        self.spent, self.costs = 0.0, []
        if self.guidance.mode == "beam":
            return self.beam(prompt, length)
        reply: list[int] = []
        while len(reply) < length:
            if self.guidance.mode in ("block", "best_of"):
                longest = len(reply) + (self.guidance.block_tokens if self.guidance.mode == "block" else length)
                blocks = []
                for branch in range(self.guidance.candidates):
                    block, ended = self.sample(prompt, reply, prompt_id, branch, min(longest, length))
                    blocks.append((self.score(prompt, block), block, ended))
                _, reply, ended = blocks[self.kept([block[0] for block in blocks], prompt_id, len(reply))]
            else:
                token = self.choose(prompt, reply, prompt_id, length)
                ended = token in self.stop_tokens
                reply = reply if ended else [*reply, token]
            if ended:
                return reply, True
        return reply, False

    def kept(self, scores: list[float], prompt_id: str, step: int) -> int:
        """The best, or by the calibrated rule the first for as much of its share of 1/k as its weight covers."""
        if self.guidance.rule != "calibrated":
            return scores.index(max(scores))
        weights = np.exp(self.guidance.strength * self.head.evidence * (np.array(scores) - max(scores)))
        shares = weights / weights.sum() * len(scores)
        chance = math.exp(-math.exp(-naive_noise(self.seed, prompt_id, -1, step, 0)))
        if chance < shares[0]:
            return 0
        chance = (chance - shares[0]) / (1 - shares[0]) * sum(max(share - 1, 0) for share in shares)
        for at, share in enumerate(shares):
            chance -= max(share - 1, 0)
            if chance < 0:
                return at
        raise AssertionError("the excess shares add up to the missing ones")

    def sample(
        self, prompt: list[int], reply: list[int], prompt_id: str, branch: int, length: int
    ) -> tuple[list[int], bool]:
        """``reply`` as plain sampling continues it to ``length`` tokens, and whether a stop token ended it."""
        while len(reply) < length:
            weights = self.perturbed(prompt, reply, prompt_id, branch)
            token = max(weights, key=lambda token: weights[token])
            if token in self.stop_tokens:
                return reply, True
            reply = [*reply, token]
        return reply, False

    def beam(self, prompt: list[int], length: int) -> tuple[list[int], bool]:
        """Places are (tokens, whether a stop token is the last); what they are worth is computed anew each time."""
        beam: list[tuple[list[int], bool]] = [([], False)]

        def over(place: tuple[list[int], bool]) -> bool:
            return place[1] or len(place[0]) == length

        def values(places: list[tuple[list[int], bool]]) -> list[float]:
            means, scores = [], []
            for tokens, stopped in places:
                means.append(self.log_prob(prompt, tokens) / len(tokens))
                cut = tokens[:-1] if stopped and not self.head.spec.ends_with_eos else tokens
                scores.append(self.score(prompt, cut))
            gains = [self.guidance.strength * s for s in self.scale(scores)]
            if self.guidance.rule == "calibrated":
                gains = [gain / len(tokens) for gain, (tokens, _) in zip(gains, places, strict=True)]
            return [m + gain for m, gain in zip(means, gains, strict=True)]

        while not all(over(place) for place in beam):
            places = [place for place in beam if over(place)]
            for tokens, _ in (place for place in beam if not over(place)):
                base = self.nucleus(self.encode(prompt + tokens)[1])
                likeliest = sorted(base, key=lambda t, base=base: -base[t])[: self.guidance.candidates]
                places += [([*tokens, token], token in self.stop_tokens) for token in likeliest]
            worth = values(places)
            beam = [places[at] for at in sorted(range(len(places)), key=lambda at: -worth[at])[: self.guidance.width]]
        worth = values(beam)
        tokens, stopped = beam[worth.index(max(worth))]
        return (tokens[:-1] if stopped else tokens), stopped

    def log_prob(self, prompt: list[int], reply: list[int]) -> float:
        return sum(float(self.encode(prompt + reply[:t])[1][token]) for t, token in enumerate(reply))


# --- backbones and heads --------------------------------------------------------------------------------------------


@dataclass
class Model:
    backbone: LanguageModel
    plain: Any

    def naive(self, head: ConvexHead, guidance: Guidance, seed: int, temperature: float = 1.0) -> Naive:
        return Naive(self.plain, self.backbone.stop_tokens, head, guidance, seed, temperature)

    def prompt(self, turns: tuple[Turn, ...]) -> list[int]:
        return self.backbone.render(turns).tokens


@cache
def tiny_models() -> dict[str, Model]:
    """The architectures with one token in eight a stop token, so that replies do end."""
    from transformers import AutoModelForCausalLM

    found = {}
    for name in ARCHITECTURES:
        folder = tiny_backbone(name, Path(tempfile.mkdtemp()) / name)
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(range(5, vocabulary, 8))}))
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        found[name] = Model(load_backbone(folder, device="cpu"), plain)
        shutil.rmtree(folder.parent)
    return found


@cache
def endless_model() -> LanguageModel:
    """A model that all but never stops."""
    folder = tiny_backbone("gpt2", Path(tempfile.mkdtemp()), seed=3)
    backbone = load_backbone(folder, device="cpu")
    shutil.rmtree(folder)
    return backbone


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return tiny_models()


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
    spec = backbone.spec(layer, pooling, ends_with_eos)
    return ConvexHead(gates, weights * 0.3, linear, spec, gate_on=gate_on, temperature=2.0, least_slope=0.4)


def texts(replies: list[Generation]) -> list[str]:
    return [reply.text for reply in replies]


# --- the same choices as the naive implementation -------------------------------------------------------------------


# One architecture for every mode, and every architecture for one of each kind; the others take longer.
QUICK = (GUIDED[0], GUIDED[5], GUIDED[6], BEAMS[0])
CASES = [
    pytest.param(name, pooling, mode, marks=() if name == "llama" or mode in QUICK else pytest.mark.nightly)
    for name, pooling in [*((name, "mean") for name in ARCHITECTURES), ("gpt2", "last"), ("qwen2", "attn")]
    for mode in (*GUIDED, *BEAMS)
]


@pytest.mark.parametrize(("name", "pooling", "guidance"), CASES, ids=str)
def test_equals_encoding_everything_anew(models: dict[str, Model], name: str, pooling: str, guidance: Guidance) -> None:
    model = models[name]
    head = make_head(model.backbone, pooling)
    _compare(model, head, guidance, seed=2)


@pytest.mark.parametrize("mode", ["token", "shift", "beam"])
@pytest.mark.parametrize(
    ("pooling", "layer", "ends_with_eos", "temperature"),
    [
        ("mean_all", -1, False, 0.7),
        ("mean", -1, True, 1.3),
        ("last", 1, True, 1.0),
        ("mean", 0, False, 0.0),
        ("attn", 1, True, 1.0),
    ],
)
def test_equals_naive_for_other_features_and_temperatures(
    models: dict[str, Model], pooling: str, layer: int, ends_with_eos: bool, temperature: float, mode: Any
) -> None:
    model = models["llama"]
    head = make_head(model.backbone, pooling, layer, ends_with_eos=ends_with_eos)
    width = {"top_k": 0, "top_p": 0.8} if temperature == 1.3 else {"top_k": 20, "top_p": 1.0}
    _compare(model, head, Guidance(mode, **width), seed=5, temperature=temperature)


@pytest.mark.parametrize(
    ("pooling", "guidance"),
    [*(("mean", g) for g in (*GUIDED, *BEAMS)), ("last", GUIDED[0]), ("mean_all", GUIDED[6]), ("attn", GUIDED[0])],
)
def test_gates_on_the_prompt_equal_naive(models: dict[str, Model], pooling: str, guidance: Guidance) -> None:
    head = make_head(models["llama"].backbone, pooling, gate_on="prompt")
    _compare(models["llama"], head, guidance, seed=2)


@pytest.mark.parametrize("pooling", ["mean", "last", "mean_all", "attn"])
def test_prompts_are_pooled_as_at_extraction(models: dict[str, Model], pooling: str) -> None:
    backbone = models["qwen2"].backbone
    spec = backbone.spec(1, pooling)
    found = extract([Pair(p, "a", "b", "g") for p in PROMPTS], backbone, spec, prompt_features=True).prompt
    rows = [backbone.render(prompt).tokens for prompt in PROMPTS]
    prefix = backbone.start(rows, spec.layer, scored=POOLINGS[pooling].scored)
    assert found is not None
    np.testing.assert_allclose(POOLINGS[pooling].prompt(prefix).numpy(), found, rtol=NETWORK, atol=NETWORK)


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
        if guidance.mode == "shift":
            assert reply.divergence is not None
            assert reply.divergence == pytest.approx(naive.spent, rel=1e-3, abs=1e-5)
            assert guidance.budget is None or 0 < naive.spent <= guidance.budget + 1e-9


def test_naive_comparison_covers_every_way_to_end(models: dict[str, Model]) -> None:
    lengths = set()
    for name in ARCHITECTURES:
        replies = generate(PROMPTS, models[name].backbone, max_new_tokens=9, seed=2)
        lengths |= {reply.n_tokens for reply in replies}
    assert 9 in lengths
    assert min(lengths) < 9
