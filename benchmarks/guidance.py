"""Does guidance align? Every mode on the bundled film task, and on stories: win rate, perplexity, repetition, cost.

    python benchmarks/guidance.py film
    python benchmarks/guidance.py stories --model STORIES    # a folder with the 260K-parameter story model
    python benchmarks/guidance.py film --permutations 400 --pairs 135

Linear heads are fitted on samples of the model itself, ranked by a labeller, either on whole replies or on eight
prefixes of each. The judge of the table shares no word and no training data with the labeller: the film task's own, and
for stories glad minus sad words, dealt to labeller and judge by the parity of their SHA-256. Every reply is compared
with ``--references`` unguided ones to the same prompt that are independent of it; intervals are over prompts. `control`
draws five candidates and samples once more among them, without a head. Cost is in forwards of one token (by
`coala.costs`), from the columns and logits that were computed. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coala.backbone import LanguageModel, load_backbone
from coala.convex import fit
from coala.costs import body_flops, head_flops, token_flops
from coala.data import read_pairs
from coala.decoding import Guidance, generate
from coala.decoding.sampling import gumbel, restrict, stream_key
from coala.evaluation import WordJudge, win_rate
from coala.features import extract
from coala.settings import Mode
from coala.statistics.intervals import mean_estimate, paired_difference
from coala.statistics.scores import perplexity
from coala.values import ConvexHead, Estimate, Generation, Pair, Turn, conversation_text, user

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
PREFIXES = 8
OPENINGS = (
    "Once upon a time",
    "One day",
    "The dog was",
    "Lily and Ben",
    "The little boy",
    "Mom said",
    "In the park",
    "There was a bird",
    "Tom had a ball",
    "It was raining",
)
Prompt = tuple[Turn, ...]


@dataclass(frozen=True)
class Task:
    """A model, what labelled the pairs, who judges, and the prompts of the table with their names."""

    backbone: LanguageModel
    layer: int
    judge: WordJudge
    labeller: WordJudge
    pairs: list[Pair]
    prompts: list[Prompt]
    ids: list[str]
    new_tokens: int


def film(n: int) -> Task:
    """The bundled pairs and held-out prompts."""
    test = {conversation_text(p.prompt): p.prompt for p in read_pairs(ASSETS / "film_pairs_test.jsonl.gz")}
    names, prompts = list(test)[:n], list(test.values())[:n]
    return Task(
        load_backbone(str(ASSETS / "film-lm"), device="cpu"),
        -1,
        WordJudge.load(ASSETS / "film-judge.json"),
        WordJudge.load(ASSETS / "film-labeller.json"),
        list(read_pairs(ASSETS / "film_pairs.jsonl.gz")),
        prompts,
        [hashlib.sha256(name.encode()).hexdigest()[:12] for name in names],
        48,
    )


def stories(n: int, model: Path) -> Task:
    """800 samples of the model for training, ranked within their opening; n stories of ten openings for the table."""
    backbone = load_backbone(model, device="cpu", template="continuation")
    labeller, judged_by = (WordJudge.load(ASSETS / "stories" / f"{name}.json") for name in ("labeller", "judge"))
    openings = [user(OPENINGS[i % len(OPENINGS)]) for i in range(max(n, 800))]
    samples = generate(openings[:800], backbone, max_new_tokens=100, seed=99, batch_size=100)
    pairs = []
    for which, opening in enumerate(OPENINGS):
        texts = {g.text for g in samples[which :: len(OPENINGS)] if g.text.strip()}
        ranked = sorted(texts, key=labeller.score, reverse=True)
        half = len(ranked) // 2
        for i, better in enumerate(ranked[:half]):  # each of the upper half against five of the lower
            for k in range(5):
                worse = ranked[half + (i + 4 * k) % half]
                if labeller.score(better) > labeller.score(worse):
                    pairs.append(Pair(user(opening), better, worse, f"{which}-{i}"))
    ids = [f"story-{i}" for i in range(n)]
    return Task(backbone, 3, judged_by, labeller, pairs, openings[:n], ids, 100)


def heads(task: Task) -> dict[str, ConvexHead]:
    """Linear heads on whole replies and on prefixes of them."""
    spec = task.backbone.spec(task.layer, "mean")
    return {
        "full": fit(extract(task.pairs, task.backbone, spec), method="linear").head,
        "prefixes": fit(extract(task.pairs, task.backbone, spec, prefixes=PREFIXES), method="linear").head,
    }


def permuted(task: Task, count: int, n_pairs: int) -> dict[str, Any]:
    """Heads of labels that are drawn for each group: what they vouch for, per root mean square of held-out margins."""
    everything = extract(task.pairs, task.backbone, task.backbone.spec(task.layer, "mean"))
    rows = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        take = np.sort(draw.permutation(len(everything))[: n_pairs or None])
        some = everything.take(take)
        names, member = np.unique(some.group, return_inverse=True)
        swapped = (draw.random(len(names)) < 0.5)[member][:, None]
        chosen = np.where(swapped, some.rejected, some.chosen)
        rejected = np.where(swapped, some.chosen, some.rejected)
        found = fit(replace(some, chosen=chosen, rejected=rejected), method="linear")
        assert found.held_out is not None
        size = float(np.sqrt((found.held_out.margins**2).mean()))
        rows.append((size / found.head.temperature, size * found.head.evidence))
    slope, least = np.array(rows).T
    found_slopes = {"fitted": slope, "least": least}
    summary = {
        name: {"above_0": float((values > 0.01).mean()), "mean": float(values.mean()), "most": float(values.max())}
        for name, values in found_slopes.items()
    }
    for name, values in summary.items():
        print(f"{name:7} slope: above 0.01 in {values['above_0']:.3f} of {count}, mean {values['mean']:.4f}, ", end="")
        print(f"largest {values['most']:.3f}")
    return {"permutations": count, "pairs": len(take), **summary}


# --- what is measured -----------------------------------------------------------------------------------------------


@contextmanager
def counted(backbone: LanguageModel) -> Iterator[dict[str, int]]:
    """Columns that went through the layers, and rows of logits, inside the block."""
    network = backbone._network
    seen = {"columns": 0, "logits": 0}
    run, log_probs = network.run, network.log_probs

    def counting_run(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        seen["columns"] += tokens.numel()
        return run(tokens, *args, **kwargs)

    def counting_log_probs(final: Any) -> Any:
        seen["logits"] += len(final)
        return log_probs(final)

    network.run, network.log_probs = counting_run, counting_log_probs  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del network.run, network.log_probs


def distinct(texts: Sequence[str]) -> Estimate:
    """Mean share of a text's word triples that are different."""
    shares = []
    for text in texts:
        found = text.lower().split()
        triples = list(zip(found, found[1:], found[2:], strict=False))
        if triples:
            shares.append(len(set(triples)) / len(triples))
    return mean_estimate(shares)


