"""Costs: the reference values, PyTorch's own counter, and the laws the formulas must obey."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from coala.costs import (
    Shape,
    Stopwatch,
    body_flops,
    cronos_flops,
    decoding_flops,
    extraction_flops,
    full_flops,
    guided_token_flops,
    head_flops,
    score_flops,
    second_phase_flops,
    token_flops,
    training_flops,
    transformer_shape,
)
from coala.values import CoalaError

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
    assert decoding_flops(SMALL, 5, 10) < fifth < every
    assert score_flops(8, 0) == 18


def test_stopwatch_runs_stands_and_goes_on() -> None:
    with Stopwatch() as watch:
        time.sleep(0.02)
        running = watch.seconds
        assert running >= 0.02
    stopped = watch.seconds
    assert stopped >= running
    assert watch.seconds == stopped
    with watch:
        pass
    assert watch.seconds >= stopped


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
