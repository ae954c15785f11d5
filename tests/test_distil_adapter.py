"""The second vehicle: an adapter on the same replies, its exact divergence, and what it is exported as."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from coala.backbone import LanguageModel, load_backbone
from coala.cli import app
from coala.decoding import Guidance, generate
from coala.decoding.adapted import adapter_off, generate_adapted, load_adapted, step_log_probs
from coala.distil.settings import AdapterSettings
from coala.policies import DistilledAdapter
from coala.recipe import load_recipe
from coala.settings import DistilSettings
from coala.store import RunFolder, StoreError, save_adapter, save_head, save_pairs
from coala.values import CoalaError, ConvexHead, Pair, SpecMismatch, prompt_id, user

from .menagerie import tiny_backbone
from .test_backbone_adapters import trained
from .tolerances import of_network

PROMPTS = [user(text) for text in ("once upon a time", "a dog", "the film was")]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}
FACTS = {"epochs": 2, "n_replies": 4, "n_held_out": 1, "temperature": 1.0, "guidance": "block", "flops": {}}


def adapter_of(base: Path, folder: Path, **settings: Any) -> DistilledAdapter:
    """A random adapter of ``base`` as a distilled one is kept."""
    trained(base, folder / "peft", target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    spec = load_backbone(base, device="cpu").spec()
    rows = ({"rate": 1e-3, "epoch": 1, "held_out": -0.1, "se": 0.01},)
    found = DistilledAdapter(folder / "peft", spec, "guided", 4, 1e-3, 1, 2.0, rows, FACTS)
    return save_adapter(folder / "distilled-adapter", found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> DistilledAdapter:
    return adapter_of(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def adapted(adapter: DistilledAdapter) -> LanguageModel:
    return load_adapted(adapter, device="cpu")


# --- sampled on one path with everything else ------------------------------------------------------------------------


def test_an_adapter_off_is_the_base_and_on_is_the_merged_model(
    base: Path, adapter: DistilledAdapter, adapted: LanguageModel
) -> None:
    plain, merged = load_backbone(base, device="cpu"), load_adapted(adapter, merge=True, device="cpu")
    row = plain.render(PROMPTS[0]).tokens

    def last(model: LanguageModel) -> torch.Tensor:
        return step_log_probs(model, row, (), 1)

    assert torch.allclose(last(adapted), last(merged), atol=of_network(1.0))
    assert not torch.allclose(last(adapted), last(plain), atol=1e-2)
    with adapter_off(adapted) as off:
        assert torch.equal(last(off), last(plain))
    assert torch.allclose(last(adapted), last(merged), atol=of_network(1.0))
    with pytest.raises(CoalaError, match="no separate adapter"), adapter_off(plain):
        pass


def test_replies_are_the_merged_models_and_tell_what_they_diverge(
    base: Path, adapter: DistilledAdapter, adapted: LanguageModel
) -> None:
    prompts, length = PROMPTS[:1] * 40, 3
    settings = {**SETTINGS, "max_new_tokens": length}
    ours = generate_adapted(prompts, adapted, **settings)
    merged = load_adapted(adapter, merge=True, device="cpu")
    theirs = generate(prompts, merged, None, Guidance.unguided(), **settings)
    assert [one.text for one in ours] == [one.text for one in theirs]
    # By the merged model and the base, which are two models of their own here.
    plain = load_backbone(base, device="cpu")
    for reply, other in zip(ours, theirs, strict=True):
        row = plain.render(prompts[0], reply.text)
        tokens = row.tokens[row.start : row.stop]
        if reply.n_tokens < length or len(tokens) != length:
            continue
        p, q = (step_log_probs(m, row.tokens[: row.start], tokens[:-1], length).double() for m in (merged, plain))
        taken = torch.arange(length), torch.tensor(tokens)
        if other.log_prob != pytest.approx(float(p[taken].sum()), rel=1e-4):
            continue  # read as other tokens than it was written in
        assert reply.divergence == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert reply.log_prob == pytest.approx(float(q[taken].sum()), rel=1e-4)
        return
    pytest.fail("no reply is read as the tokens it was written in")


def test_an_adapter_that_changes_nothing_diverges_by_nothing(base: Path, tmp_path: Path) -> None:
    idle = adapter_of(base, tmp_path)
    from safetensors.torch import load_file, save_file

    file = idle.folder / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(StoreError, match="is not the file"):
        DistilledAdapter.load(idle.folder)
    replies = generate_adapted(PROMPTS, load_adapted(idle, device="cpu"), **SETTINGS)
    plain = generate(PROMPTS, load_backbone(base, device="cpu"), **SETTINGS)
    assert [one.text for one in replies] == [one.text for one in plain]
    assert [one.divergence for one in replies] == [0.0] * len(PROMPTS)
    assert [one.log_prob for one in replies] == pytest.approx([one.log_prob for one in plain], rel=1e-5)


def test_an_adapter_is_read_back_as_it_was_written(adapter: DistilledAdapter) -> None:
    found = DistilledAdapter.load(adapter.folder)
    assert asdict(found) == asdict(adapter)
    assert found.kept["held_out"] == -0.1
    assert ["certificate", "none: training is not convex, and nothing says how near this is to the best adapter"] in (
        found.summary_rows()
    )


def test_an_adapter_of_another_model_is_refused(adapter: DistilledAdapter, tmp_path: Path) -> None:
    about = json.loads((adapter.folder / "adapter.json").read_text())
    other = DistilledAdapter.load(adapter.folder)
    object.__setattr__(other, "spec", type(other.spec)(**{**about["spec"], "weights": "0" * 64}))
    with pytest.raises(SpecMismatch, match="give back the model"):
        load_adapted(other, device="cpu")


# --- trained by TRL --------------------------------------------------------------------------------------------------


def teaching_run(folder: Path, base: Path) -> Path:
    """A run with a random head that guides by any rule, and prompts to answer."""
    model = load_backbone(base, device="cpu")
    settings = {
        "pairs": ["x"],
        "model": {"name": str(base), "device": "cpu"},
        "guidance": {"rule": "min-max"},
        "evaluation": {"max_new_tokens": 6, "prompts": 3, "judge": "rule:longer"},
    }
    run = RunFolder(folder)
    run.start(load_recipe(None, settings, {}).plain())
    words = ("once", "upon", "a time", "the dog", "a girl", "quick", "brown", "film", "evening", "story", "good", "bad")
    pairs = [Pair(user(word), "there was a dog", "no", str(i)) for i, word in enumerate(words)]
    save_pairs(run.path / "pairs-train.jsonl", pairs)
    held = [Pair(prompt, "there was a dog", "no", str(i)) for i, prompt in enumerate(PROMPTS)]
    save_pairs(run.path / "pairs-eval.jsonl", held)
    none = np.zeros((0, model.width + 1), np.float32)
    linear = np.random.default_rng(0).standard_normal(model.width + 1).astype(np.float32)
    save_head(run.path / "head", ConvexHead(none, none, linear, model.spec(2)))
    return run.path


DISTIL = DistilSettings(prompts=12, candidates=2, block_tokens=3)
ADAPTER = AdapterSettings(rates=(3e-3, 1e-7), epochs=2, adapter_rank=4, batch=4)


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DistilledAdapter]:
    pytest.importorskip("trl", reason="training an adapter needs the extra baselines")
    from coala.distil.adapter import distil_adapter

    run = teaching_run(tmp_path_factory.mktemp("run") / "run", base)
    return run, distil_adapter(run, DISTIL, ADAPTER)


@pytest.mark.nightly
def test_the_rate_and_the_epoch_are_those_of_the_lowest_held_out_loss(
    base: Path, taught: tuple[Path, DistilledAdapter]
) -> None:
    run, found = taught
    assert [(row["rate"], row["epoch"]) for row in found.trials] == [(1e-7, 1), (1e-7, 2), (3e-3, 1), (3e-3, 2)]
    assert found.kept["held_out"] == min(row["held_out"] for row in found.trials) < 0
    assert found.rate == 3e-3
    assert not list((run / "distilled-adapter").glob("training-*"))
    # What it says of the held-out replies is what the merged model says.
    from coala.distil.adapter import held_out, rendered
    from coala.store import load_generations

    (kept,) = (run / "distilled").glob("replies-*.jsonl")
    replies = load_generations(kept)
    assert len(replies) == 12
    plain, model = load_backbone(base, device="cpu"), load_adapted(found, merge=True, device="cpu")
    lessons = _lessons(run, replies, plain)
    out = held_out(lessons, [rendered(plain, one) for one in lessons], DISTIL.seed)
    assert found.facts["n_replies"] + found.facts["n_held_out"] == len(lessons)
    assert [one.group for one, held in zip(lessons, out, strict=True) if held] == found.facts["held_out_prompts"]
    losses: dict[str, float] = {}
    for name, one in (("base", plain), ("adapter", model)):
        total, n = 0.0, 0
        for lesson, held in zip(lessons, out, strict=True):
            if held:
                row = one.render(lesson.prompt, lesson.text, ends_with_eos=lesson.ended)
                at = [torch.tensor([x]) for x in (row.start, row.stop)]
                total -= float(one.log_likelihood(one.hidden([row.tokens], -1), torch.tensor([row.tokens]), *at))
                n += row.stop - row.start
        losses[name] = total / n
    assert found.base_loss == pytest.approx(losses["base"], rel=1e-5)
    assert found.kept["held_out"] == pytest.approx(losses["adapter"] - losses["base"], abs=1e-4)


def _lessons(run: Path, replies: list[Any], model: LanguageModel) -> list[Any]:
    from coala.distil.states import Lesson
    from coala.store import load_pairs

    prompts = [pair.prompt for pair in load_pairs(run / "pairs-train.jsonl")]
    tells = not model.stop_texts
    return [
        Lesson(prompt, reply.text, i, ended=tells and reply.n_tokens < 6)
        for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
        if reply.text
    ]


@pytest.mark.nightly
def test_both_vehicles_hold_the_same_prompts_out(base: Path, taught: tuple[Path, DistilledAdapter]) -> None:
    from coala.convex.output_fit import FOLDS
    from coala.convex.validation import grouped_folds
    from coala.distil.stage import distil

    run, found = taught
    distil(run, DISTIL)
    (states,) = (run / "distilled").glob("states-*")
    group = np.load(states / "group.npy")[:, 0]
    folds = grouped_folds(group, FOLDS, DISTIL.seed)
    assert folds is not None
    assert sorted(set(group[folds == 0].tolist())) == found.facts["held_out_prompts"]


@pytest.mark.nightly
def test_what_is_there_is_taken_up_and_another_setting_is_another_training(
    taught: tuple[Path, DistilledAdapter],
) -> None:
    from coala.distil.adapter import distil_adapter

    run, found = taught
    written = (run / "distilled-adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    heard: list[str] = []
    again = distil_adapter(run, DISTIL, ADAPTER, on_progress=lambda stage, *_: heard.append(stage))
    assert asdict(again) == asdict(found)
    assert (run / "distilled-adapter" / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert not [stage for stage in heard if stage.startswith("adapter")]
    with pytest.raises(CoalaError, match="TRL imitates texts"):
        distil_adapter(run, DistilSettings(teacher="shift"), ADAPTER)
    with pytest.raises(CoalaError, match="above 0"):
        distil_adapter(run, DISTIL, AdapterSettings(rates=(0.0,)))


KILLED = """
import os, sys
from dataclasses import replace
from pathlib import Path
from tests.test_distil_adapter import ADAPTER, DISTIL
from coala.distil.adapter import distil_adapter

