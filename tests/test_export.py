"""Exported folders score as the head does, on the same tokens, in the pipelines of others; what is refused and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import POOLINGS, LanguageModel, load_backbone
from coala.export import (
    ExportError,
    RunFacts,
    as_reward_func,
    export_linear_head,
    export_reward_model,
    facts_of,
    score_replies,
    verify_folder,
)
from coala.store import save_features, save_head
from coala.values import Certificate, CoalaError, ConvexHead, FeatureSet, SpecMismatch, Turn, user

from .menagerie import tiny_backbone
from .tolerances import NETWORK, of_network

KINDS = ("gpt2", "llama", "qwen2")
PROMPTS = ["tell me a story", "hello there, what do you think?", "a", "the quick brown fox " * 3]
REPLIES = [
    "once upon a time there was a girl.",
    "",
    "I am well - thank you!\n\nGood",
    "it's a long evening, and we'd go ",
]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LanguageModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: load_backbone(tiny_backbone(kind, folder / kind), device="cpu") for kind in KINDS}


@pytest.fixture(autouse=True)
def own_code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remote code is copied and imported from a folder of the test's own."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with monkeypatch.context() as context:
        context.syspath_prepend(str(tmp_path / "modules"))
        yield


def head_of(
    model: LanguageModel, layer: int = -1, pooling: str = "mean", gate_on: Any = "reply", m: int = 5, **spec: Any
) -> ConvexHead:
    draw = np.random.default_rng(7)
    # Not the model's width everywhere: a few models project between their layers and their ends.
    width = model.hidden([[1]], layer).shape[-1]
    size = (m, width + 1)
    linear = draw.normal(size=width + 1)
    wanted = model.spec(layer, pooling, **spec)
    return ConvexHead(draw.normal(size=size), draw.normal(size=size), linear, wanted, gate_on=gate_on, temperature=2.5)


def naive(head: ConvexHead, model: LanguageModel, prompt: tuple[Turn, ...], reply: str) -> float:
    """The head's score of one row that shares its pass with no other."""
    return float(together(head, model, [prompt], [reply])[0])


def together(head: ConvexHead, model: LanguageModel, prompts: list[tuple[Turn, ...]], replies: list[str]) -> Any:
    """The head's scores of rows read in one pass: which rows share one changes the last bits of all of them."""

    def pooled(texts: list[str] | list[None]) -> Any:
        options: dict[str, Any] = {"max_tokens": head.spec.max_tokens, "ends_with_eos": head.spec.ends_with_eos}
        rows = [model.render(prompt, text, **options) for prompt, text in zip(prompts, texts, strict=True)]
        pooling = POOLINGS[head.spec.pooling]
        hidden = model.hidden([row.tokens for row in rows], head.spec.layer, scored=pooling.scored)
        start = torch.tensor([0 if text is None else row.start for row, text in zip(rows, texts, strict=True)])
        stop = torch.tensor([row.stop for row in rows])
        return pooling.pool(hidden, start, stop).numpy()

    return head.score(pooled(replies), pooled([None] * len(prompts)) if head.needs_prompt else None)


