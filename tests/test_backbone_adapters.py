"""Adapters, quantised weights and offload: the states are those of the adapted, quantised or whole model, or a refusal.

Needs the extras where a part does: peft, bitsandbytes, accelerate. What happens without them is tested everywhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import BackboneError, load_backbone
from coala.backbone.adapters import find_adapter
from coala.values import SpecMismatch
from tests.menagerie import tiny_backbone
from tests.tolerances import NETWORK

ROWS = [[5, 9, 30, 7, 12, 40, 8], [6, 7, 8], [9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny_backbone(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def trained(base: Path, where: Path, seed: int = 0, **settings: Any) -> Any:
    """A random adapter of ``base`` saved to ``where``, and the model that holds it beside its weights."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:  # the second factor begins at 0, where an adapter does nothing
                    parameter.normal_(0, 0.1)
    adapted.save_pretrained(where)
    return adapted.eval()


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"fan_in_fan_out": True}),
        ("llama", {}),
        ("llama", {"use_rslora": True, "use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}),
        ("gemma2", {"target_modules": ["q_proj", "down_proj"]}),
        ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    ],
)
def test_states_with_an_adapter_are_those_of_peft(
    folder: Callable[[str], Path], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    adapted = trained(folder(name), tmp_path / "adapter", **settings)
    base, backbone = load_backbone(folder(name)), load_backbone(folder(name), adapter=tmp_path / "adapter")
    for layer in range(backbone.n_layers + 1):
        hidden = backbone.hidden(ROWS, layer)
        for b, row in enumerate(ROWS):
            with torch.no_grad():
                out = adapted(input_ids=torch.tensor([row]), output_hidden_states=True)
            assert_close(hidden[b, : len(row)], out.hidden_states[layer][0])
    prefix = backbone.start([ROWS[0]])
    prefix.peek(torch.tensor([[4, 5]]))
    prefix.push(torch.tensor([5]))
    with torch.no_grad():
        out = adapted(input_ids=torch.tensor([[*ROWS[0], 5]]))
    assert_close(prefix.log_probs()[0], out.logits[0, -1].log_softmax(-1))
    assert not torch.allclose(base.hidden(ROWS), backbone.hidden(ROWS), atol=1e-2)
    assert base.shape == backbone.shape


def test_features_of_base_and_adapted_model_are_never_confused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = folder("llama")
    trained(base, tmp_path / "a")
    trained(base, tmp_path / "b", seed=1)
    # The same tensors at another scale compute something else; under another name they do not.
    shutil.copytree(tmp_path / "a", tmp_path / "scaled")
    shutil.copytree(tmp_path / "a", tmp_path / "renamed")
    for where, change in [("scaled", {"lora_alpha": 17}), ("renamed", {"base_model_name_or_path": "owner/elsewhere"})]:
        path = tmp_path / where / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    names = ["a", "b", "scaled", "renamed"]
    models = {name: load_backbone(base, adapter=tmp_path / name) for name in names}
    plain = load_backbone(base)
    assert len({model.weights for model in models.values()} | {plain.weights}) == 4
    assert models["a"].weights == models["renamed"].weights
    assert models["a"].name == f"{base}+{tmp_path / 'a'}"
    models["a"].require(models["renamed"].spec())
    for other in (plain, models["b"], models["scaled"]):
        with pytest.raises(SpecMismatch, match="features are those of"):
            other.require(models["a"].spec())


def test_the_order_in_which_an_adapter_lists_its_modules_does_not_matter(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    trained(folder("llama"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    before = find_adapter(str(tmp_path / "a")).digest
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "target_modules": settings["target_modules"][::-1]}))
    assert find_adapter(str(tmp_path / "a")).digest == before


def test_a_tokenizer_saved_with_an_adapter_is_used(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained(folder("qwen2"), tmp_path / "a", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(folder("qwen2"))
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    without = load_backbone(folder("qwen2"), adapter=tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    backbone = load_backbone(folder("qwen2"), adapter=tmp_path / "a")
    assert backbone.template != without.template == load_backbone(folder("qwen2")).template


def test_adapters_that_do_not_fit_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = folder("llama")
    trained(base, tmp_path / "a")

    def changed(where: str, **changes: Any) -> Path:
        place = shutil.copytree(tmp_path / "a", tmp_path / where)
        path = place / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return Path(place)

    unnamed = changed("unnamed", base_model_name_or_path=None)
    # Another architecture, other shapes, other weights of the same shape.
    with pytest.raises(BackboneError, match=r"does not fit .*Fix: pass the model it was trained on"):
        load_backbone(folder("gpt2"), adapter=unnamed)
    with pytest.raises(BackboneError, match=r"does not fit .*Fix: pass the model it was trained on"):
        load_backbone(base, adapter=changed("ranked", r=5))
    twin = tiny_backbone("llama", tmp_path / "twin", seed=1)
    with pytest.raises(BackboneError, match=rf"was trained on {base}, but the model is {twin}, with other weights"):
        load_backbone(twin, adapter=tmp_path / "a")
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    assert load_backbone(moved, adapter=tmp_path / "a").weights == load_backbone(base, adapter=tmp_path / "a").weights
    # A tensor too few, and one too many.
    from safetensors.numpy import load_file, save_file

    for where, edit in [("fewer", lambda t: t.pop(min(t))), ("more", lambda t: t.update(stray=np.ones(3, np.float32)))]:
        place = changed(where)
        tensors = load_file(place / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, place / "adapter_model.safetensors")
        with pytest.raises(BackboneError, match=r"1 tensor\(s\) do not fit"):
            load_backbone(base, adapter=place)
    with pytest.raises(BackboneError, match=r"which are one matrix.*untie"):
        load_backbone(folder("gpt2"), adapter=_tied(folder("gpt2"), tmp_path / "tied"))
    with pytest.raises(BackboneError, match=r"spread over memory and disk|needs the package accelerate"):
        load_backbone(base, adapter=tmp_path / "a", device="offload")


def _tied(base: Path, where: Path) -> Path:
    trained(base, where, target_modules=["wte", "c_attn"], fan_in_fan_out=False)
    return where


def test_what_is_no_adapter_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters need peft")
    base = folder("llama")
    place = tmp_path / "a"
    trained(base, place)
    with pytest.raises(BackboneError, match=r"is an adapter of .*\. Give that as the model"):
        load_backbone(place)
    with pytest.raises(BackboneError, match=r"missing adapter_config.json, .*It is a whole model"):
        load_backbone(base, adapter=base)
    (place / "adapter_model.safetensors").rename(place / "kept")
    with pytest.raises(BackboneError, match=r"missing adapter_model.safetensors"):
        load_backbone(base, adapter=place)
    (place / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(BackboneError, match=r"pickled \(adapter_model.bin\)"):
        load_backbone(base, adapter=place)
    (place / "kept").rename(place / "adapter_model.safetensors")
    with pytest.raises(BackboneError, match="no such folder"):
        load_backbone(base, adapter="./nowhere/at/all")
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(BackboneError, match=r"kind PROMPT_TUNING.*expected an adapter of weights"):
        load_backbone(base, adapter=tmp_path / "prompt")


def test_missing_packages_are_named(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from coala.backbone import adapters, placement

    for module in (adapters, placement):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for options, package in [
        ({"adapter": "some/adapter"}, r"package peft.*pip install 'coala-align\[adapters\]'"),
        ({"quantise": "4bit"}, "quantise='4bit' needs the package bitsandbytes"),
        ({"device": "offload"}, "device='offload' needs the package accelerate"),
    ]:
        with pytest.raises(BackboneError, match=package):
            load_backbone(folder("llama"), **options)


def test_wrong_placements_are_refused(folder: Callable[[str], Path]) -> None:
    for options, said in [
        ({"quantise": "2bit"}, "expected 8bit or 4bit"),
        ({"max_memory": {"cpu": "1GiB"}}, "device='offload'"),
        ({"max_memory": {3: "1GiB"}, "device": "offload"}, "expected 0 .* only"),
        ({"device": "toaster"}, "or offload"),
    ]:
        with pytest.raises(BackboneError, match=said):
            load_backbone(folder("llama"), **options)


# --- larger than the card ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, {"cpu": "45KB"}, {"cpu": 100}], ids=["in memory", "some on disk", "on disk"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma2", "mixtral", "bert"])
def test_offloaded_weights_change_nothing(folder: Callable[[str], Path], name: str, memory: Any) -> None:
    pytest.importorskip("accelerate", reason="offload needs accelerate")
    plain = load_backbone(folder(name), device="cpu")
    backbone = load_backbone(folder(name), device="offload", dtype="float32", max_memory=memory)
    where = {parameter.device.type for parameter in backbone._network.causal.parameters()}
    if not torch.cuda.is_available():
        assert ("meta" in where) == (memory is not None)  # what is on disk has no storage until it is used
        assert backbone.device == torch.device("cpu")
    for _ in range(2):  # weights are fetched and let go, again and again
        for layer in range(backbone.n_layers + 1):
            assert_close(backbone.hidden(ROWS, layer)[0], plain.hidden(ROWS, layer)[0], NETWORK)
        if plain.generates:
            prefixes = [model.start(ROWS, 1) for model in (plain, backbone)]
            for prefix in prefixes:
                prefix.peek(torch.tensor([[4, 5]] * 3))
                prefix.push(torch.tensor([4, 5, 4]))
            assert_close(prefixes[1].log_probs(), prefixes[0].log_probs(), NETWORK)
    assert backbone.weights == plain.weights
    assert backbone.shape == plain.shape


# --- fewer bits --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the least width that 4 bits on a CPU allow: blocks of 64 columns and 32 rows."""
    import transformers

    place = Path(shutil.copytree(folder("llama"), tmp_path_factory.mktemp("wide") / "model"))
    config = transformers.AutoConfig.from_pretrained(place)
    config.hidden_size, config.intermediate_size, config.head_dim = 128, 192, 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.1)
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("quantise", "device", "worst"), [("8bit", "cpu", 0.05), ("8bit", "cuda", 0.05), ("4bit", "auto", 0.35)]
)
def test_quantised_weights_are_near_and_told_apart(wide: Path, quantise: str, device: str, worst: float) -> None:
    if (quantise, device) != ("8bit", "cpu"):
        for package in ("bitsandbytes", "accelerate"):
            pytest.importorskip(package, reason=f"quantised weights need {package}")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("on a CPU 8 bits are torch's own")
    plain = load_backbone(wide, device="cpu")
    backbone = load_backbone(wide, quantise=quantise, device=device, dtype="float32")
    expected, found = plain.hidden(ROWS)[0], backbone.hidden(ROWS)[0].to("cpu", torch.float32)
    distance = float((found - expected).norm() / expected.norm())
    assert 1e-4 < distance < worst
    assert backbone.weights != plain.weights
    assert backbone.shape == plain.shape
    alone = backbone.hidden(ROWS[1:2])[0].to("cpu", torch.float32)
    if (quantise, device) != ("8bit", "cuda"):  # weights alone are rounded, so a row's states are its own
        assert backbone.shares
        assert_close(backbone.hidden(ROWS)[1, : len(ROWS[1])].to("cpu", torch.float32), alone, 1e-4)
    assert backbone.start(ROWS).log_probs().isfinite().all()


def test_packed_weights_are_told_of_and_an_adapter_is_merged_first(wide: Path, tmp_path: Path) -> None:
    trained(wide, tmp_path / "a")
    packed = [load_backbone(wide, quantise="8bit", device="cpu", adapter=a) for a in (None, tmp_path / "a")]
    full = load_backbone(wide, device="cpu", adapter=tmp_path / "a")
    expected, other, found = (model.hidden(ROWS)[0] for model in (full, *packed))
    assert float((found - expected).norm()) < float((other - expected).norm())
    assert len({full.weights, *(model.weights for model in packed)}) == 3
    assert any("8 bits" in line for line in packed[0].reads(packed[0].spec()))
    assert not any("8 bits" in line for line in full.reads(full.spec()))
    with pytest.raises(SpecMismatch):
        packed[0].require(load_backbone(wide, device="cpu").spec())
    names = {name for name, _ in packed[0].transformer.named_parameters()}
    assert not any(name.endswith(("proj.weight", "head.weight")) for name in names)


def test_an_adapter_stays_beside_quantised_weights(wide: Path, tmp_path: Path) -> None:
    for package in ("bitsandbytes", "accelerate"):
        pytest.importorskip(package, reason=f"quantised weights need {package}")
    trained(wide, tmp_path / "a")
    full = load_backbone(wide, device="cpu", adapter=tmp_path / "a")
    small = load_backbone(wide, quantise="4bit", dtype="float32", adapter=tmp_path / "a")
    base = load_backbone(wide, quantise="4bit", dtype="float32")
    expected, found, other = (m.hidden(ROWS)[0].to("cpu", torch.float32) for m in (full, small, base))
    assert float((found - expected).norm()) < float((other - expected).norm())
    assert len({full.weights, small.weights, base.weights}) == 3
