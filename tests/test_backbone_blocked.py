"""Weights in oneDNN's order: the same numbers, the same model, whatever reads or saves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from coala.backbone import LanguageModel, blocked, load_backbone
from coala.backbone.blocked import BlockedLinear, block

from .menagerie import tiny_backbone

pytestmark = pytest.mark.skipif(not blocked._sound(), reason="this torch has no oneDNN")

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("rows", "width", "n_out"), [(1, 64, 16), (2, 65, 17), (5, 200, 33), (40, 96, 3)])
def test_products_are_those_of_the_weights(rows: int, width: int, n_out: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(n_out, width), torch.randn(n_out), torch.randn(rows, width)
    layer = BlockedLinear(weight, bias)
    exact = x.double() @ weight.double().T + bias
    # A sum of `width` products, in any order, each rounded.
    bound = (width + 2) * EPS * (x.double().abs() @ weight.double().abs().T + bias.abs())
    assert ((layer(x[None, :, :])[0] - exact).abs() <= bound).all()
    assert torch.equal(layer.weight, weight)
    assert layer(x[:0]).shape == (0, n_out)
    # A view whose rows do not lie one behind the other.
    assert torch.equal(layer(x.T.contiguous().T), layer(x))


def test_the_state_is_that_of_the_plain_layers_and_a_shared_table_stays_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(self.table(tokens)))

    model, plain = Tied(), Tied()
    plain.load_state_dict(model.state_dict())
    assert type(block(model).head) is nn.Linear  # too small to gain
    block(model, fewest=0)
    assert type(model.inner) is type(model.head) is BlockedLinear
    assert model.head.weight is model.table.weight
    tokens = torch.arange(20)
    torch.testing.assert_close(model(tokens), plain(tokens))
    state, expected = model.state_dict(), plain.state_dict()
    assert {*state} == {*expected}
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_half_precision_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    assert type(block(model, fewest=0)[0]) is nn.Linear


def test_a_model_reads_writes_and_saves_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(model: LanguageModel) -> torch.Tensor:
        states = model.hidden([[5, 3, 7, 2, 9]], -1)[0]
        return torch.cat([states.flatten(), model.logits(states).flatten()])

    folder = tiny_backbone("llama", tmp_path / "model")
    plain = load_backbone(folder)
    monkeypatch.setattr(blocked, "FEWEST", 0)
    ours = load_backbone(folder)
    assert any(type(module) is BlockedLinear for module in ours.transformer.modules())
    torch.testing.assert_close(read(ours), read(plain), rtol=1e-4, atol=1e-4)
    assert ours.spec(-1, "mean", True, 64) == plain.spec(-1, "mean", True, 64)
    for name, model in (("plain", plain), ("ours", ours)):
        model.transformer.save_pretrained(tmp_path / name)
    from safetensors.torch import load_file

    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "plain"))
    assert {*saved} == {*expected}
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