def watch(stage, done, total, note=""):
    # After the first epoch of the second rate.
    if stage == "adapter at 0.003" and done == 4:
        os.kill(os.getpid(), 9)

distil_adapter(Path(sys.argv[1]), DISTIL, ADAPTER, on_progress=watch)
"""


@pytest.mark.nightly
def test_a_killed_training_goes_on_and_ends_with_the_same_adapter(
    base: Path, taught: tuple[Path, DistilledAdapter], tmp_path: Path
) -> None:
    from coala.distil.adapter import distil_adapter

    run = teaching_run(tmp_path / "run", base)
    done = subprocess.run([sys.executable, "-c", KILLED, str(run)], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    (work,) = (run / "distilled-adapter").glob("training-*")
    assert (work / "1e-07.json").is_file()
    assert list((work / "0.003" / "checkpoints").glob("checkpoint-3"))
    found = distil_adapter(run, DISTIL, ADAPTER)
    assert found.trials == taught[1].trials
    files = [one.folder / "adapter_model.safetensors" for one in (found, taught[1])]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("into", ["adapter", "output"])
def test_the_command_distils_measures_and_exports(
    into: str, taught: tuple[Path, DistilledAdapter], tmp_path: Path
) -> None:
    run, form = taught[0], "merged" if into == "adapter" else "checkpoint"
    line = ["distil", str(run), "--into", into, "--prompts", "12", "--candidates", "2", "--block-tokens", "3"]
    if into == "adapter":
        line += ["--rate", "3e-3", "--rate", "1e-7", "--epochs", "2", "--adapter-rank", "4", "--batch", "4"]
    line += ["--measure", "--to", form, "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.strip().splitlines()[-1])
    assert Path(last["folder"]).name == ("distilled-adapter" if into == "adapter" else "distilled")
    assert (last["certificate"] is None) == (into == "adapter")
    assert last["measured"]["n"] == 3
    assert last["exported"]["difference"] < 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    wins = last["measured"]["wins"]
    assert f"{wins['value']:.3f} [{wins['low']:.3f}, {wins['high']:.3f}], n = {wins['n']}" in card
    assert "of four learning rates of DPO by adapters on the same pairs" in card
    policy = load_backbone(tmp_path / "out", device="cpu")
    ids = [prompt_id(prompt) for prompt in PROMPTS]
    replies = generate(PROMPTS, policy, max_new_tokens=6, seed=0, prompt_ids=ids)
    told = DistilledAdapter.load(run / "distilled-adapter") if into == "adapter" else None
    if told is not None:
        ours = generate_adapted(PROMPTS, load_adapted(told, device="cpu"), max_new_tokens=6, seed=0, prompt_ids=ids)
        assert [one.text for one in ours] == [one.text for one in replies]
        spent = [one.divergence for one in ours if one.divergence is not None]
        assert last["measured"]["divergence"]["value"] == pytest.approx(np.mean(spent), rel=1e-6)
    # Perplexity is the base model's, of the policy's replies and of unguided ones.
    measured = json.loads((run / Path(last["folder"]).name / "measured.json").read_text())
    assert measured["perplexity"]["value"] / measured["unguided_perplexity"]["value"] == measured["perplexity_ratio"]


@pytest.mark.nightly
def test_a_gguf_chat_models_adapter_samples_with_its_exact_divergence(smollm2: Path, tmp_path: Path) -> None:
    """The adapter lies beside dequantised weights; off, they are the file's own."""
    from safetensors.torch import load_file, save_file

    base = load_backbone(smollm2, device="cpu", dtype="float32")
    width = base.width
    factors = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in (3, 20):
            place = f"base_model.model.model.layers.{layer}.mlp.down_proj"
            inner = base.transformer.model.layers[layer].mlp.down_proj.weight.shape[1]
            factors |= {
                f"{place}.lora_A.weight": 0.05 * torch.randn(4, inner),
                f"{place}.lora_B.weight": 0.15 * torch.randn(width, 4),
            }
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    about |= {"bias": "none", "target_modules": r".*layers\.(3|20)\.mlp\.down_proj", "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    row = {"rate": 1e-3, "epoch": 1, "held_out": -0.1, "se": 0.01}
    found = save_adapter(
        tmp_path / "kept", DistilledAdapter(folder, base.spec(), "guided", 4, 1e-3, 1, 2.0, (row,), FACTS)
    )
    assert load_file(found.folder / "adapter_model.safetensors").keys() == factors.keys()
    model = load_adapted(found, device="cpu", dtype="float32")
    prompt = user("Give three tips for staying healthy.")
    (reply,) = generate_adapted([prompt], model, max_new_tokens=12, seed=0, temperature=0)
    tokens = base.render(prompt).tokens
    with adapter_off(model):
        assert torch.allclose(step_log_probs(model, tokens, (), 1), step_log_probs(base, tokens, (), 1), atol=1e-4)
    # The same weights changed by hand.
    for layer in (3, 20):
        place = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        module = base.transformer.model.layers[layer].mlp.down_proj
        changed = torch.nn.Linear(module.weight.shape[1], width, bias=False)
        update = 2.0 * factors[f"{place}.lora_B.weight"] @ factors[f"{place}.lora_A.weight"]
        changed.weight = torch.nn.Parameter(module.weight + update, requires_grad=False)
        base.transformer.model.layers[layer].mlp.down_proj = changed
    (other,) = generate([prompt], base, max_new_tokens=12, seed=0, temperature=0)
    assert reply.text == other.text
    assert reply.divergence is not None
    assert reply.divergence > 0.01
    written = base.render(prompt, reply.text).tokens[len(tokens) :]
    p = step_log_probs(base, tokens, written[:-1], len(written)).double()
    with adapter_off(model):
        q = step_log_probs(model, tokens, written[:-1], len(written)).double()
    if reply.n_tokens == len(written) == 12:
        assert reply.divergence == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
