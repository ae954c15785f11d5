"""Make the bundled film task: a labelling scorer, an independent judge, neutral prompts, and preference pairs.

The controlled-sentiment setting of the DPO paper with the bundled film-review model: the model continues neutral film
prompts (written here), and of two continuations the one that a labelling scorer finds more positive is chosen. The
judge shares neither a word nor a training review with the labeller: words are dealt to the two by the parity of their
SHA-256, films likewise. Both rules were fixed before any guided text was judged.

    python scripts/make_film_task.py scorers REVIEWS.jsonl.gz --test REVIEWS_TEST.jsonl.gz
    python scripts/make_film_task.py pairs
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
PATTERN = r"[a-z]+(?:'[a-z]+)?"
WINDOW = 60  # words: the length of the texts the scorers are for

OPENINGS = """
This film is about {who} {what}.
The story follows {who} {what}.
I watched this movie last night. It is about {who} {what}.
In this picture we meet {who} {what}.
Set in a small town, the film tells of {who} {what}.
The plot is simple: {who} {what}.
We saw this one on television. It has {who} {what}.
It is an old story about {who} {what}.
""".strip().split("\n")
SUBJECTS = """
a retired detective
a young violin teacher
two brothers
a lighthouse keeper
a night nurse
a country doctor
an unknown painter
a taxi driver
a widow from the coast
a group of students
a former soldier
a travelling salesman
a village priest
a radio announcer
three old friends
a chess player
a bank clerk
a circus family
a lonely translator
a train conductor
a dance instructor
a small-time thief
a school principal
a fishing captain
""".strip().split("\n")
EVENTS = """
on the way home after many years
with a secret to keep
in search of a lost letter
who must sell the family house
and a stranger who moves in next door
who inherits an empty theatre
during one long winter
who witnesses a robbery
and a child left at the door
caught between two families
who agrees to one last job
on a journey across the country
who wakes up without a memory
and the summer that changed everything
hiding from the past
who finds a map in an attic
preparing for a wedding
trapped in a hotel by a storm
""".strip().split("\n")
ENDINGS = """
I thought
The acting
To me, this film
The script
As for the story, it
When it was over I
The lead actor
The director
Overall, this is
The whole thing
The dialogue
By the end
Most of the scenes
What I remember is
""".strip().split("\n")


def belongs_to_judge(name: str) -> bool:
    """The fair coin that deals words and films to the labeller or the judge."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 1


