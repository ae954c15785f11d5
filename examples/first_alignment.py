"""Pairs in, a certified head, and guided next to unguided replies: the whole line on a part of the bundled data."""

from importlib.resources import files

import coala

assets = files("coala") / "assets"
pairs = list(coala.read_pairs(str(assets / "film_pairs.jsonl.gz")))[:160]

run = coala.align(
    pairs,
    model=str(assets / "film-lm"),
    out="runs/example",
    model_settings={"template": "chat"},
    head={"method": "linear"},  # the quickest; without it, gates compete with the linear head
    evaluation={"prompts": 0},  # no replies for the report: it is quicker
)
print(run.head.certificate.statement)

prompt = pairs[0].prompt
unguided = run.guidance.changed(mode="none")
for name, guidance in (("unguided", unguided), ("guided", run.guidance)):
    (reply,) = run.generate([prompt], guidance, max_new_tokens=24)
    print(f"{name:>9} (score {reply.score:+.2f}): {reply.text.strip()}")
