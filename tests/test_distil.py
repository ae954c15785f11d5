"""Distillation from end to end: states of replies, the policy as a decoder, and the model with its layer changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import coala
from coala.backbone import LanguageModel, load_backbone
from coala.cli import app
from coala.decoding import Guidance, generate, generate_distilled, policy_likelihood
from coala.decoding.distilled import divergence
from coala.distil.matrix import output_matrix
from coala.distil.shift import shift_states
from coala.distil.stage import distil
from coala.distil.states import LIGHT, Lesson, teacher_states, weighted_lessons
from coala.export.policy import export_beside, export_checkpoint, export_gguf, export_lora
from coala.policies import DistilledPolicy
from coala.recipe import load_recipe
from coala.settings import DistilSettings
from coala.store import RunFolder, save_head
from coala.values import CoalaError, ConvexHead, FeatureSet, Pair, SpecMismatch, prompt_id, user

from .menagerie import tiny_backbone
from .test_align import pair_rows, write_rows
from .test_backbone_gguf import make_folder, write_gguf
from .test_backbone_gguf_parity import ARITHMETIC, asked, serving

PROMPTS = [user(text) for text in ("once upon a time", "a dog", "the film was")]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}


def log_probs(model: LanguageModel, policy: DistilledPolicy, states: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model.with_policy(policy).changed().logits(states), -1)


def policy_of(backbone: LanguageModel, scale: float, rank: int | None = 3) -> DistilledPolicy:
    rng = np.random.default_rng(1)
    d = backbone.width
    left = (scale * rng.standard_normal((d, rank or d))).astype(np.float32)
    right = None if rank is None else rng.standard_normal((rank, d)).astype(np.float32)
    return DistilledPolicy(left, right, backbone.spec(), "guided", "nucleus", 0.1)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_backbone(tiny_backbone("llama", tmp_path_factory.mktemp("llama")), device="cpu")


def with_layer(folder: Path, output: np.ndarray) -> LanguageModel:
    """A model of its own whose output layer is ``output``."""
    model = load_backbone(folder, device="cpu")
    layer = model.transformer.get_output_embeddings()
    layer.weight = torch.nn.Parameter(torch.from_numpy(output), requires_grad=False)
    return model


def test_a_policy_samples_what_the_model_with_its_layer_changed_samples(backbone: LanguageModel) -> None:
    policy = policy_of(backbone, 0.2)
    output = output_matrix(backbone)
    other = with_layer(Path(backbone.name), output + output @ policy.change)
    ours = generate_distilled(PROMPTS, backbone, policy, **SETTINGS)
    theirs = generate(PROMPTS, other, None, Guidance.unguided(), **SETTINGS)
    assert [one.text for one in ours] == [one.text for one in theirs]
    base = generate(PROMPTS, backbone, None, Guidance.unguided(), **SETTINGS)
    assert [one.text for one in ours] != [one.text for one in base]
    still = generate_distilled(PROMPTS, backbone, policy, strength=0, **SETTINGS)
    assert [one.text for one in still] == [one.text for one in base]
    assert [one.divergence for one in still] == pytest.approx([0.0] * len(base), abs=1e-5)


def test_what_a_reply_diverges_is_the_sum_over_its_steps(backbone: LanguageModel) -> None:
    policy = policy_of(backbone, 0.2, rank=None)
    prompt, length = PROMPTS[0], 3
    replies = generate_distilled([prompt] * 40, backbone, policy, max_new_tokens=length, seed=0)
    rows = [backbone.render(prompt, reply.text) for reply in replies]
    # One whose text is read as the tokens that it was written in.
    reply, row = next(
        (reply, row)
        for reply, row in zip(replies, rows, strict=True)
        if row.stop - row.start == length
        and policy_likelihood([prompt], [reply.text], backbone, policy)[0][1] == pytest.approx(reply.log_prob, rel=1e-4)
    )
    output, at = output_matrix(backbone), policy.change.astype(float)
    final = backbone.hidden([row.tokens], -1)[0, row.start - 1 : row.stop - 1].double().numpy()
    logits = [states @ output.astype(float).T for states in (final + final @ at.T, final)]
    p, q = (np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True)) for z in logits)
    assert reply.divergence == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
    ((policy_log, base_log, n),) = policy_likelihood([prompt], [reply.text], backbone, policy)
    taken = np.arange(n), row.tokens[row.start : row.stop]
    assert (policy_log, base_log) == pytest.approx((np.log(p[taken]).sum(), np.log(q[taken]).sum()), rel=1e-4)


def test_pairs_teach_by_their_weight_and_with_their_ends(backbone: LanguageModel) -> None:
    draw, n = np.random.default_rng(0), 40
    pairs = [Pair(user(f"ask {i}"), "a dog " * (1 + 30 * (i % 2)), f"the film {i}", str(i)) for i in range(n)]
    width = backbone.width
    none, linear = np.zeros((0, width + 1), np.float32), draw.standard_normal(width + 1).astype(np.float32)
    head = ConvexHead(none, none, linear, backbone.spec(2))
    sides = draw.standard_normal((2, n, width)).astype(np.float32)
    features = FeatureSet(*sides, np.array([pair.group for pair in pairs]), backbone.spec(2))
    continuing, beta, longest = load_backbone(backbone.name, template="continuation", device="cpu"), 0.5, 25
    found = weighted_lessons(continuing, pairs, features, head, beta, longest)
    rewards = np.concatenate([head.score(side, None) for side in sides]).astype(float)
    weights = np.exp((rewards - rewards.max()) / (beta * rewards.std()))
    texts = [(0, pair) for pair in pairs] + [(1, pair) for pair in pairs]
    wanted = {
        (pair.prompt, (pair.chosen, pair.rejected)[side]): w for (side, pair), w in zip(texts, weights, strict=True)
    }
    taught = {(one.prompt, one.text): one.weight for one in found}
    assert taught == pytest.approx({key: wanted[key] for key in taught}, rel=1e-5)
    left = [weight for key, weight in wanted.items() if key not in taught]
    assert left
    assert sum(left) <= LIGHT * weights.sum() < sum(left) + min(taught.values())
    assert max(left) <= min(taught.values())
    # Thirty-one dogs are more than 25 tokens, and so may have been cut.
    assert [one.ended for one in found] == [len(one.text) < 100 for one in found]
    assert len({one.ended for one in found}) == 2
    # A dialogue ends by a text, not by a token.
    assert backbone.stop_texts
    assert not any(one.ended for one in weighted_lessons(backbone, pairs, features, head, beta, longest))


def test_divergence_is_none_of_equals_and_bears_what_cannot_be() -> None:
    p = torch.log_softmax(torch.randn(3, 7), -1)
    assert torch.equal(divergence(p, p), torch.zeros(3, dtype=torch.float64))
    assert float(divergence(torch.tensor([[0.0, -torch.inf]]), torch.log(torch.tensor([[0.5, 0.5]])))) == pytest.approx(
        np.log(2)
    )


def test_states_are_those_the_model_predicts_from(backbone: LanguageModel, tmp_path: Path) -> None:
    lessons = [
        Lesson(PROMPTS[0], "there was a dog", 0, 2.0, ended=True),
        Lesson(PROMPTS[1], "", 1),
        Lesson(PROMPTS[2], "good", 2),
    ]
    output = output_matrix(backbone)
    told: list[tuple[int, int]] = []
    found = teacher_states(
        backbone,
        output,
        lessons,
        tmp_path,
        Guidance.unguided(top_k=20),
        n_tokens=24,
        on_reply=lambda *n: told.append(n),
    )
    row = backbone.render(lessons[0].prompt, lessons[0].text, ends_with_eos=True)
    first = found.group == 0
    assert first.sum() == row.stop - row.start
    assert set(found.weight[first]) == {2.0}
    assert row.tokens[row.stop - 1] in backbone.stop_tokens
    taken = np.take_along_axis(found.tokens, found.target.argmax(1)[:, None], 1)[:, 0]
    assert taken[first].tolist() == row.tokens[row.start : row.stop]
    logits = found.states @ output.T
    likelihood, n = (
        backbone.log_likelihood(
            backbone.hidden([row.tokens], -1),
            torch.tensor([row.tokens]),
            torch.tensor([row.start]),
            torch.tensor([row.stop]),
        ),
        int(first.sum()),
    )
    ours = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[first][np.arange(n), taken[first]].sum()
    assert ours == pytest.approx(float(likelihood), rel=1e-4)
    assert found.size.max() <= 20
    # What is there is not made again; a shard that is, is taken as it stands.
    again = teacher_states(backbone, output, lessons, tmp_path, Guidance.unguided(top_k=20), n_tokens=24)
    assert np.array_equal(again.states, found.states)
    assert isinstance(again.states, np.memmap)
    assert told == [(3, 3)]


@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_a_scale_of_the_logits_is_part_of_the_matrix(kind: str, tmp_path: Path) -> None:
    model = load_backbone(tiny_backbone(kind, tmp_path / kind), device="cpu")
    config = model.transformer.config
    for name in ("logit_scale", "logits_scaling"):
        if hasattr(config, name):
            # Both read it when they are made, or at every step.
            setattr(config, name, 0.25)
    if hasattr(model.transformer, "logit_scale"):
        model.transformer.logit_scale = 0.25
    raw = model.transformer.get_output_embeddings().weight.numpy()
    assert np.allclose(output_matrix(model), raw * (0.25 if kind == "cohere" else 4.0))


def test_models_whose_logits_are_no_product_are_refused_by_name(tmp_path: Path) -> None:
    bent = load_backbone(tiny_backbone("gemma2", tmp_path / "gemma2"), device="cpu")
    with pytest.raises(CoalaError, match="final_logit_softcapping"):
        output_matrix(bent)
    shifted = load_backbone(tiny_backbone("phi", tmp_path / "phi"), device="cpu")
    with pytest.raises(CoalaError, match="bias"):
        output_matrix(shifted)


def test_a_policy_of_another_model_is_refused(backbone: LanguageModel) -> None:
    policy = policy_of(backbone, 0.1)
    other = replace(policy, spec=replace(policy.spec, weights="0" * 64))
    with pytest.raises(SpecMismatch, match="load the model it was distilled from"):
        generate_distilled(PROMPTS, backbone, other, **SETTINGS)


# --- what others serve ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # the second ties its output layer to the embedding
def test_exported_folders_have_the_policys_probabilities_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = load_backbone(tiny_backbone(kind, tmp_path / kind), device="cpu")
    policy = policy_of(model, 0.2)
    tokens = torch.tensor([model.render(PROMPTS[0]).tokens])
    wanted = log_probs(model, policy, model.hidden(tokens.tolist(), -1)[0])
    export_checkpoint(policy, model, tmp_path / "checkpoint")
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    found = {"checkpoint": checkpoint}
    if kind == "llama":
        export_lora(policy, model, tmp_path / "lora")
        found["lora"] = PeftModel.from_pretrained(adapted, tmp_path / "lora")
    else:
        with pytest.raises(CoalaError, match="ties its output layer"):
            export_lora(policy, model, tmp_path / "lora")
    for name, network in found.items():
        with torch.no_grad():
            theirs = network(tokens).logits[0].float().log_softmax(-1)
        assert torch.allclose(theirs, wanted, atol=1e-4), name
    # All else is as it was.
    state, old = checkpoint.state_dict(), model.transformer.state_dict()
    assert all(torch.equal(state[key], old[key].float()) for key in old if key != "lm_head.weight")


def test_an_adapter_of_full_rank_is_refused(backbone: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="full rank"):
        export_lora(policy_of(backbone, 0.1, rank=None), backbone, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_gguf_file_is_the_old_one_but_for_its_output_layer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", tie_word_embeddings=True)
    file = write_gguf(folder, tmp_path / "tiny.gguf")
    model = load_backbone(file, device="cpu")
    policy = policy_of(model, 0.2)
    found = export_gguf(policy, model, tmp_path / "changed.gguf")
    assert found.probes == 3
    assert found.difference < 2e-2
    again = load_backbone(tmp_path / "changed.gguf", device="cpu", dtype="float32")
    row = model.render(PROMPTS[0]).tokens
    wanted = log_probs(model, policy, model.hidden([row], -1)[0])
    theirs = again.logits(again.hidden([row], -1)[0]).log_softmax(-1)
    # The layer is kept in half precision.
    assert torch.allclose(theirs, wanted, atol=2e-2)
    base = model.logits(model.hidden([row], -1)[0]).log_softmax(-1)
    assert (theirs - wanted).abs().max() < 0.05 * (base - wanted).abs().max()
    # A file that has an output layer already gets the new one in its place.
    twice = export_gguf(policy, model, tmp_path / "twice.gguf", base=tmp_path / "changed.gguf")
    assert twice.path.stat().st_size == found.n_bytes
    with pytest.raises(CoalaError, match="found something of that name"):
        export_gguf(policy, model, tmp_path / "twice.gguf")
    with pytest.raises(CoalaError, match="not loaded from a GGUF file"):
        export_gguf(policy, load_backbone(folder, device="cpu"), tmp_path / "other.gguf")


def test_a_policy_goes_beside_its_run_once_and_never_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model in an installed package, whose file is the one that is changed."""
    package, about = tmp_path / "site" / "tiny_model", tmp_path / "site" / "tiny_model-1.2.dist-info"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny_model\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write_gguf(make_folder(tmp_path / "folder", tie_word_embeddings=True), package / "tiny.gguf")
    model, run, told = load_backbone("wheel:tiny-model==1.2", device="cpu"), RunFolder(tmp_path / "mine"), []
    settings = {"pairs": ["x"], "model": {"name": model.name, "device": "cpu"}}
    run.start(load_recipe(None, settings, {}).plain())
    none = np.zeros((0, model.width + 1), np.float32)
    head = ConvexHead(none, none, np.ones(model.width + 1, np.float32), model.spec(2))
    save_head(run.path / "head", head)
    parts: Any = lambda: (model, head, Guidance())  # noqa: E731
    assert export_beside(run, "gguf", parts=parts, on_note=told.append) is None  # nothing was distilled
    policy_of(model, 0.2).save(run.path / "distilled")
    found = export_beside(run, "gguf", parts=parts)
    assert found is not None
    assert found.path == tmp_path / "mine-served.gguf"
    llama, ollama = found.commands
    assert llama == f"llama-server -m {found.path} --temp 1 --top-k 50 --top-p 0.9 --min-p 0"
    assert ollama == f"ollama create mine -f {tmp_path / 'mine-served.Modelfile'} && ollama run mine"
    assert (tmp_path / "mine-served.Modelfile").read_text().startswith("FROM ./mine-served.gguf\n")
    made = found.path.stat().st_mtime_ns
    assert export_beside(run, "gguf", parts=parts) == found
    assert (found.path.stat().st_mtime_ns, told) == (made, [])
    policy_of(model, 0.3).save(run.path / "distilled")
    assert export_beside(run, "gguf", parts=parts, on_note=told.append) is None
    assert "is not of this policy" in told[0]
    assert found.path.stat().st_mtime_ns == made


