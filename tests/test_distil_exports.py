"""What policies are written as for others: bytes, cards and Modelfiles, by means that know nothing of how."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coala.backbone import LanguageModel, load_backbone
from coala.cli import app
from coala.export.merged import merge_into
from coala.export.modelfile import chatml_of, modelfile
from coala.export.network import ExportError
from coala.export.policy import export_checkpoint, export_gguf, export_policy, planned
from coala.export.policy_card import PolicyFacts, licence_of, policy_card, policy_facts
from coala.export.reading_back import compare
from coala.policies import DistilledAdapter
from coala.store import file_digest, save_json
from coala.values import Certificate, CoalaError, Turn, user

from .menagerie import tiny_backbone
from .test_backbone_adapters import trained
from .test_backbone_gguf import make_folder, write_gguf
from .test_distil import policy_of
from .test_distil_adapter import adapter_of, teaching_run

PROBE = torch.tensor([[5, 9, 12, 7]])
CERTIFICATE = Certificate(
    program="output layer, nucleus",
    statement="No change of the output layer gains more than 0.2 nats a step.",
    objective=-0.19,
    lower_bound=-0.2,
    violation=0.0,
    n_patterns=0,
    status="converged",
    tolerance=1e-3,
    precision="float64",
    seed=0,
    versions={},
    facts={},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, DistilledAdapter]:
    """A base, a run of it and an adapter in the run."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny_backbone("llama", folder / "llama")
    run = teaching_run(folder / "run", base)
    adapter = adapter_of(base, folder / "adapter")
    (adapter.folder).rename(run / "distilled-adapter")
    return base, run, DistilledAdapter.load(run / "distilled-adapter")


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(PROBE).logits.float().log_softmax(-1)
    return found


def test_a_merged_checkpoint_is_the_base_but_for_what_the_adapter_changes(
    made: tuple[Path, Path, DistilledAdapter], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run, adapter = made
    found = export_policy(adapter, run, "merged", tmp_path / "merged")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert set(old) == set(new)
    differing = {name for name in old if old[name].numpy().tobytes() != new[name].numpy().tobytes()}
    changed = ("self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.down_proj.weight")
    assert differing == {name for name in old if name.endswith(changed)}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    # By peft's own merging.
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter.folder))
    theirs = log_probs(peft.merge_and_unload())
    ours = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, log_probs(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)
    assert found.difference < 1e-4
    about = json.loads((tmp_path / "merged" / "coala.json").read_text())
    assert about["form"] == "distilled merged"
    assert about["files"]["model.safetensors"] == file_digest(tmp_path / "merged" / "model.safetensors")


def test_an_adapter_is_handed_on_as_it_is(made: tuple[Path, Path, DistilledAdapter], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run, adapter = made
    export_policy(adapter, run, "lora", tmp_path / "lora")
    files = [folder / "adapter_model.safetensors" for folder in (adapter.folder, tmp_path / "lora")]
    assert files[0].read_bytes() == files[1].read_bytes()
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base.name  # no path of this machine
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter.folder))
    assert torch.equal(log_probs(loaded), log_probs(own))


