"""Outlines: what config.json alone tells of a model is what the loaded model says of itself, and what was published."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from coala.backbone import BackboneError, load_backbone
from coala.backbone.outline import outline
from tests.menagerie import BACKBONES, ENCODERS, FAMILIES, tiny_backbone
from tests.test_costs import transformer_shape


@pytest.mark.parametrize("name", [*BACKBONES, *FAMILIES])
def test_an_outline_is_the_loaded_model(tmp_path: Path, name: str) -> None:
    folder = tiny_backbone(name, tmp_path)
    found, backbone = outline(folder), load_backbone(folder)
    network = backbone._network
    assert found.shape == backbone.shape
    assert (found.n_layers, found.width, found.context) == (backbone.n_layers, backbone.width, backbone.max_tokens)
    assert found.parameters == sum(parameter.numel() for parameter in network.causal.parameters())
    assert found.weight_bytes("float32") == sum(p.nbytes for p in network.causal.parameters())
    assert found.weight_bytes("float16") == found.weight_bytes("float32") // 2
    assert found.encoder == (name in ENCODERS)
    assert found.encoder != backbone.generates
    if found.encoder:
        assert found.cached == 0
        return
    # What the model's own cache grows by with one more token; recurrent states do not grow.
    grown = [_cached(network.causal, network.config, length) for length in (4, 5)]
    assert 4 * found.cached == grown[1] - grown[0]


def _cached(model: Any, config: Any, length: int) -> int:
    cache = DynamicCache(config=config)
    name = "cache_params" if config.model_type.startswith("mamba") else "past_key_values"
    with torch.no_grad():
        model(input_ids=torch.arange(length)[None] + 5, use_cache=True, **{name: cache})
    kept = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(states.nbytes for states in kept if isinstance(states, torch.Tensor))


# Hyper-parameters as published; parameters counted by hand from them and by their makers.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, 124_439_808),
    "mistral-7b": (
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        7_241_732_096,
    ),
    "llama-3.1-8b": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        8_030_261_248,
    ),
    "mixtral-8x7b": (
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
        46_702_792_704,
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_models_are_known_from_their_settings(tmp_path: Path, name: str) -> None:
    settings, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = outline(tmp_path)
    assert found.parameters == parameters
    assert found.weight_bytes("bfloat16") == 2 * parameters
    if name == "gpt2":
        assert found.shape == transformer_shape(
            n_layers=12, width=768, vocabulary=50257, mlp_width=3072, n_heads=12, gated_mlp=False
        )
        assert (found.context, found.cached) == (1024, 2 * 12 * 768)
        return
    dense = transformer_shape(
        n_layers=32, width=4096, vocabulary=settings["vocab_size"], mlp_width=14336, n_heads=32, n_kv_heads=8
    )
    assert 2 * found.cached == 131_072  # 2 * 32 layers * 8 heads * 128 * 2 bytes
    assert found.context == settings["max_position_embeddings"]
    if name == "mixtral-8x7b":
        # Two experts of eight a token, and the router: the second expert and 8 * 4096 a layer above a dense model.
        more = 32 * (3 * 4096 * 14336 + 8 * 4096)
        assert found.shape.body_matmul_parameters == dense.body_matmul_parameters + more
        return
    assert found.shape == dense
    # 4 bits a weight and a float32 scale for each 64 of them; embedding, head and norms stay as they are.
    small = dense.body_matmul_parameters
    assert found.weight_bytes("bfloat16", "4bit") == small * 9 // 16 + 2 * (parameters - small)
    assert found.weight_bytes("bfloat16", "8bit") == small + 2 * (parameters - small)


def test_an_outline_needs_config_json_alone(tmp_path: Path) -> None:
    folder = tiny_backbone("llama", tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole, bare, file = (outline(p) for p in (folder, tmp_path / "bare", tmp_path / "bare" / "config.json"))
    assert whole.shape == bare.shape == file.shape
    assert whole.parameters == bare.parameters == file.parameters
    assert file.kind == "llama"


def test_a_configuration_is_built_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("coala.backbone.outline")
    built: list[Path] = []
    real = module._built

    def counted(place: Path, name: str) -> Any:
        built.append(place)
        return real(place, name)

    monkeypatch.setattr(module, "_built", counted)
    monkeypatch.setattr(module, "_BUILT", {})
    settings = {**PUBLISHED["llama-3.1-8b"][0], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    found = [outline(tmp_path / name) for name in ("a", "b", "a")]
    assert len(built) == 1
    assert [one.name for one in found] == [str(tmp_path / name) for name in ("a", "b", "a")]
    assert found[0].shape == found[1].shape
    (tmp_path / "a" / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    assert (outline(tmp_path / "a").n_layers, outline(tmp_path / "b").n_layers) == (3, 2)
    assert len(built) == 2


def test_what_cannot_be_outlined_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="has no config"):
        outline(tmp_path)
    with pytest.raises(BackboneError, match="no such folder"):
        outline("./nowhere/at/all")
    with pytest.raises(BackboneError, match="could not be fetched"):
        outline("nobody/no-such-model")
    path = tmp_path / "config.json"
    for settings, said in [
        ({}, "names no model_type"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "homemade", "auto_map": {"AutoConfig": "evil.Config"}}, "Python code of its own"),
        ({"model_type": "homemade"}, "cannot read its config"),
        ({"model_type": "albert", "architectures": ["AlbertForMaskedLM"]}, "expected a transformer with one stack"),
    ]:
        path.write_text(json.dumps(settings))
        with pytest.raises(BackboneError, match=said):
            outline(path)
    path.write_text(json.dumps(PUBLISHED["gpt2"][0]))
    found = outline(path)
    for act in (lambda: found.weight_bytes("float8"), lambda: found.weight_bytes("float16", "2bit")):
        with pytest.raises(BackboneError, match="expected"):
            act()
