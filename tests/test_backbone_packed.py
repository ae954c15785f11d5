"""Products of weights packed in 8 bits, against exact ones and the error that rounding may have."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from coala.backbone import BackboneError, load_backbone
from coala.backbone.packed import PackedLinear


def test_products_of_packed_weights_are_within_the_error_of_rounding() -> None:
    """The bound: half a step of each weight times its input, and half a step of each input times its weight."""
    torch.manual_seed(0)
    for rows, width, n_out in ((1, 64, 16), (2, 65, 17), (5, 200, 33), (40, 96, 3)):
        weight, bias = torch.randn(n_out, width), torch.randn(n_out)
        x = torch.randn(rows, width) * torch.logspace(-6, 3, rows)[:, None]
        x[0, 3] = 50 * x[0].abs().max()  # one input that dwarfs the others
        found = PackedLinear(weight, bias)(x[None])[0].double()
        step, unit = weight.double().abs().amax(1) / 254, x.double().abs().amax(1) / (63 * 128 * 2)
        bound = x.double().abs().sum(1)[:, None] * step + unit[:, None] * (weight.double().abs().sum(1) + width * step)
        error = (found - (x.double() @ weight.double().T + bias)).abs()
        assert (error <= bound * 1.001 + 1e-6 * (x.double().abs() @ weight.double().abs().T) + 1e-6).all()
        assert error.max() > 0


def test_the_largest_sums_of_packed_products_do_not_overflow() -> None:
    """Every sum of neighbours as large as it can be, in each digit: what CPUs without VNNI would cut off at 2^15."""
    for digit in (63 * 128.0, 63 * 128.0 - 64, 64.0):
        signs = torch.tensor([[1.0], [-1.0]]).expand(2, 512)
        x = torch.cat([signs * digit, torch.full((2, 1), 63 * 128.0)], dim=1)
        weight = torch.cat([torch.ones(8, 512), torch.zeros(8, 1)], dim=1)
        torch.testing.assert_close(PackedLinear(weight, None)(x), x @ weight.T, rtol=1e-5, atol=1e-3)


def test_a_row_of_packed_products_is_its_own_in_any_batch() -> None:
    torch.manual_seed(1)
    layer = PackedLinear(torch.randn(48, 96), torch.randn(48))
    x = torch.randn(7, 96)
    x[2], x[4] = 0.0, 1e4 * x[4]
    whole = layer(x)
    for row in range(7):
        assert torch.equal(layer(x[row : row + 1])[0], whole[row])
    assert torch.equal(whole[2], layer.bias)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 48)
    x[3, 0] = torch.nan
    assert not layer(x)[3].isfinite().any()
    assert torch.equal(layer(x)[1], whole[1])


@pytest.mark.nightly
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_packed_products_are_the_same_on_lesser_cpus(capability: str) -> None:
    """torch's other kernels of this machine, in a process of its own, for they are chosen when torch is loaded."""
    program = (
        "import torch\nfrom coala.backbone.packed import PackedLinear, check_kernel\ncheck_kernel()\n"
        "w = torch.arange(-300, 300).reshape(10, 60) / 7\nx = torch.arange(180).reshape(3, 60) / 11 - 5\n"
        "print(((PackedLinear(w, None)(x) - x @ w.T).abs() < 0.01 * (x.abs() @ w.abs().T)).all().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr


def test_a_machine_without_the_kernel_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from coala.backbone import packed

    def absent(*_: Any) -> Any:
        raise RuntimeError("fbgemm needs AVX2\nand more")

    for product, said in (
        (absent, r"no 8-bit product .*\(fbgemm needs AVX2\).*Fix: leave it out"),
        (
            lambda digits, _: torch.zeros(len(digits), 16),
            "is wrong on this machine; expected 64",
        ),
    ):
        monkeypatch.setattr(packed, "_product", product)
        with pytest.raises(BackboneError, match=said):
            load_backbone("nowhere", quantise="8bit", device="cpu")
