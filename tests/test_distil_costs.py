"""What distillation costs: every formula against a counter while the real work runs, on small models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.backbone import LanguageModel, load_backbone
from coala.compare.flop_counter import jax_products, torch_flops
from coala.costs import (
    Solve,
    imitation_flops,
    output_fit_bytes,
    output_fit_flops,
    states_flops,
    sweep_flops,
    teacher_flops,
    usual_solves,
)
from coala.decoding import Guidance, generate
from coala.distil.accounts import fit_flops
from coala.distil.matrix import output_matrix
from coala.distil.states import Lesson, teacher_states
from coala.values import ConvexHead, Estimate, user

from .menagerie import tiny_backbone
from .test_convex_output import instance

PROMPTS = [user(text) for text in ("once upon a time", "a dog", "the film was a quick brown fox")]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_backbone(tiny_backbone("llama", tmp_path_factory.mktemp("llama")), device="cpu")


def test_the_teachers_replies(backbone: LanguageModel) -> None:
    rng = np.random.default_rng(0)
    none = np.zeros((0, backbone.width + 1), np.float32)
    head = ConvexHead(none, none, rng.standard_normal(backbone.width + 1).astype(np.float32), backbone.spec(-1))
    guidance = Guidance("block", rule="min-max", candidates=4, block_tokens=3)
    replies, counted = torch_flops(
        lambda: generate(PROMPTS, backbone, head, guidance, max_new_tokens=9, seed=1, batch_size=1)
    )
    lengths = [len(backbone.render(prompt).tokens) for prompt in PROMPTS]
    formula = teacher_flops(backbone.shape, lengths, [9] * 3, candidates=4)
    assert {reply.n_tokens for reply in replies} == {9}
    # The cache has room to spare, which is attended to and masked: much on a model as small as this.
    assert formula <= counted < 1.2 * formula


def test_states_of_replies(backbone: LanguageModel, tmp_path: Path) -> None:
    lessons = [Lesson(prompt, "there was a dog", number) for number, prompt in enumerate(PROMPTS)]
    output, guidance = output_matrix(backbone), Guidance.unguided(top_k=20)
    found, counted = torch_flops(lambda: teacher_states(backbone, output, lessons, tmp_path, guidance, n_tokens=24))
    rows = [backbone.render(lesson.prompt, lesson.text) for lesson in lessons]
    formula = states_flops(backbone.shape, [len(row.tokens) for row in rows], [row.stop - row.start for row in rows])
    assert len(found) == sum(row.stop - row.start for row in rows)
    assert counted == pytest.approx(formula, rel=0.01)  # but for the angles of positions


def test_a_solve_is_a_sum_and_a_sweep_a_multiple(backbone: LanguageModel) -> None:
    steps = [output_fit_flops(64, 512, 16, [Solve(16, n)]) for n in (0, 1, 2)]
    assert steps[2] - steps[1] == steps[1] - steps[0] == 4 * 64 * 256 + 4 * 512 * 16 + 16 * 16**3
    assert output_fit_flops(64, 512, 16, [Solve(16, 1)] * 3) == 3 * steps[1]
    assert usual_solves(8)[-1].inputs == 8
    shape, rows = backbone.shape, [9, 12]
    one = imitation_flops(shape, rows, epochs=1, rates=1)
    assert imitation_flops(shape, rows, epochs=3, rates=3) == 9 * one
    # DPO of adapters: three forwards of both replies, where SFT's are two of one.
    assert sweep_flops(shape, rows, rows, rates=4) == 4 * 2 * one * 3 // 2


@pytest.mark.nightly
@pytest.mark.parametrize("rank", ["auto", 2])
@pytest.mark.parametrize("led", [False, True])
def test_the_solver(rank: Any, led: bool) -> None:
    from coala.convex.output_fit import fit_output

    def never(change: Any, groups: Any) -> Estimate:
        return Estimate(-1.0, -2.0, 0.0, len(groups), method="none")

    states, output = instance()
    with jax_products() as products:
        found = fit_output(states, output, rank=rank, lead=never if led else None)
    assert products.flops == sum(fit_flops(found, states.width, len(output)))


@pytest.mark.nightly
def test_imitation(tmp_path: Path) -> None:
    """With adapters of rank 1, whose own products the formula leaves out."""
    pytest.importorskip("trl", reason="training an adapter needs the extra baselines")
    from coala.baselines import Demonstration, Lora, train
    from coala.distil.adapter import train_settings
    from coala.distil.settings import AdapterSettings

    base = tiny_backbone("llama", tmp_path / "llama")
    model = load_backbone(base, device="cpu")
    reply = "there was a little girl, once upon a time"
    shown = [Demonstration(PROMPTS[0], reply, ended=False)] * 4
    rows = [len(model.render(one.prompt, one.text).tokens) for one in shown]
    settings = train_settings(1e-3, AdapterSettings(epochs=1, adapter_rank=1, batch=2), len(shown), 0, False)
    settings = replace(settings, lora=replace(settings.lora or Lora(), targets=("q_proj", "v_proj")))
    trained, counted = torch_flops(
        lambda: train("sft", shown, base, out=tmp_path / "run", settings=settings, device="cpu")
    )
    formula = imitation_flops(model.shape, rows, epochs=1, rates=1)
    assert trained.flops == formula
    assert counted == pytest.approx(formula, rel=0.15)


@pytest.mark.nightly
def test_bytes_are_above_what_the_compiler_says_of_every_piece() -> None:
    from tests.test_convex_output import memory_of

    n, d, vocabulary, tokens = 8192, 256, 4096, 24
    bound = sum(output_fit_bytes(n, n * tokens, d, vocabulary).values())
    assert 0.3 * bound < memory_of(n, d, vocabulary, tokens) <= bound
