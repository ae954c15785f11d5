"""A real model as GGUF, read by COALA and by llama.cpp: the same tokens, the same greedy replies."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from coala.backbone import load_backbone
from coala.values import Turn

PROMPTS = (
    "Give three tips for staying healthy.",
    "What is 2024 minus 1999?",
    "Write a haiku about rain.",
    "Name the capital of France.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Pride and Prejudice?",
    "List four primary colours, and say why one of them is wrong.",
    "Explain photosynthesis to a child.",
    "def add(a, b):\n    return a + b\n\nWhat does this do?",
    "Summarise: The cat sat on the mat. It was 12:30, and 1,250 people watched.",
    "Why is the sky blue?",
    "Tell me a joke about a programmer.",
    "How do I boil an egg?",
    "Was ist die Hauptstadt von Österreich?",
    "Give me a recipe with tomatoes, onions & garlic.",
    "I feel sad today...",
    "Write an e-mail that asks for a day off.",
    "What's the difference between 'affect' and 'effect'?",
    "日本の首都はどこですか?",
    "Count from 1 to 10.",
)
# llama.cpp multiplies quantised weights by states rounded to 8 bits, and attends in half precision where it can. By so
# much do log-probabilities differ on these prompts at most (as measured: 0.3 and 0.008).
ARITHMETIC = {"as it is": 0.5, "in float32": 0.02}


def _in_float32(file: Path, folder: Path) -> Path:
    """The file with all that it says, its weights dequantised."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    read = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(folder / "float32.gguf", "llama")
    for field in read.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            array = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=array)
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "float32.gguf"


def serving(file: Path, adapter: Path | None = None) -> Any:
    library = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    settings = library.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 1024, 1, -1
    settings.cache_type_k = settings.cache_type_v = int(library.ggml_type.GGML_TYPE_F32)
    if adapter is not None:
        settings.lora_adapters = [library.CommonAdapterLoraInfo(str(adapter), 1.0)]
    # Threads that wait for one another spin, on cores that others want.
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return library.Server(settings)


def asked(llama: Any, path: str, **settings: Any) -> dict[str, Any]:
    """What the server answers: its own interface tells of tokens, which the one in the style of OpenAI does not."""
    content = {"content-type": "application/json"}
    request = urllib.request.Request(f"{llama.listening_address}/{path}", json.dumps(settings).encode(), content)
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))


@pytest.mark.nightly
@pytest.mark.parametrize("weights", sorted(ARITHMETIC))
def test_greedy_replies_are_those_of_llama_cpp(smollm2: Path, tmp_path: Path, weights: str) -> None:
    """Up to where the two best tokens are closer than two log-probabilities move."""
    file = smollm2 if weights == "as it is" else _in_float32(smollm2, tmp_path)
    llama, backbone = serving(file), load_backbone(file, device="cpu", dtype="float32")
    settings = {"temperature": 0, "n_predict": 32, "cache_prompt": False, "return_tokens": True, "n_probs": 1}
    apart: dict[str, tuple[int, float]] = {}
    errors = []
    for prompt in PROMPTS:
        turns = (Turn("user", prompt),)
        row, text = backbone.render(turns), backbone.renderer.prompt_text(turns)
        read = asked(llama, "tokenize", content=text, add_special=False, parse_special=True)
        assert read["tokens"] == row.tokens, prompt
        answer = asked(llama, "completion", prompt=row.tokens, **settings)
        reply = answer["tokens"]
        assert reply
        with torch.no_grad():
            logits = backbone.transformer(torch.tensor([row.tokens + reply])).logits[0, len(row.tokens) - 1 : -1]
        best, sure = logits.argmax(-1).tolist(), logits.log_softmax(-1)
        told = answer["completion_probabilities"]
        for at, token in enumerate(reply):
            # Tokens that are parts of one character are told of as one, so what follows them is not to be found.
            if len(told) == len(reply):
                errors.append(abs(float(sure[at, token]) - told[at]["logprob"]))
            if best[at] != token:
                apart[prompt] = (at, float(logits[at, best[at]] - logits[at, token]))
                break
    same = len(PROMPTS) - len(apart)
    print(f"{weights}: {same} of {len(PROMPTS)} equal, errors to {max(errors):.2g}, differences and gaps: {apart}")
    assert max(errors) < ARITHMETIC[weights]
    assert all(gap < 2 * max(errors) for _, gap in apart.values()), apart
