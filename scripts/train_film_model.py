"""Train the bundled film-review language model from scratch: byte-level BPE, then a small Llama.

Knows the review file and writes a Hugging Face folder; knows nothing of preferences. Run once, by hand; the product of
the run is committed under ``src/coala/assets/film-lm``.

    python scripts/train_film_model.py REVIEWS.jsonl.gz --test REVIEWS_TEST.jsonl.gz --out DIR [--steps N]

A killed run continues from its last checkpoint (``OUT/checkpoint.pt``, every 200 steps) with the same batches.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


def read_reviews(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [row["text"].replace("<br />", "\n").replace("\n\n", "\n").strip() for row in rows]


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str], seed: int) -> np.ndarray:
    """All reviews in a fixed random order, each preceded by the end token (it also opens a review)."""
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = tokenizer.encode_batch([texts[i] for i in order])
    end = tokenizer.token_to_id(END)
    return np.concatenate([np.array([end, *e.ids], dtype=np.int32) for e in encoded])


def bits_per_character(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str], context: int) -> float:
    """Total next-token bits over the texts' characters; each text cut at the model's context."""
    bits, characters = 0.0, 0
    end = tokenizer.token_to_id(END)
    with torch.no_grad():
        for text in texts:
            ids = tokenizer.encode(text).ids[: context - 1]
            row = torch.tensor([[end, *ids]])
            log_probs = model(row).logits[0, :-1].log_softmax(-1)
            bits -= log_probs.gather(1, row[0, 1:, None]).sum().item() / math.log(2)
            characters += len(tokenizer.decode(ids))
    return bits / characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop-after", type=int, help="stop here without finishing (to time a few steps)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    texts = read_reviews(args.reviews)
    tokenizer_file = args.out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(texts, args.vocabulary).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    end = tokenizer.token_to_id(END)
    stream = torch.from_numpy(token_stream(tokenizer, texts, args.seed)).long()
    print(f"{len(texts)} reviews, {len(stream)} tokens, {sum(map(len, texts)) / len(stream):.2f} characters per token")

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    # The library's padding row is zeroed and left out of the gradient; here that token also opens a review.
    model.model.embed_tokens.padding_idx = None
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    # Muon for the blocks' matrices (fewer steps than AdamW to the same loss), AdamW for embeddings and norms.
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not b for b in blocks)]
    optimizers = [
        torch.optim.Muon(blocks, lr=args.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return args.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    forward = torch.compile(model)  # fuses the element-wise work, which is half the time on a CPU

    checkpoint = args.out / "checkpoint.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start = saved["step"]
    began, seen = time.monotonic(), 0
    for step in range(start, args.steps):
        # Batches are a function of (seed, step), so that a resumed run sees what an unbroken one would.
        offsets = np.random.default_rng([args.seed, step]).integers(0, len(stream) - args.context - 1, args.batch)
        rows = torch.stack([stream[o : o + args.context + 1] for o in offsets])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        logits = forward(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seen += rows[:, 1:].numel()
        if step % 20 == 0:
            speed = seen / (time.monotonic() - began)
            left = (args.steps - step) * args.batch * args.context / speed / 60
            print(f"step {step} loss {loss.item():.4f} {speed:,.0f} tokens/s, {left:.0f} min left", flush=True)
        if args.stop_after and step + 1 - start >= args.stop_after:
            return
        if (step + 1) % 200 == 0:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    model.eval()
    # Stored in half precision (half the bytes); what is measured below is the stored model.
    model.half().save_pretrained(args.out)
    # The chat template says that a reply continues its prompt, letter for letter.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=args.context
    )
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(args.out)
    stored = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    test = read_reviews(args.test)[:500]
    result = {
        "tokens_seen": args.steps * args.batch * args.context,
        "test_reviews": len(test),
        "bits_per_character": round(bits_per_character(stored, tokenizer, test, args.context), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