def control(task: Task, seed: int, candidates: int = 5) -> list[Generation]:
    """Candidates as the unguided sampler draws them, then one more sample among them: App. H.3 at strength 0."""
    backbone, found = task.backbone, []
    for prompt, name in zip(task.prompts, task.ids, strict=True):
        prefix = backbone.start([backbone.render(prompt).tokens])
        tokens: list[int] = []
        log_prob = 0.0
        while len(tokens) < task.new_tokens:
            nucleus = restrict(prefix.log_probs(), temperature=1.0, top_k=50, top_p=0.9)
            perturbed = nucleus.log_probs[0] + gumbel([stream_key(seed, name, 0, len(tokens))], nucleus.tokens)[0]
            few = np.argsort(-perturbed)[:candidates]
            anew = gumbel([stream_key(seed, name, 1, len(tokens))], nucleus.tokens)[0]
            rank = few[(nucleus.log_probs[0] + anew)[few].argmax()]
            token = int(nucleus.tokens[0, rank])
            if token in backbone.stop_tokens:
                break
            tokens.append(token)
            log_prob += float(nucleus.base[0, rank])
            prefix.push(torch.tensor([token]))
        found.append(Generation(name, backbone.decode(tokens), "control", len(tokens), seed, np.nan, log_prob))
    return found


