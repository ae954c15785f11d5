"""A broken checkpoint is one sentence, whatever is broken in it; so is a kind of model or a device that is not read."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coala.backbone import BackboneError, load_backbone
from coala.backbone.checkpoint import LONGEST_HEADER
from coala.values import CoalaError
from tests.menagerie import tiny_backbone


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("qwen2", tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


WEIGHTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
    "page": (lambda _: b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "empty": (lambda _: b"", "is empty"),
    "short": (lambda _: b"\x01\x02", "not a safetensors file"),
    "header": (lambda b: b[:100], "is truncated in its header"),
    "tensors": (lambda b: b[:-7], "is truncated"),
    "more": (lambda b: b + b"x", "is too long"),
    "pickle": (lambda _: b"PK\x03\x04" + b"0" * 99, "a pickle"),
    "gguf": (lambda _: b"GGUF" + b"\0" * 99, "is GGUF"),
    "long": (lambda _: (1 << 62).to_bytes(8, "little") + b"{}", "is truncated in its header"),
    "no JSON": (lambda _: (2).to_bytes(8, "little") + b"{x", "damaged header"),
    "list": (lambda _: (2).to_bytes(8, "little") + b"[]", "damaged header"),
    "nothing": (lambda _: (2).to_bytes(8, "little") + b"{}", "holds no tensors"),
    "offsets": (
        lambda _: _file({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, 4),
        "damaged header at 'a'",
    ),
    "type": (lambda _: _file({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, 4), "unknown number type"),
}


def _file(header: Any, size: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * size


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_weights_that_are_none_are_called_what_they_are(model: Path, name: str) -> None:
    file = model / "model.safetensors"
    spoil, said = WEIGHTS[name]
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(BackboneError, match=said) as told:
        load_backbone(model)
    assert "model.safetensors" in str(told.value)
    assert "Fix:" in str(told.value)


def test_a_header_longer_than_the_format_allows_is_not_read(model: Path) -> None:
    file = model / "model.safetensors"
    with file.open("wb") as out:
        out.write((LONGEST_HEADER + 1).to_bytes(8, "little"))
        out.truncate(LONGEST_HEADER + 100)  # sparse: no room is taken
    with pytest.raises(BackboneError, match=r"a header of .* expected at most"):
        load_backbone(model)


@pytest.mark.parametrize("index", [{"weight_map": ["a"]}, {"weight_map": {}}, {}, {"weight_map": {"a": 1}}, ["a"]])
def test_an_index_that_is_none_is_told(model: Path, index: Any) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r"index\.json: (weight_map )?holds"):
        load_backbone(model)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e38])
def test_numbers_that_are_not_finite_are_told_with_their_place(model: Path, layer: int, number: float) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    tensors[name][:] = number
    save_file(tensors, file, {"format": "pt"})
    place = f"layer {layer + 1} of" if number == 1e38 else name.replace(".", r"\.")
    for generation in (True, False):
        with pytest.raises(BackboneError, match=f"not finite.*{place}.*Check its weights"):
            load_backbone(model, device="cpu", generation=generation)


KINDS = {
    "llava": "a vision-language model",
    "qwen2_vl": "a vision-language model",
    "whisper": "an encoder-decoder",
    "t5": "an encoder-decoder",
    "vit": "a vision model",
    "clip": "a vision-language model",
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_kinds_of_model_are_one_line(model: Path, kind: str) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        BackboneError, match=f"{KINDS[kind]}.*expected a decoder-only language model or an encoder"
    ) as told:
        load_backbone(model)
    assert len(str(told.value)) - len(str(model)) < 200


@pytest.mark.parametrize("device", ["mps", "gpu", "tpu", "xla", "meta", "cuda:97", "cpu:3", "cuda:-1", "", "mps:0"])
def test_a_device_that_is_not_supported_is_told_before_anything_is_read(device: str) -> None:
    with pytest.raises(BackboneError, match=r"Device .*(expected auto, cpu, cuda|GPU\(s\)\. Use device='cpu')"):
        load_backbone("./nowhere/at/all", device=device)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_hidden_layers", value) for value in (10**9, "2", -1, 0, None, 2.5, True, 7)),
        *(("hidden_size", value) for value in (10**13, "x", 0, 33)),
        *(("vocab_size", value) for value in (10**9, 3, "x")),
        *(("max_position_embeddings", value) for value in ("x", 0, -7)),
        *(("hidden_act", value) for value in ("nosuch", 3)),
        *(("eos_token_id", value) for value in ("x", [1.5], -4, {})),
        *(("model_type", value) for value in (3, None, "", "nosuch", [])),
        *(("auto_map", value) for value in ("x", 3, {"AutoConfig": 1})),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", {"quant_method": "nosuch"}),
        ("rope_parameters", "x"),
        ("layer_types", ["x"]),
        ("architectures", 3),
        ("dtype", "nosuch"),
    ],
)
def test_an_odd_configuration_is_a_sentence_or_does_no_harm(model: Path, key: str, value: Any) -> None:
    for file in ("config.json", "generation_config.json"):
        if (model / file).exists() and key in json.loads((model / file).read_text()) | {"auto_map": 0}:
            edit(model / file, **{key: value})
    edit(model / "config.json", **{key: value})
    _loads_or_is_told(model)


def _loads_or_is_told(model: Path) -> None:
    try:
        load_backbone(model, device="cpu").hidden([[1, 2, 3]])
    except CoalaError as error:
        said = str(error).replace(str(model), "M")
        if "\n" in said or len(said) > 700:
            raise AssertionError(f"not one line: {said}") from error


def _spoilt(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(max(1, len(content)))
    return draw.choice(
        [
            content[:at],
            content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            content[:at] + bytes(draw.randrange(256) for _ in range(8)) + content[at + 8 :],
            content[at:],
            content[:at] + content[at + 16 :],
        ]
    )


def _replaced(value: Any, draw: random.Random) -> Any:
    """A JSON value with one of its parts replaced by another type."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        return {**value, key: _replaced(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], _replaced(value[at], draw), *value[at + 1 :]]
    return draw.choice([None, True, -1, 3, 2.5, "x", [], {}, ["x"], {"x": 1}])


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("file", FILES)
def test_whatever_is_broken_is_a_sentence(model: Path, file: str, seed: int) -> None:
    draw = random.Random(f"{file} {seed}")
    path = model / file
    if not path.exists():
        path.write_text("{}")
    content = path.read_bytes()
    if file.endswith(".json") and seed % 2:
        path.write_text(json.dumps(_replaced(json.loads(content), draw)))
    else:
        path.write_bytes(_spoilt(content, draw))
    _loads_or_is_told(model)


def test_the_whole_model_still_loads(whole: Path) -> None:
    states = load_backbone(whole, device="cpu").hidden([[1, 2, 3]])
    assert torch.isfinite(states).all()
