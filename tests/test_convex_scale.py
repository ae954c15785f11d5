"""Laws of scale: rows in memory, in a file or on several devices make the same solution."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coala.convex import GatedProgram, PairProgram, certify
from coala.convex import rows as rows_module
from coala.convex.gate_sampling import ascend
from coala.convex.rows import BLOCK, available_bytes, check_memory, open_rows, solve_bytes
from coala.convex.sharding import spread
from coala.store import write_rows
from coala.values import CoalaError

from .conftest import REPOSITORY
from .convex_processes import mapped_program, programs, solved

# One row more or less than whole blocks, and fewer rows than a block.
SIZES = (BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1)


def start(*arguments: str, flags: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.convex_processes", *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def stiffness(program: GatedProgram | PairProgram) -> float:
    """m with F(u) - F* >= m/2 ||u - u*||^2: the ridge, or the least curvature of a quadratic loss."""
    if isinstance(program, PairProgram):
        return float(program.ridge)
    F = np.einsum("nk,ni->nki", np.asarray(program.X, float), program.patterns).reshape(len(program.y), -1)
    return float(np.linalg.eigvalsh(F.T @ F)[0])


def assert_same(program: GatedProgram | PairProgram, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both certificates enclose one optimum, and the weights lie no further apart than two such gaps allow."""
    assert certify(program, np.array(found["weights"]))[0] == pytest.approx(found["objective"], rel=1e-12)
    gaps = [one["objective"] - one["lower"] for one in (found, expected)]
    assert 0 <= min(gaps) <= max(gaps) <= 1e-6 * expected["objective"]
    assert found["lower"] <= expected["objective"]
    assert expected["lower"] <= found["objective"]
    apart = sum(np.sqrt(2 * gap / stiffness(program)) for gap in gaps)
    assert np.linalg.norm(np.subtract(found["weights"], expected["weights"])) <= apart


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("signs", [(1.0,), (1.0, -1.0)], ids=["rows", "pairs"])
def test_products_by_blocks_are_the_products(n: int, signs: tuple[float, ...]) -> None:
    rng = np.random.default_rng(n)
    X = rng.standard_normal((len(signs), n, 5)).astype(np.float32)
    patterns = rng.random((len(signs), n, 3)) < 0.5
    curvature, u = rng.random(n), rng.standard_normal((5, 3))
    F = np.einsum("s,snk,sni->nki", np.array(signs), X.astype(float), patterns)
    expected = np.einsum("nki,n,nlj,lj->ki", F, curvature, F, u)
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-13)):
        with jax.enable_x64(dtype is np.float64):
            # Rows stay float32: only what they are multiplied with is wide.
            c, v = jnp.asarray(curvature, dtype), jnp.asarray(u, dtype)
            found = rows_module.normal_product(jnp.asarray(X), jnp.asarray(patterns), signs, c, v)
            image = rows_module.gated_product(jnp.asarray(X), jnp.asarray(patterns), v)
            back = rows_module.gated_product_adjoint(jnp.asarray(X), jnp.asarray(patterns), image)
        assert found.dtype == image.dtype == back.dtype == dtype
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
        assert float(np.vdot(back, u)) == pytest.approx(float(np.vdot(image, image)), rel=1e2 * tolerance)


@pytest.mark.nightly
def test_the_width_of_a_block_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    program = programs()[0]
    expected = solved(program)
    try:
        for width in (100, 2000):
            monkeypatch.setattr(rows_module, "BLOCK", width)
            jax.clear_caches()
            assert_same(program, solved(program), expected)
    finally:
        jax.clear_caches()


@pytest.mark.nightly
def test_rows_of_a_file(tmp_path: Path) -> None:
    pairs = programs()[1]
    assert isinstance(pairs, PairProgram)
    held = np.asarray(pairs.rows)
    for cuts in ([1000], [1, 2, 700]):
        write_rows(tmp_path / "rows.npy", np.split(held, cuts, axis=1), held.shape[1])
        mapped = open_rows(tmp_path / "rows.npy")
        np.testing.assert_array_equal(mapped, held)
    found = solved(PairProgram(mapped, pairs.patterns, pairs.margin, pairs.weight, pairs.sparsity, pairs.ridge))
    assert found == solved(pairs)
    dual, starts = jnp.ones(held.shape[:2]), jnp.eye(held.shape[2])[:, :4]
    searched = [ascend(a, dual, starts, jnp.ones(4), 3)[1] for a in (mapped, pairs.rows)]
    np.testing.assert_array_equal(*searched)


def test_files_that_are_not_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    with pytest.raises(CoalaError, match="3 rows; 4 were announced"):
        write_rows(path, [np.zeros((3, 2), np.float32)], 4)
    for wrong in (np.zeros((3, 2), int), np.zeros(3), np.zeros((3, 2), order="F")):
        np.save(path, wrong)
        with pytest.raises(CoalaError, match=r"write_rows"):
            open_rows(path)


def test_memory_is_predicted_and_refused() -> None:
    needed = solve_bytes(118_090, 4096, 32)
    assert needed > 118_090 * 4096 * 4
    assert solve_bytes(118_090, 4096, 32, mapped=True) < needed / 4
    with pytest.raises(CoalaError, match=r"needs about 2\.0 GiB and 1\.0 GiB are available"):
        check_memory(2 * 2**30, 2**30)
    check_memory(2**30, 2**30)
    available = available_bytes()
    assert available is None or 0 < available < 2**50
    if available is not None:
        with pytest.raises(CoalaError, match="available"):
            check_memory(2 * available + 2**40)


def test_spreading_needs_a_mesh() -> None:
    with pytest.raises(CoalaError, match="row_mesh"):
        spread(programs()[0])


@pytest.mark.slow
@pytest.mark.nightly
def test_a_solve_from_a_file_takes_the_memory_predicted(tmp_path: Path) -> None:
    path, n, d = tmp_path / "rows.npy", 60_000, 256
    rng = np.random.default_rng(0)
    write_rows(path, (rng.standard_normal((10_000, d), np.float32) / 16 for _ in range(n // 10_000)), n)
    result = answer(start("file", str(path)))
    assert result["predicted"] < path.stat().st_size / 2
    assert result["taken"] <= result["predicted"]
    program = mapped_program(str(path), 6)
    assert certify(program, np.array(result["weights"]))[0] == pytest.approx(result["objective"], rel=1e-9)
    assert result["objective"] - result["lower"] <= 1e-5 * result["objective"]


@pytest.mark.slow
@pytest.mark.nightly
def test_devices_of_one_process_agree_with_one_device() -> None:
    result = answer(start("devices", flags="--xla_force_host_platform_device_count=4"))
    assert result["devices"] == 4
    assert result["moved"] == []
    for found, program in zip(result["solved"], programs(), strict=True):
        assert_same(program, found, solved(program))


@pytest.mark.nightly
def test_two_processes_agree_with_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    parts = [start("process", port, rank) for rank in "01"]
    results = [answer(part) for part in parts]
    assert results[0] == results[1]
    assert results[0]["processes"] == 2
    assert_same(programs()[1], results[0]["solved"], solved(programs()[1]))
