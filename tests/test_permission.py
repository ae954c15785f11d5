"""What a file cannot allow: a model's own Python code, hub models that nobody asked for, files out of their folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coala.alignment import load_parts
from coala.backbone import BackboneError, load_backbone
from coala.cli import app
from coala.permission import Permission, permission, permitted
from coala.recipe import RecipeError, load_recipe, set_option
from coala.values import CoalaError

CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
Path({marker!r}).write_text("it ran")
class Config(GPT2Config):
    model_type = "homemade"
class Model(GPT2LMHeadModel):
    config_class = Config
"""
LOADING = {
    "generate": ("generate", "RUN", "hello", "--max-new-tokens", "2"),
    "chat": ("chat", "RUN", "--max-new-tokens", "2"),
    "serve": ("serve", "RUN", "--port", "59321"),
    "export": ("export", "RUN", "--out", "OUT"),
}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def settings(run: Path, **model: object) -> None:
    found = json.loads((run / "run.json").read_text())
    edit(run / "run.json", model={**found["model"], **model})


@pytest.fixture
def strange(served_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Somebody else's run, whose model has code of its own that leaves a mark; and the mark."""
    run, model, marker = tmp_path / "run", tmp_path / "model", tmp_path / "marker"
    shutil.copytree(served_run, run)
    shutil.copytree(served_run.parent / "model", model)
    (model / "homemade.py").write_text(CODE.format(marker=str(marker)))
    edit(
        model / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Model"},
    )
    settings(run, name=str(model), trust_remote_code=True)
    return run, marker


def said(*arguments: str, lines: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), input=lines)
    return done.exit_code, f"{done.output} {done.exception if isinstance(done.exception, CoalaError) else ''}"


