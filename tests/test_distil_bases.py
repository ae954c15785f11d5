"""What a policy cannot be written into is one sentence before anything is; what is broken leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import LanguageModel, load_backbone
from coala.distil.matrix import output_matrix
from coala.export.policy import export_checkpoint, export_lora, planned
from coala.export.policy_gguf import export_gguf, export_gguf_lora
from coala.policies import DistilledPolicy
from coala.store import file_digest
from coala.values import CoalaError

from .menagerie import BACKBONES, FAMILIES, tiny_backbone
from .test_backbone_gguf import make_folder, write_gguf
from .test_distil import PROMPTS, policy_of
from .test_distil_served import log_probs_of

Export = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folder"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(folder, tmp_path_factory.mktemp("base") / "tiny.gguf")


def sentence(caught: pytest.ExceptionInfo[CoalaError]) -> str:
    """One line that says what was found, what was expected and what mends it."""
    told = str(caught.value)
    assert "\n" not in told
    assert all(word in told.lower() for word in ("found", "expected", "fix")), told
    return told


# --- which file it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "Q4_0"])
def test_any_quantisation_of_the_model_will_do(kind: str, folder: Path, model: LanguageModel, tmp_path: Path) -> None:
    file = write_gguf(folder, tmp_path / "base.gguf", kind)
    assert export_gguf(policy_of(model, 0.1), model, tmp_path / "changed.gguf", base=file).path.exists()


def _split(writer: Any) -> None:
    writer.add_uint16("split.count", 3)


def _biased(writer: Any) -> None:
    writer.add_tensor("output.bias", np.zeros(8, np.float32))


BASES: dict[str, tuple[dict[str, Any], str]] = {
    "one of several files": ({"change": _split}, "one of 3 files"),
    "an adapter": ({"type": "adapter"}, "of the type 'adapter'"),
    "a projector": ({"type": "mmproj"}, "of the type 'mmproj'"),
    "soft-capped": ({"llama__final_logit_softcapping": 30.0}, "soft-capped at 30"),
    "scaled": ({"llama__logit_scale": 0.5}, "logit_scale 0.5, expected 1"),
    "scaled by a text": ({"llama__logit_scale": "half"}, "expected a number"),
    "biased": ({"change": _biased}, r"output\.bias"),
    "scaled by its architecture": ({"architecture": "minicpm"}, "architecture minicpm"),
}


@pytest.mark.parametrize("case", BASES)
def test_what_llama_cpp_would_read_otherwise_is_refused_by_name(
    case: str, folder: Path, model: LanguageModel, tmp_path: Path
) -> None:
    keys, told = BASES[case]
    file = write_gguf(folder, tmp_path / "base.gguf", **keys)
    with pytest.raises(CoalaError, match=told) as caught:
        export_gguf(policy_of(model, 0.1), model, tmp_path / "changed.gguf", base=file)
    sentence(caught)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf"]


def test_a_scale_in_the_header_must_be_that_of_the_model(folder: Path, model: LanguageModel, tmp_path: Path) -> None:
    """As Granite has one: the same number on both sides, whichever divides by it."""
    file = write_gguf(folder, tmp_path / "base.gguf", llama__logit_scale=8.0)
    config = model.transformer.config
    config.logits_scaling = 8.0
    try:
        export_gguf(policy_of(model, 0.1), model, tmp_path / "same.gguf", base=file)
        config.logits_scaling = 4.0
        with pytest.raises(CoalaError, match="logit_scale 8, expected 4"):
            export_gguf(policy_of(model, 0.1), model, tmp_path / "other.gguf", base=file)
    finally:
        del config.logits_scaling


@pytest.mark.parametrize("case", ["of other weights", "trained further", "of another width", "of another vocabulary"])
def test_another_models_file_is_refused(case: str, folder: Path, model: LanguageModel, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    network = load_backbone(other, device="cpu").transformer
    with torch.no_grad():
        if case == "of other weights":
            network.get_input_embeddings().weight.normal_(0, 0.3)
        if case == "trained further":
            network.model.norm.weight.mul_(1.01)
    network.save_pretrained(other)
    if case == "of another width":
        other = make_folder(tmp_path / "wide", tie_word_embeddings=True, hidden_size=128)
    if case == "of another vocabulary":
        network.resize_token_embeddings(model.shape.vocabulary + 3, mean_resizing=False)
        network.save_pretrained(other)
    told = {
        "of other weights": "another model's embedding",
        "trained further": "trained further",
        "of another width": "x 128, expected",
        "of another vocabulary": "found token_embd.weight",
    }[case]
    file = write_gguf(other, tmp_path / "base.gguf")
    with pytest.raises(CoalaError, match=told) as caught:
        export_gguf(policy_of(model, 0.1), model, tmp_path / "changed.gguf", base=file)
    sentence(caught)


def test_what_is_no_file_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    for name in ("absent.gguf", "."):
        with pytest.raises(CoalaError, match="found no such file") as caught:
            export_gguf(policy_of(model, 0.1), model, tmp_path / "changed.gguf", base=tmp_path / name)
        sentence(caught)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_a_sentence_or_a_copy_of_what_is_there(
    seed: int, base: Path, model: LanguageModel, tmp_path: Path
) -> None:
    """Broken off anywhere, and bytes of its header flipped."""
    rng, whole = np.random.default_rng(seed), base.read_bytes()
    policy, refused = policy_of(model, 0.1), []
    for number in range(12):
        content = bytearray(whole)
        if number % 3 == 0:
            content = content[: int(rng.integers(len(whole)))]
        else:
            for at in rng.integers(1 << 14, size=number):
                content[at] ^= int(rng.integers(1, 256))
        file, out = tmp_path / f"{number}.gguf", tmp_path / f"{number}-changed.gguf"
        file.write_bytes(content)
        try:
            export_gguf(policy, model, out, base=file)
        except CoalaError as error:
            refused.append((str(error), out.exists()))
        else:
            assert out.stat().st_size > len(content)
    assert len(refused) >= 4
    assert not any("\n" in told or there for told, there in refused)
    assert not list(tmp_path.glob(".*"))


# --- which model it is ----------------------------------------------------------------------------------------------


def exact(model: LanguageModel) -> None:
    """Logits are the matrix times the final state, for states that are not those it was tried on."""
    output = output_matrix(model)
    final = model.hidden([model.render(PROMPTS[1]).tokens], -1)[0]
    theirs = model.logits(final).numpy()
    assert output.shape == (theirs.shape[1], final.shape[1])
    assert np.allclose(final.float().numpy() @ output.T, theirs, atol=1e-3 * max(1.0, np.abs(theirs).max() / 10))


BENT = {
    **dict.fromkeys(("phi", "gptj", "codegen"), "bias"),
    "gemma2": "soft-capped",
    **dict.fromkeys(("bert", "roberta", "distilbert"), "need a language-model head"),
    **dict.fromkeys(("electra", "mpnet", "modernbert", "deberta-v2", "eurobert"), "need a language-model head"),
}


def _taken_or_refused(kind: str, tmp_path: Path) -> None:
    model = load_backbone(tiny_backbone(kind, tmp_path / kind), device="cpu")
    if kind in BENT:
        with pytest.raises(CoalaError, match=BENT[kind]) as caught:
            output_matrix(model)
        assert "\n" not in str(caught.value)
    else:
        exact(model)


@pytest.mark.parametrize("kind", ["mixtral", "falcon", "mamba", "bert", "phi"])
def test_a_model_is_taken_exactly_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    _taken_or_refused(kind, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", sorted({*BACKBONES, *FAMILIES}))
def test_every_family_is_taken_exactly_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    _taken_or_refused(kind, tmp_path)


def test_logits_of_more_than_the_final_state_are_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that adds what it makes of the state otherwise; several heads; one behind a projection."""
    network = model.transformer
    layer = network.get_output_embeddings()
    forward, wide = layer.forward, torch.nn.Linear(2 * model.width, model.shape.vocabulary, bias=False)
    heads = {
        "no single output layer": SimpleNamespace(weights=[layer.weight, layer.weight]),
        f"for final states of {model.width} numbers": wide,
    }
    for told, head in heads.items():
        with monkeypatch.context() as context:
            context.setattr(network, "get_output_embeddings", lambda head=head: head)
            with pytest.raises(CoalaError, match=told) as caught:
                output_matrix(model)
        sentence(caught)
    monkeypatch.setattr(layer, "forward", lambda states: forward(states) + forward(states.sin()))
    with pytest.raises(CoalaError, match="not its output layer times its final state") as caught:
        output_matrix(model)
    sentence(caught)


