"""Costs: the reference values, PyTorch's own counter, and the laws the formulas must obey."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coala.costs.measured
from coala.costs import (
    Load,
    Meter,
    Shape,
    Stopwatch,
    ask_driver,
    body_flops,
    cronos_flops,
    decoding_bytes,
    decoding_flops,
    extraction_flops,
    full_flops,
    guided_token_flops,
    head_flops,
    pairwise_flops,
    pass_bytes,
    score_flops,
    second_phase_flops,
    token_flops,
    training_flops,
    work_over_bound,
)
from coala.values import CoalaError
from tests.menagerie import tiny_backbone
from tests.waiting import PATIENCE, Clock, wait_for


def transformer_shape(
    *,
    n_layers: int,
    width: int,
    vocabulary: int,
    mlp_width: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    head_size: int | None = None,
    gated_mlp: bool = True,
) -> Shape:
    """Shape of a decoder with query, key, value, output and two (``gated_mlp``: three) MLP matrices a layer."""
    size = head_size or width // n_heads
    kv_width = (n_kv_heads or n_heads) * size
    layer = 2 * width * n_heads * size + 2 * width * kv_width + (3 if gated_mlp else 2) * width * mlp_width
    return Shape(n_layers, width, vocabulary, n_layers * layer, n_heads * size)


SHAPES = {
    "DistilGPT2": transformer_shape(
        n_layers=6, width=768, vocabulary=50257, mlp_width=3072, n_heads=12, gated_mlp=False
    ),
    "GPT2": transformer_shape(n_layers=12, width=768, vocabulary=50257, mlp_width=3072, n_heads=12, gated_mlp=False),
    "Mistral-7B": transformer_shape(
        n_layers=32, width=4096, vocabulary=32000, mlp_width=14336, n_heads=32, n_kv_heads=8
    ),
    "Llama-3.1-8B": transformer_shape(
        n_layers=32, width=4096, vocabulary=128256, mlp_width=14336, n_heads=32, n_kv_heads=8
    ),
    "Dolphin-7B": transformer_shape(
        n_layers=32, width=4096, vocabulary=32001, mlp_width=14336, n_heads=32, n_kv_heads=8
    ),
}
SMALL = Shape(n_layers=3, width=8, vocabulary=50, body_matmul_parameters=12 * 64 * 3, attention_width=8)
TERA = 1e12


@pytest.mark.parametrize("name", SHAPES)
def test_published_accounting(name: str, shared: Path) -> None:
    wanted = json.loads((shared / "eval_reference/flops/flops_reference.json").read_text())["models"][name]
    shape, pairs = SHAPES[name], wanted["pairs"]
    row = [wanted["tokens_per_sequence"]]
    rows = 2 * pairs
    close = {"rel": 1e-9, "abs": 0}
    assert body_flops(shape, row) == wanted["forward_body_flops_per_seq"]
    assert full_flops(shape, row) == wanted["forward_full_flops_per_seq"]
    extraction = extraction_flops(shape, row) * rows / TERA
    assert extraction == pytest.approx(wanted["feature_extraction_TFLOP"], **close)
    small = cronos_flops(rows, shape.width, 10, admm_steps=5, pcg_steps=28) / TERA
    large = cronos_flops(rows, shape.width, 10, admm_steps=20, pcg_steps=50) / TERA
    second = second_phase_flops(rows, shape.width, 20, epochs=100) / TERA
    assert small == pytest.approx(wanted["cronos_small_TFLOP"], **close)
    assert large == pytest.approx(wanted["cronos_large_TFLOP"], **close)
    assert second == pytest.approx(wanted["stage2_100_epochs_TFLOP"], **close)
    total = extraction + large + second
    assert total == pytest.approx(wanted["coala_total_TFLOP"], **close)
    for kind, adapters in (("full", False), ("lora", True)):
        cost = {
            method: training_flops(shape, row, row, method, adapters=adapters) * pairs / TERA  # type: ignore[arg-type]
            for method in ("sft", "dpo", "orpo")
        }
        for method, value in cost.items():
            assert value == pytest.approx(wanted[f"{method}_{kind}_TFLOP"], **close)
        cost["coala"] = total
        for ratio, value in wanted[f"ratios_{kind}"].items():
            above, below = ratio.split("_")
            assert cost[above] / cost[below] == pytest.approx(value, **close)


def _counted(model: Any, tokens: int, batch: int) -> int:
    """FLOPs by PyTorch's counter, without those of the rotary angles (an outer product, not a layer's work)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(batch, tokens, dtype=torch.long), use_cache=False)
    rotary = sum(
        sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    return int(counter.get_total_flops() - rotary)


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers

    transformers.GPT2LMHeadModel, transformers.LlamaForCausalLM  # noqa: B018 - loads the lazy modules
    return transformers


@pytest.mark.parametrize("head", [True, False], ids=["logits", "body"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_formula_equals_the_counter(family: str, head: bool, transformers: Any) -> None:
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=3, n_embd=24, n_head=4, vocab_size=97, n_positions=64, attn_implementation="eager"
        )
        shape = transformer_shape(n_layers=3, width=24, vocabulary=97, mlp_width=96, n_heads=4, gated_mlp=False)
        kind = transformers.GPT2LMHeadModel if head else transformers.GPT2Model
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=56,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            vocab_size=101,
            attn_implementation="eager",
        )
        shape = transformer_shape(
            n_layers=2, width=32, vocabulary=101, mlp_width=56, n_heads=4, n_kv_heads=2, head_size=12
        )
        kind = transformers.LlamaForCausalLM if head else transformers.LlamaModel
    model = kind(config).eval()
    formula = full_flops if head else body_flops
    for tokens, batch in ((1, 1), (17, 1), (9, 3)):
        assert _counted(model, tokens, batch) == formula(shape, [tokens] * batch)


def test_sums_are_exact_and_add_up() -> None:
    lengths = [3, 500_000, 1, 0]
    assert body_flops(SMALL, lengths) == sum(body_flops(SMALL, [n]) for n in lengths)
    assert full_flops(SMALL, lengths) == body_flops(SMALL, lengths) + head_flops(SMALL, lengths)
    long = SHAPES["Llama-3.1-8B"]
    assert body_flops(long, [131072] * 1000) == 1000 * body_flops(long, [131072])  # past 2^63
    assert isinstance(body_flops(long, [131072] * 1000), int)


def test_layers_cost_alike() -> None:
    rows = [4, 9]
    assert body_flops(SMALL, rows, layer=0) == 0
    assert body_flops(SMALL, rows, layer=3) == body_flops(SMALL, rows) == body_flops(SMALL, rows, layer=-1)
    assert body_flops(SMALL, rows, layer=1) + body_flops(SMALL, rows, layer=2) == body_flops(SMALL, rows)
    assert body_flops(SMALL, rows, layer=-2) == body_flops(SMALL, rows, layer=2)
    with pytest.raises(CoalaError, match="3 layers"):
        body_flops(SMALL, rows, layer=4)


def test_training_rules() -> None:
    chosen, rejected = [5, 7], [4, 11]
    full = full_flops(SMALL, chosen) + full_flops(SMALL, rejected)
    assert training_flops(SMALL, chosen, rejected, "dpo") == 4 * full
    assert training_flops(SMALL, chosen, rejected, "orpo", checkpointing=True) == 4 * full
    assert training_flops(SMALL, chosen, rejected, "simpo", adapters=True, epochs=2) == 4 * full
    assert training_flops(SMALL, chosen, rejected, "sft") == 3 * full_flops(SMALL, chosen)
    with pytest.raises(CoalaError, match="expected one of sft"):
        training_flops(SMALL, chosen, rejected, "ppo")  # type: ignore[arg-type]
    with pytest.raises(CoalaError, match="0 or more"):
        body_flops(SMALL, [3, -1])


def test_decoding_adds_up() -> None:
    # One cached token at a time is never dearer than the logits of the whole row, and without the triangle equal.
    tokens = 12
    cached = sum(token_flops(SMALL, t) for t in range(tokens))
    attention = 4 * SMALL.attention_width * SMALL.n_layers
    assert cached == full_flops(SMALL, [tokens]) - attention * (tokens**2 - tokens * (tokens + 1) // 2)
    assert decoding_flops(SMALL, 5, 4) == body_flops(SMALL, [5]) + sum(token_flops(SMALL, 5 + i) for i in range(4))
    assert guided_token_flops(SMALL, 9, 1, 2) == token_flops(SMALL, 9) + score_flops(8, 2)
    every = decoding_flops(SMALL, 5, 10, candidates=5, n_neurons=2)
    fifth = decoding_flops(SMALL, 5, 10, candidates=5, every=5, n_neurons=2)
    assert fifth == body_flops(SMALL, [5]) + sum(
        token_flops(SMALL, 5 + i) if i % 5 else guided_token_flops(SMALL, 5 + i, 5, 2) for i in range(10)
    )
    assert decoding_flops(SMALL, 5, 10) < fifth < every
    assert score_flops(8, 0) == 18


def test_stopwatch_runs_stands_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(coala.costs.measured, "time", clock)
    with Stopwatch() as watch:
        clock.move(2)
        assert watch.seconds == 2
        clock.move(1)
    clock.move(5)
    assert watch.seconds == 3
    with watch:
        clock.move(4)
    assert watch.seconds == 7


def test_stopwatch_stops_at_an_error() -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError, match="x"), watch:
        raise ValueError("x")
    assert watch.seconds == watch.seconds > 0


def test_peak_memory_grows_with_use() -> None:
    code = (
        "from coala.costs import peak_memory; before = peak_memory()['host'];"
        "block = b'x' * 80_000_000; print(before, peak_memory()['host'])"
    )
    before, after = map(
        int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split()
    )
    assert 5_000_000 < before < 500_000_000
    assert after - before > 60_000_000


def test_costs_load_no_framework() -> None:
    code = (
        "import coala.costs, sys; coala.costs.peak_memory(); print(sorted({'torch','jax','scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


# --- an extraction that shares -------------------------------------------------------------------------------------


def _without_rotary(work: Any) -> int:
    """FLOPs of ``work()`` by PyTorch's counter, without those of the rotary angles."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        work()
    rotary = sum(sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return int(counter.get_total_flops() - rotary)


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_shared_extraction_costs_what_the_counter_counts(family: str, layer: int, tmp_path: Path) -> None:
    """Trees of equal rows, so that no pass is padded: the trunks' pass, the branches' pass, and all of ``extract``."""
    from coala.backbone import load_backbone
    from coala.features import extract
    from coala.features.prefix_tree import PrefixTree
    from coala.values import Pair, user

    backbone = load_backbone(tiny_backbone(family, tmp_path))
    backbone._network.causal.set_attn_implementation("eager")  # type: ignore[operator]
    assert backbone.shares
    draw = np.random.default_rng(0)
    trees, long, shared = 3, 20, 12
    tokens, trunk = [], []
    for tree in range(trees):
        whole = draw.integers(5, 300, long, dtype=np.int32)
        tokens += [whole, np.concatenate([whole[:shared], draw.integers(5, 300, long - shared, dtype=np.int32)])]
        trunk += [2 * tree, 2 * tree]
    rows = np.arange(2 * trees)
    plan = PrefixTree(
        tokens,
        start=np.full(2 * trees, shared),
        stop=np.full(2 * trees, long),
        dropped=np.zeros(2 * trees, dtype=np.int64),
        parent=np.array(trunk),
        shared=np.array([0, shared] * trees),
        index=rows.reshape(-1, 2),
    )
    spec = backbone.spec(layer)
    shape = backbone.shape

    def formula(**of: Any) -> int:
        return extraction_flops(shape, layer=spec.layer, **of)

    readings = []
    trunks = _without_rotary(
        lambda: readings.append(backbone.read([list(map(int, t)) for t in tokens[::2]], [spec.layer], keep=True))
    )
    branches = _without_rotary(
        lambda: readings[0].branch([0, 1, 2], [shared] * trees, [list(map(int, t[shared:])) for t in tokens[1::2]])
    )
    assert trunks == formula(lengths=[long] * trees)
    assert branches == formula(lengths=[long] * trees, own=[long - shared] * trees)
    pairs = [Pair(user("p"), "a", "b", str(i)) for i in range(trees)]
    whole = _without_rotary(lambda: extract(pairs, backbone, spec, plan=plan))
    assert whole == trunks + branches == formula(lengths=plan.lengths, own=plan.own_lengths)
    assert whole < formula(lengths=plan.lengths)


def test_work_is_over_its_bound_by_what_is_computed_twice() -> None:
    from coala.features import distinct_lengths

    draw = np.random.default_rng(3)
    begin = draw.integers(0, 9, 6, dtype=np.int32)
    rows = [np.concatenate([begin, np.full(4, last, dtype=np.int32)]) for last in (10, 11, 12)]
    lengths, own = distinct_lengths(rows)
    least = extraction_flops(SMALL, lengths, own=own)
    alone = extraction_flops(SMALL, [10, 10, 10])
    # All rows are of one length, so that work is in proportion to tokens: 30 of them against 6 + 3 * 4.
    assert work_over_bound(alone, least) == pytest.approx(30 / 18)
    assert work_over_bound(least, least) == 1
    assert work_over_bound(1, 0) != work_over_bound(1, 0)


def test_a_newton_step_is_what_the_compiler_counts() -> None:
    """One product of conjugate gradients, in one block so that the compiler counts no loop body once."""
    import jax.numpy as jnp

    from coala.convex.rows import normal_product

    n, width, gates = 200, 48, 6
    rows, is_open = jnp.ones((2, n, width)), jnp.ones((2, n, gates), bool)
    compiled = normal_product.lower(rows, is_open, (1.0, -1.0), jnp.ones(n), jnp.ones((width, gates))).compile()  # type: ignore[attr-defined]
    counted = compiled.cost_analysis()["flops"]
    # The compiler counts masks and sums too.
    ours = pairwise_flops(n, width, gates, newton_steps=1, pcg_steps=1) / 2
    assert ours == 8 * n * width * gates
    assert ours <= counted <= 1.1 * ours


# --- energy --------------------------------------------------------------------------------------------------------


def _zone(folder: Path, number: int, name: str, micro_joules: int, full: int = 1_000_000_000) -> Path:
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{micro_joules}\n")
    (zone / "max_energy_range_uj").write_text(f"{full}\n")
    return zone / "energy_uj"


def test_energy_is_what_the_counters_rose_by(tmp_path: Path) -> None:
    package, core, memory = (
        _zone(tmp_path, 0, "package-0", 5_000_000),
        _zone(tmp_path, 1, "core", 1_000_000),
        _zone(tmp_path, 2, "dram", 999_000_000),
    )
    meter = Meter(tmp_path)
    with meter:
        package.write_text("8500000")
        core.write_text("4000000")  # lies inside the package
        memory.write_text("1000000")  # began again behind its range: 2 J
    assert meter.joules is not None
    assert meter.joules["host"] == pytest.approx(5.5)
    with meter:
        package.write_text("9000000")
    assert meter.joules["host"] == pytest.approx(6.0)
    facts = meter.facts(tokens=100)
    assert facts["tokens_per_second"] == 100 / meter.seconds
    assert facts["joules"] == meter.joules
    assert facts["peak_bytes"]["host"] > 0
    package.unlink()
    with meter:
        pass
    assert meter.joules["host"] == pytest.approx(6.0)  # a counter that went away takes nothing with it


def test_energy_nobody_reports_is_none(tmp_path: Path) -> None:
    with Meter(tmp_path) as meter:
        pass
    # A machine with an NVIDIA driver reports its GPUs whatever the processor does.
    assert "host" not in (meter.joules or {})
    assert meter.joules is None or meter.joules["device"] >= 0
    if not ask_driver("power.draw"):
        assert meter.joules is None
        assert meter.facts()["joules"] is None


def test_power_is_energy_by_time_and_linear_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    from coala.costs.measured import _Sampler

    clock, watts = Clock(), iter([70.0, 70.0, None])
    monkeypatch.setattr(coala.costs.measured, "time", clock)
    asked: list[float] = []

    def reading() -> float | None:
        asked.append(clock.time())
        return next(watts)

    sampler = _Sampler(reading, 50.0, every=PATIENCE)  # it asks when this test says so
    clock.move(2)
    sampler._advance()
    clock.move(3)
    sampler._advance()
    clock.move(1)
    assert sampler.used() == 2 * 60 + 3 * 70 + 1 * 70  # a reading that is lost is taken to be the one before
    assert len(asked) == 3
    # By itself it asks again and again until it is read.
    again: list[float] = []
    busy = _Sampler(lambda: again.append(clock.time()) or 50.0, 50.0, every=0.001)
    wait_for(lambda: len(again) >= 3)
    clock.move(2)
    assert busy.used() == 100


def test_bytes_of_a_pass_grow_with_all_they_hold() -> None:
    shape = SHAPES["Llama-3.1-8B"]

    def total(load: Load, **of: Any) -> int:
        return sum(pass_bytes(shape, 65_536, load, **{"size": 2, **of}).values())

    plain, shared = Load(4096), Load(4096, 4096, 8192, 1024)
    assert total(plain) < total(shared) < total(Load(8192, 8192, 16384, 1024))
    assert total(shared, layer=16) < total(shared) < total(shared, size=4)
    assert total(shared) < total(shared, to_end=True) == total(shared, pooled=2)
    assert pass_bytes(shape, 65_536, shared, size=2)["kept keys and values"] == 4096 * 131_072
    assert pass_bytes(shape, 65_536, plain, size=2)["kept keys and values"] == 0
    assert decoding_bytes(shape, 65_536, 2, 100, 10, size=2) < decoding_bytes(shape, 65_536, 2, 200, 10, size=2)
