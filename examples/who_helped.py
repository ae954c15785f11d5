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
print(f"{found['title']}: {found['value']:.4f}")
for way, listed in found["lists"].items():
    print(f"leaving one of these pairs out {way} it most; no other pair does more than {listed['outside']:.4f}:")
    for row in listed["rows"]:
        print(f"    {row['name']}: {row['effect']:+.4f}  {row['chosen'][:60]!r}")
