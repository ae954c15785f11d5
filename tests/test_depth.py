"""The layer that is read: the cheapest within the noise, from one pass, the same whoever asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from coala.align.depth import choose_layer
from coala.backbone import LanguageModel, load_backbone
from coala.cli import app
from coala.convex import fit
from coala.features import extract
from coala.store import load_features, load_json
from coala.values import CoalaError, Pair, user

from .menagerie import tiny_backbone
from .test_align import pair_rows, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> LanguageModel:
    return load_backbone(folder)


def some_pairs(n: int, groups: int) -> list[Pair]:
    return [
        Pair(user(row["prompt"]), row["chosen"], row["rejected"], f"g{i % groups}")
        for i, row in enumerate(pair_rows(n, groups))
    ]


def test_the_cheapest_within_the_noise_is_chosen(backbone: LanguageModel) -> None:
    pairs, spec = some_pairs(60, 20), backbone.spec()
    scores = choose_layer(pairs, backbone, spec)
    assert [score.layer for score in scores] == list(range(1, backbone.n_layers + 1))
    assert scores[-1].cost == 1.0
    best = min(score.nll for score in scores)
    chosen = [score for score in scores if score.chosen]
    assert len(chosen) == 1
    for score in scores:
        assert score.excess == pytest.approx(score.nll - best)
        if score.layer < chosen[0].layer:
            assert score.excess > score.excess_error
    assert chosen[0].excess <= chosen[0].excess_error
    # What one pass over several layers says is what features of that layer by themselves say.
    alone = fit(extract(pairs, backbone, backbone.spec(layer=1)), method="linear").held_out
    assert alone is not None
    assert scores[0].nll == pytest.approx(alone.loss, rel=1e-3)


def test_a_sample_keeps_groups_whole(backbone: LanguageModel) -> None:
    pairs = some_pairs(60, 12)
    seen: list[int] = []
    scores = choose_layer(
        pairs, backbone, backbone.spec(), layers=[1, 2], most_pairs=23, on_batch=lambda d, total, t: seen.append(total)
    )
    assert seen[-1] == 20  # four groups of five
    assert len(scores) == 2
    assert scores == choose_layer(pairs, backbone, backbone.spec(), layers=[1, 2], most_pairs=23)


def test_one_group_cannot_choose(backbone: LanguageModel) -> None:
    with pytest.raises(CoalaError, match="are of one group"):
        choose_layer(some_pairs(6, 1), backbone, backbone.spec())


def test_the_command_reads_what_was_chosen(folder: Path, backbone: LanguageModel, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(40, 20))
    command = ["extract", str(pairs), "--model", str(folder), "--layer", "auto", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--prefixes", "2"])
    assert done.exit_code == 0, done.output
    rows = load_json(tmp_path / "out" / "layer.json")
    layer = next(row["layer"] for row in rows if row["chosen"])
    features = load_features(tmp_path / "out")
    assert features.spec.layer == layer
    assert len(features) == 80
    assert f"{layer} (chosen)" in done.output
    assert np.isfinite(features.chosen).all()
    wrong = CliRunner().invoke(app, [*command[:-3], "deep", "--out", str(tmp_path / "other")])
    assert isinstance(wrong.exception, CoalaError)
    assert "expected a number" in str(wrong.exception)