# --- vocabularies that are larger than the tokenizer ----------------------------------------------------------------


def test_a_padded_vocabulary_is_kept_as_it_is(tmp_path: Path) -> None:
    plain = tiny_backbone("llama", tmp_path / "plain")
    network = load_backbone(plain, device="cpu").transformer
    n = network.config.vocab_size
    network.resize_token_embeddings(n + 29, mean_resizing=False)
    with torch.no_grad():
        # Rows that nothing was trained to write: those of real models lie far from every state.
        network.get_output_embeddings().weight[n:] = 0
        network.get_input_embeddings().weight[n:] = 0
    padded = shutil.copytree(plain, tmp_path / "padded")
    network.save_pretrained(padded)
    model = load_backbone(padded, device="cpu")
    assert len(model.tokenizer) < len(output_matrix(model)) == n + 29
    policy = policy_of(model, 0.2)
    export_checkpoint(policy, model, tmp_path / "checkpoint")
    again = load_backbone(tmp_path / "checkpoint", device="cpu")
    states = model.hidden([model.render(PROMPTS[0]).tokens], -1)[0]
    wanted, found = log_probs_of(model, policy, states), again.logits(states).log_softmax(-1)
    assert found.shape[1] == n + 29
    assert torch.allclose(found, wanted, atol=1e-4)
    # No change moves a row of zeros, and none is the likeliest.
    assert not again.transformer.get_output_embeddings().weight[n:].any()
    assert int(wanted.argmax(-1).max()) < n