def close(found: Any, expected: Any) -> None:
    """Equal but for sums of float32 in another order."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=of_network(expected))


def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return tokenizer, AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()


# --- a reward model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("gate_on", ["reply", "prompt"])
@pytest.mark.parametrize("pooling", sorted(name for name, pooling in POOLINGS.items() if not pooling.scored))
@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_scores_as_the_head(
    kind: str, pooling: str, gate_on: str, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    from transformers import pipeline

    model = models[kind]
    # One of the poolings reads an inner state, so that the model is cut.
    head = head_of(model, 2 if pooling == "mean" else -1, pooling, gate_on)
    export_reward_model(head, model, tmp_path / "out")
    expected = [naive(head, model, user(p), r) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    assert np.ptp(expected) > 0.1
    pipe = pipeline("text-classification", model=str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    rows = [{"text": p, "text_pair": r} for p, r in zip(PROMPTS, REPLIES, strict=True)]
    close([pipe(row)["score"] for row in rows], expected)
    expected = together(head, model, [user(p) for p in PROMPTS], REPLIES)
    for side in ("right", "left"):
        pipe.tokenizer.padding_side = side
        close([found["score"] for found in pipe(rows, batch_size=4)], expected)
        inputs = pipe.tokenizer(text=PROMPTS, text_pair=REPLIES, padding=True, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            close(pipe.model(**inputs).logits[:, 0].numpy(), expected)
    alone = score_replies([user(p) for p in PROMPTS], REPLIES, head, model, batch_tokens=1)
    close(alone, [naive(head, model, user(p), r) for p, r in zip(PROMPTS, REPLIES, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends_with_eos", [False, True])
def test_tokens_are_those_of_the_fit(
    kind: str, ends_with_eos: bool, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    model = models[kind]
    head = head_of(model, gate_on="prompt", ends_with_eos=ends_with_eos, max_tokens=80)
    export_reward_model(head, model, tmp_path / "out")
    tokenizer, network = loaded(tmp_path / "out")
    draw = np.random.default_rng(0)
    letters = [*"abc  .,'\n\té中😀<|>_0123", "Human:", "\n\nAssistant:", "<s>", "the"]
    cut = 0
    for _ in range(60):
        texts = ["".join(draw.choice(letters, n)) for n in draw.integers(0, 20, 4)]
        prompt = (Turn("user", texts[0] or "a"), Turn("assistant", texts[1] or "b"), Turn("user", texts[2] or "c"))
        row = model.render(prompt, texts[3], max_tokens=80, ends_with_eos=ends_with_eos)
        messages = [{"role": turn.role, "content": turn.text} for turn in prompt]
        found = tokenizer(text=messages, text_pair=texts[3])
        assert found["input_ids"] == row.tokens
        assert found["token_type_ids"] == [0] * row.start + [1] * (len(row.tokens) - row.start)
        assert found["prompt_ids"] == model.render(prompt, max_tokens=80).tokens
        cut += row.dropped > 0
        if texts[3]:
            assert tokenizer([*messages, {"role": "assistant", "content": texts[3]}])["input_ids"] == row.tokens
    assert 5 < cut < 60  # both kinds of row were seen
    # A prompt cut in the row but not by itself: gates act on the whole of it.
    long = "the quick brown fox jumps over it " * 2
    inputs = tokenizer(text=long, text_pair="a good film " * 20, return_tensors="pt")
    assert inputs["prompt_ids"].shape[1] > int((inputs["token_type_ids"] == 0).sum())
    with torch.no_grad():
        close(network(**inputs).logits[0, 0].numpy(), naive(head, model, user(long), "a good film " * 20))


@pytest.mark.parametrize("kind", KINDS)
def test_one_rendered_text_is_cut_at_the_last_marker(
    kind: str, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    model = models[kind]
    head = head_of(model)
    export_reward_model(head, model, tmp_path / "out")
    tokenizer, _ = loaded(tmp_path / "out")
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "well, hi"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "I am well"},
    ]
    if kind == "qwen2":
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False),
            tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True),
        ]
    else:
        texts = ["Human: hello\n\nAssistant: well, hi\n\nHuman: go on\n\nAssistant: I am well"]
    prompt = tuple(Turn(m["role"], m["content"]) for m in messages[:-1])  # type: ignore[arg-type]
    row = model.render(prompt, "I am well")
    for text in texts:
        assert tokenizer.reply_marker in text
        for extra in ({}, {"add_special_tokens": False}):
            found = tokenizer(text, **extra)
            assert found["input_ids"] == row.tokens
            assert sum(found["token_type_ids"]) == len(row.tokens) - row.start
    with pytest.raises(ValueError, match="text_pair"):
        tokenizer("no marker at all")


def test_a_separator_marks_the_reply_without_a_template(tmp_path: Path) -> None:
    model = load_backbone(tiny_backbone("gpt2", tmp_path / "model"), device="cpu", template="continuation")
    export_reward_model(head_of(model), model, tmp_path / "out")
    tokenizer, _ = loaded(tmp_path / "out")
    row = model.render(user("once upon"), " a time")
    assert tokenizer("once upon<|reply|> a time")["input_ids"] == row.tokens
    assert sum(tokenizer(text="once upon", text_pair=" a time")["token_type_ids"]) == len(row.tokens) - row.start


@pytest.mark.parametrize("kind", ["mixtral", "gemma3", "opt", "bert", "gpt-neo", "mamba"])
def test_other_families(kind: str, tmp_path: Path) -> None:
    """An export tries its own folder: layers that differ in kind, projections, experts, an encoder, no attention."""
    model = load_backbone(tiny_backbone(kind, tmp_path / "model"), device="cpu")
    made = export_reward_model(head_of(model, 1, "mean_all", "prompt"), model, tmp_path / "out")
    # Not one pass with the same rows: last digits differ.
    assert made.difference < NETWORK


def test_the_cut_leaves_out_what_is_above(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    from safetensors import safe_open

    model = models["llama"]
    sizes = []
    for layer in (1, 2, -1):
        made = export_reward_model(head_of(model, layer), model, tmp_path / str(layer))
        with safe_open(made.folder / "model.safetensors", "np") as file:
            names = set(file.keys())
        assert any(".layers.0." in name for name in names)
        assert any(".layers.1." in name for name in names) == (layer != 1)
        assert not any("lm_head" in name for name in names)
        sizes.append(made.n_bytes)
    assert sizes[0] < sizes[1] < sizes[2]
    assert {p.suffix for p in (tmp_path / "1").iterdir()} <= {".json", ".safetensors", ".py", ".md", ".jinja"}


def test_half_precision_keeps_the_head(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    head = head_of(models["llama"])
    export_reward_model(head, models["llama"], tmp_path / "out")
    half = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16
    )
    assert half.head.gates.dtype == torch.float32
    assert np.array_equal(half.head.gates.detach().numpy(), head.gates)
    assert half.backbone.get_input_embeddings().weight.dtype == torch.bfloat16


# --- the folder --------------------------------------------------------------------------------------------------


def test_card_and_manifest(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    model = models["gpt2"]
    certificate = Certificate("pairwise", "The optimum is near.", 1.0, 0.9999, 0.0, 3, "solved", 1e-4, "float32", 0, {})
    head = replace(head_of(model), certificate=certificate)
    run = tmp_path / "run"
    save_head(run / "head", head)
    draw = np.random.default_rng(1)
    states = draw.normal(size=(2, 40, model.width))
    groups = np.array([str(i // 2) for i in range(40)])
    save_features(run / "features/eval", FeatureSet(*states, groups, head.spec))
    (run / "run.json").write_text("{}")
    secret = "a sentence nobody may publish"
    (run / "pairs-train.jsonl").write_text(json.dumps({"prompt": secret}) + "\n")
    facts = facts_of(run, head)
    accuracy = facts.metrics["ranking accuracy"]
    margins = head.score(states[0].astype(np.float32)) - head.score(states[1].astype(np.float32))
    assert accuracy.value == pytest.approx(np.mean(margins > 0))
    assert accuracy.n == 40
    made = export_reward_model(head, model, tmp_path / "out", facts)
    text = (made.folder / "README.md").read_text()
    for said in (str(accuracy), str(certificate), "The optimum is near.", "trust_remote_code", head.spec.weights):
        assert said in text
    assert "1 pairs, SHA-256" in text
    assert "hf upload OWNER/NAME FOLDER ." in text
    # Neither rows nor folders of this machine leave it.
    for path in made.folder.iterdir():
        if path.suffix != ".safetensors":
            assert secret not in path.read_text()
            assert str(tmp_path.parent) not in path.read_text(), path.name
            assert model.name not in path.read_text(), path.name
    assert verify_folder(made.folder)["spec"]["weights"] == head.spec.weights
    bare = export_reward_model(replace(head, certificate=None), model, tmp_path / "bare", RunFacts())
    assert "None was saved" in (bare.folder / "README.md").read_text()


def test_a_tampered_folder_is_told(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    folder = export_reward_model(head_of(models["gpt2"]), models["gpt2"], tmp_path / "out").folder
    (folder / "README.md").write_text("an edited card")
    verify_folder(folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def altered(name: str, data: bytes | None, match: str) -> None:
        path = folder / name
        path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
        with pytest.raises(ExportError, match=match):
            verify_folder(folder)
        path.write_bytes(whole[name]) if name in whole else path.unlink()
        verify_folder(folder)

    weights = bytearray(whole["model.safetensors"])
    weights[-1] ^= 1
    altered("model.safetensors", bytes(weights), "changed: model.safetensors")
    altered("modeling_coala.py", whole["modeling_coala.py"] + b"\nimport os\n", "changed: modeling_coala.py")
    altered("tokenizer.json", None, "missing: tokenizer.json")
    altered("more.py", b"x = 1\n", "not listed: more.py")
    altered("coala.json", None, "not an exported folder")
    altered("coala.json", b"{}", "lists no files")


def test_refusals(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    head = head_of(models["llama"])
    with pytest.raises(SpecMismatch, match="loaded model"):
        export_reward_model(head, models["gpt2"], tmp_path / "out")
    changed = replace(head, spec=replace(head.spec, weights="0" * 64))
    for attempt in (export_reward_model, export_linear_head):
        with pytest.raises(SpecMismatch):
            attempt(changed, models["llama"], tmp_path / "out")
    with pytest.raises(ExportError, match="listens to one layer's attention"):
        export_reward_model(head_of(models["llama"], pooling="attn"), models["llama"], tmp_path / "out")
    with pytest.raises(ExportError, match="read the last token alone"):
        export_linear_head(head_of(models["llama"], pooling="attn", m=0), models["llama"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(CoalaError, match="not empty"):
        export_reward_model(head, models["llama"], tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(CoalaError, match="--out"):
        export_reward_model(head, models["llama"], tmp_path / "file" / "out")
    export_reward_model(head, models["llama"], tmp_path / "empty")
    leftovers = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert leftovers == []


# --- a stock folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_head_needs_no_code(kind: str, models: dict[str, LanguageModel], tmp_path: Path) -> None:
    from transformers import pipeline

    model = models[kind]
    head = head_of(model, pooling="last", m=0)
    with pytest.raises(ExportError, match="adds a constant"):
        export_linear_head(head, model, tmp_path / "out")
    made = export_linear_head(head, model, tmp_path / "out", drop_constant=True)
    assert not list(made.folder.glob("*.py"))
    assert "auto_map" not in (made.folder / "config.json").read_text()
    pipe = pipeline("text-classification", model=str(made.folder), device="cpu")
    assert type(pipe.model).__module__.startswith("transformers.")
    replies = ["once upon a time", "I am well, thank you!", "no"]
    expected = [naive(head, model, user("hello there"), reply) - float(head.linear[-1]) for reply in replies]
    options: dict[str, Any] = {}
    if kind == "qwen2":
        options = {"add_special_tokens": False}
        texts = [
            pipe.tokenizer.apply_chat_template(
                [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": reply}],
                tokenize=False,
                continue_final_message=True,
            )
            for reply in replies
        ]
    else:
        texts = [f"Human: hello there\n\nAssistant: {reply}" for reply in replies]
    for text, reply in zip(texts, replies, strict=True):
        assert pipe.tokenizer(text, **options)["input_ids"] == model.render(user("hello there"), reply).tokens
    close([found["score"] for found in pipe(texts, **options)], expected)
    # Stock classes pass a mask, and with it other kernels.
    found = [one["score"] for one in pipe(texts, batch_size=3, **options)]
    close(found, expected)


def test_a_linear_head_is_refused_with_the_reason(models: dict[str, LanguageModel], tmp_path: Path) -> None:
    model = models["gpt2"]
    refused = {
        "5 gates": head_of(model, pooling="last"),
        "pools by 'mean'": head_of(model, m=0),
        "hidden state 1": head_of(model, 1, "last", m=0),
        # GPT-2's only special token ends replies, and stock classes would take it for padding.
        "no other special token": head_of(model, pooling="last", m=0, ends_with_eos=True),
    }
    for match, head in refused.items():
        with pytest.raises(ExportError, match=match):
            export_linear_head(head, model, tmp_path / "out", drop_constant=True)
    llama = models["llama"]
    export_linear_head(
        head_of(llama, pooling="last", m=0, ends_with_eos=True), llama, tmp_path / "out", drop_constant=True
    )


# --- a reward function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "attn"])
def test_a_reward_function_scores_texts_and_messages(models: dict[str, LanguageModel], pooling: str) -> None:
    model = models["qwen2"]
    head = head_of(model, pooling=pooling, gate_on="prompt")
    reward = as_reward_func(head, model)
    expected = [naive(head, model, user(p), r) for p, r in zip(PROMPTS, REPLIES, strict=True)]
    found = reward(prompts=PROMPTS, completions=REPLIES, completion_ids=None, trainer_state=None)
    assert all(isinstance(value, float) for value in found)
    close(found, expected)
    messages = [[{"role": "user", "content": p}] for p in PROMPTS]
    answers = [[{"role": "assistant", "content": [{"type": "text", "text": r}]}] for r in REPLIES]
    close(reward(prompts=messages, completions=answers), expected)
    close(np.array(as_reward_func(head, model, in_log_odds=True)(PROMPTS, REPLIES)) * 2.5, expected)
    assert reward(prompts=[], completions=[]) == []
    with pytest.raises(CoalaError, match="completions"):
        reward(prompts=PROMPTS, completions=[])
    with pytest.raises(CoalaError, match="assistant"):
        reward(prompts=["a"], completions=[[{"role": "user", "content": "b"}]])
    with pytest.raises(CoalaError, match="backbone"):
        as_reward_func(head)
    with pytest.raises(SpecMismatch):
        as_reward_func(head, models["gpt2"])


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_one_step_of_a_trainer(
    method: str, conversational: bool, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="needs trl: pip install 'coala-align[baselines]'")
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'coala-align[baselines]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = models["qwen2"]
    reward = as_reward_func(head_of(model, gate_on="prompt"), model)
    seen: list[tuple[Any, Any, list[float]]] = []

    def watched(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.append((prompts, completions, reward(prompts=prompts, completions=completions, **columns)))
        return seen[-1][2]

    policy = AutoModelForCausalLM.from_pretrained(model.name)
    tokenizer = AutoTokenizer.from_pretrained(model.name)
    tokenizer.pad_token = "<|endoftext|>"
    before = policy.get_input_embeddings().weight.detach().clone()
    prompts: list[Any] = ["hello there", "tell me a story"]
    rows = [[{"role": "user", "content": p}] for p in prompts] if conversational else prompts
    arguments = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        bf16=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = getattr(trl, f"{method}Trainer")(
        model=policy,
        reward_funcs=watched,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": rows, "note": ["x", "y"]}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert len(seen) == 1
    asked, replied, rewards = seen[0]
    assert isinstance(replied[0], list) == conversational
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert logged["reward"] == pytest.approx(np.mean(rewards), rel=1e-4)
    text = replied[0][0]["content"] if conversational else replied[0]
    prompt = asked[0][0]["content"] if conversational else asked[0]
    close(rewards[0], naive(reward.head, model, user(prompt), text))
    assert not torch.equal(policy.get_input_embeddings().weight.cpu(), before)
