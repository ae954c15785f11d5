"""Plans: what was told beforehand is what a run then does, below the bounds told, and fits where it was said to."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from typer import Typer
from typer.testing import CliRunner

import coala.costs.measured
from coala.alignment import align_recipe
from coala.backbone import load_backbone, outline
from coala.backbone.network import Network
from coala.cli.plan import plan as plan_command
from coala.convex import output_fit
from coala.costs import Stopwatch, decoding_bytes, decoding_flops, full_flops, pass_bytes, states_flops
from coala.data import read_pairs
from coala.decoding import Guidance, generate
from coala.features import extract, survey
from coala.plan import distilling
from coala.plan.memory import size
from coala.plan.plan import PlanError, fit_flops, make_plan
from coala.plan.probe import measured_rates
from coala.plan.text import first_lines, table_rows
from coala.plan.tokens import Guess, count
from coala.recipe import Recipe, recipe_of
from coala.settings import DistilSettings, HeadSettings
from coala.store import RunFolder, load_json, save_pairs
from coala.values import CoalaError, Pair, user
from tests.menagerie import tiny_backbone
from tests.test_backbone_outline import PUBLISHED
from tests.waiting import Clock

GIB = 2**30
WORDS = ["good", "fine", "lovely", "sharp", "warm", "bright", "dull", "weak", "tired", "cold", "story", "film", "girl"]


def write_pairs(path: Path, n: int = 60, words: int = 12) -> Path:
    """Pairs that share prompts within a group and now and then the beginning of a reply."""
    draw = np.random.default_rng(1)

    def text(k: int) -> str:
        return " ".join(draw.choice(WORDS, int(draw.integers(k // 2, k))))

    asked = [f"tell me a story of {text(words)}" for _ in range(n // 3)]
    pairs = []
    for i in range(n):
        begin = text(6) if i % 2 else ""
        pairs.append(
            Pair(
                user(asked[i % len(asked)]), f"{begin} {text(words)} {i}", f"{begin} {text(words)}", str(i % len(asked))
            )
        )
    save_pairs(path, pairs)
    return path


def recipe(pairs: Path | None, name: Path | str, /, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"pairs": [str(pairs)] if pairs else [], "model": {"name": str(name)}}
    for part, values in changes.items():
        settings[part] = {**settings[part], **values} if isinstance(values, dict) and part in settings else values
    return recipe_of(settings)


def published(folder: Path, name: str, **more: Any) -> Path:
    (folder / name).mkdir(exist_ok=True)
    path = folder / name / "config.json"
    path.write_text(json.dumps({**PUBLISHED[name][0], **more}))
    return path


# --- what is told is what is done ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"prompt_features": True, "log_ratios": True, "prefixes": 1}], ids=["", "all"])
def test_a_plan_is_what_the_run_records(tmp_path: Path, extra: dict[str, Any]) -> None:
    model = tiny_backbone("llama", tmp_path / "model")
    settings = recipe(
        write_pairs(tmp_path / "pairs.jsonl"),
        model,
        model={"device": "cpu", "batch_tokens": 256, **extra},
        evaluation={"prompts": 3, "max_new_tokens": 4},
        head={"method": "linear"},
        guidance={"mode": "token"},
    )
    plan = make_plan(settings, probe_seconds=0)
    run = RunFolder(tmp_path / "run")
    align_recipe(settings, run, separate=False)
    facts = [load_json(run.path / f"stages/features-{part}.json")["facts"] for part in ("train", "eval")]
    assert plan.tokens["computed"] == sum(found["tokens"] for found in facts)
    assert plan.tokens["distinct"] == sum(found["distinct_tokens"] for found in facts)
    assert plan.tokens["pair_by_pair"] == sum(found["reply_tokens"] for found in facts)
    assert plan.rows == sum(found["rows"] for found in facts)
    assert plan.longest_row == max(found["longest_row"] for found in facts)
    assert plan.flops["extraction"] == sum(found["flops"] for found in facts)
    assert plan.pairs == sum(found["pairs"] for found in facts)
    assert plan.flops["least"] == sum(found["flops_bound"] for found in facts)
    assert 0 < plan.flops["least"] <= plan.flops["extraction"]
    replies = sum(
        load_json(run.path / f"stages/replies-{how}.json")["facts"]["flops"] for how in ("unguided", "guided")
    )
    assert 0 < replies <= plan.flops["replies"]
    written = sum(path.stat().st_size for path in run.path.rglob("features.safetensors"))
    assert 0.9 * plan.disk_bytes["features"] <= written <= 1.3 * plan.disk_bytes["features"] + 20_000
    peak = max(found["peak_bytes"]["host"] for found in facts)
    # The test's own process holds more than a run's; what a run adds to it is below the bound all the same.
    assert sum(plan.host_bytes["extraction"].values()) > 0.3 * peak


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "bert"])
def test_weights_are_not_needed_to_count(tmp_path: Path, name: str) -> None:
    folder = tiny_backbone(name, tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    settings = recipe(pairs, folder, model={"device": "cpu"})
    whole = make_plan(settings, probe_seconds=0)
    (folder / "model.safetensors").unlink()
    bare = make_plan(settings, probe_seconds=5)
    assert bare == replace(whole, probe=bare.probe, room=bare.room)
    assert bare.probe == "not measured: the model's weights are not available locally"
    assert whole.counted == "by the model's tokenizer"
    # Encoders see what follows, so that nothing is shared.
    assert (whole.tokens["computed"] < whole.tokens["pair_by_pair"]) == (name != "bert")
    config = make_plan(settings, config=folder / "config.json", probe_seconds=0)
    assert config.tokens == whole.tokens


def test_without_a_tokenizer_characters_are_counted(tmp_path: Path) -> None:
    settings = recipe(write_pairs(tmp_path / "pairs.jsonl"), published(tmp_path, "gpt2"))
    plan = make_plan(settings, config=tmp_path / "gpt2/config.json", probe_seconds=0)
    texts = [
        f"user: {p.prompt[0].text}\n\nassistant: {reply}"
        for p in read_pairs(tmp_path / "pairs.jsonl")
        for reply in (p.chosen, p.rejected)
    ]
    characters = sum(map(len, texts))
    assert characters / 4 <= plan.tokens["pair_by_pair"] <= characters / 4 + 2 * len(texts)
    assert plan.tokens["distinct"] <= plan.tokens["computed"] < plan.tokens["pair_by_pair"]
    assert "characters / 4" in plan.counted


def test_more_rows_cost_in_proportion(tmp_path: Path) -> None:
    folder = tiny_backbone("gpt2", tmp_path / "model")
    settings = recipe(write_pairs(tmp_path / "pairs.jsonl"), folder)
    one, ten = (make_plan(settings, probe_seconds=0, rows=rows) for rows in (None, 600))
    assert ten.pairs == 10 * one.pairs == 600
    for name, tokens in one.tokens.items():
        assert ten.tokens[name] == 10 * tokens
    assert ten.flops["extraction"] == 10 * one.flops["extraction"]
    # Passes do not grow with the data: only what is kept does.
    kept = {"features", "pairs and tokens"}
    grown = {k for k, v in ten.host_bytes["extraction"].items() if v > 2 * one.host_bytes["extraction"][k]}
    assert kept <= grown | {"features"}
    assert ten.disk_bytes["features"] == 10 * one.disk_bytes["features"]


# --- published models ------------------------------------------------------------------------------------------------

REFERENCE = {"gpt2": "GPT2", "mistral-7b": "Mistral-7B", "llama-3.1-8b": "Llama-3.1-8B"}


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_published_extraction(tmp_path: Path, shared: Path, name: str) -> None:
    wanted = json.loads((shared / "eval_reference/flops/flops_reference.json").read_text())["models"][REFERENCE[name]]
    config = published(tmp_path, name)
    plan = make_plan(
        recipe(None, "no-weights"),
        config=config,
        rows=wanted["pairs"],
        guess=Guess(1, wanted["tokens_per_sequence"] - 1),
        probe_seconds=0,
    )
    reference = wanted["feature_extraction_TFLOP"]
    # One token in common is not worth sharing, so that both ways of encoding cost the same.
    for flops in (plan.flops["extraction"], plan.flops["pair_by_pair"]):
        assert flops / 1e12 == pytest.approx(reference, rel=1e-9, abs=0)
    assert plan.pairs == wanted["pairs"]
    # At most, and of the whole path of the default head, not of one solve.
    assert plan.flops["fit"] < 0.05 * plan.flops["extraction"]
    settings = HeadSettings(method="two-phase", n_patterns=10)
    fit = fit_flops(settings, wanted["pairs"], outline(config).width, sources=1)
    assert fit / 1e12 == pytest.approx(
        wanted["cronos_large_TFLOP"] + wanted["stage2_100_epochs_TFLOP"], rel=1e-9, abs=0
    )


def test_llama_fits_a_card_of_24_gib_in_bfloat16(tmp_path: Path) -> None:
    config = published(tmp_path, "llama-3.1-8b")

    def plan(gib: float, **model: Any) -> Any:
        return make_plan(
            recipe(None, "llama", model=model),
            config=config,
            rows=65_606,
            guess=Guess(256, 256),
            device_memory=int(gib * GIB),
            memory=64 * GIB,
            disk=100 * GIB,
            probe_seconds=0,
        )

    fits = plan(24)
    assert (fits.device, fits.dtype) == ("gpu", "bfloat16")
    fits.require()
    assert fits.device_bytes["extraction"]["weights"] == 2 * PUBLISHED["llama-3.1-8b"][1]
    # n rows of d float32 numbers: 4 n d of the design, chosen and rejected.
    assert fits.disk_bytes["features"] == 2 * 65_606 * 4096 * 4
    wide = plan(24, dtype="float32")
    with pytest.raises(PlanError, match=r"Device memory: up to .*weights 29\.9 GiB.*24\.0 GiB available"):
        wide.require()
    assert {"--dtype bfloat16", "--quantise 4bit"} <= set(wide.mends)
    # Weights that are spread fill the card, and leave no room for passes of this size.
    assert "--device offload" not in wide.mends
    assert not any(flag.startswith("--batch-tokens") for flag in wide.mends)
    small = plan(12)
    assert "--quantise 4bit" in small.mends
    assert not any(flag.startswith("--dtype") for flag in small.mends)
    assert all(shortage.certain for shortage in small.shortages)


# --- what is refused -------------------------------------------------------------------------------------------------


def _apply(settings: Recipe, flags: tuple[str, ...]) -> Recipe:
    parts = {"prompts": "evaluation", "method": "head"}
    changed = settings.plain()
    for flag in flags:
        name, value = re.fullmatch(r"--([a-z-]+) (\S+)", flag).groups()  # type: ignore[union-attr]
        name = name.replace("-", "_")
        changed[parts.get(name, "model")][name] = int(value) if value.isdigit() else value
    return recipe_of(changed)


_MORE_CARDS = (("gpt2", 2.5), ("llama-3.1-8b", 1.0), ("llama-3.1-8b", 9.0))


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("gpt2", 1.0),
        ("llama-3.1-8b", 22.0),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in _MORE_CARDS),
    ],
)
def test_a_flag_that_is_named_makes_it_fit(tmp_path: Path, name: str, gib: float) -> None:
    config = published(tmp_path, name)
    settings = recipe(None, name, model={"dtype": "float32", "batch_tokens": 16_384})
    options: dict[str, Any] = {
        "config": config,
        "rows": 5000,
        "guess": Guess(300, 400),
        "device_memory": int(gib * GIB),
        "memory": 64 * GIB,
        "disk": 100 * GIB,
        "probe_seconds": 0,
    }
    plan = make_plan(settings, **options)
    if not plan.shortages:
        assert not plan.mends
        return
    with pytest.raises(PlanError, match="does not fit") as refused:
        plan.require()
    for shortage in plan.shortages:
        assert shortage.needed > shortage.there
        assert size(shortage.needed) in str(refused.value)
        assert size(shortage.there) in str(refused.value)
    for flag in plan.mends:
        assert flag in str(refused.value)
        alone = make_plan(_apply(settings, (flag,)), **options)
        assert bool(alone.shortages) == plan.together
    if plan.together:
        assert not make_plan(_apply(settings, plan.mends), **options).shortages
    if not plan.mends:
        assert "No setting makes it fit" in str(refused.value)


def test_host_memory_and_disk_are_refused_too(tmp_path: Path) -> None:
    config = published(tmp_path, "gpt2")

    def plan(**room: int) -> Any:
        settings = recipe(None, "gpt2", model={"device": "cpu", "prefixes": 4})
        room = {"memory": 64 * GIB, "disk": 100 * GIB, **room}
        return make_plan(settings, config=config, rows=1_000_000, guess=Guess(50, 50), probe_seconds=0, **room)

    assert not plan(memory=128 * GIB).shortages
    with pytest.raises(PlanError, match=r"Disk: up to .* for the run .*, 20\.0 GiB available"):
        plan(memory=128 * GIB, disk=20 * GIB).require()
    # What is kept of a prefix is kept of four: taking one is the only way.
    assert plan(memory=128 * GIB, disk=20 * GIB).mends == ("--prefixes 1",)
    with pytest.raises(PlanError, match="Memory: "):
        plan(memory=2 * GIB).require()


def test_what_only_might_be_short_is_told_apart(tmp_path: Path) -> None:
    config = published(tmp_path, "llama-3.1-8b")
    plan = make_plan(
        recipe(None, "llama", model={"batch_tokens": 65_536}, evaluation={"prompts": 1}),
        config=config,
        rows=10_000,
        guess=Guess(100, 100),
        device_memory=20 * GIB,
        memory=64 * GIB,
        disk=100 * GIB,
        probe_seconds=0,
    )
    assert [shortage.certain for shortage in plan.shortages] == [False]
    plan.require(certain=True)
    assert plan.mends[0].startswith("--batch-tokens")
    with pytest.raises(PlanError, match="--batch-tokens"):
        plan.require()


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    config = published(tmp_path, "gpt2")
    for options, said in [
        ({}, "no pairs to count"),
        ({"rows": 10}, "no pairs to count"),
        ({"rows": 1, "guess": Guess(3, 3)}, "at least 2"),
        ({"rows": 10, "guess": Guess(0, 3)}, "at least 1"),
    ]:
        with pytest.raises(CoalaError, match=said):
            make_plan(recipe(None, "gpt2"), config=config, probe_seconds=0, **options)  # type: ignore[arg-type]


# --- bounds hold -----------------------------------------------------------------------------------------------------


class _Living(TorchDispatchMode):
    """The most bytes of tensors, made inside, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in given:
                continue
            self._known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, number: int) -> None:
        self._known.discard(key)
        self.now -= number