@pytest.mark.nightly
def test_llama_cpp_serves_the_policys_own_greedy_tokens(smollm2: Path, tmp_path: Path) -> None:
    """Up to where the two best tokens are closer than its arithmetic moves them."""
    model = load_backbone(smollm2, device="cpu", dtype="float32")
    policy = policy_of(model, 0.004, rank=8)
    changed, llama = (
        model.with_policy(policy).changed(),
        serving(export_gguf(policy, model, tmp_path / "changed.gguf").path),
    )
    for prompt in ("Give three tips for staying healthy.", "What is 2024 minus 1999?"):
        row = model.render(user(prompt)).tokens
        settings = {"temperature": 0, "n_predict": 24, "cache_prompt": False, "return_tokens": True}
        reply = asked(llama, "completion", prompt=row, **settings)["tokens"]
        states = model.hidden([row + reply], -1)[0, len(row) - 1 : -1]
        both, base = changed.logits(states).log_softmax(-1), model.logits(states).log_softmax(-1)
        assert base.argmax(-1).tolist() != reply
        for at, token in enumerate(reply):
            assert both[at].max() - both[at, token] < 2 * ARITHMETIC["as it is"]
            if int(both[at].argmax()) != token:
                break


@pytest.mark.nightly
def test_the_command_distils_a_run_and_takes_up_what_is_there(tmp_path: Path) -> None:
    """Both teachers, from the command line to a checkpoint that samples the policy."""
    tiny_backbone("llama", tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", pair_rows(24, 12))
    coala.align(
        tmp_path / "pairs.jsonl",
        model=tmp_path / "model",
        out=tmp_path / "run",
        head={"method": "linear"},
        guidance={"rule": "min-max"},
        evaluation={"prompts": 0, "max_new_tokens": 6},
    )
    run, told = str(tmp_path / "run"), []
    line = ["distil", run, "--prompts", "6", "--candidates", "2", "--json"]
    result = CliRunner().invoke(app, [*line, "--to", "checkpoint", "--out", str(tmp_path / "checkpoint")])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.strip().splitlines()[-1])
    assert last["certificate"]["facts"]["relative_gap_of_full_change"] <= 1e-3
    policy = DistilledPolicy.load(tmp_path / "run" / "distilled")
    settings: dict[str, Any] = {"max_new_tokens": 6, "seed": 0}
    ours = generate_distilled(PROMPTS, load_backbone(tmp_path / "model", device="cpu"), policy, **settings)
    theirs = generate(PROMPTS, load_backbone(tmp_path / "checkpoint", device="cpu"), **settings)
    assert [one.text for one in ours] == [one.text for one in theirs]
    # The policy of these settings is there already, and what was said of it is said again.
    notes: list[str] = []
    once: dict[str, Any] = {"on_progress": lambda stage, *_: told.append(stage), "on_note": notes.append}
    again = distil(run, DistilSettings(prompts=6, candidates=2), **once)
    assert np.array_equal(again.change, policy.change)
    assert told == []
    assert any("already has the policy of these settings" in note for note in notes)
    assert [note for note in notes if "held-out prompts do not" in note and note not in result.stderr] == []
    # After a kill the replies and states are taken up; a weighted teacher writes none.
    (tmp_path / "run" / "distilled" / "path.json").unlink()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "distilled").rglob("*.npy")}
    again = distil(run, DistilSettings(prompts=6, candidates=2), **once)
    assert np.array_equal(again.change, policy.change)
    assert "distil fit" in told
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    weighted = distil(run, DistilSettings(teacher="weighted", rank=2, ridge=0.1))
    assert (weighted.rank, weighted.program) == (2, "weighted")
    assert len(list((tmp_path / "run" / "distilled").glob("replies-*.jsonl"))) == 1