def rules() -> Iterator[tuple[str, Guidance]]:
    """Head and guidance of every row of the table."""
    for which in ("full", "prefixes"):
        for strength in (8.0, 16.0, 24.0, 32.0):
            yield which, Guidance("block", strength)
        for strength in (4.0, 8.0, 16.0):
            yield which, Guidance("token", strength)
            yield which, Guidance("shift", strength)
        yield which, Guidance("best_of")

    def by_choice(mode: Mode, **settings: Any) -> Guidance:
        """By what the candidates of one choice are worth among themselves, whatever the evidence."""
        return Guidance(mode, **{"rule": "min-max", **settings})

    for k in ("full", "prefixes"):
        yield k, by_choice("token")
        yield k, by_choice("token", strength=4)
        yield k, by_choice("block", block_tokens=10)
        yield k, by_choice("best_of")
        yield k, by_choice("shift", budget=20.0, candidates=10)
    yield "prefixes", by_choice("token", strength=3)
    yield "prefixes", by_choice("token", strength=6)
    yield "prefixes", by_choice("block", block_tokens=5)
    yield "prefixes", by_choice("block", candidates=10, block_tokens=10)
    yield "prefixes", by_choice("block", candidates=10, block_tokens=5)
    yield "prefixes", by_choice("block", candidates=20, block_tokens=5)
    yield "prefixes", by_choice("block", block_tokens=3)
    yield "prefixes", by_choice("block", candidates=10, block_tokens=3)
    yield "prefixes", by_choice("shift", strength=4.0)
    yield "prefixes", by_choice("shift", budget=40.0, candidates=10)
    yield "prefixes", by_choice("shift", budget=80.0)
    yield "prefixes", by_choice("beam", strength=0.1)
    yield "full", Guidance.paper()
    yield "full", Guidance.paper(8)
    yield "full", by_choice("token", strength=1)
    yield "full", by_choice("token", strength=3)
    yield "full", by_choice("token", rule="z-score", strength=1)
    yield "full", by_choice("token", strength=4, candidates=10)
    yield "full", by_choice("token", rule="raw", strength=32)
    for budget in (5.0, 10.0, 20.0, 40.0, 80.0):
        yield "full", by_choice("shift", budget=budget)
    yield "full", by_choice("shift", strength=2.0)
    yield "full", by_choice("shift", strength=4.0)
    yield "full", by_choice("shift", budget=40.0, candidates=10)
    yield "full", by_choice("shift", budget=20.0, rule="z-score")
    yield "full", by_choice("shift", budget=20.0, rule="raw")
    yield "full", by_choice("block", block_tokens=5)
    yield "full", by_choice("block", candidates=10, block_tokens=10)
    yield "full", by_choice("best_of", candidates=20)
    yield "full", by_choice("beam", strength=0.0)
    yield "full", by_choice("beam", strength=0.1)
    yield "full", by_choice("beam", strength=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("film", "stories"))
    parser.add_argument("--model", type=Path, help="the story model's folder")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--only", default="", help="rows whose guidance has this in its name")
    parser.add_argument("--permutations", type=int, default=0, help="instead: fits to labels that say nothing")
    parser.add_argument("--pairs", type=int, default=0, help="of permutations: pairs of each, drawn anew; 0: all")
    args = parser.parse_args()
    if args.task == "stories" and (args.model is None or not (args.model / "config.json").exists()):
        print("the story model is not there: give its folder with --model")
        print(json.dumps({"skipped": "no story model"}))
        return
    task = film(args.prompts) if args.task == "film" else stories(args.prompts, args.model)
    if args.permutations:
        print(json.dumps({"task": args.task, **permuted(task, args.permutations, args.pairs)}))
        return
    backbone, fitted = task.backbone, heads(task)

    def replies(rule: Guidance, head: ConvexHead | None = None, seed: int = 0) -> list[Generation]:
        return generate(
            task.prompts,
            backbone,
            head,
            rule,
            max_new_tokens=task.new_tokens,
            seed=seed,
            prompt_ids=task.ids,
            batch_size=args.batch,
        )

    reference = [g for k in range(args.references) for g in replies(Guidance("none"), seed=1000 + k)]
    prompt_tokens = float(np.mean([len(backbone.render(prompt).tokens) for prompt in task.prompts]))
    rows: list[dict[str, Any]] = []
    plain: list[Generation] = []

    def measure(head: str, name: str, make: Callable[[], list[Generation]]) -> None:
        start = time.perf_counter()
        with counted(backbone) as seen:
            found = make()
        seconds = time.perf_counter() - start
        n_tokens = sum(g.n_tokens for g in found)
        context = round(prompt_tokens + n_tokens / len(found) / 2)
        column = body_flops(backbone.shape, [context], own=[1])
        flops = seen["columns"] * column + seen["logits"] * head_flops(backbone.shape, [1])
        if not plain:
            plain.extend(found)
        several = [g for _ in range(args.references) for g in found]

        def wins(by: WordJudge) -> Estimate:
            judgements = [by.compare((), mine, theirs) for mine, theirs in zip(several, reference, strict=True)]
            # A beam gives one reply to one prompt, however often it is asked: that is one group of the interval.
            beam = found[0].method.startswith("beam")
            names = [conversation_text(prompt) for prompt in task.prompts] if beam else task.ids
            # Two texts of one method may meet: the sides are named here, for the null row's sake.
            sided = [
                replace(judgement, prompt_id=name, first="row", second="reference")
                for name, judgement in zip(names * args.references, judgements, strict=True)
            ]
            return win_rate(sided)

        nll = [-g.log_prob / max(g.n_tokens, 1) for g in found]
        base = [-g.log_prob / max(g.n_tokens, 1) for g in plain]
        ppl = perplexity([g.log_prob for g in found], [g.n_tokens for g in found])
        ppl_plain = perplexity([g.log_prob for g in plain], [g.n_tokens for g in plain])
        nats = [g.divergence for g in found if g.divergence is not None]
        row = {
            "head": head,
            "guidance": name,
            "wins": asdict(wins(task.judge)),
            "wins_labeller": asdict(wins(task.labeller)),
            "perplexity": asdict(ppl),
            "perplexity_ratio": ppl.value / ppl_plain.value,
            "nll_difference": asdict(paired_difference(nll, base)),
            "distinct_3": asdict(distinct([g.text for g in found])),
            "tokens": n_tokens / len(found),
            "tokens_per_second": n_tokens / seconds,
            "cost": flops / token_flops(backbone.shape, context) / max(n_tokens, 1),
            "score": float(np.mean([g.score for g in found])),
            "nats": float(np.mean(nats)) if nats else None,
            "most_nats": float(np.max(nats)) if nats else None,
        }
        rows.append(row)
        print(
            f"{head:8} | {name:45} | {wins(task.judge)} | {wins(task.labeller).value:.3f} | {ppl.value:.2f} "
            f"[{ppl.low:.2f}, {ppl.high:.2f}] | {row['perplexity_ratio']:.2f} | {row['distinct_3']['value']:.3f} | "
            f"{row['tokens']:.1f} | {row['cost']:.2f} | {row['tokens_per_second']:.0f} | "
            f"{'' if not nats else f'{np.mean(nats):.1f}'}",
            flush=True,
        )

    measure("-", "unguided", lambda: replies(Guidance("none")))
    measure("-", "control: 5 candidates, sampled once more", lambda: control(task, seed=0))
    for which, rule in rules():
        if args.only not in str(rule):
            continue
        measure(which, str(rule), lambda which=which, rule=rule: replies(rule, fitted[which]))
    print(json.dumps({"task": args.task, "pairs": len(task.pairs), "rows": rows}))


if __name__ == "__main__":
    main()