# --- disks and kills ------------------------------------------------------------------------------------------------


@contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond ``n_bytes``: the system refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def exports(folder: Path, model: LanguageModel, base: Path) -> dict[str, Export]:
    untied = load_backbone(make_folder(folder / "untied", tie_word_embeddings=False), device="cpu")
    policy, other = policy_of(model, 0.1), policy_of(untied, 0.1)
    return {
        "checkpoint": lambda out: export_checkpoint(policy, model, out),
        "lora": lambda out: export_lora(other, untied, out),
        "gguf": lambda out: export_gguf(policy, model, out, base=base),
        "gguf-lora": lambda out: export_gguf_lora(policy, model, out, base=base),
    }


@pytest.mark.parametrize("form", ["checkpoint", "lora", "gguf", "gguf-lora"])
def test_a_full_disk_leaves_nothing(form: str, exports: dict[str, Export], tmp_path: Path) -> None:
    """At the first byte, within the smallest file, and within the largest."""
    exports[form](tmp_path / "whole")
    whole = tmp_path / "whole"
    sizes = sorted(path.stat().st_size for path in ([whole] if whole.is_file() else whole.iterdir()))
    there = set(tmp_path.iterdir())
    for n_bytes in (0, sizes[0] // 2, sizes[-1] - 1):
        with full_after(n_bytes), pytest.raises(CoalaError, match="could not be written") as caught:
            exports[form](tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert set(tmp_path.iterdir()) == there
    exports[form](tmp_path / "out")
    assert file_digest(tmp_path / "out") == file_digest(whole)


def killed_at(step: int, work: Callable[[], Any]) -> bool:
    """Do ``work`` in a process that is killed for good at its ``step``-th change of a file or name; whether it was."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["checkpoint", "lora", "gguf", "gguf-lora"])
def test_a_kill_at_any_step_of_an_export_leaves_the_whole_or_nothing(
    form: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    exports[form](tmp_path / "whole")
    whole, step = file_digest(tmp_path / "whole"), 0
    while killed_at(step := step + 1, lambda: exports[form](tmp_path / f"out-{step}")):
        out = tmp_path / f"out-{step}"
        if not out.exists():
            exports[form](out)
        assert file_digest(out) == whole
    assert step > 3


def test_where_it_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    told = {
        tmp_path / "file": "found something of that name",
        tmp_path / "link": "found something of that name",
        run / "deep" / "out": "inside the run",
        tmp_path / "file" / "out": "could not be written",
    }
    for out, words in told.items():
        with pytest.raises(CoalaError, match=words) as caught:
            planned("checkpoint", out, None, "output", run)
        assert "\n" not in str(caught.value)
    planned("checkpoint", tmp_path / "new" / "out", None, "output", run)
    with pytest.raises(CoalaError, match="--base or --precision") as caught:
        planned("checkpoint", tmp_path / "new", None, "output", run, "q8_0")
    sentence(caught)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_folder_of_someone_else_is_said_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        with pytest.raises(CoalaError, match=os.strerror(errno.EACCES)):
            planned("checkpoint", tmp_path / "out", None)
    finally:
        os.seteuid(0)
        os.setegid(0)


# --- the policy's own files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_policy_is_a_sentence_or_a_policy(seed: int, model: LanguageModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    policy = policy_of(model, 0.1)
    policy.save(tmp_path / "whole")
    files = {name: (tmp_path / "whole" / name).read_bytes() for name in ("policy.json", "policy.safetensors")}
    refused = []
    for number in range(40):
        shutil.copytree(tmp_path / "whole", tmp_path / "harmed", dirs_exist_ok=True)
        name = sorted(files)[number % 2]
        content = bytearray(files[name])
        if number % 3 == 0:
            content = content[: int(rng.integers(len(content)))]
        else:
            for at in rng.integers(len(content), size=1 + number % 4):
                content[at] ^= int(rng.integers(1, 256))
        (tmp_path / "harmed" / name).write_bytes(content)
        try:
            found = DistilledPolicy.load(tmp_path / "harmed")
        except CoalaError as error:
            refused.append(str(error))
        else:
            # The arrays are known by their digest; of what is said beside them a changed letter can be another word.
            assert np.array_equal(found.change, policy.change)
    assert len(refused) >= 25
    assert not any("\n" in told for told in refused)


@pytest.mark.parametrize(
    ("key", "value"),
    [("program", "magic"), ("support", 3), ("ridge", -1.0), ("ridge", "x"), ("rank", 99), ("certificate", [1])],
)
def test_a_policy_that_says_what_cannot_be_is_refused(
    key: str, value: Any, model: LanguageModel, tmp_path: Path
) -> None:
    policy_of(model, 0.1).save(tmp_path)
    about = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(about | {key: value}))
    with pytest.raises(CoalaError) as caught:
        DistilledPolicy.load(tmp_path)
    assert "\n" not in str(caught.value)


# --- what older engines read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_a_checkpoint_tells_its_rotary_positions_in_older_words_too(rope: dict[str, Any], tmp_path: Path) -> None:
    """Some engines know none but the older names, and without them take a base of 10,000."""
    source = make_folder(tmp_path / "model", rope_parameters={"rope_theta": 1234.0, **rope})
    model = load_backbone(source, device="cpu")
    export_checkpoint(policy_of(model, 0.1), model, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["rope_theta"] == 1234.0
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else rope)
    again = load_backbone(tmp_path / "checkpoint", device="cpu").transformer.config
    assert again.rope_parameters == model.transformer.config.rope_parameters
