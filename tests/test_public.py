"""What `import coala` offers: every name is there, old names say where they went, and the README's lines run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import coala
from tests.conftest import REPOSITORY
from tests.menagerie import tiny_backbone
from tests.test_align import pair_rows, write_rows

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_public_name_is_there() -> None:
    for name in coala.__all__:
        assert getattr(coala, name) is not None
    assert set(coala.__all__) <= set(dir(coala))
    assert coala.__version__


@pytest.mark.parametrize("name", ["check", "split", "extract", "fit", "judge", "solve", "Program"])
def test_a_name_that_moved_says_where_to(name: str) -> None:
    with pytest.raises(AttributeError, match=r"is now coala\."):
        getattr(coala, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        coala.nonsense  # noqa: B018


def test_nothing_heavy_is_imported_with_it() -> None:
    code = "import sys, coala; print(sorted({'torch', 'jax', 'transformers', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    tiny_backbone("llama", folder / "my-model")
    write_rows(folder / "pairs.jsonl", pair_rows(60, 20))
    return folder


def test_the_lines_of_the_readme_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    # The tiny model has nothing to say in fifty tokens to fifty prompts.
    lines = code[1].replace('out="runs/mine"', 'out="runs/mine", evaluation={"prompts": 2, "max_new_tokens": 4}')
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    exec(compile(lines, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "lowers the ridge-regularised training objective by more than" in printed or "gates of this head" in printed
    run = names["run"]
    assert isinstance(run, coala.Run)

    again = coala.load_run("runs/mine")
    np.testing.assert_array_equal(again.head.linear, run.head.linear)
    assert again.report["summary"]["n_eval"] > 0
    assert again.guidance == run.guidance
    messages = [[{"role": "user", "content": "tell me story"}]]
    by_messages, by_text = (again.generate(prompts, max_new_tokens=3)[0] for prompts in (messages, ["tell me story"]))
    assert by_messages.text == by_text.text
    again.head.save(place / "head")
    kept = coala.ConvexHead.load(place / "head")
    assert kept.certificate == again.head.certificate
    np.testing.assert_array_equal(kept.linear, again.head.linear)


def test_pairs_may_be_given_as_they_are(place: Path, tmp_path: Path) -> None:
    pairs = list(coala.read_pairs(place / "pairs.jsonl"))
    options = {"model": place / "my-model", "head": {"method": "linear"}, "evaluation": {"prompts": 0}}
    run = coala.align(pairs, out=tmp_path / "given", **options)
    other = coala.align(place / "pairs.jsonl", out=tmp_path / "file", **options)
    np.testing.assert_array_equal(run.head.linear, other.head.linear)
    assert coala.align(pairs, out=tmp_path / "given", **options).path == run.path  # finished: nothing is redone
    kept = (tmp_path / "given.pairs.jsonl").read_bytes()
    with pytest.raises(coala.CoalaError, match="found other pairs"):
        coala.align(pairs[:-1], out=tmp_path / "given", **options)
    assert (tmp_path / "given.pairs.jsonl").read_bytes() == kept


def test_what_cannot_be_aligned_is_a_sentence(place: Path, tmp_path: Path) -> None:
    model = place / "my-model"
    with pytest.raises(coala.CoalaError, match="found int, expected a file, several files, or Pair objects"):
        coala.align([1], model=model, out=tmp_path / "run")
    with pytest.raises(coala.CoalaError, match="head"):
        coala.align(place / "pairs.jsonl", model=model, out=tmp_path / "run", head={"method": "magic"})
    with pytest.raises(coala.CoalaError, match="not a run folder"):
        coala.load_run(tmp_path / "nowhere")
