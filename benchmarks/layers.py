"""Which hidden state to read: the layer that validation picks, and the last token, against the mean at the last layer.

    python benchmarks/layers.py [--data ../shared/data] [--out runs/layers]

For every data set and model: the cheapest layer within the noise of the best on a sample of the training pairs
(``coala.alignment.layer_choice``), then features of all training and test pairs at that layer, and at the last layer
with both poolings, from one pass; a linear head on each. Differences are paired over the test pairs, by group. Prints a
table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "hh_rlhf_harmless": ("train", "test"),
    "mrbench": ("pairs_train", "pairs_test"),
    "ultrafeedback_sample": ("train", "test"),
    "alpaca_eval_pairs": ("train", "test"),
}
MODELS = ("stories260K-hf", "craftgpt-5m-hf", "film-lm")


def cell(data: Path, name: str, model: str, most: int) -> dict[str, Any]:
    import numpy as np

    from coala.alignment.layer_choice import choose_layer
    from coala.backbone import load_backbone
    from coala.convex import fit
    from coala.data import check
    from coala.features import extract
    from coala.statistics.scores import accuracy_difference, accuracy_of_margins

    folder = ROOT / "src" / "coala" / "assets" / model if model == "film-lm" else data / "models" / model
    backbone = load_backbone(folder, device="cpu")
    train, test = (check([str(data / name / f"{part}.jsonl.gz")]).pairs[:most] for part in SETS[name])
    choice = choose_layer(train, backbone, backbone.spec())
    chosen = choice.layer
    specs = {
        "mean, last layer": backbone.spec(),
        "last token, last layer": backbone.spec(pooling="last"),
        f"mean, picked layer {chosen}": backbone.spec(layer=chosen),
    }
    parts = [extract(pairs, backbone, list(specs.values())) for pairs in (train, test)]
    margins = {}
    for (label, _), fitted, held_out in zip(specs.items(), *parts, strict=True):
        margins[label] = fit(fitted, method="linear").head.margins(held_out).astype(float)
    group = parts[1][0].group
    labels = list(specs)
    return {
        "data": name,
        "model": model,
        "train": len(train),
        "test": len(test),
        "layers": choice.to_dict()["scores"],
        "layer": chosen,
        "of": backbone.n_layers,
        "accuracy": {label: vars(accuracy_of_margins(m, group)) for label, m in margins.items()},
        "against_mean": {
            label: vars(accuracy_difference(margins[label], margins[labels[0]], group)) for label in labels[1:]
        },
        "nll": {label: float(np.logaddexp(0, -m).mean()) for label, m in margins.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "layers")
    parser.add_argument("--pairs", type=int, default=100_000, help="pairs of each file at most")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    if not args.data.exists():
        print(f"{args.data} is not there: nothing to measure")
        print(json.dumps({"skipped": f"{args.data} is not there"}))
        return
    from coala.store import load_json, save_json

    rows = []
    print("| data | model | layer (cost) | mean, last layer | last token - mean | mean at that layer - last layer |")
    print("|---|---|---|---|---|---|")
    for name in SETS:
        for model in args.models:
            kept = args.out / f"{name}-{model}-{args.pairs}.json"
            if not kept.exists():
                save_json(kept, cell(args.data, name, model, args.pairs))
            row = load_json(kept)
            first = row["accuracy"]["mean, last layer"]
            last, picked = row["against_mean"].values()
            print(
                f"| {name} | {model} | {row['layer']} of {row['of']} ({100 * row['layer'] / row['of']:.0f} %) | "
                f"{first['value']:.3f} [{first['low']:.3f}, {first['high']:.3f}], n = {first['n']} | "
                + " | ".join(
                    f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" for d in (last, picked)
                )
                + " |",
                flush=True,
            )
            rows.append(row)
    print(json.dumps({"benchmark": "layers", "rows": rows}), file=sys.stdout)


if __name__ == "__main__":
    main()