@pytest.mark.parametrize("name", sorted(LOADING))
def test_a_run_cannot_have_its_code_run(strange: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    run, marker = strange
    names = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    code, text = said(*(names.get(word, word) for word in LOADING[name]))
    assert code
    assert f"{run}/run.json: sets model.trust_remote_code" in text
    assert "--trust-remote-code" in text
    assert not marker.exists()


def test_nor_can_it_as_a_judge_or_a_reward(strange: tuple[Path, Path]) -> None:
    from coala.export import as_reward_func
    from coala.leaderboards.judges import Service, choose

    run, marker = strange
    service = Service(None, None, "KEY", "", None, None, 1, 1.0, False, ())
    for load in (lambda: choose(f"head:{run}", None, service, run / "x.sqlite"), lambda: as_reward_func(run)):
        with pytest.raises(CoalaError, match=r"run.json: sets model.trust_remote_code"):
            load()
    assert not marker.exists()


def test_the_flag_of_this_invocation_allows_it_and_lasts_no_longer(strange: tuple[Path, Path]) -> None:
    run, marker = strange
    code, text = said("generate", str(run), "hello", "--max-new-tokens", "2", "--trust-remote-code")
    assert code == 0, text
    assert marker.exists()
    assert permission() == Permission()
    with pytest.raises(CoalaError, match="trust_remote_code"):
        load_parts(run)
    load_parts(run, trust_remote_code=True)
    # Silence in the run is no leave either: the model itself asks.
    settings(run, trust_remote_code=False)
    marker.unlink()
    with pytest.raises(BackboneError, match=r"Python code of its own.*--trust-remote-code"):
        load_parts(run)
    assert not marker.exists()


def test_a_recipe_cannot_allow_code_and_a_flag_can(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pairs: [x]\nmodel: {name: m, trust_remote_code: true}\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: sets model.trust_remote_code.*--trust-remote-code"):
        load_recipe(recipe)
    assert load_recipe(recipe, {"model": {"trust_remote_code": True}}).model.trust_remote_code
    assert load_recipe(recipe, set_option("model.trust_remote_code=true")).model.trust_remote_code
    assert not load_recipe(recipe, set_option("model.trust_remote_code=false")).model.trust_remote_code
    with permitted(code=True):
        assert load_recipe(recipe).model.trust_remote_code
    assert not load_recipe(None, {"pairs": ["x"], "model": {"name": "m"}}).model.trust_remote_code


def test_a_hub_model_that_only_a_run_names_is_not_fetched(
    served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def download(name: str, *, local_files_only: bool, **_: object) -> str:
        asked.append(local_files_only)
        raise OSError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    run = tmp_path / "run"
    shutil.copytree(served_run, run)
    settings(run, name="stranger/model")
    with pytest.raises(CoalaError, match=r"run.json: stranger/model: no such folder.*not fetched.*--download"):
        load_parts(run)
    assert asked == [True]
    with pytest.raises(CoalaError, match="could not be fetched"):
        load_parts(run, download=True)
    code, text = said("generate", str(run), "hello", "--download")
    assert code
    assert "could not be fetched" in text
    assert asked == [True, False, False]
    # An adapter of the run is such a name as well.
    settings(run, name=str(served_run.parent / "model"), adapter="stranger/adapter")
    with pytest.raises(CoalaError, match=r"run.json: stranger/adapter: .*--download|peft"):
        load_parts(run)
    assert False not in asked[3:]


# --- what is loaded is what was looked at ------------------------------------------------------------------------


@pytest.fixture
def model(served_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served_run.parent / "model", tmp_path / "model"))


def index(folder: Path, names: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "x.bin"])
def test_an_index_names_only_files_of_its_own_folder(model: Path, name: str) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "other.safetensors")
    (model / "model.safetensors").unlink()
    index(model, {"transformer.wte.weight": name})
    with pytest.raises(BackboneError, match="of its own folder"):
        load_backbone(model)


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused_unless_the_cache_put_it_there(model: Path) -> None:
    hub = model.parent / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    snapshot = hub / "snapshots" / "abc"
    shutil.move(model, snapshot)
    (snapshot / "model.safetensors").rename(hub / "blobs" / "0123")
    shard = snapshot / "model-00001-of-00001.safetensors"
    index(snapshot, {"transformer.wte.weight": shard.name})
    shard.symlink_to("../../blobs/0123")
    cached = load_backbone(snapshot, device="cpu").weights
    (hub / "blobs" / "0123").rename(hub / "elsewhere")
    shard.unlink()
    shard.symlink_to(hub / "elsewhere")
    with pytest.raises(BackboneError, match="link out of its folder"):
        load_backbone(snapshot)
    shard.unlink()
    (hub / "elsewhere").rename(shard)
    assert load_backbone(snapshot, device="cpu").weights == cached


def test_the_digest_is_of_what_is_loaded_and_of_nothing_else(model: Path) -> None:
    before = load_backbone(model, device="cpu").weights
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    assert load_backbone(model, device="cpu").weights == before
    edit(model / "config.json", transformers_weights="consolidated.safetensors")
    with pytest.raises(BackboneError, match="transformers_weights"):
        load_backbone(model)


def test_a_model_folder_with_an_adapter_in_it_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "stranger/model"}))
    with pytest.raises(BackboneError, match="a model and an adapter"):
        load_backbone(model)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json", "generation_config.json", "generate.py"])
def test_code_beside_a_known_kind_of_model_never_runs(
    model: Path, tmp_path: Path, where: str, run_or_sentence: Callable[[Path], None]
) -> None:
    marker = tmp_path / "marker"
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))
    own = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.Model")
    own |= {"AutoTokenizer": ["evil.Model", "evil.Model"]}
    if where == "generate.py":
        (model / "custom_generate").mkdir()
        (model / "custom_generate" / "generate.py").write_text(CODE.format(marker=str(marker)))
    elif (model / where).exists():
        edit(model / where, auto_map=own, custom_generate=str(model))
    run_or_sentence(model)
    assert not marker.exists()


@pytest.fixture
def run_or_sentence() -> Callable[[Path], None]:
    def tried(model: Path) -> None:
        with suppress(CoalaError):
            load_backbone(model, device="cpu")

    return tried
