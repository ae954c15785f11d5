"""What kind of model a config.json is of, and whether it is one that can be read. No weight is touched."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

from coala.backbone.gguf import amend, is_gguf, source, stamp
from coala.backbone.network import BackboneError
from coala.permission import CODE_FLAG, permission

SUPPORTED = "a decoder-only language model or an encoder"
# A configuration of more layers than any model has would be built for hours.
MOST_LAYERS = 10_000
# Tables of transformers that tell what a model is that makes no text from text alone.
_OTHER_KINDS = {
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a vision-language model",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_CTC_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "an audio model",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES": "a vision-language model",
    "MODEL_FOR_IMAGE_MAPPING_NAMES": "a vision model",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES": "a vision model",
    "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES": "a time-series model",
}


def brief(error: BaseException, longest: int = 200) -> str:
    """The kind of an error of a library and the beginning of what it says, in one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:longest]}{'...' if len(said) > longest else ''}"


def read_config(where: Path, name: str, trust_remote_code: bool = False) -> tuple[Any, bool]:
    """The configuration in a folder, config.json or GGUF file, and whether it is an encoder's."""
    from transformers import AutoConfig

    try:
        if is_gguf(where):
            config = copy.deepcopy(_of_gguf(where, stamp(where)))
        else:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise _unread(where, name, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(f"{name}: is an encoder-decoder ({config.model_type}); expected {SUPPORTED}.")
    encoder = is_encoder(config)
    if not encoder and not trust_remote_code and not _decodes(config):
        raise BackboneError(f"{name}: {config.model_type} is {_other_kind(config.model_type)}; expected {SUPPORTED}.")
    _check_sizes(config, name)
    return config, encoder


@lru_cache(maxsize=4)
def _of_gguf(path: Path, _stamp: tuple[int, ...]) -> Any:
    from transformers import AutoConfig

    with source(path) as (folder, options):
        return amend(AutoConfig.from_pretrained(folder, local_files_only=True, **options), path)


def _unread(where: Path, name: str, error: Exception) -> BackboneError:
    from transformers import CONFIG_MAPPING, __version__

    from coala.backbone.checkpoint import read_json

    if is_gguf(where):
        return BackboneError(
            f"{name}: transformers {__version__} cannot make a configuration of its header ({brief(error)}). Fix: "
            "download it again, or update transformers."
        )
    path = where if where.is_file() else where / "config.json"
    kind = read_json(path).get("model_type")
    if kind not in CONFIG_MAPPING:
        return BackboneError(
            f"{name}: transformers {__version__} cannot read its config.json: it knows no model_type {kind!r}. "
            "Fix: update transformers, or use a model that it knows."
        )
    return BackboneError(
        f"{name}: transformers cannot read its config.json ({brief(error)}). Fix: download it again, or save the model "
        "with save_pretrained()."
    )


def _check_sizes(config: Any, name: str) -> None:
    """Refuse numbers that no model has, before one is built of them."""
    text = config.get_text_config()
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "max_position_embeddings"):
        found = getattr(text, key, None)
        most = MOST_LAYERS if key == "num_hidden_layers" else 1 << 40
        if found is not None and (isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= most):
            if key == "max_position_embeddings" and found == -1:
                continue  # some models say so that they have no limit
            raise BackboneError(
                f"{name}: config.json has {key} {str(found)[:40]!r}; expected a whole number from 1 to {most:,}. "
                "Fix: download it again."
            )


def encoder_options(config: Any) -> dict[str, Any]:
    """What to build an encoder with: without the pooler, which is not read and often not in the checkpoint."""
    from transformers import MODEL_MAPPING

    kind: Any = MODEL_MAPPING.get(type(config), None)
    takes = isinstance(kind, type) and "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if takes else {}


def refuse_foreign_code(stored: dict[str, Any], name: str, trust_remote_code: bool = False) -> None:
    """Refuse a configuration whose model is Python code beside its weights, unless that code is trusted."""
    from transformers import CONFIG_MAPPING

    own = stored.get("auto_map")
    if not own or trust_remote_code or permission().code or stored["model_type"] in CONFIG_MAPPING:
        return
    parts = ", ".join(sorted(map(str, own)))[:200] if isinstance(own, dict | list) else str(own)[:200]
    raise BackboneError(
        f"{name}: needs Python code of its own ({parts}). Read that code; then pass {CODE_FLAG} (in Python: "
        "trust_remote_code=True), or use a model that transformers knows."
    )


def is_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    architectures = getattr(config, "architectures", None) or ()
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal


def _decodes(config: Any) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _other_kind(model_type: str) -> str:
    from transformers.models.auto import modeling_auto

    for table, kind in _OTHER_KINDS.items():
        if model_type in getattr(modeling_auto, table, ()):
            return kind
    return "a model of another kind"