@pytest.mark.parametrize(
    ("name", "batch_tokens"),
    [
        ("gpt2", 64),
        ("llama", 64),
        *((n, 1024) for n in ("gpt2", "gemma2", "bert")),
        *(pytest.param(n, 1024, marks=pytest.mark.nightly) for n in ("llama", "mistral", "falcon", "phi")),
    ],
)
def test_an_extraction_stays_below_its_bound(tmp_path: Path, name: str, batch_tokens: int) -> None:
    folder = tiny_backbone(name, tmp_path / "model")
    pairs = list(read_pairs(write_pairs(tmp_path / "pairs.jsonl", n=90)))
    backbone, about = load_backbone(folder, device="cpu"), outline(folder)
    settings = recipe(tmp_path / "pairs.jsonl", folder, model={"batch_tokens": batch_tokens})
    counts = count(settings, about, tokenizer=folder)
    spec = backbone.spec()
    plan = survey(pairs, backbone, spec)
    with _Living() as living:
        extract(pairs, backbone, spec, batch_tokens=batch_tokens, plan=plan)
    load = counts.load(batch_tokens, counts.longest_row)
    bound = sum(pass_bytes(about.shape, about.cached, load, size=4).values())
    assert living.most <= bound <= 12 * living.most


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoding_stays_below_its_bound(tmp_path: Path, name: str) -> None:
    folder = tiny_backbone(name, tmp_path / "model")
    backbone, about = load_backbone(folder, device="cpu"), outline(folder)
    prompts = [user("tell me a story of a girl and a film " * k) for k in (1, 2, 1, 2)]
    longest = max(len(backbone.render(prompt).tokens) for prompt in prompts)
    with _Living() as living:
        generate(prompts, backbone, None, Guidance("none"), max_new_tokens=12, seed=0, batch_size=4)
    bound = decoding_bytes(about.shape, about.cached, 4, longest, 12, size=4)
    assert living.most <= bound <= 12 * living.most