def read_reviews(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def windows(text: str) -> list[list[str]]:
    words = re.findall(PATTERN, text.replace("<br />", " ").lower())
    return [words[i : i + WINDOW] for i in range(0, max(1, len(words) - WINDOW // 2), WINDOW)]


def counts(rows: list[list[str]], index: dict[str, int]) -> scipy.sparse.csr_matrix:
    """Share of each known word among all words of a row: the WordJudge's features."""
    row_ids, columns, values = [], [], []
    for i, row in enumerate(rows):
        for word in row:
            if word in index:
                row_ids.append(i)
                columns.append(index[word])
                values.append(1.0 / len(row))
    return scipy.sparse.csr_matrix((values, (row_ids, columns)), shape=(len(rows), len(index)))


def fit_logistic(x: scipy.sparse.csr_matrix, y: np.ndarray, ridge: float) -> np.ndarray:
    """Weights and bias (last) of ridge logistic regression; y is +-1."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = y * (x @ w[:-1] + w[-1])
        slope = -y / (1 + np.exp(margin)) / len(y)
        gradient = np.append(x.T @ slope + ridge * w[:-1], slope.sum())
        return float(np.logaddexp(0, -margin).mean() + ridge / 2 * w[:-1] @ w[:-1]), gradient

    start = np.zeros(x.shape[1] + 1)
    return scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x


def make_scorers(reviews: Path, test: Path) -> None:
    train_rows, test_rows = read_reviews(reviews), read_reviews(test)
    frequency = Counter(w for r in train_rows for w in set(re.findall(PATTERN, r["text"].lower())))
    for name, mine in (("film-labeller", False), ("film-judge", True)):
        words = sorted(w for w, k in frequency.items() if k >= 40 and belongs_to_judge(w) == mine)
        index = {word: i for i, word in enumerate(words)}
        texts, labels = [], []
        for row in train_rows:
            if belongs_to_judge(row["movie"]) == mine:
                pieces = windows(row["text"])
                texts += pieces
                labels += [1.0 if row["label"] else -1.0] * len(pieces)
        weights = fit_logistic(counts(texts, index), np.array(labels), ridge=1e-7)
        held_out = [(p, row["label"]) for row in test_rows for p in windows(row["text"])[:1]]
        scores = counts([p for p, _ in held_out], index) @ weights[:-1] + weights[-1]
        accuracy = float(np.mean((scores > 0) == np.array([bool(label) for _, label in held_out])))
        about = (
            f"Logistic regression on word shares: {len(words)} words, {len(texts)} windows of {WINDOW} words from film "
            f"reviews; accuracy {accuracy:.3f} on the first window of {len(held_out)} held-out reviews. It shares no "
            f"word and no film with {'film-labeller' if mine else 'film-judge'}."
        )
        kept = {word: round(float(w), 2) for word, w in zip(words, weights[:-1], strict=True)}
        document = {"name": name, "about": about, "pattern": PATTERN, "bias": round(float(weights[-1]), 3)}
        (ASSETS / f"{name}.json").write_text(json.dumps({**document, "weights": kept}, indent=0) + "\n")
        print(name, about)


def prompts(seed: int) -> list[str]:
    """All prompts in a fixed random order; any two differ in at least one part."""
    everything = list(itertools.product(OPENINGS, SUBJECTS, EVENTS, ENDINGS))
    order = np.random.default_rng(seed).permutation(len(everything))
    return [f"{o.format(who=s, what=e)} {end}" for o, s, e, end in (everything[i] for i in order)]


def make_pairs(
    model: Path, out: Path, train_prompts: int, test_prompts: int, samples: int, tokens: int, seed: int
) -> None:
    from coala.backbone import load_backbone
    from coala.decoding import Guidance, generate
    from coala.evaluation import WordJudge
    from coala.store import save_pairs
    from coala.values import Pair, user

    backbone = load_backbone(str(model))
    labeller = WordJudge.load(ASSETS / "film-labeller.json")
    chosen_prompts = prompts(seed)[: train_prompts + test_prompts]
    replies: list[list[str]] = [[] for _ in chosen_prompts]
    for sample in range(samples):
        generated = generate(
            [user(p) for p in chosen_prompts],
            backbone,
            guidance=Guidance(mode="none"),
            max_new_tokens=tokens,
            seed=seed + sample,
            batch_size=64,
        )
        for i, generation in enumerate(generated):
            replies[i].append(generation.text)
        print(f"sample {sample + 1}/{samples}", flush=True)
    pairs: list[Pair] = []
    for i, prompt in enumerate(chosen_prompts):
        ranked = sorted({r for r in replies[i] if r.strip()}, key=labeller.score, reverse=True)
        # Best against worst, second best against second worst, ...: every text is used once.
        for better, worse in zip(ranked[: len(ranked) // 2], ranked[::-1], strict=False):
            if labeller.score(better) > labeller.score(worse):
                pairs.append(Pair(user(prompt), better, worse, group=f"film-{i:04d}"))
    train = {f"film-{i:04d}" for i in range(train_prompts)}
    for name, wanted in (("film_pairs", True), ("film_pairs_test", False)):
        plain = out / f"{name}.jsonl"
        save_pairs(plain, [p for p in pairs if (p.group in train) == wanted])
        # No time stamp in the archive: the same pairs give the same bytes.
        plain.with_suffix(".jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        plain.unlink()
    print(len(pairs), "pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scorers = commands.add_parser("scorers")
    scorers.add_argument("reviews", type=Path)
    scorers.add_argument("--test", type=Path, required=True)
    pairs = commands.add_parser("pairs")
    pairs.add_argument("--model", type=Path, default=ASSETS / "film-lm")
    pairs.add_argument("--out", type=Path, default=ASSETS)
    pairs.add_argument("--train-prompts", type=int, default=300)
    pairs.add_argument("--test-prompts", type=int, default=200)
    pairs.add_argument("--samples", type=int, default=8)
    pairs.add_argument("--tokens", type=int, default=48)
    pairs.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "scorers":
        make_scorers(args.reviews, args.test)
    else:
        make_pairs(args.model, args.out, args.train_prompts, args.test_prompts, args.samples, args.tokens, args.seed)


if __name__ == "__main__":
    main()
