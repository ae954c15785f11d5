"""Documents that somebody else wrote: read as the libraries read them, within bounds, and never with a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from coala.documents import MOST_DEPTH, MOST_NODES, DocumentError, parse_json, parse_yaml, tensors_header
from coala.store import StoreError
from coala.store.files import load_arrays, load_json, load_lines

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def _load(text: str) -> Any:
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@given(PLAIN)
def test_documents_come_back_as_they_were_written(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True)) == _load(yaml.safe_dump(value, allow_unicode=True))


@given(st.text() | st.text(alphabet="[]{}:,-&*!?|> \n\t'\"#%@ab01.", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse, reference in ((parse_json, json.loads), (parse_yaml, _load)):
        try:
            found = parse(text)
        except DocumentError:
            continue
        assert repr(found) == repr(reference(text))


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 5000, '{"a": ' * 100_000], ids=["lists", "digits", "objects"])
def test_json_beyond_the_bounds_is_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        parse_json(text)


def test_aliases_count_as_what_they_stand_for() -> None:
    line = ", ".join(["x"] * 10)
    bomb = f"a0: &a0 [{line}]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    with pytest.raises(DocumentError, match="aliases"):
        parse_yaml(bomb)
    assert parse_yaml("base: &b {x: 1}\nused: {<<: *b, y: 2}")["used"] == {"x": 1, "y": 2}
    with pytest.raises(DocumentError, match="contains itself"):
        parse_yaml("a: &a [*a]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * (MOST_DEPTH + 1), "deep"),
        ("- x\n" * (MOST_NODES + 1), "more than"),
        ("x" * (2**20 + 1), "characters"),
        ("day: 2026-99-99", "month"),
        ("n: " + "9" * 5000, "digits"),
        ("? {a: 1}\n: 2", "unhashable"),
        ("a: !!python/object/apply:os.getcwd []", "constructor"),
        ("a: \x00", "control characters"),
    ],
)
def test_yaml_beyond_the_bounds_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def _file(folder: Path, header: bytes, body: bytes = b"", length: int | None = None) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + body)
    return path


def test_arrays_are_those_that_were_saved(tmp_path: Path) -> None:
    wanted = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4))}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(wanted, metadata={"about": "it"}))
    header, start = tensors_header(path)
    assert set(header) == set(wanted)
    assert path.stat().st_size == start + max(about["data_offsets"][1] for about in header.values())
    for mmap in (False, True):
        found = load_arrays(path, mmap=mmap)
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


BAD_HEADERS = {
    "empty": (b"", b"", 0),
    "an error page": (b"<html>", b"", None),
    "a length beyond the file": (b"{}", b"", 2**63),
    "nested": (b"[" * 100_000, b"", None),
    "a list": (b"[]", b"", None),
    "an entry that is a number": (b'{"a": 1}', b"", None),
    "offsets beyond the file": (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234", None),
    "offsets backwards": (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}', b"1234", None),
    "a shape beyond its bytes": (b'{"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 4]}}', b"1234", None),
    "a negative shape": (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"1234", None),
    "an unknown kind": (b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}', b"1234", None),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_file_of_arrays_is_a_sentence(case: str, mmap: bool, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"x\.safetensors: is "):
        load_arrays(_file(tmp_path, *BAD_HEADERS[case]), mmap=mmap)


@given(st.binary(max_size=200))
def test_any_bytes_are_arrays_or_a_sentence(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        path.write_bytes(data)
        for mmap in (False, True):
            try:
                load_arrays(path, mmap=mmap)
            except StoreError:
                continue


def test_files_of_a_run_are_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in ("[" * 100_000, "9" * 5000):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"run\.json: is n"):
            load_json(path)
        with pytest.raises(StoreError, match=r"run\.json:1: is n"):
            list(load_lines(path))
