"""Who plays in `coala comal matrix`: models, checkpoints of a COMAL run, guided models, baselines, saved answers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.comal.oracles import Example, prompt_of
from coala.values import CoalaError, prompt_id

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding.guidance import Guidance
    from coala.values import ConvexHead, Generation

    Writer = tuple[LanguageModel, ConvexHead | None, Guidance]


@dataclass(frozen=True)
class AnswerSampling:
    """How entrants answer: so many answers per prompt, of at most so many tokens."""

    samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Entrant:
    """Whose answers they are: a name, what decides them (for the record), the same in words, and who writes them.

    ``opened(top_p)`` holds the writer while answers are drawn; who has none has answered in ``file``.
    """

    name: str
    identity: Mapping[str, Any]
    how: str
    opened: Callable[[float], AbstractContextManager[Writer]] | None
    file: Path | None = None

    def answer(
        self,
        examples: Sequence[Example],
        sampling: AnswerSampling,
        seed: int,
        kept: Path,
        on_reply: Callable[[int, int], None],
    ) -> list[Generation]:
        """Answers, sample by sample, kept in the folder ``kept`` as they come.

        A prompt's noise depends on the seed and the prompt alone.
        """
        from coala.decoding import generate
        from coala.store import load_generations

        prompts = [prompt_of(example) for example in examples]
        ids = [prompt_id(prompt) for prompt in prompts]
        if self.opened is None:
            assert self.file is not None
            return [reply for reply in load_generations(self.file) if reply.prompt_id in set(ids)]
        found: list[Generation] = []
        in_all = sampling.samples * len(ids)
        with self.opened(sampling.top_p) as (backbone, head, guidance):
            for sample in range(sampling.samples):

                def tell(done: int, _: int, before: int = sample * len(ids)) -> None:
                    on_reply(before + done, in_all)

                found += generate(
                    prompts,
                    backbone,
                    head,
                    guidance,
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    seed=seed + sample,
                    prompt_ids=ids,
                    kept=kept / f"{sample}.jsonl",
                    on_reply=tell,
                )
        return found


def entrants_of(text: str, template: str, device: str) -> Iterator[Entrant]:
    from coala.comal.inputs import kind_of_run

    label, sign, spec = text.partition("=")
    if not sign:
        label, spec = "", text
    place, _, part = spec.rpartition("@")
    if not place or kind_of_run(Path(place).expanduser()) is None:
        place, part = spec, ""
    path = Path(place).expanduser()
    name = _plain(label or "-".join(filter(None, (path.name, part if part != "all" else ""))))
    kind = kind_of_run(path)
    if kind == "comal":
        yield from _checkpoints(path, part, name, device)
    elif kind == "coala":
        yield _guided(path, part, name)
    elif kind == "baseline":
        yield _baseline(path, name, device)
    elif path.suffix == ".jsonl":
        yield _answered(path, name)
    else:
        yield _model(place, name, template, device)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "entrant"


def _unguided(top_p: float) -> Guidance:
    from coala.decoding.guidance import Guidance

    return Guidance("none", top_k=0, top_p=top_p)


def _model(model: str, name: str, template: str, device: str) -> Entrant:
    from coala.backbone.files import check_files, find, weights_digest

    folder, _, _ = find(model, None)
    check_files(folder)

    def opened(top_p: float) -> AbstractContextManager[Writer]:
        from coala.backbone import load_backbone

        return nullcontext((load_backbone(model, template=template, device=device), None, _unguided(top_p)))

    identity = {"weights": weights_digest(folder), "template": template}
    return Entrant(name, identity, f"the model {model}", opened)


def _checkpoints(run: Path, part: str, name: str, device: str) -> Iterator[Entrant]:
    """The policies of a COMAL run: its start, its references, the last one."""
    from coala.store import RunFolder, load_json

    settings = RunFolder.open(run).settings
    outer, inner = settings["settings"]["outer_steps"], settings["settings"]["inner_steps"]
    about = settings.get("about")
    if about is None:
        raise CoalaError(f"{run}: does not name the model it trains, so it is not a run of `coala comal train`.")
    places = {"start": "start", **{str(t): f"outer-{t:02d}/inner-{inner:02d}/policy" for t in range(1, outer + 1)}}
    if part not in ("", "all") and part not in places:
        raise CoalaError(f"{run}@{part}: found no such policy; expected start, 1 to {outer}, or all.")
    wanted = list(places) if part == "all" else [part or str(outer)]
    for which in wanted:
        place = places[which]
        stage = "start" if which == "start" else place.removesuffix("/policy").replace("/", "-") + "-train"
        record = run / "stages" / f"{stage}.json"
        if not record.exists() or not (run / place).is_dir():
            raise CoalaError(f"{run}: has no policy {which!r} yet. Fix: rerun its command to resume it.")
        identity = {"policy": load_json(record)["outputs"][place], "model": settings["policy"]}
        when = "the start" if which == "start" else f"after update {which}"
        label = f"{name}-{which}" if part == "all" else name
        yield Entrant(label, identity, f"{run}, {when}", partial(_as_writer, run / place, about, device))


@contextmanager
def _as_writer(place: Path, about: Mapping[str, Any], device: str, top_p: float) -> Iterator[Writer]:
    """The weights of a checkpoint as a frozen model, by way of a folder that is gone afterwards."""
    import tempfile

    from coala.backbone import load_backbone
    from coala.comal.llm import LowRank, load_policy

    adapter = about["lora"]
    lora = None
    if adapter is not None:
        modules = None if adapter["targets"] is None else tuple(adapter["targets"])
        lora = LowRank(adapter["rank"], adapter["alpha"], modules)
    options = {"revision": about["revision"], "template": about["template"]}
    policy = load_policy(about["model"], lora=lora, device="cpu", dtype=about["dtype"], download=False, **options)
    policy.load(place)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".export-") as folder:
        policy.export(Path(folder))
        del policy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of names that transformers is about to change
            if adapter is None:
                backbone = load_backbone(folder, template=about["template"], device=device)
            else:
                backbone = load_backbone(about["model"], adapter=folder, device=device, download=False, **options)
    yield backbone, None, _unguided(top_p)


def _guided(run: Path, part: str, name: str) -> Entrant:
    from coala.alignment.parts import guidance_of
    from coala.recipe import recipe_of
    from coala.store import DISTILLED, RunFolder, file_digest, load_head, run_policy

    if part not in ("", "unguided", "distilled"):
        raise CoalaError(f"{run}@{part}: expected {run} (guided), {run}@distilled or {run}@unguided.")
    if not (run / "head").is_dir():
        raise CoalaError(f"{run}: has no head yet. Fix: rerun `coala align` to resume it.")
    guidance = guidance_of(recipe_of(RunFolder.open(run).settings, run / "run.json"))
    if part:
        guidance = guidance.plain if part == "unguided" else guidance.changed(mode=part)

    def opened(_: float) -> AbstractContextManager[Writer]:
        from coala.alignment import load_parts

        backbone, head, _guidance = load_parts(run)
        return nullcontext((backbone, head, guidance))

    identity = {
        "head": file_digest(run / "head"),
        "weights": load_head(run / "head").spec.weights,
        "rule": repr(guidance),
    }
    if guidance.change:
        run_policy(RunFolder.open(run))  # refused where there is none
        identity["policy"] = file_digest(run / DISTILLED / "policy.safetensors")
    how = f"{run}, {guidance}, from the run's own restricted base (top-k {guidance.top_k}, top-p {guidance.top_p:g})"
    return Entrant(name, identity, how, opened)


def _baseline(run: Path, name: str, device: str) -> Entrant:
    from coala.store import file_digest

    def opened(top_p: float) -> AbstractContextManager[Writer]:
        from coala.baselines import load_trained

        return nullcontext((load_trained(run).backbone(device=device), None, _unguided(top_p)))

    return Entrant(name, {"model": file_digest(run / "model")}, f"the baseline {run}", opened)


def _answered(file: Path, name: str) -> Entrant:
    from coala.store import file_digest

    if not file.is_file():
        raise CoalaError(f"{file}: found no such file. Fix: check the path.")

    return Entrant(name, {"file": file_digest(file)}, f"answers of {file}", None, file)


def texts_of(replies: Sequence[Generation], examples: Sequence[Example], samples: int, name: str) -> list[str]:
    """``samples`` answers to each prompt in order; CoalaError where some are missing."""
    by_prompt: dict[str, list[str]] = {}
    for reply in replies:
        by_prompt.setdefault(reply.prompt_id, []).append(reply.text)
    short = [example for example in examples if len(by_prompt.get(prompt_id(prompt_of(example)), ())) < samples]
    if short:
        raise CoalaError(
            f"{name}: {len(short)} of {len(examples)} prompts have fewer than {samples} answer(s). Fix: pass the "
            "prompts of these answers, or fewer --samples."
        )
    return [text for example in examples for text in by_prompt[prompt_id(prompt_of(example))][:samples]]
