"""The small things every contract test runs over. A new object joins here and inherits the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

# --- tiny backbones: random weights and a real tokenizer, written to a folder as a user's model would be ------------

TEXT = (
    "the quick brown fox jumps over the lazy dog. a good film is a good friend, and a bad film is a long evening. "
    "tell me a story: once upon a time there was a little girl who liked to read. what do you think of it? "
    "Human: hello there. Assistant: I am well, thank you! it's 2024, and we'd rather not say 'no'."
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 96


def _byte_level(specials: list[str]) -> Any:
    """GPT-2's kind: bytes, no space in front, nothing put before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    return tokenizer


def _sentencepiece(specials: list[str]) -> Any:
    """Llama's kind: a space put in front of every text, bytes for unknown characters, an opening token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*specials, *bytes_], show_progress=False)
    # Without a pre-tokenizer whole sentences would become tokens.
    tokenizer.train_from_iterator([word for word in TEXT.split() for _ in range(2)], trainer)
    model = json.loads(tokenizer.to_str())
    # Bytes are tokens of the model, not markers to be cut out of a text.
    model["added_tokens"] = [token for token in model["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(model))
    opening = specials[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A", special_tokens=[(opening, tokenizer.token_to_id(opening))]
    )
    return tokenizer


def _word_piece(specials: list[str]) -> Any:
    """BERT's kind: lower-cased words, a token before and one after."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _gpt2_tokenizer(**extra: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level([end]), bos_token=end, eos_token=end, **extra)


def _chat_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def _llama_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = _sentencepiece(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _bert_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    backend = _word_piece([*names.values(), "[MASK]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **names)


_WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
_GATED = {**_WIDE, "intermediate_size": 48, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}

# name -> (configuration class, model class, its settings, tokenizer)
BACKBONES: dict[str, tuple[str, str, dict[str, Any], Callable[[], Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2, _gpt2_tokenizer),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GATED, _llama_tokenizer),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_GATED, "tie_word_embeddings": True}, _chat_tokenizer),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GATED, "sliding_window": 7}, _llama_tokenizer),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GATED, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        _llama_tokenizer,
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_WIDE, "intermediate_size": 48}, _gpt2_tokenizer),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_WIDE, "ffn_dim": 48, "word_embed_proj_dim": 16}, _gpt2_tokenizer),
    "gpt-neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
        },
        _gpt2_tokenizer,
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, _gpt2_tokenizer),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        _gpt2_tokenizer,
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**_WIDE, "intermediate_size": 48}, _bert_tokenizer),
}
DECODERS = [name for name in BACKBONES if name != "bert"]


def tiny_backbone(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a random backbone of ``BACKBONES`` with its tokenizer to ``folder``; the same bits for the same seed."""
    import torch
    import transformers

    config_class, model_class, settings, make_tokenizer = BACKBONES[name]
    tokenizer = make_tokenizer()
    tokens = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = getattr(transformers, config_class)(
        **{"vocab_size": len(tokenizer), **settings, **{f"{kind}_token_id": token for kind, token in tokens.items()}}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            # The usual 0.02 makes every token nearly alike; distributions should have something to choose.
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