def test_any_adapter_that_peft_saved_is_merged_by_the_command(
    made: tuple[Path, Path, DistilledAdapter], tmp_path: Path
) -> None:
    base, run, adapter = made
    result = CliRunner().invoke(app, ["export", str(adapter.folder), "--to", "merged", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    export_policy(adapter, run, "merged", tmp_path / "again")
    files = [tmp_path / folder / "model.safetensors" for folder in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| base model | {base.name} |" in card
    assert "LoRA of rank 4" in card
    assert str(base) not in card


def test_half_precision_is_rounded_once_and_stays_what_it_is(
    made: tuple[Path, Path, DistilledAdapter], tmp_path: Path
) -> None:
    base, _, adapter = made
    half = tmp_path / "half"
    half.mkdir()
    for file in base.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    stored = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    merge_into(_new(tmp_path / "merged"), adapter.folder, base=str(half))
    name = "model.layers.0.mlp.down_proj.weight"
    found = load_file(tmp_path / "merged" / "model.safetensors")
    factors = load_file(adapter.folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
    assert torch.equal(found[name], (stored[name].float() + 4.0 * (b @ a)).bfloat16())  # alpha 16, rank 4
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_matrices_that_a_model_keeps_transposed_are_changed_so(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_backbone("gpt2", tmp_path / "gpt2")
    trained(base, tmp_path / "peft", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    merge_into(_new(tmp_path / "merged"), tmp_path / "peft", base=str(base))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "peft"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(log_probs(ours), log_probs(theirs.merge_and_unload()), atol=1e-4)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_cannot_be_merged_exactly_is_refused(made: tuple[Path, Path, DistilledAdapter], tmp_path: Path) -> None:
    base, _, adapter = made
    with pytest.raises(ExportError, match="more than rounding"):
        compare("it", [torch.zeros(3)], [torch.tensor([0.0, 0.0, 0.1])], torch.float32)
    renamed = _new(tmp_path / "renamed")
    for file in base.iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    # Where transformers finds them, but under a prefix that the model itself does not have.
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, renamed / "model.safetensors", metadata={"format": "pt"})
    merge_into(_new(tmp_path / "bare"), adapter.folder, base=str(renamed))
    assert set(load_file(tmp_path / "bare" / "model.safetensors")) == set(bare)
    trained(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ExportError, match="DoRA"):
        merge_into(_new(tmp_path / "no"), tmp_path / "dora", base=str(base))


def test_forms_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    for form, into, told in (
        ("gguf", "adapter", "convert_hf_to_gguf.py"),
        ("checkpoint", "adapter", "--to merged"),
        ("merged", "output", "--to checkpoint"),
    ):
        with pytest.raises(ExportError, match=told):
            planned(form, tmp_path / "out", None, into)  # type: ignore[arg-type]
    (tmp_path / "out.Modelfile").write_text("")
    with pytest.raises(ExportError, match=r"out\.Modelfile: found something"):
        planned("gguf", tmp_path / "out.gguf", None)


def test_settings_of_the_other_vehicle_are_refused() -> None:
    for line, told in (
        (["--into", "adapter", "--rank", "4", "--support", "vocabulary"], "--support, --rank with --into adapter"),
        (["--rate", "1e-3"], "--rate with --into output"),
    ):
        result = CliRunner().invoke(app, ["distil", "nowhere", *line])
        assert isinstance(result.exception, CoalaError)
        assert told in str(result.exception)
    default = CliRunner().invoke(app, ["distil", "nowhere"])
    assert "is not a run folder" in str(default.exception)


# --- cards -----------------------------------------------------------------------------------------------------------


def estimate(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 40, "method": ""}


FACTS = PolicyFacts(
    "block, 10 x 5 tokens",
    {"temperature": 1.0, "top_k": 40, "top_p": 0.8},
    300,
    {"teacher": 10**9, "states": 10**8, "solver": 10**8, "dpo_sweep": 3 * 10**9},
    {
        "wins": estimate(0.7),
        "judge": "rule length",
        "divergence": estimate(5.5),
        "perplexity_ratio": 1.15,
        "n": 40,
    },
)


def test_a_card_says_what_is_proved_and_what_is_not(made: tuple[Path, Path, DistilledAdapter], tmp_path: Path) -> None:
    base, _, adapter = made
    model = load_backbone(base, device="cpu")
    policy = replace(policy_of(model, 0.2), certificate=CERTIFICATE)
    export_checkpoint(policy, model, tmp_path / "checkpoint", FACTS)
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    for told in (
        CERTIFICATE.statement,
        "It does not say that replies are better",
        "0.700 [0.600, 0.800], n = 40, by rule length",
        "| KL(policy, base) per reply, nats | 5.500 [5.400, 5.600], n = 40 |",
        "| 1.15 |",
        "0.4 of four learning rates of DPO",
        "`guided`: replies guided by a preference head, block by block (block, 10 x 5 tokens); 300 replies",
        "| rank | 3 of",
        "not stated in the model's files",
        "vllm serve",
        "temperature=1, top_k=40, top_p=0.8",
    ):
        assert told in card, told
    assert str(tmp_path) not in card
    # Pairs' own replies are guided by nothing, and are several to a prompt.
    weighted = policy_card(replace(policy, program="weighted"), model, "gguf", FACTS, "")
    assert "weighted by the head's score; to 300 prompts |" in weighted
    bare = policy_card(adapter, model, "merged", PolicyFacts(), "Read back.")
    assert "None: the training is not convex" in bare
    assert "Not measured by the run. `coala distil RUN --measure` measures it" in bare
    assert "0.001, the best of 0.001 on 1 replies held out" in bare
    # An opened card names the licence of the base in its front matter.
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\nlicense: none of this\n")
    assert licence_of(model.name) == "apache-2.0"
    assert "license: apache-2.0" in policy_card(policy, model, "lora", FACTS, "").split("---")[1]
    (base / "README.md").unlink()


def test_measurements_of_other_weights_are_left_out(made: tuple[Path, Path, DistilledAdapter]) -> None:
    _, run, adapter = made
    folder = adapter.folder
    for weights, there in ((file_digest(folder / "adapter_model.safetensors"), True), ("0" * 64, False)):
        save_json(folder / "measured.json", {**(FACTS.measured or {}), "weights": weights})
        assert (policy_facts(run, adapter).measured is not None) == there
    (folder / "measured.json").unlink()


# --- Ollama ----------------------------------------------------------------------------------------------------------


def expanded(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that are used."""
    found = re.fullmatch(r"(?s)\{\{- range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template)
    assert found is not None
    body = "".join(
        found[1].replace("{{ .Role }}", one["role"]).replace("{{ .Content }}", one["content"]) for one in messages
    )
    return body + found[2]


def check_modelfile(model: LanguageModel, text: str) -> None:
    """The template writes what the model's own chat template writes, its system turn given by Ollama as a message."""
    template = re.search(r'(?s)TEMPLATE """(.*?)"""', text)
    system = re.search(r'(?s)SYSTEM """(.*?)"""', text)
    assert template is not None
    asked = [{"role": "user", "content": "How?"}]
    for given in ([], [{"role": "system", "content": "Be brief."}]):
        messages = given or ([{"role": "system", "content": system[1]}] if system else [])
        wanted = model.tokenizer.apply_chat_template([*given, *asked], tokenize=False, add_generation_prompt=True)
        assert expanded(template[1], [*messages, *asked]) == wanted


def test_a_chatml_template_is_written_out_and_any_other_left_to_the_file(tmp_path: Path) -> None:
    model = load_backbone(tiny_backbone("qwen2", tmp_path / "qwen2"), device="cpu")
    text = modelfile("tiny.gguf", model, FACTS.sampling)
    assert text.startswith("FROM ./tiny.gguf\n")
    check_modelfile(model, text)
    for line in ("temperature 1", "top_k 40", "top_p 0.8", "repeat_penalty 1", "min_p 0", 'stop "<|im_end|>"'):
        assert f"PARAMETER {line}\n" in text
    other = load_backbone(tiny_backbone("llama", tmp_path / "llama"), device="cpu")
    assert chatml_of(other) is None
    left = modelfile("tiny.gguf", other, FACTS.sampling)
    assert "TEMPLATE" not in left.replace("# The template", "")
    assert "left to the one that the GGUF file holds" in left


def test_a_gguf_file_has_its_card_and_modelfile_beside_it(tmp_path: Path) -> None:
    file = write_gguf(make_folder(tmp_path / "folder", tie_word_embeddings=True), tmp_path / "tiny.gguf")
    model = load_backbone(file, device="cpu")
    found = export_gguf(policy_of(model, 0.2), model, tmp_path / "changed.gguf", FACTS)
    assert [path.name for path in found.beside] == ["changed.md", "changed.Modelfile"]
    assert (tmp_path / "changed.Modelfile").read_text().startswith("FROM ./changed.gguf\n")
    card = (tmp_path / "changed.md").read_text()
    assert "ollama create" in card
    assert "--top-k 40 --top-p 0.8" in card
    assert not {row[0] for row in found.summary_rows()} ^ {"gguf", "read back", "next to it"}


@pytest.mark.nightly
def test_the_chat_models_modelfile_gives_its_own_system_turn(smollm2: Path) -> None:
    model = load_backbone(smollm2, device="cpu")
    chat = chatml_of(model)
    assert chat is not None
    assert "SmolLM" in chat.system
    check_modelfile(model, modelfile("smollm2.gguf", model, FACTS.sampling))
    assert licence_of(model.name)


def test_turns_of_a_conversation_are_in_the_template(tmp_path: Path) -> None:
    model = load_backbone(tiny_backbone("qwen2", tmp_path / "qwen2"), device="cpu")
    template = re.search(r'(?s)TEMPLATE """(.*?)"""', modelfile("x", model, {}))
    assert template is not None
    turns = (*user("one"), Turn("assistant", "two"), Turn("user", "three"))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    wanted = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert expanded(template[1], messages) == wanted