def test_the_soft_teacher_spends_what_its_decoder_accounts_for(backbone: LanguageModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    none = np.zeros((0, backbone.width + 1), np.float32)
    head = ConvexHead(none, none, rng.standard_normal(backbone.width + 1).astype(np.float32), backbone.spec(2))
    guidance = Guidance("shift", rule="raw", strength=2.0, candidates=5, top_k=20, every=2)
    ids = [prompt_id(prompt) for prompt in PROMPTS]
    settings: dict[str, Any] = {"max_new_tokens": 7, "seed": 1}
    found = shift_states(backbone, head, PROMPTS, tmp_path, guidance, **settings)
    replies = generate(PROMPTS, backbone, head, guidance, prompt_ids=ids, **settings)
    # The base distribution within the nucleus, from states and matrix alone.
    logits = np.take_along_axis(found.states @ output_matrix(backbone).T, found.tokens, 1).astype(float)
    inside = np.arange(logits.shape[1]) < found.size[:, None]
    p = np.where(inside, np.exp(logits - logits.max(1, keepdims=True)), 0.0)
    p /= p.sum(1, keepdims=True)
    q = found.target.astype(float)
    spent = np.where(q > 0, q * (np.log(np.where(q > 0, q, 1)) - np.log(np.where(inside, p, 1))), 0.0).sum(1)
    for number, reply in enumerate(replies):
        assert reply.divergence is not None
        assert spent[found.group == number].sum() == pytest.approx(reply.divergence, rel=1e-3)
        assert reply.divergence > 0.01
    assert found.in_nucleus.all()
    again = shift_states(backbone, head, PROMPTS, tmp_path, guidance, **settings)
    assert np.array_equal(again.target, found.target)
    with pytest.raises(CoalaError, match="expected mode shift, no budget"):
        shift_states(backbone, head, PROMPTS, tmp_path / "other", guidance.changed(budget=3.0), **settings)
