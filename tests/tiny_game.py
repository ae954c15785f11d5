"""A language model of eight words that answers two prompts with one word: small enough to know every probability."""

from __future__ import annotations

from typing import Any

import numpy as np

from coala.comal.llm import LanguagePolicy
from coala.comal.settings import COMALSettings
from coala.nash import PreferenceGame
from coala.values import user

ANSWERS = ("a", "b", "c")
START = np.array([0.2, 0.5, 0.3])
PAPER = np.array([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]])
RPS = 0.5 + 0.8 * np.array([[0, -0.5, 0.3], [0.5, 0, -0.2], [-0.3, 0.2, 0]])  # Nash (.2, .3, .5)
GAME = PreferenceGame({"q1": PAPER, "q2": RPS}, labels=list(ANSWERS))
EXAMPLES = [{"prompt": user("q1")}, {"prompt": user("q2")}]
# A step close to its minimiser: 124,750 pairs a prompt in the weights of three, 60 updates by all of them.
EXACT = COMALSettings(
    eta=2,
    ref_weight=1 / 3,
    outer_steps=2,
    inner_steps=6,
    num_candidates=500,
    pair_selection="all",
    max_new_tokens=2,
    learning_rate=3e-3,
    epochs=60,
    batch_size=64,
)


def new_model(seed: int = 0) -> tuple[Any, Any]:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "q1", "q2", *ANSWERS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


def supervised_start() -> tuple[Any, Any]:
    """The model after supervised training to (.2, .5, .3) on both prompts, by the expected loss itself."""
    import torch

    model, tokenizer = new_model()
    rows = torch.tensor([[q, a, 1] for q in (3, 4) for a in (5, 6, 7)])
    weight = torch.tensor([*START, *START], dtype=torch.float32) / 2
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    steps = 300
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0.01, steps)
    for _ in range(steps):
        log_p = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
        loss = -(weight * log_p.gather(2, rows[:, 1:, None])[..., 0].sum(1)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return model, tokenizer


def copy_of(start: tuple[Any, Any], **options: Any) -> LanguagePolicy:
    model, _ = new_model()
    model.load_state_dict(start[0].state_dict())
    return LanguagePolicy(model, start[1], name="tiny", template="continuation", rows_per_forward=1000, **options)


def distribution(policy: LanguagePolicy) -> tuple[Any, Any]:
    """P(answer | prompt) (2, 3) given that it is one of the three, and the mass of these (2,)."""
    found = policy.log_probs([[q] for q in (3, 4) for _ in ANSWERS], [[a, 1] for _ in (3, 4) for a in (5, 6, 7)], EXACT)
    p = np.exp(found).reshape(2, 3)
    return p / p.sum(1, keepdims=True), p.sum(1)