# --- the time --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.nightly
def test_the_time_told_is_the_time_taken(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 200 real pairs, by the clock of a machine that multiplies at an even pace and does nothing else."""
    clock, run = Clock(), Network.run

    def counted(self: Network, *given: Any, **options: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = run(self, *given, **options)
        clock.move(counter.get_total_flops() / 5e8)
        return found

    monkeypatch.setattr(coala.costs.measured, "time", clock)
    monkeypatch.setattr(Network, "run", counted)
    model = shared / "data/models/stories260K-hf"
    pairs = list(islice(read_pairs(shared / "data/mrbench/pairs_train.jsonl.gz"), 200))
    save_pairs(tmp_path / "pairs.jsonl", pairs)
    settings = recipe(tmp_path / "pairs.jsonl", model, model={"device": "cpu"})
    plan = make_plan(settings, probe_seconds=10)
    assert plan.seconds is not None
    assert plan.seconds.low <= plan.seconds.value <= plan.seconds.high
    assert plan.seconds.n >= 2
    backbone = load_backbone(model, device="cpu")
    with Stopwatch() as watch:
        extract(pairs, backbone, backbone.spec())
    assert watch.seconds > 20  # so that some of the batches were tried, not all
    assert plan.seconds.value == pytest.approx(watch.seconds, rel=0.25)


@given(
    st.lists(st.floats(1, 1e4), min_size=1, max_size=30),
    st.floats(0.0, 50.0),
    st.floats(0.01, 10.0),
    st.integers(1, 5),
)
def test_a_probe_keeps_to_its_time_as_far_as_the_smallest_tree_allows(
    costs: list[float], seconds: float, pace: float, width: int
) -> None:
    """On a machine whose pace does not change: no part is begun that ends too late, but for the first."""
    cost = np.array(sorted(costs, reverse=True))
    trees = [range(i, i + 1) for i in range(len(cost))]
    batches = [range(i, min(i + width, len(cost))) for i in range(0, len(cost), width)]
    read: list[range] = []

    def timed(rows: range) -> tuple[float, float]:
        read.append(rows)
        flops = float(cost[rows.start : rows.stop].sum())
        return flops * pace / 1000, flops

    rates, spent, n = measured_rates(trees, batches, cost, range(len(batches)), timed, seconds)
    least = cost.min() * pace / 1000
    assert rates
    assert spent <= max(seconds, least) * (1 + 1e-9)
    assert n == len(read) - (1 if 2 * least > seconds else 2)
    for took, flops in rates:
        assert took / flops == pytest.approx(pace / 1000)
    # Everything is read where there is time for it.
    if seconds > 3 * cost.sum() * pace / 1000:
        assert n == len(batches)


# --- the command -----------------------------------------------------------------------------------------------------


def _command(*arguments: str) -> Any:
    app = Typer()
    app.command()(plan_command)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_shows_and_refuses(tmp_path: Path) -> None:
    folder = tiny_backbone("gpt2", tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    done = _command(str(pairs), "--model", str(folder), "--device", "cpu", "--probe", "0.2")
    assert done.exit_code == 0, done.output
    *shown, last = done.output.strip().split("\n")
    told = json.loads(last)
    assert told["pairs"] == 60
    assert told["seconds"]["low"] <= told["seconds"]["high"]
    assert told["shortages"] == []
    for word in ("tokens", "FLOPs", "extraction", "fit", "time", "memory", "disk", "weights"):
        assert any(word in line for line in shown), word
    config = published(tmp_path, "llama-3.1-8b")
    base = ["--config", str(config), "--rows", "65606", "--tokens-per-prompt", "256", "--tokens-per-reply", "256"]
    fits = _command(*base, "--gpu-memory", "24GiB", "--memory", "64g", "--disk", "100g")
    assert fits.exit_code == 0, fits.output
    short = _command(*base, "--gpu-memory", "12GiB", "--memory", "64g", "--disk", "100g")
    assert isinstance(short.exception, PlanError)
    assert "--quantise 4bit" in str(short.exception)
    assert json.loads(short.output.strip().split("\n")[-1])["mends"]
    for arguments, said in [
        (["--gpu-memory", "much"], "expected a size"),
        (["--rows", "9", "--tokens-per-prompt", "3"], "expected both"),
    ]:
        wrong = _command("--config", str(config), *arguments)
        assert isinstance(wrong.exception, CoalaError)
        assert said in str(wrong.exception)


def test_the_first_lines_say_the_same(tmp_path: Path) -> None:
    config = published(tmp_path, "gpt2")
    plan = make_plan(
        recipe(None, "gpt2", model={"device": "cpu"}),
        config=config,
        rows=1000,
        guess=Guess(100, 60),
        memory=64 * GIB,
        disk=100 * GIB,
    )
    lines = "\n".join(first_lines(plan))
    assert f"{plan.tokens['computed']:,} tokens" in lines
    assert "1,000 pairs" in lines
    assert size(max(sum(parts.values()) for parts in plan.host_bytes.values())) in lines
    assert dict(table_rows(plan))["  counted"] == plan.counted == "as given: 100 tokens a prompt, 60 a reply"
    short = replace(plan, room={**plan.room, "host": None})
    assert "an unknown amount" in "\n".join(first_lines(short))


def test_distilling_is_planned_by_the_formulas_of_costs(tmp_path: Path) -> None:
    settings = recipe(None, "gpt2", model={"device": "cpu"}, evaluation={"max_new_tokens": 60})
    room = {"memory": 64 * GIB, "disk": 100 * GIB}
    plan = make_plan(settings, config=published(tmp_path, "gpt2"), rows=1000, guess=Guess(100, 60), **room)
    assert plan.distil is not None
    flops, shape = plan.distil.flops, outline(tmp_path / "gpt2" / "config.json").shape
    row = full_flops(shape, [160])
    # Four rates of DPO: three forwards of both replies. SFT at three rates for three epochs: two of four fifths.
    assert flops["dpo"]["training"] == 4 * 3 * 2 * row * plan.train
    assert flops["adapter"]["training"] == 3 * 3 * 2 * row * 240
    assert flops["output"]["teacher"] == flops["adapter"]["teacher"] > 10 * 300 * decoding_flops(shape, 100, 59) // 2
    assert (plan.distil.replies, plan.distil.reply_tokens) == (300, 60)
    # Sixty held-out prompts, answered at five strengths.
    assert (output_fit.FOLDS, len(output_fit.STRENGTHS)) == (distilling.FOLDS, distilling.STRENGTHS)
    assert flops["output"]["choice"] == 5 * 60 * decoding_flops(shape, 100, 60)
    told = dict(table_rows(plan))
    assert told["distil"].startswith("300 replies of 60 tokens")
    assert "teacher" in told["  --into output"]
    assert "for comparison, DPO at 4 rates" in " ".join(told)
    few = make_plan(settings, config=tmp_path / "gpt2" / "config.json", rows=10, guess=Guess(100, 60), **room)
    assert few.distil is not None
    assert few.distil.replies == few.train
    # As the recipe says: the pairs' own replies teach, and none is written; rounds are as many of the same.
    given: dict[str, Any] = {"config": tmp_path / "gpt2" / "config.json", "rows": 1000, "guess": Guess(100, 60), **room}
    weighted = make_plan(replace(settings, distil=DistilSettings(teacher="weighted")), **given).distil
    rounds = make_plan(replace(settings, distil=DistilSettings(rounds=3)), **given).distil
    assert weighted is not None
    assert rounds is not None
    assert weighted.flops["output"]["teacher"] == 0
    assert "choice" not in weighted.flops["output"]
    assert (weighted.replies, weighted.reply_tokens) == (2 * plan.train, 60)
    assert weighted.flops["output"]["states"] == 2 * plan.train * states_flops(shape, [160], [60])
    assert weighted.flops["adapter"] == flops["adapter"]
    assert rounds.flops["output"] == {name: 3 * number for name, number in flops["output"].items()}
