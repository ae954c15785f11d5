"""The backbone: what is loaded, what is refused, how conversations become tokens, and hidden states row by row."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coala.backbone import BackboneError, LanguageModel, load_backbone
from coala.backbone.files import weights_digest
from coala.backbone.template import Renderer
from coala.values import CoalaError, Pair, SpecMismatch, Turn, user
from tests.menagerie import BACKBONES, CONTEXT, tiny_backbone
from tests.tolerances import NETWORK, of_network

Load = Callable[..., LanguageModel]
DIALOGUE = (Turn("system", "be kind"), Turn("user", "hello"), Turn("assistant", "yes?"), Turn("user", "a story"))
TEXTS = ["a good film", " leading", "two\n\nlines ", "héré 日本 🙂", "I am well, thank you!", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny_backbone(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def load(folder: Callable[[str], Path]) -> Load:
    loaded: dict[tuple[str, str], LanguageModel] = {}

    def get(name: str, template: str = "auto") -> LanguageModel:
        if (name, template) not in loaded:
            loaded[name, template] = load_backbone(folder(name), template=template)
        return loaded[name, template]

    return get


def naive_hidden(backbone: LanguageModel, row: list[int], layer: int) -> torch.Tensor:
    model: Any = backbone._network.causal
    with torch.no_grad():
        states = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
    shift = model.config.model_type == "mamba" and 0 < layer < backbone.n_layers
    return torch.as_tensor(states[layer - shift][0])


# --- hidden states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_hidden_states_do_not_depend_on_the_batch(load: Load, name: str) -> None:
    backbone = load(name)
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, backbone.shape.vocabulary, length).tolist() for length in (17, 4, 9, 1)]
    # Mamba's own list leaves the embedding out.
    for layer in range(name == "mamba", backbone.n_layers + 1):
        hidden = backbone.hidden(rows, layer)
        assert hidden.shape[:2] == (4, 17)
        for b, row in enumerate(rows):
            expected = naive_hidden(backbone, row, layer)
            atol = of_network(expected)
            torch.testing.assert_close(hidden[b, : len(row)], expected, rtol=NETWORK, atol=atol)
            alone = backbone.hidden([row], layer)[0]
            torch.testing.assert_close(hidden[b, : len(row)], alone, rtol=NETWORK, atol=atol)
    assert torch.equal(backbone.hidden(rows, -1), backbone.hidden(rows, backbone.n_layers))
    assert torch.equal(backbone.hidden(rows, -2)[0], backbone.hidden(rows, backbone.n_layers - 1)[0])
    assert backbone.hidden(rows).shape[-1] == backbone.width


def test_layers_above_the_one_asked_for_are_not_run(load: Load) -> None:
    backbone = load("llama")
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output, i=i: ran.append(i))
        for i, layer in enumerate(backbone._network.layers)
    ]
    try:
        backbone.hidden([[1, 2, 3]], 1)
        assert ran == [0]
    finally:
        for handle in handles:
            handle.remove()


def test_rows_a_model_cannot_read_are_refused(load: Load) -> None:
    backbone = load("gpt2")
    for rows, found in [
        ([[1] * (CONTEXT + 1)], f"{CONTEXT + 1} tokens"),
        ([[1], []], "without tokens"),
        ([[9999]], "another model"),
    ]:
        with pytest.raises(BackboneError, match=found):
            backbone.hidden(rows)
    with pytest.raises(BackboneError, match=r"0 \(embedding\) to 3 \(final\)"):
        backbone.hidden([[1]], 4)


def test_shape_counts_the_matrix_products(load: Load) -> None:
    shape = load("gpt2").shape
    assert shape.body_matmul_parameters == 12 * shape.width**2 * shape.n_layers
    assert shape.attention_width == shape.width
    llama = load("llama").shape
    assert llama.body_matmul_parameters == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)


# --- conversations to tokens -------------------------------------------------------------------------------------

TEMPLATED = [
    ("gpt2", "dialogue"),
    ("gpt2", "continuation"),
    ("llama", "dialogue"),
    ("llama", "continuation"),
    ("qwen2", "chat"),
]


@pytest.mark.parametrize("reply", TEXTS)
@pytest.mark.parametrize(("name", "template"), TEMPLATED)
def test_a_reply_continues_its_prompt(load: Load, name: str, template: str, reply: str) -> None:
    backbone = load(name, template)
    for prompt in (user("hello there"), DIALOGUE, user("ends in a space ")):
        alone, both = backbone.render(prompt), backbone.render(prompt, reply, max_tokens=10_000)
        if alone.dropped or both.dropped:
            continue
        assert both.tokens[: len(alone.tokens)] == alone.tokens
        assert both.start == alone.start == len(alone.tokens)
        text = backbone.decode(both.tokens)
        assert text.endswith(reply)
        # What the reply's own tokens say is the reply, whatever a tokenizer would put in front of a new text.
        before = backbone.decode(both.tokens[: both.start])
        glue = " " if template == "dialogue" else ""
        assert text == before + glue + reply


def test_dialogue_and_continuation_are_written_out(load: Load) -> None:
    written = "System: be kind\n\nHuman: hello\n\nAssistant: yes?\n\nHuman: a story\n\nAssistant:"
    assert load("gpt2").decode(load("gpt2").render(DIALOGUE).tokens) == written
    joined = load("gpt2", "continuation")
    assert joined.decode(joined.render(DIALOGUE, " once").tokens) == "be kindhelloyes?a story once"
    assert load("llama").render(DIALOGUE).tokens[0] == 1  # the tokenizer's opening token, once
    assert load("llama").render(DIALOGUE).tokens.count(1) == 1


def test_chat_is_the_tokenizer_s_own_template(load: Load) -> None:
    backbone = load("qwen2")
    tokenizer = backbone._renderer.tokenizer
    messages = [{"role": turn.role, "content": turn.text} for turn in DIALOGUE]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert backbone.render(DIALOGUE).tokens == expected
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    without, closed = backbone.render(DIALOGUE, "fine"), backbone.render(DIALOGUE, "fine", ends_with_eos=True)
    assert closed.tokens == [*without.tokens, end]
    assert end in backbone.stop_tokens


TRIMMED = "{% for m in messages %}[{{ m['content'] | trim }}]{% if m['role'] == 'user' %}:{% endif %}{% endfor %}"
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}U {{ m['content'] }} A"
    "{% else %} {{ m['content'] }} .{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("template", "written"), [(TRIMMED, "good"), (SPACED, " good  ")], ids=["trimmed", "spaced"])
def test_templates_that_put_something_before_a_reply(
    folder: Callable[[str], Path], template: str, written: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("qwen2"))
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, "chat", stop_tokens=frozenset([2]))
    row = renderer.render(user("hello"), "good  ", max_tokens=90)
    alone = renderer.render(user("hello"), None, max_tokens=90)
    assert row.tokens[: row.start] == alone.tokens
    assert renderer.decode(row.tokens[row.start :]) == written


def test_a_template_s_refusal_names_the_way_out(folder: Callable[[str], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder("qwen2"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    renderer = Renderer(tokenizer, "chat", stop_tokens=frozenset())
    with pytest.raises(BackboneError, match=r"roles must alternate.*template 'dialogue'"):
        renderer.render(DIALOGUE, None, max_tokens=90)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.tuples(st.integers(1, 60), st.integers(0, 60)),
    longest=st.integers(2, CONTEXT),
    name=st.sampled_from(["llama", "gpt2", "bert"]),
)
def test_truncation_spares_a_quarter_of_the_prompt(load: Load, words: tuple[int, int], longest: int, name: str) -> None:
    backbone = load(name, "continuation")
    if name == "bert" and longest < 6:
        return
    prompt, reply = user("dog " * words[0]), "fox " * words[1]
    whole = backbone._renderer.render(prompt, reply, max_tokens=1 << 20)
    row = backbone.render(prompt, reply, max_tokens=longest)
    assert len(row.tokens) == min(longest, len(whole.tokens))
    assert row.dropped == len(whole.tokens) - len(row.tokens)
    assert 0 < row.start <= row.stop <= len(row.tokens)
    assert row.start >= min(whole.start, longest // 4)
    before = len(backbone._renderer.before)
    if row.start > before:  # the prompt keeps its end, and the opening token
        assert row.tokens[:before] == whole.tokens[:before]
        assert row.tokens[before : row.start] == whole.tokens[whole.start - row.start + before : whole.start]
    assert row.tokens[row.start : row.stop] == whole.tokens[whole.start : whole.start + row.stop - row.start]
    if row.stop - row.start < whole.stop - whole.start:  # the reply only gives way to the prompt's quarter
        assert row.start == min(whole.start, max(longest // 4, 1))


def test_a_long_text_is_cut_without_a_word_from_transformers(
    load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("llama")
    monkeypatch.setattr(backbone.tokenizer, "model_max_length", CONTEXT)
    assert backbone.render(user("hello " * 3 * CONTEXT)).dropped > 0  # which is what is shown to the user
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    backbone.tokenizer.deprecation_warnings.clear()
    with caplog.at_level(logging.WARNING):
        backbone.render(user("good " * 3 * CONTEXT))
    assert not caplog.records


def test_count_tokens_cuts_nothing(load: Load) -> None:
    pair = Pair(user("dog " * 500), "yes", "fox " * 300, "g")
    assert load("gpt2").count_tokens(pair) > 1000


def test_encoders_pool_the_reply_between_their_own_tokens(load: Load) -> None:
    backbone = load("bert")
    row = backbone.render(user("a good film"), " a bad film")
    tokenizer = backbone._renderer.tokenizer
    assert row.tokens == tokenizer.encode("a good film a bad film")
    assert tokenizer.decode(row.tokens[row.start : row.stop]) == "a bad film"
    assert row.tail == 1
    assert not backbone.generates
    assert backbone.template.startswith("continuation:")


# --- specs -------------------------------------------------------------------------------------------------------


def test_specs_tell_models_and_renderings_apart(load: Load, folder: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = load("llama")
    spec = backbone.spec()
    assert (spec.layer, spec.pooling, spec.max_tokens) == (3, "mean", CONTEXT)
    backbone.require(spec)
    backbone.require(replace(spec, backbone="elsewhere", revision="abc", max_tokens=50))
    other = load_backbone(tiny_backbone("llama", tmp_path, seed=1))
    for model in (other, load("llama", "continuation")):
        with pytest.raises(SpecMismatch, match=r"features are those of .* but the loaded model is"):
            model.require(spec)
    with pytest.raises(SpecMismatch):
        backbone.require(replace(spec, max_tokens=CONTEXT + 1))
    assert len({load(n, t).template for n, t in TEMPLATED}) == len(TEMPLATED)
    for wrong in ({"layer": 4}, {"pooling": "max"}, {"max_tokens": CONTEXT + 1}, {"max_tokens": 0}):
        with pytest.raises(BackboneError, match=r"expected|hidden states"):
            backbone.spec(**wrong)


def test_the_weights_digest_is_of_the_tensors(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    found = weights_digest(folder("gpt2"))
    tensors = load_file(folder("gpt2") / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:5]}, tmp_path / "model-00001-of-00002.safetensors", {"made": "by hand"})
    save_file({n: tensors[n] for n in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert weights_digest(tmp_path) == found
    tensors[names[0]].reshape(-1)[0] += 1
    save_file({n: tensors[n] for n in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    assert weights_digest(tmp_path) != found
    assert load_backbone(folder("gpt2"), dtype="bfloat16").weights == found


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.fixture
def copied(folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(folder(name), tmp_path / name))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_incomplete_folders_are_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        BackboneError, match=r"not a model folder; missing config.json, model.safetensors, tokenizer.json"
    ):
        load_backbone(tmp_path / "empty")
    made = copied("gpt2")
    (made / "model.safetensors").rename(made / "elsewhere")
    with pytest.raises(BackboneError, match=r"not complete; missing model.safetensors"):
        load_backbone(made)
    (made / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BackboneError, match="pickled"):
        load_backbone(made)
    (made / "elsewhere").rename(made / "model.safetensors")
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(BackboneError, match=r"missing gone.safetensors"):
        load_backbone(made)
    (made / "model.safetensors.index.json").unlink()
    (made / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="cannot be read as JSON"):
        load_backbone(made)
    with pytest.raises(BackboneError, match="is a file"):
        load_backbone(made / "config.json")
    with pytest.raises(BackboneError, match="no such folder"):
        load_backbone("./nowhere/at/all")


def test_a_hub_name_without_a_network_is_an_error_of_ours() -> None:
    with pytest.raises(BackboneError, match="could not be fetched"):
        load_backbone("nobody/no-such-model")


def test_weights_that_would_be_random_are_refused(copied: Callable[[str], Path]) -> None:
    from safetensors.numpy import load_file, save_file

    made = copied("llama")
    tensors = load_file(made / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != gone}, made / "model.safetensors", {"format": "pt"})
    for generation in (True, False):
        with pytest.raises(BackboneError, match=rf"1 weight\(s\).*{gone}.*would be random"):
            load_backbone(made, generation=generation)
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="generation=False"):
        load_backbone(made)
    features_only = load_backbone(made, generation=False)
    assert not features_only.generates
    save_file({**tensors, gone: tensors[gone][:-1]}, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError):
        load_backbone(made)


def test_foreign_code_is_refused(copied: Callable[[str], Path]) -> None:
    made = copied("gpt2")
    edit(made / "config.json", model_type="homemade", auto_map={"AutoConfig": "evil.Config"})
    (made / "evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(BackboneError, match=r"Python code of its own \(AutoConfig\).*trust_remote_code=True"):
        load_backbone(made)
    edit(made / "config.json", model_type="homemade", auto_map={})
    with pytest.raises(BackboneError, match="cannot read its config"):
        load_backbone(made)


def test_wrong_options_are_refused(folder: Callable[[str], Path]) -> None:
    for options in (
        {"dtype": "float8"},
        {"device": "toaster"},
        {"template": "chat"},
        {"template": "haiku"},
        {"revision": "main"},
    ):
        with pytest.raises(CoalaError, match=r"expected|no chat template|no revisions"):
            load_backbone(folder("gpt2"), **options)


def test_loading_is_quiet_and_leaves_no_setting_behind(
    folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    saved = folder("bert")  # with a head that is not used, without a pooler that is not read
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()  # saving it, if no test has done so before, is not quiet
    backbone = load_backbone(saved)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert not any(parameter.requires_grad for parameter in backbone._network.causal.parameters())


# --- real models -------------------------------------------------------------------------------------------------

GREEDY = {
    "stories260K-hf": ("Once upon a time", ", there was a little girl named Lily. She loved to play outside in the p"),
    "tinystories-656k-hf": (
        "Once upon a time",
        ", a little girl named Lily lived in a small house with her mom, dad, and her dog, Spot, Spot, "
        "loved to play all day. One day, Lily saw a ",
    ),
    "craftgpt-5m-hf": ("how are you today?", "i am feeling very happy today, thank you for asking."),
}


@pytest.mark.parametrize("name", sorted(GREEDY))
def test_real_models_say_what_they_should(shared: Path, name: str) -> None:
    prompt, expected = GREEDY[name]
    backbone = load_backbone(shared / "data/models" / name, template="chat" if "craft" in name else "continuation")
    row = backbone.render(user(prompt))
    prefix = backbone.start([row.tokens, row.tokens[:2]])
    assert prefix.tree
    said: list[int] = []
    while len(said) < 24:
        best = prefix.log_probs().topk(3).indices
        if int(best[0, 0]) in backbone.stop_tokens:
            break
        prefix.peek(best)
        prefix.push(best[:, 0])
        said.append(int(best[0, 0]))
    text = backbone.decode([*row.tokens, *said]).removeprefix(backbone.decode(row.tokens))
    # Between a prompt and a reply CraftGPT's decoder writes a space that is in neither.
    assert text.removeprefix(" ") == expected.removeprefix(" ")


@pytest.mark.parametrize("reply", ["Yes. I like it very much", "once\nupon"])
@pytest.mark.parametrize("template", ["dialogue", "continuation"])
@pytest.mark.parametrize("name", ["stories260K-hf", "tinystories-656k-hf", "craftgpt-5m-hf", "gpt2-tokenizer"])
def test_real_tokenizers_go_back_to_the_text(shared: Path, name: str, template: str, reply: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models" / name)
    renderer = Renderer(tokenizer, template, stop_tokens=frozenset())
    row = renderer.render(user("Do you like it?"), reply, max_tokens=500)
    alone = renderer.render(user("Do you like it?"), None, max_tokens=500)
    assert row.tokens[: row.start] == alone.tokens
    before, text = renderer.decode(alone.tokens), renderer.decode(row.tokens)
    said = text.removeprefix(before)
    if "craft" in name:  # it lower-cases and drops what it does not know
        assert said.split() == reply.lower().split()
    else:
        assert said == (" " if template == "dialogue" else "") + reply


def test_a_reply_without_tokens_is_empty(shared: Path) -> None:
    backbone = load_backbone(shared / "data/models/craftgpt-5m-hf")
    row = backbone.render(user("hello"), "123 %")
    assert row.start == row.stop == len(row.tokens)
    assert row.tokens == backbone.render(user("hello")).tokens


def test_tied_weights_stored_under_the_head_are_found(shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    place = shared / "data/models/tinystories-656k-hf"
    features_only = load_backbone(place, generation=False)
    expected = AutoModelForCausalLM.from_pretrained(place).get_input_embeddings().weight
    assert torch.equal(features_only.hidden([[1, 5, 9]], 0)[0], expected[[1, 5, 9]])
