"""GGUF files: the model is that of the same weights in safetensors, and what would be misread is one sentence."""

from __future__ import annotations

import random
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import BackboneError, LanguageModel, load_backbone, outline
from coala.backbone.checkpoint import weight_files
from coala.backbone.files import check_files
from coala.backbone.gguf import read_header
from coala.backbone.load import check_asked, read_conversations
from coala.values import CoalaError, Turn
from tests.menagerie import CHATML, CONTEXT, _chat_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

TURNS = (Turn("user", "tell me a story of 2024"),)
# Rows of 64 numbers: whole blocks of every type but those of 256.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_folder(folder: Path, **settings: Any) -> Path:
    """A random Llama with a chat tokenizer, as a model folder."""
    import transformers

    tokenizer = _chat_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **{**SIZES, **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{
        f"model.layers.{layer}.{theirs}.weight": f"blk.{layer}.{name}.weight"
        for layer in range(2)
        for theirs, name in {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items()
    },
}


def _paired(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key in the order of llama.cpp, which turns neighbours where transformers turns halves."""
    return weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    folder: Path, file: Path, kind: str = "F32", change: Callable[[Any], None] | None = None, **keys: Any
) -> Path:
    """A model folder of :func:`make_folder` as a GGUF file; ``keys`` replace (or, if None, remove) what it says."""
    import transformers
    from safetensors.torch import load_file

    tokenizer, config = _chat_tokenizer(), transformers.AutoConfig.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    said = {
        "architecture": "llama",
        "name": "tiny",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            3 if token in tokenizer.all_special_tokens or "<|" in token else 1 for token in tokens
        ],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.chat_template": CHATML,
    } | {name.replace("__", "."): value for name, value in keys.items()}
    writer = gguf.GGUFWriter(file, said.pop("architecture"))
    for name, value in said.items():
        key = name if "." in name else f"general.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    quantised = gguf.GGMLQuantizationType[kind]
    weights = {name: tensor.numpy() for path in weight_files(folder) for name, tensor in load_file(path).items()}
    for name, values in weights.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        values = _paired(values, heads) if heads else values
        if values.ndim < 2:
            writer.add_tensor(NAMES[name], values)
        else:
            writer.add_tensor(NAMES[name], gguf.quantize(values, quantised), raw_dtype=quantised)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _merges(tokenizer: Any) -> list[list[str]]:
    import json

    return list(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


def _logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.transformer(torch.tensor([model.render(TURNS).tokens])).logits[0]
    return found


# --- the same model ---------------------------------------------------------------------------------------------------


def test_the_model_of_float32_is_that_of_the_folder(folder: Path, file: Path) -> None:
    theirs, mine = load_backbone(folder, device="cpu"), load_backbone(file, device="cpu")
    assert torch.equal(_logits(theirs), _logits(mine))
    assert mine.stop_tokens == theirs.stop_tokens
    assert mine.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert mine.tokenizer.chat_template == theirs.tokenizer.chat_template
    for text in ("tell me a story", "it's 2024,  and\n\nwe'd rather not", "<|im_end|> é 日本"):
        assert mine.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert mine.render(TURNS, "a good film").tokens == theirs.render(TURNS, "a good film").tokens
    assert mine.max_tokens == CONTEXT


@pytest.mark.parametrize(("kind", "block", "error"), [("F16", 1, 2**-11), ("Q8_0", 32, 1 / 254)])
def test_quantised_weights_are_within_the_error_of_quantising(
    folder: Path, tmp_path: Path, kind: str, block: int, error: float
) -> None:
    """Half a step of what each type keeps, which is relative to the number, or to the largest of its block."""
    mine = load_backbone(write_gguf(folder, tmp_path / "tiny.gguf", kind), device="cpu")
    theirs = load_backbone(folder, device="cpu")
    expected = dict(theirs.transformer.named_parameters())
    moved = False
    for name, found in mine.transformer.named_parameters():
        true = expected[name].detach()
        if true.ndim < 2:
            assert torch.equal(found, true)
            continue
        bound = true.abs().reshape(-1, block).amax(1, keepdim=True) * error
        # The scale of a block is itself a half, which moves its numbers by as much again; the smallest half is 6e-8.
        difference = (found - true).abs().reshape(-1, block)
        assert (difference <= bound + true.abs().reshape(-1, block) * 2**-10 + 6e-8).all(), name
        moved |= bool(difference.any())
    assert moved
    distance = (_logits(mine) - _logits(theirs)).norm() / _logits(theirs).norm()
    assert 0 < distance < 20 * error


def test_weights_come_in_the_dtype_that_was_asked_for(file: Path) -> None:
    model = load_backbone(file, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert any("GGUF, F32, dequantised to bfloat16" in line for line in model.reads(model.spec()))


def test_a_dequantised_model_can_be_saved_and_is_the_same_again(folder: Path, tmp_path: Path) -> None:
    mine = load_backbone(write_gguf(folder, tmp_path / "tiny.gguf", "Q8_0"), device="cpu")
    mine.transformer.save_pretrained(tmp_path / "saved")
    mine.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved", device="cpu")
    assert torch.equal(_logits(again), _logits(mine))
    assert again.render(TURNS).tokens == mine.render(TURNS).tokens


def test_tied_heads_and_the_scaling_of_llama_3(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder = make_folder(tmp_path / "folder", tie_word_embeddings=True, rope_parameters=rope)
    theirs = load_backbone(folder, device="cpu")
    plain = 500000.0 ** -(torch.arange(8) / 8)

    def scaled(writer: Any) -> None:
        factors = plain / theirs.transformer.model.rotary_emb.inv_freq
        assert factors.max() == 8
        writer.add_tensor("rope_freqs.weight", factors.numpy())

    mine = load_backbone(write_gguf(folder, tmp_path / "tiny.gguf", change=scaled), device="cpu")
    assert torch.equal(_logits(mine), _logits(theirs))

    def others(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32))

    with pytest.raises(BackboneError, match=r"scales its rotary positions \(rope_freqs.weight\).*Fix: use the orig"):
        load_backbone(write_gguf(folder, tmp_path / "other.gguf", change=others), device="cpu")


def test_the_digest_is_that_of_the_file(file: Path, tmp_path: Path) -> None:
    import hashlib

    other = Path(shutil.copy(file, tmp_path / "other.gguf"))
    assert load_backbone(other).weights == hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_token_that_ends_a_turn_ends_a_reply(folder: Path, tmp_path: Path) -> None:
    found = load_backbone(write_gguf(folder, tmp_path / "tiny.gguf", tokenizer__ggml__eot_token_id=1), device="cpu")
    assert found.stop_tokens == {1, 2}


def test_how_replies_are_sampled_is_what_the_file_says(folder: Path, tmp_path: Path) -> None:
    said = {"general__sampling__temp": 0.25, "general__sampling__top_k": 7}
    found = load_backbone(write_gguf(folder, tmp_path / "tiny.gguf", **said), device="cpu").transformer
    config = found.generation_config
    assert (config.temperature, config.top_k) == (0.25, 7)
    assert config.top_p in (None, 1.0)  # nothing is said of it


# --- where a model is taken -------------------------------------------------------------------------------------------


def test_nothing_beside_the_file_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = load_backbone(file)
    place = tmp_path / "place"
    place.mkdir()
    shutil.copy(file, place / "tiny.gguf")
    (place / "tokenizer_config.json").write_text(
        '{"chat_template": "other", "auto_map": {"AutoTokenizer": ["x.Y", null]}}'
    )
    (place / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "tiny.gguf").write_bytes(b"of another")
    monkeypatch.chdir(tmp_path)
    for given in (place, place / "tiny.gguf"):
        beside = load_backbone(given)
        assert (beside.template, beside.stop_tokens) == (alone.template, alone.stop_tokens)


def test_a_folder_with_several_is_refused_and_a_blob_is_known_by_its_bytes(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "sha256-0a1b")
    assert load_backbone(tmp_path / "sha256-0a1b").width == 64
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(BackboneError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); expected one. Fix: name the file"):
        load_backbone(tmp_path)


def test_the_header_alone_tells_what_a_plan_needs(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.gguf import reader

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    check_files(file)
    # What remains of reading a tensor, in either of transformers' ways.
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: np.zeros(1) if not data.any() else refused())
    monkeypatch.setattr(reader.LazyGgufTensor, "__getitem__", refused)
    found, expected = outline(file), outline(folder)
    assert (found.shape, found.context, found.parameters) == (expected.shape, expected.context, expected.parameters)
    assert (found.in_layers, found.cached, found.kind) == (expected.in_layers, expected.cached, "llama")
    check_asked(file, layer=2)
    assert read_conversations(file).kind == "chat"
    with pytest.raises((AssertionError, BackboneError), match="a weight was read"):
        load_backbone(file)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_of_align_and_its_plan(file: Path, tmp_path: Path) -> None:
    from coala.alignment import align_recipe
    from coala.store import RunFolder, load_head
    from tests.test_align import invoked, pair_rows, recipe, write_rows

    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(40, 20))
    planned, said = invoked("plan", pairs, "--model", file, "--probe", "0")
    assert planned["parameters"] == outline(file).parameters, said
    assert "tokenizer" in planned["counted"]
    # A folder that holds the file is the same model.
    place = tmp_path / "place"
    place.mkdir()
    shutil.copy(file, place)
    align_recipe(recipe(pairs, place), RunFolder(tmp_path / "run"))
    head = load_head(tmp_path / "run" / "head")
    load_backbone(file, device="cpu").require(head.spec)


def test_comal_trains_from_it_and_trl_is_refused(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra baselines")
    from coala.baselines import TrainSettings, train
    from coala.comal.inputs import start_of
    from coala.comal.llm import load_policy

    policy = load_policy(file, device="cpu")
    assert policy.context == CONTEXT
    policy.model.save_pretrained(tmp_path / "saved")
    assert start_of(str(file)).model == str(file.resolve())
    with pytest.raises(CoalaError, match=r"is GGUF, which TRL does not train; expected a model folder. Fix: write one"):
        train("dpo", [], file, out=tmp_path / "out", settings=TrainSettings())


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architecture": "rwkv7"},
        r"architecture 'rwkv7'; expected one that transformers reads.*Fix: use",
    ),
    "bert": ({"architecture": "bert"}, r"architecture 'bert'; expected.*Fix: use the original"),
    "encoder-decoder": ({"architecture": "t5"}, r"architecture 't5'; expected.*Fix: use the original"),
    "embeddings": ({"llama__pooling_type": 3}, r"embeds texts.*; expected a language model.*Fix: use the original"),
    "not causal": ({"llama__attention__causal": False}, r"embeds texts.*; expected a language model"),
    "projector": ({"type": "mmproj"}, r"multimodal projector.*; expected a language model. Fix: pass the language"),
    "clip": ({"architecture": "clip"}, r"multimodal projector.*; expected a language model. Fix: pass the language"),
    "adapter": ({"type": "adapter"}, r"of the type 'adapter'; expected a model. Fix: pass the model's own file"),
    "split": ({"split__count": 3}, r"one of 3 files.*; expected one whole file. Fix: join them: llama-gguf-split"),
    "words": (
        {"tokenizer__ggml__model": "bert"},
        r"tokenizer of the kind 'bert'; expected one.*Fix: use the original",
    ),
    "no tokenizer": ({"tokenizer__ggml__model": None}, r"has no tokenizer; expected one.*Fix: use the original"),
    "pre": ({"tokenizer__ggml__pre": "chatglm-bpe"}, r"splits texts the way 'chatglm-bpe'.*; expected.*Fix: use the"),
    "scaling": ({"llama__rope__scaling__type": "yarn"}, r"rotary positions \(yarn\).*; expected none.*Fix: use the"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_transformers_would_misread_is_one_sentence(folder: Path, tmp_path: Path, name: str) -> None:
    keys, told = REFUSED[name]
    made = write_gguf(folder, tmp_path / "tiny.gguf", **keys)
    for use in (load_backbone, outline, check_asked, read_conversations):
        with pytest.raises(BackboneError, match=told) as found:
            use(made)
        assert "\n" not in str(found.value)


def _retyped(kind: int) -> Callable[[bytes], bytes]:
    """The type of the first matrix, whose entry is name, rank, two sizes, type and offset."""

    def change(content: bytes) -> bytes:
        at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
        return content[:at] + struct.pack("<I", kind) + content[at + 4 :]

    return change


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda b: b[:-9], "is truncated: .* that its header declares. Fix: download it again"),
    "in its header": (lambda b: b[:700], "is truncated in its header"),
    "empty": (lambda _: b"", "is empty; expected GGUF"),
    "magic alone": (lambda _: b"GGUF", "is truncated in its header"),
    "text": (lambda _: b"hello", "not a GGUF file, despite its name; expected GGUF"),
    "pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "version": (lambda b: b[:4] + struct.pack("<I", 9) + b[8:], "version 9; expected 2 or 3"),
    "tensors": (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "declares 1,152,921,504,606,846,976 tensors"),
    "keys": (lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:], "keys; expected fewer"),
    "no quantisation": (_retyped(26), "quantised as I32; expected a type.*Fix: update gguf"),
    "unknown": (_retyped(900), "in the number type 900; expected one.*Fix: update gguf"),
    "larger": (_retyped(28), "is truncated|overlaps"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_file_is_one_sentence(file: Path, tmp_path: Path, name: str) -> None:
    change, told = BROKEN[name]
    made = tmp_path / "broken.gguf"
    made.write_bytes(change(file.read_bytes()))
    for use in (load_backbone, outline, read_conversations):
        with pytest.raises(BackboneError, match=told):
            use(made)


def test_an_array_without_end_takes_no_memory(tmp_path: Path) -> None:
    key = struct.pack("<Q", 1) + b"k"
    for of in (0, 8, 9):
        made = tmp_path / f"{of}.gguf"
        made.write_bytes(
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, of, 1 << 40) + b"\0" * 64
        )
        with pytest.raises(BackboneError, match="an array has 1,099,511,627,776 entries"):
            read_header(made)


@pytest.mark.parametrize("seed", range(4))
def test_headers_at_random_raise_errors_of_ours_alone_in_bounded_memory(file: Path, tmp_path: Path, seed: int) -> None:
    content, draw = file.read_bytes(), random.Random(seed)
    header = min(tensor.first for tensor in read_header(file).tensors)
    made = tmp_path / "broken.gguf"
    outcomes = {"read": 0, "refused": 0}
    tracemalloc.start()
    try:
        for _ in range(120):
            changed = bytearray(content)
            for _ in range(draw.choice((1, 1, 2, 8))):
                changed[draw.randrange(header)] = draw.choice((0, 1, 255, draw.randrange(256)))
            made.write_bytes(changed[: draw.randrange(header)] if draw.random() < 0.3 else changed)
            try:
                check_files(made)
                outcomes["read"] += 1
            except CoalaError:
                outcomes["refused"] += 1
        assert tracemalloc.get_traced_memory()[1] < 20 * len(content) + (64 << 20)
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("seed", range(2))
def test_files_whose_header_still_reads_are_used_or_refused(file: Path, tmp_path: Path, seed: int) -> None:
    """Behind the header stand the libraries: whatever they raise over what it says is a sentence of ours."""
    content, draw = file.read_bytes(), random.Random(seed)
    header = min(tensor.first for tensor in read_header(file).tensors)
    made = tmp_path / "broken.gguf"
    for _ in range(25):
        changed = bytearray(content)
        changed[draw.randrange(header)] = draw.randrange(256)
        made.write_bytes(changed)
        for use in (outline, read_conversations):
            with suppress(CoalaError):
                use(made)


def test_options_that_do_not_go_with_gguf(file: Path) -> None:
    with pytest.raises(BackboneError, match=r"is GGUF.*found device='offload'. Fix: remove that"):
        load_backbone(file, device="offload")
    with pytest.raises(BackboneError, match="is a file, which has no revisions"):
        load_backbone(file, revision="main")


def test_without_the_extra_it_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("coala.backbone.gguf_header.find_spec", lambda package: None)
    with pytest.raises(
        BackboneError, match=r"needs packages that are not installed.*\(gguf.*Fix: pip install 'coala-align\[gguf\]'"
    ):
        load_backbone(file)
