"""Pairs as rows of TRL's preference format, and back; `datasets.Dataset.from_list(rows)` makes a data set of them."""

from importlib.resources import files

import coala

pairs = list(coala.read_pairs(str(files("coala") / "assets" / "film_pairs.jsonl.gz")))[:5]
rows = [pair.to_trl() for pair in pairs]
print(rows[0])
assert [coala.Pair.from_trl(row) for row in rows] == pairs

# What TRL honours and no head could learn is refused, not dropped.
try:
    coala.Pair.from_trl({**rows[0], "tools": [{"name": "search"}]})
except coala.CoalaError as error:
    print(error)
