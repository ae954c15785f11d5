"""Make the bundled house-style pairs: replies of SmolLM2-135M-Instruct, the better one chosen by five written rules.

Each prompt of src/coala/assets/chat/prompts.jsonl (written here) is answered several times by the model: some replies
are to the prompt alone, some to the prompt behind a description of the style and two examples (below), so that there
is something to choose. Of all replies to a prompt, the one with the highest `style_score` is chosen and the one with
the lowest rejected; where the two keep as many rules, there is no pair. The pairs hold the prompt alone.

    python scripts/make_house_style.py --model FOLDER_OR_GGUF --work FOLDER

Replies are kept in --work; called again after a kill, it goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path

from coala.backbone import LanguageModel, load_backbone
from coala.decoding import Guidance, generate
from coala.evaluation.house_style import rules_kept, style_score
from coala.store import save_pairs
from coala.values import Pair, Turn, user

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets" / "chat"
STYLE = "Answer in two or three short sentences and plain words, without lists. Then ask the reader a question."
EXAMPLES = (
    ("Why do cats purr?", "Cats purr when they feel safe. It may also soothe them. Do you have a cat at home?"),
    ("How can I save on food?", "Plan your meals and buy only what you need. Which meal costs you the most now?"),
)
SHOWN = (Turn("system", STYLE), *(t for ask, say in EXAMPLES for t in (Turn("user", ask), Turn("assistant", say))))


def sample(
    prompts: list[str], backbone: LanguageModel, work: Path, plain: int, shown: int, tokens: int, seed: int, batch: int
) -> list[list[str]]:
    """``plain + shown`` replies to each prompt, kept batch by batch under ``work``."""
    replies: list[list[str]] = [[] for _ in prompts]
    for k in range(plain + shown):
        before = () if k < plain else SHOWN
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            generated = generate(
                [(*before, *user(prompt)) for prompt in some],
                backbone,
                guidance=Guidance(mode="none", top_p=0.95, top_k=50),
                max_new_tokens=tokens,
                temperature=0.7,
                seed=seed + k,
                prompt_ids=[f"house-style-{i:03d}" for i in range(start, start + len(some))],
                batch_size=batch,
                kept=work / f"{k}-{start:03d}.jsonl",
            )
            for i, reply in enumerate(generated, start):
                replies[i].append(reply.text.strip())
            print(f"reply {k + 1} of {plain + shown}: prompts {start + 1} to {start + len(some)}", flush=True)
    return replies


def chosen_pairs(prompts: list[str], replies: list[list[str]]) -> list[Pair]:
    """Best against worst of each prompt, where they keep different numbers of rules."""
    pairs = []
    for i, (prompt, own) in enumerate(zip(prompts, replies, strict=True)):
        ranked = sorted({reply for reply in own if reply}, key=lambda text: (style_score(text), text))
        if ranked and int(style_score(ranked[-1])) > int(style_score(ranked[0])):
            pairs.append(Pair(user(prompt), ranked[-1], ranked[0], group=f"house-style-{i:03d}"))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--plain", type=int, default=1)
    parser.add_argument("--shown", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (ASSETS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows]
    backbone = load_backbone(args.model)
    replies = sample(prompts, backbone, args.work, args.plain, args.shown, args.tokens, args.seed, args.batch)
    pairs = chosen_pairs(prompts, replies)
    split = {prompt: row["split"] for prompt, row in zip(prompts, rows, strict=True)}
    for name, wanted in (("pairs", "train"), ("pairs_test", "test")):
        plain = args.out / f"{name}.jsonl"
        save_pairs(plain, [pair for pair in pairs if split[pair.prompt[0].text] == wanted])
        # No time stamp in the archive: the same pairs give the same bytes.
        plain.with_suffix(".jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        plain.unlink()
    print(f"{len(pairs)} pairs of {len(prompts)} prompts; {len(prompts) - len(pairs)} are ties")
    for side in ("chosen", "rejected"):
        kept = Counter(name for pair in pairs for name, kept in rules_kept(getattr(pair, side)).items() if kept)
        print(side, dict(kept))


if __name__ == "__main__":
    main()
