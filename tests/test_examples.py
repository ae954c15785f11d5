"""The examples run as they are written, notebooks are kept without outputs, and the site builds without a dead link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from scripts import extras_table

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
PATHS = os.pathsep.join([str(ROOT / "src"), str(ROOT)])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PATHS, "HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"}


def test_every_example_is_on_the_page_of_examples() -> None:
    named = set(re.findall(r"`([\w.]+\.(?:py|ipynb))`", (ROOT / "docs" / "examples.md").read_text()))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []


def test_every_extra_says_what_it_enables() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras_table.ENABLES) == set(declared) - set(extras_table.NOT_SHOWN)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_links_to_files_of_the_repository_lead_there(name: str) -> None:
    text = (ROOT / name).read_text()
    places = [place.partition("#")[0] for place in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in place]
    assert [place for place in places if place and not (ROOT / place).exists()] == []


@pytest.mark.nightly
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_script_runs_as_it_is_written(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_as_it_is_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.nightly
def test_the_site_builds_offline_without_a_dead_link(tmp_path: Path) -> None:
    import coala

    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**environment(), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    # Nothing is fetched when a page is opened.
    fetched = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://[^\"> ]+")
    assert {name: found for name, text in pages.items() if (found := fetched.findall(text))} == {}
    missing = [name for name in coala.__all__ if f'id="coala.{name}"' not in pages["reference/python.html"]]
    assert missing == []
    for command in ("coala align", "coala eval share", "coala comal train"):
        assert f">{command}<" in pages["reference/commands.html"]
    listed = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert len(pages) > len(listed)
