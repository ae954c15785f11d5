"""The stages one by one: read, split, extract, fit, measure; nothing is written."""

from importlib.resources import files

import coala

assets = files("coala") / "assets"
pairs = list(coala.read_pairs(str(assets / "film_pairs.jsonl.gz")))[:160]
train, held_out = coala.split_pairs(pairs, 0.25, seed=0)  # by whole groups: no film is on both sides

backbone = coala.load_backbone(str(assets / "film-lm"), template="chat")
spec = backbone.spec(layer=-1, pooling="mean")
seen, unseen = (coala.extract_features(some, backbone, spec) for some in (train, held_out))
print(f"features: {len(seen)} and {len(unseen)} pairs of {seen.width} numbers")

head = coala.fit_head(seen, method="linear").head  # without `method`, gates compete with the linear head
print(head.certificate)

scores = (head.score(side) for side in (unseen.chosen, unseen.rejected))
print("held-out ranking accuracy:", coala.ranking_accuracy(*scores, unseen.group))
