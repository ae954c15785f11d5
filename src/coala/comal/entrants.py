"""Who plays in `coala comal matrix`: models, checkpoints of a COMAL run, guided models, baselines, saved answers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.comal.oracles import Example, prompt_of
from coala.values import CoalaError, prompt_id

if TYPE_CHECKING:
    from coala.decoding.guidance import Guidance
    from coala.values import Generation

Answer = Callable[[Sequence["Example"], int, int, float, float, int], list["Generation"]]


@dataclass(frozen=True)
class Entrant:
    """Whose answers they are: a name, what decides them (for the record), the same in words, and the making."""

    name: str
    identity: Mapping[str, Any]
    how: str
    answer: Answer


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


def _generate(
    backbone: Any, examples: Sequence[Example], samples: int, tokens: int, temperature: float, seed: int, **how: Any
) -> list[Generation]:
    """Answers of ``backbone``, sample by sample; a prompt's noise depends on the seed and the prompt alone."""
    from coala.decoding import generate

    prompts, ids = [prompt_of(example) for example in examples], [prompt_id(prompt_of(example)) for example in examples]
    found = []
    for sample in range(samples):
        found += generate(
            prompts,
            backbone,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seed + sample,
            prompt_ids=ids,
            **how,
        )
    return found


def _model(model: str, name: str, template: str, device: str) -> Entrant:
    from coala.backbone.files import check_files, find, weights_digest

    folder, _, _ = find(model, None)
    check_files(folder)

    def answer(
        examples: Sequence[Example], samples: int, tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[Generation]:
        from coala.backbone import load_backbone

        backbone = load_backbone(model, template=template, device=device)
        return _generate(backbone, examples, samples, tokens, temperature, seed, guidance=_unguided(top_p))

    identity = {"weights": weights_digest(folder), "template": template}
    return Entrant(name, identity, f"the model {model}", answer)


def _checkpoints(run: Path, part: str, name: str, device: str) -> Iterator[Entrant]:
    """The policies of a COMAL run: its start, its references, the last one."""
    from coala.store import RunFolder, load_json

    settings = RunFolder.open(run).settings
    outer, inner = settings["settings"]["outer_steps"], settings["settings"]["inner_steps"]
    about = settings.get("about")
    if about is None:
        raise CoalaError(f"{run}: does not say what model it trains (it was not made by `coala comal train`).")
    places = {"start": "start", **{str(t): f"outer-{t:02d}/inner-{inner:02d}/policy" for t in range(1, outer + 1)}}
    if part not in ("", "all") and part not in places:
        raise CoalaError(f"{run}@{part}: there is no such policy; expected start, 1 to {outer}, or all.")
    wanted = list(places) if part == "all" else [part or str(outer)]
    for which in wanted:
        place = places[which]
        stage = "start" if which == "start" else place.removesuffix("/policy").replace("/", "-") + "-train"
        record = run / "stages" / f"{stage}.json"
        if not record.exists() or not (run / place).is_dir():
            raise CoalaError(f"{run}: has no policy {which!r} yet: run its command again, which goes on where it was.")
        identity = {"policy": load_json(record)["outputs"][place], "model": settings["policy"]}
        when = "the start" if which == "start" else f"after update {which}"
        label = f"{name}-{which}" if part == "all" else name
        yield Entrant(label, identity, f"{run}, {when}", _answer_of_checkpoint(run / place, about, device))


def _answer_of_checkpoint(place: Path, about: Mapping[str, Any], device: str) -> Answer:
    def answer(
        examples: Sequence[Example], samples: int, tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[Generation]:
        with _as_backbone(place, about, device) as backbone:
            return _generate(backbone, examples, samples, tokens, temperature, seed, guidance=_unguided(top_p))

    return answer


@contextmanager
def _as_backbone(place: Path, about: Mapping[str, Any], device: str) -> Iterator[Any]:
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
    yield backbone


def _guided(run: Path, part: str, name: str) -> Entrant:
    from dataclasses import replace

    from coala.alignment.stages import guidance_of
    from coala.recipe import recipe_of
    from coala.store import RunFolder, file_digest, load_head

    if part not in ("", "unguided"):
        raise CoalaError(f"{run}@{part}: expected {run} (guided) or {run}@unguided.")
    if not (run / "head").is_dir():
        raise CoalaError(f"{run}: has no head yet: run `coala align` again, which goes on where it was.")
    guidance = guidance_of(recipe_of(RunFolder.open(run).settings, run / "run.json"))
    if part:
        guidance = replace(guidance, mode="none")

    def answer(
        examples: Sequence[Example], samples: int, tokens: int, temperature: float, _: float, seed: int
    ) -> list[Generation]:
        from coala.alignment import load_parts

        backbone, head, _guidance = load_parts(run)
        return _generate(backbone, examples, samples, tokens, temperature, seed, head=head, guidance=guidance)

    identity = {
        "head": file_digest(run / "head"),
        "weights": load_head(run / "head").spec.weights,
        "rule": repr(guidance),
    }
    how = f"{run}, {guidance}, from the run's own restricted base (top-k {guidance.top_k}, top-p {guidance.top_p:g})"
    return Entrant(name, identity, how, answer)


def _baseline(run: Path, name: str, device: str) -> Entrant:
    from coala.store import file_digest

    def answer(
        examples: Sequence[Example], samples: int, tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[Generation]:
        from coala.baselines import load_trained

        backbone = load_trained(run).backbone(device=device)
        return _generate(backbone, examples, samples, tokens, temperature, seed, guidance=_unguided(top_p))

    return Entrant(name, {"model": file_digest(run / "model")}, f"the baseline {run}", answer)


def _answered(file: Path, name: str) -> Entrant:
    from coala.store import file_digest, load_generations

    if not file.is_file():
        raise CoalaError(f"{file}: there is no such file. Check the path.")

    def answer(
        examples: Sequence[Example], samples: int, _tokens: int, _temperature: float, _top_p: float, _seed: int
    ) -> list[Generation]:
        wanted = {prompt_id(prompt_of(example)) for example in examples}
        return [reply for reply in load_generations(file) if reply.prompt_id in wanted]

    return Entrant(name, {"file": file_digest(file)}, f"answers of {file}", answer)


def texts_of(replies: Sequence[Generation], examples: Sequence[Example], samples: int, name: str) -> list[str]:
    """``samples`` answers to each prompt in order; CoalaError where some are missing."""
    by_prompt: dict[str, list[str]] = {}
    for reply in replies:
        by_prompt.setdefault(reply.prompt_id, []).append(reply.text)
    short = [example for example in examples if len(by_prompt.get(prompt_id(prompt_of(example)), ())) < samples]
    if short:
        raise CoalaError(
            f"{name}: {len(short)} of {len(examples)} prompts have fewer than {samples} answer(s). Give the prompts "
            "that the answers were made for, or fewer --samples."
        )
    return [text for example in examples for text in by_prompt[prompt_id(prompt_of(example))][:samples]]
