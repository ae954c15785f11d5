"""Pairs that a study makes of a model's own replies, labelled by a scorer; in a process of its own.

OUT/data/replies-.../N.jsonl         the N-th reply to every prompt, kept as it comes
OUT/data/<dataset>/sampled.jsonl     the pairs: to each prompt the best reply against the worst
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from coala.compare.progress import OnStage, Teller, unheard
from coala.compare.study import Sampled, Study, StudyModel
from coala.processes import Child, Parent
from coala.store import digest, file_digest, load_json, save_json, save_pairs
from coala.values import CoalaError, Pair, user


def sampled_pairs(study: Study, name: str, folder: Path, tell: OnStage = unheard) -> Path:
    """The file of the pairs of dataset ``name``, made unless it is there for the same settings."""
    from coala.evaluation.judges.named import named_judge

    dataset, target = study.datasets[name], folder / "sampled.jsonl"
    assert dataset.sampled is not None
    model = next(iter(dataset.models or study.models))
    labeller = named_judge(dataset.sampled.labeller)
    read = (dataset.sampled.prompts, *((dataset.sampled.labeller,) if labeller is None else ()))
    gone = [path for path in read if not Path(path).is_file()]
    if gone:
        raise CoalaError(
            f"Dataset {name!r}: {gone[0]} is missing; expected the file its pairs are sampled from. Fix: name the "
            "folder of data: paths with --data."
        )
    wanted = digest(
        dataset.sampled.model_dump(), study.models[model].model_dump(), study.split.seed, study.evaluation.temperature
    )
    about = folder / "sampled.json"
    if target.is_file() and about.is_file() and load_json(about) == {"of": wanted, "pairs": file_digest(target)}:
        return target
    # The model and its libraries stay out of the process that starts the cells.
    with Child(_sample, study, model, name, folder) as child:
        for stage in child.told():
            tell(*stage)
        if child.join() != 0:
            raise CoalaError(f"Dataset {name!r}: the process that samples its pairs stopped early. Fix: rerun it.")
    save_json(about, {"of": wanted, "pairs": file_digest(target)})
    return target


def _sample(parent: Parent, study: Study, model: str, name: str, folder: Path) -> None:
    settings = study.datasets[name].sampled
    assert settings is not None
    weights = folder.parent.parent / "models" / model
    tell = Teller(lambda *stage: parent.tell(stage))

    def show(number: int, done: int, total: int) -> None:
        tell(f"{name}: replies to choose from", number * total + done, settings.replies * total)

    # Sets that differ in what labels them alone have the same replies.
    alike = settings.model_dump(exclude={"labeller"}), study.models[model].model_dump()
    kept = folder.parent / f"replies-{digest(*alike, study.split.seed, study.evaluation.temperature)[:12]}"
    pairs = make_pairs(study, study.models[model], settings, kept, weights, show)
    save_pairs(folder / "sampled.jsonl", pairs)


def make_pairs(
    study: Study,
    model: StudyModel,
    settings: Sampled,
    kept: Path,
    weights: Path,
    show: Callable[[int, int, int], None],
) -> list[Pair]:
    """The best against the worst of several replies to each prompt, where the scorer tells them apart."""
    from coala.backbone import load_backbone
    from coala.baselines.weights import trainable
    from coala.decoding import Guidance, generate
    from coala.evaluation.judges.named import local_judge
    from coala.evaluation.rows import read_rows

    labeller = local_judge(settings.labeller).scorer()
    texts = [row.text("text", "prompt").strip() for row in read_rows(settings.prompts)][: settings.n_prompts]
    if settings.words is not None:
        texts = [" ".join(text.split()[: settings.words]) for text in texts]
    prompts = [user(settings.ask.replace("{text}", text)) for text in texts]
    backbone = load_backbone(
        trainable(model.path, weights), revision=model.revision, template=model.template, device=study.device
    )
    replies = [
        generate(
            prompts,
            backbone,
            guidance=Guidance(mode="none"),
            max_new_tokens=settings.max_new_tokens,
            temperature=study.evaluation.temperature,
            # Not the noise of the replies that methods are judged by.
            seed=study.split.seed + 1000 + number,
            kept=kept / f"{number}.jsonl",
            on_reply=partial(show, number),
        )
        for number in range(settings.replies)
    ]
    pairs = []
    for place, prompt in enumerate(prompts):
        written = sorted({some[place].text.strip() for some in replies} - {""}, key=lambda t: (labeller.score(t), t))
        if len(written) > 1 and labeller.score(written[-1]) > labeller.score(written[0]):
            pairs.append(Pair(prompt, written[-1], written[0], f"prompt-{place:05d}"))
    if not pairs:
        raise CoalaError("the scorer scores all replies alike. Fix: use more prompts, or another labeller.")
    return pairs
