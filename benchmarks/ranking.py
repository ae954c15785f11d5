"""Ranking accuracy of the default head beside a linear Bradley-Terry probe on the same features, on real pairs.

    python benchmarks/ranking.py --data ../shared/data --out runs/ranking

Runs `coala align` for every data set and model (a finished run is not repeated) and fits the probe of the tests (ridge
by grouped cross-validation, SciPy) on the saved features. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from coala.statistics.scores import accuracy_difference, ranking_accuracy  # noqa: E402
from coala.store import load_features, load_head  # noqa: E402
from tests.reference import linear_probe  # noqa: E402

SETS = {
    "hh_rlhf_harmless": ("train", "test"),
    "mrbench": ("pairs_train", "pairs_test"),
    "ultrafeedback_sample": ("train", "test"),
    "alpaca_eval_pairs": ("train", "test"),
}
MODELS = ("stories260K-hf", "craftgpt-5m-hf")
FILM = ROOT / "src" / "coala" / "assets" / "film-lm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ranking")
    parser.add_argument("--sets", nargs="+", choices=(*SETS, "imdb"), default=[*SETS, "imdb"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="for all sets but imdb")
    args = parser.parse_args()
    if not args.data.exists():
        print(f"{args.data} is not there: nothing to measure")
        print(json.dumps({"skipped": f"{args.data} is not there"}))
        return
    jobs = [(s, args.data / "models" / m, files) for s, files in SETS.items() if s in args.sets for m in args.models]
    jobs += [("imdb", FILM, ("train", "test"))] if "imdb" in args.sets else []
    rows = []
    print(f"{'data':<22}{'model':<16}{'train':>6}{'eval':>6}  {'head':<34}{'probe':>6}  difference (head - probe)")
    for name, model, (train, test) in jobs:
        run = args.out / f"{name}-{model.name}"
        files = [str(args.data / name / f"{part}.jsonl.gz") for part in (train, test)]
        command = [
            "align",
            files[0],
            "--eval",
            files[1],
            "--model",
            str(model),
            "--out",
            str(run),
            "--prompts",
            "4",
            "--skip-bad",
        ]
        done = subprocess.run([sys.executable, "-m", "coala", *command], stdout=subprocess.PIPE, text=True, check=True)
        summary = json.loads(done.stdout.strip().split("\n")[-1])
        fit_on, held_out = load_features(run / "features/train"), load_features(run / "features/eval")
        head = load_head(run / "head")
        margins = head.score(held_out.chosen) - head.score(held_out.rejected)
        probe = linear_probe(fit_on, held_out)
        ours, theirs = ranking_accuracy(margins, np.zeros_like(margins), held_out.group), float(np.mean(probe > 0))
        difference = accuracy_difference(margins, probe, held_out.group)
        row = {
            "data": name,
            "model": model.name,
            "n_train": len(fit_on),
            "n_eval": len(held_out),
            "head": [ours.value, ours.low, ours.high],
            "probe": theirs,
            "n_neurons": head.n_neurons,
            "difference": [difference.value, difference.low, difference.high],
            "seconds": summary["seconds"],
        }
        rows.append(row)
        print(
            f"{name:<22}{model.name:<16}{len(fit_on):>6}{len(held_out):>6}  {ours!s:<34}{theirs:>6.3f}  "
            f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]  {head.n_neurons} neurons",
            flush=True,
        )
    print(json.dumps({"rows": rows, "worst": min(row["difference"][0] for row in rows)}))


if __name__ == "__main__":
    main()
