"""COMAL beside iterative DPO, iterative IPO and INPO on real text, judged by preferences that go in circles.

    python benchmarks/comal_text.py MODEL --out runs/comal_text   # a model of 260,000 weights: 4 minutes of a core
    python benchmarks/comal_text.py MODEL --out runs/tiny --prompts 4 --candidates 4 --outer 1 --inner 1 --answers 2

MODEL continues openings of stories (wording of our own). Three things are measured on a continuation: cheerfulness
(share of cheerful words less share of sad ones), brevity (words in a sentence, fewer is better) and simplicity (letters
in a word, fewer is better). In units of the start policy's standard deviations they make a profile, and of two profiles
the one that is larger in two of three wins. Before that each profile loses the share ``--lean`` of its own mean. With 0
this is the plain majority, which hardly ever goes in circles here, for some continuations are good at everything; with
1 none is, and all that counts is what it leans to: rock, paper, scissors.

All methods make outer x inner steps of the same size on as many drawn pairs, from the same start ("sft"). Each policy
then answers held-out openings; the table is the matrix of win rates with intervals over openings, the share of triples
of a policy's continuations that go in a circle, and what training reached. Every stage is skipped when it is done, so
that the command may be killed and run again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coala.comal.llm import LanguagePolicy, load_policy
from coala.comal.loop import run_comal
from coala.comal.matrix import win_rate_matrix
from coala.comal.measures import cyclic_share
from coala.comal.oracles import Oracle, ask
from coala.comal.report import matrix_rows, nash_rows, summarise, update_rows
from coala.comal.settings import COMALSettings
from coala.statistics.intervals import mean_estimate
from coala.store import digest, load_json, load_lines, save_json, save_lines
from coala.values import Estimate, user

NAMES = ("Mia", "Ben", "Anna", "Tom", "Sara", "Max", "Lucy", "Sam", "Ella", "Jack", "Nora", "Leo")
OPENINGS = (
    "{} found an old boat by the lake. The boat",
    "One morning {} heard a noise behind the door. It was",
    "{} wanted to bake a cake for Grandpa, but",
    "In the garden {} planted a tiny seed. Every day",
    "{} had a red kite. The wind was strong and",
    "It was raining, so {} stayed inside and",
    "{} met a little duck who could not swim. The duck",
    "At the market {} saw a big yellow hat.",
    "{} and a friend built a house of sand. Then",
    "The lamp in the room of {} went out. In the dark",
    "{} could not find the other shoe. Mom said",
    "There was a hole in the fence. {} looked through it and",
)
CHEERFUL = """happy happily love loved loves fun smile smiled smiling laugh laughed laughing hug hugged hugs kind nice
good best better friend friends play played playing yay glad proud wonderful great excited joy dance danced sing sang
beautiful pretty thank thanked safe enjoy enjoyed share shared warm"""
GLOOMY = """sad cry cried crying scared afraid angry mad bad hurt lost alone mean tired broke broken scary dark worried
fell no not never sorry cold wrong away stuck"""
WEIGHT = dict.fromkeys(CHEERFUL.split(), 1) | dict.fromkeys(GLOOMY.split(), -1)
ATTRIBUTES = ("cheerfulness", "brevity", "simplicity")
METHODS = ("sft", "dpo", "ipo", "inpo", "comal")


def attributes(text: str) -> tuple[float, float, float]:
    """Cheerfulness, brevity and simplicity of a continuation."""
    words = re.findall(r"[a-z']+", text.lower())
    sentences = [part for part in re.split(r"[.!?]", text) if re.search(r"[a-z]", part.lower())]
    n = max(len(words), 1)
    return (
        sum(WEIGHT.get(word, 0) for word in words) / n,
        -len(words) / max(len(sentences), 1),
        -sum(map(len, words)) / n,
    )


def oracle_of(lean: float, scale: Sequence[Sequence[float]]) -> Oracle:
    """Two of three, in units of ``scale``, means and standard deviations of the attributes; ``lean`` from 0 to 1."""
    mean, deviation = np.array(scale)

    def profiles(texts: Sequence[str]) -> Any:
        z = (np.array([attributes(text) for text in texts]) - mean) / deviation
        return z - lean * z.mean(axis=1, keepdims=True)

    def compare(_: Any, a: Sequence[str], b: Sequence[str]) -> list[float]:
        balance = np.sign(np.round(profiles(a) - profiles(b), 12)).sum(axis=1)
        return [float(value) for value in (np.sign(balance) + 1) / 2]

    name = f"two of {', '.join(ATTRIBUTES)}, lean {lean:g}, {digest(np.array(scale))[:8]}"
    return Oracle(compare, name, antisymmetric=True)


def openings(n: int, *, held_out: bool) -> list[dict[str, Any]]:
    """The first ``n`` openings; the held-out ones share neither name nor opening with the others."""
    names, texts = (NAMES[8:], OPENINGS[8:]) if held_out else (NAMES[:8], OPENINGS[:8])
    every = [text.format(name) for k in range(len(names)) for text, name in zip(texts, np.roll(names, k), strict=False)]
    if n > len(every):
        raise SystemExit(f"There are {len(every)} such openings; {n} were asked for.")
    return [{"prompt": user(text)} for text in every[:n]]


def settings_of(method: str, given: argparse.Namespace) -> COMALSettings:
    plain = COMALSettings(
        eta=given.eta,
        ref_weight=given.ref_weight,
        outer_steps=given.outer,
        inner_steps=given.inner,
        num_candidates=given.candidates,
        max_new_tokens=given.tokens,
        anchor_nll=given.anchor,
        learning_rate=given.rate,
        epochs=given.epochs,
        batch_size=given.batch,
        seed=given.seed,
    )
    if method == "comal":
        return plain
    if method == "inpo":
        return replace(plain, outer_steps=1, inner_steps=given.outer * given.inner)
    moving = replace(plain, ref_weight=0.0, tau=None)
    if method == "ipo":
        return moving
    # The logistic loss curves by 1/(4 eta^2) where the squared one curves by 2: the anchor weighs as much beside it.
    return replace(moving, inner_loss="dpo", anchor_nll=given.anchor / (8 * given.eta**2))


def draw(
    policy: LanguagePolicy, start: LanguagePolicy, examples: Sequence[Any], given: argparse.Namespace, file: Path
) -> list[dict[str, Any]]:
    """Continuations of each opening by the policy as it is, from ``file`` if they are there, and their log-ratios."""
    if not file.exists():
        chosen = replace(settings_of("comal", given), num_candidates=given.answers)
        prompts = [policy.prompt_tokens(example["prompt"]) for example in examples]
        found = policy.sample(prompts, chosen, given.seed + 1000)
        rows = [(prompt, answer.tokens) for prompt, answers in zip(prompts, found, strict=True) for answer in answers]
        own, before = (p.log_probs([x for x, _ in rows], [y for _, y in rows], chosen) for p in (policy, start))
        ratios = (own - before).reshape(len(found), -1)
        save_lines(
            file,
            [
                {"answers": [answer.text for answer in answers], "log_ratios": ratio.tolist()}
                for answers, ratio in zip(found, ratios, strict=True)
            ],
        )
    return list(load_lines(file))


def circles(oracle: Oracle, examples: Sequence[Any], answers: Sequence[Sequence[str]]) -> float | None:
    """Share of triples of continuations of one opening that go in a circle."""
    tables = []
    for example, texts in zip(examples, answers, strict=True):
        places = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j]
        said = ask(oracle, [example] * len(places), [texts[i] for i, _ in places], [texts[j] for _, j in places])
        P = np.full((len(texts), len(texts)), np.nan)
        for (i, j), verdict in zip(places, said, strict=True):
            P[i, j] = np.nan if verdict.preference is None else verdict.preference
        tables.append(P)
    return cyclic_share(tables)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a small model of stories")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; rerun the same command to resume")
    parser.add_argument("--lean", type=float, default=0.4, help="0: plain majority; 1: rock, paper, scissors")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=32, help="openings trained on")
    parser.add_argument("--held-out", type=int, default=16, help="openings judged on")
    parser.add_argument("--answers", type=int, default=32, help="continuations of each held-out opening")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--outer", type=int, default=3)
    parser.add_argument("--inner", type=int, default=4)
    parser.add_argument("--eta", type=float, default=10.0)
    parser.add_argument("--ref-weight", type=float, default=0.25)
    parser.add_argument("--anchor", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.model = str(Path(given.model).resolve())
    train, held_out = openings(given.prompts, held_out=False), openings(given.held_out, held_out=True)
    given.out.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in vars(given).items() if name not in ("out", "methods")}
    if (given.out / "settings.json").exists() and load_json(given.out / "settings.json") != about:
        raise SystemExit(f"{given.out} was made with other settings; give another --out.")
    save_json(given.out / "settings.json", about)

    start = load_policy(given.model, template="continuation")
    start.rows_per_forward = 512
    own = draw(start, start, train, given, given.out / "attributes.jsonl")
    values = np.array([attributes(text) for row in own for text in row["answers"]])
    scale = [values.mean(0).tolist(), values.std(0).tolist()]
    oracle = oracle_of(given.lean, scale)
    answers: dict[str, list[list[str]]] = {}
    moved: dict[str, Estimate] = {}
    reached: dict[str, Any] = {}
    earlier: dict[str, list[list[str]]] = {}
    for method in given.methods:
        began = time.perf_counter()
        policy = load_policy(given.model, template="continuation")
        policy.rows_per_forward = 512
        if method != "sft":
            run_comal(policy, train, oracle, settings_of(method, given), given.out / method)
            reached[method] = summarise(given.out / method)
        drawn = draw(policy, start, held_out, given, given.out / f"answers-{method}.jsonl")
        answers[method] = [row["answers"] for row in drawn]
        labels = [i for i, row in enumerate(drawn) for _ in row["answers"]]
        moved[method] = mean_estimate(np.concatenate([row["log_ratios"] for row in drawn]), labels)
        print(f"{method}: {time.perf_counter() - began:.0f} s", flush=True)

    # Methods that are not held back go further in as many steps: their earlier policies tell distance from direction.
    for method in [name for name in ("dpo", "ipo") if "comal" in given.methods and name in given.methods]:
        for t in range(1, given.outer):
            policy = load_policy(given.model, template="continuation")
            policy.rows_per_forward = 512
            policy.load(given.out / method / f"outer-{t:02d}/inner-{given.inner:02d}/policy")
            label = f"{method} after {t * given.inner} steps"
            rows = draw(policy, start, held_out, given, given.out / f"answers-{method}-{t}.jsonl")
            earlier[label] = [row["answers"] for row in rows]
            labels = [i for i, row in enumerate(rows) for _ in row["answers"]]
            moved[label] = mean_estimate(np.concatenate([row["log_ratios"] for row in rows]), labels)

    examples = [example for example in held_out for _ in range(given.answers)]
    group = [i for i in range(len(held_out)) for _ in range(given.answers)]
    flat = {name: [text for texts in found for text in texts] for name, found in answers.items()}
    rates = win_rate_matrix(flat, examples, oracle, group=group)
    nash = rates.nash()
    print(f"\nwin rates, {len(held_out)} openings x {given.answers} continuations, intervals by opening\n")
    print(markdown(*matrix_rows(rates)))
    print(f"\nempirical Nash mixture ({'unique' if nash.unique else 'one of several'})\n")
    print(markdown(*nash_rows(nash)))
    facts = []
    for name in answers:
        z = (np.array([attributes(text) for text in flat[name]]) - scale[0]) / np.array(scale[1])
        circle = circles(oracle, held_out, answers[name])
        distinct = len(set(flat[name])) / len(flat[name])
        last = reached[name]["updates"][-1] if name in reached else None
        seconds = f"{reached[name]['seconds']:.0f}" if name in reached else "-"
        facts.append(
            [
                name,
                *(f"{value:+.2f}" for value in z.mean(0)),
                "-" if circle is None else f"{100 * circle:.1f} %",
                f"{100 * distinct:.0f} %",
                f"{moved[name].value:.2f} [{moved[name].low:.2f}, {moved[name].high:.2f}]",
                "-" if last is None else f"{100 * last['achieved']:.0f} %",
                "-" if last is None else f"{sum(u['drift'] for u in reached[name]['updates']):+.1f}",
                "-" if last is None else f"{min(u['mass'] for u in reached[name]['updates']):.2f}",
                seconds,
            ]
        )
    head = ["policy", *ATTRIBUTES, "circles", "distinct", "KL from sft", "achieved", "drift", "mass", "seconds"]
    print("\nmeans in the start's standard deviations; triples of its continuations that go in a circle\n")
    print(markdown(head, facts))
    if "comal" in reached:
        print("\nCOMAL by update\n")
        print(markdown(*update_rows(reached["comal"])))
    against: dict[str, Estimate] = {}
    for name, found in (earlier | {name: answers[name] for name in answers if name != "comal"}).items():
        if earlier:
            both = {"comal": flat["comal"], name: [text for texts in found for text in texts]}
            against[name] = win_rate_matrix(both, examples, oracle, group=group).intervals[0][1]
    if against:
        print(f"\nCOMAL ({moved['comal'].value:.1f} nats from sft) against policies by their distance\n")
        ordered = sorted(against, key=lambda name: moved[name].value)
        cells = [
            [name, *(f"{e.value:.1f} [{e.low:.1f}, {e.high:.1f}]" for e in (moved[name], against[name]))]
            for name in ordered
        ]
        print(markdown(["opponent", "KL from sft, nats", "COMAL wins, %"], cells))
    plain = {
        "names": rates.names,
        "percent": rates.percent.tolist(),
        "intervals": [[asdict(cell) for cell in row] for row in rates.intervals],
        "averages": [asdict(cell) for cell in rates.averages],
        "nash": nash.mixture,
        "gap": nash.gap,
        "facts": facts,
        "kl": {name: asdict(value) for name, value in moved.items()},
        "comal_against": {name: asdict(value) for name, value in against.items()},
        "settings": about,
    }
    print(json.dumps(plain))


if __name__ == "__main__":
    main()
