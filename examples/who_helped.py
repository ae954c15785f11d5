"""Which pairs moved the head most, and what leaving them out would do; the run is that of first_alignment.py."""

from importlib.resources import files
from pathlib import Path

import coala

out = Path("runs/example")
if not (out / "head").is_dir():
    assets = files("coala") / "assets"
    pairs = list(coala.read_pairs(str(assets / "film_pairs.jsonl.gz")))[:160]
    settings = {"model_settings": {"template": "chat"}, "head": {"method": "linear"}, "evaluation": {"prompts": 0}}
    coala.align(pairs, model=str(assets / "film-lm"), out=out, **settings)

found = coala.pair_influence(out, metric="loss", top=3)
for side in ("raises", "lowers"):
    print(f"without it, the held-out loss {side.removesuffix('s')}s most:")
    for one in found[side]["listed"]:
        print("   ", one)
