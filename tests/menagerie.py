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
_MLP = {**_WIDE, "intermediate_size": 48}
_GATED = {**_MLP, "num_key_value_heads": 2}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
_GEMMA = {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
_GEMMA4 = {
    **{key: value for key, value in _GEMMA.items() if key != "query_pre_attn_scalar"},
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 400,
    "hidden_size_per_layer_input": 8,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    **_MLP,
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
}
# Three layers that look back at a state, one at tokens.
_HYBRID = {
    **_GATED,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
Settings = dict[str, Any]
# configuration class, model class, its settings, tokenizer
Recipe = tuple[str, str, Settings, Callable[[], Any]]

# Every contract test of backbones runs over these: one of each way to build a transformer.
BACKBONES: dict[str, Recipe] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2, _gpt2_tokenizer),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GATED, _llama_tokenizer),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_GATED, "tie_word_embeddings": True}, _chat_tokenizer),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GATED, "head_dim": 12}, _chat_tokenizer),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GATED, "sliding_window": 7}, _llama_tokenizer),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GATED, **_EXPERTS, "num_local_experts": 4},
        _llama_tokenizer,
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_GATED, **_EXPERTS, "head_dim": 8, "num_experts": 4, "mlp_only_layers": [1]},
        _chat_tokenizer,
    ),
    "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _LATENT, _llama_tokenizer),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GATED, "head_dim": 8}, _llama_tokenizer),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GEMMA, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
        _llama_tokenizer,
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        _llama_tokenizer,
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", _GATED, _gpt2_tokenizer),
    "falcon": ("FalconConfig", "FalconForCausalLM", _WIDE, _gpt2_tokenizer),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _MLP, _gpt2_tokenizer),
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
    "bert": ("BertConfig", "BertForMaskedLM", _MLP, _bert_tokenizer),
    "roberta": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**_MLP, "max_position_embeddings": CONTEXT + 1},
        _bert_tokenizer,
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": CONTEXT},
        _bert_tokenizer,
    ),
}
# More families, for the one law that none may break: hidden states and decoding are the model's own.
FAMILIES: dict[str, Recipe] = {
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_GATED, "sliding_window": 6}, _llama_tokenizer),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {**_GATED, "num_local_experts": 4}, _llama_tokenizer),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_GATED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
        _chat_tokenizer,
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_HYBRID, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
        _chat_tokenizer,
    ),
    "qwen3.5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _HYBRID, _chat_tokenizer),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_GATED,
            "head_dim": 8,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        _chat_tokenizer,
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**_GATED, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6},
        _llama_tokenizer,
    ),
    "gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA4, _llama_tokenizer),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}, _gpt2_tokenizer),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**_GPT2, "rotary_dim": 4}, _gpt2_tokenizer),
    "gpt-bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT2, _gpt2_tokenizer),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT},
        _gpt2_tokenizer,
    ),
    "xglm": (
        "XGLMConfig",
        "XGLMForCausalLM",
        {"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": CONTEXT},
        _gpt2_tokenizer,
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _GATED, _gpt2_tokenizer),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**_GATED, "sliding_window": 6}, _gpt2_tokenizer),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GATED, _gpt2_tokenizer),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {**_GATED, "sliding_window": 6}, _gpt2_tokenizer),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {**_GATED, "num_experts": 4, "num_experts_per_tok": 2},
        _gpt2_tokenizer,
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", _GATED, _llama_tokenizer),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**_GATED, "sliding_window": 6}, _llama_tokenizer),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _GATED, _chat_tokenizer),
    "granite": ("GraniteConfig", "GraniteForCausalLM", _GATED, _llama_tokenizer),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {**_GATED, "head_dim": 8}, _chat_tokenizer),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", {**_GATED, "sliding_window": 6}, _llama_tokenizer),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", _GATED, _llama_tokenizer),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        _gpt2_tokenizer,
    ),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            **_GATED,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
        _llama_tokenizer,
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {**_GATED, "layer_types": ["conv", "full_attention", "conv"]},
        _chat_tokenizer,
    ),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**_MLP, "embedding_size": 16}, _bert_tokenizer),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", _MLP, _bert_tokenizer),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**_MLP, "num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3},
        _bert_tokenizer,
    ),
    "deberta-v2": (
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        {
            **_MLP,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
            "position_biased_input": False,
            "share_att_key": True,
        },
        _bert_tokenizer,
    ),
    "eurobert": ("EuroBertConfig", "EuroBertForMaskedLM", {**_GATED, "mask_token_id": 4}, _bert_tokenizer),
}
# Families that must be refused, for their states would change with the rest of a batch; name -> what is said.
REFUSED: dict[str, tuple[Recipe, str]] = {
    "rwkv": (
        ("RwkvConfig", "RwkvForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2}, _gpt2_tokenizer),
        "padding in front",
    ),
    "recurrent-gemma": (
        (
            "RecurrentGemmaConfig",
            "RecurrentGemmaForCausalLM",
            {**_GATED, "num_key_value_heads": 1, "attention_window_size": 6, "lru_width": 32},
            _llama_tokenizer,
        ),
        "padding in front",
    ),
    "gemma3n": (
        (
            "Gemma3nTextConfig",
            "Gemma3nForCausalLM",
            {
                **_GEMMA,
                "vocab_size_per_layer_input": 400,
                "hidden_size_per_layer_input": 8,
                "num_kv_shared_layers": 0,
                "laurel_rank": 4,
                "altup_num_inputs": 2,
                "activation_sparsity_pattern": [0.0] * 3,
            },
            _llama_tokenizer,
        ),
        "one vector per token",
    ),
    "bert-as-decoder": (("BertConfig", "BertLMHeadModel", _MLP, _bert_tokenizer), "see later ones"),
    "fnet": (("FNetConfig", "FNetForMaskedLM", _MLP, _bert_tokenizer), "mixes the padding"),
    "mobilebert": (
        (
            "MobileBertConfig",
            "MobileBertForMaskedLM",
            {**_MLP, "embedding_size": 16, "intra_bottleneck_size": 16},
            _bert_tokenizer,
        ),
        "mixes the padding",
    ),
    "albert": (
        ("AlbertConfig", "AlbertForMaskedLM", {**_MLP, "embedding_size": 16}, _bert_tokenizer),
        "list of 3 layers",
    ),
}


def _is_decoder(recipe: Recipe) -> bool:
    return not recipe[1].endswith("ForMaskedLM")


DECODERS = [name for name, recipe in BACKBONES.items() if _is_decoder(recipe)]
ENCODERS = [name for name, recipe in {**BACKBONES, **FAMILIES}.items() if not _is_decoder(recipe)]


def tiny_backbone(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a random backbone of the names above with its tokenizer to ``folder``; the same bits for the same seed."""
    import torch
    import transformers

    recipe = BACKBONES.get(name) or FAMILIES.get(name) or REFUSED[name][0]
    config_class, model_class, settings, make_tokenizer = recipe
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
