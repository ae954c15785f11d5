"""The bytes of tokens: a token's own where they are known, and those of a reply's tokens are exactly its text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from coala.backbone import load_backbone
from coala.serve.detokenize import PieceReader
from coala.serve.spelling import Spelling

from .menagerie import _bert_tokenizer, _chat_tokenizer, _gpt2_tokenizer, _llama_tokenizer, tiny_backbone

KINDS = {"gpt2": _gpt2_tokenizer, "chat": _chat_tokenizer, "llama": _llama_tokenizer}
TOKENIZERS = {name: made() for name, made in KINDS.items()}
TEXT = "naïve 日本語 \U0001f600 it's 2024\u00a0\x00\r\n\t  \u0301end"


def own(tokenizer: Any, tokens: list[int]) -> bytes:
    found = [Spelling(tokenizer).own(token) for token in tokens]
    assert None not in found
    return b"".join(one for one in found if one is not None)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=20) | st.just(TEXT))
def test_the_tokens_of_a_text_spell_it(name: str, text: str) -> None:
    """SentencePiece's kind with the space that it puts before every text."""
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    space = b" " if name == "llama" and text else b""
    assert own(tokenizer, tokens) == space + text.encode()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_byte_is_the_own_of_some_token(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    spelling = Spelling(tokenizer)
    every = [spelling.own(token) for token in range(len(tokenizer))]
    assert {bytes([byte]) for byte in range(256)} <= set(every)
    # No token is taken for a replacement character, which is what its text may show.
    assert "\N{REPLACEMENT CHARACTER}".encode() not in every
    assert all(spelling.own(token) == b"" for token in tokenizer.all_special_ids)


def test_tokens_that_mend_words_have_no_bytes_of_their_own() -> None:
    tokenizer = _bert_tokenizer()
    plain = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    assert {Spelling(tokenizer).own(token) for token in plain} == {None}


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen2"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PieceReader]:
    backbone = load_backbone(tiny_backbone(request.param, tmp_path_factory.mktemp("s") / request.param), device="cpu")
    return backbone, PieceReader(backbone)


@given(draw=st.data())
def test_bytes_of_any_reply_are_its_text(reader: tuple[Any, PieceReader], draw: st.DataObject) -> None:
    """Whatever a model writes, bytes that are no characters too; all at once or a few at a time."""
    _, read = reader
    tokens = draw.draw(st.lists(st.integers(1, 330), max_size=14))
    pieces = read.pieces(tokens)
    spelt = read.spelling.spelt(tokens, pieces, first=True)
    assert len(spelt) == len(tokens)
    assert b"".join(spelt) == "".join(pieces).encode()


@given(text=st.text(min_size=1, max_size=12))
def test_bytes_of_a_reply_of_characters_are_the_tokens_own(reader: tuple[Any, PieceReader], text: str) -> None:
    """Half characters too; but for the space that a dialogue puts before a reply."""
    backbone, read = reader
    tokens = backbone.tokenizer.encode(text, add_special_tokens=False)
    pieces = read.pieces(tokens)
    # Some texts a tokenizer itself does not give back.
    assume("\N{REPLACEMENT CHARACTER}" not in text and "".join(pieces) == text)
    spelt = read.spelling.spelt(tokens, pieces, first=True)
    own = [read.spelling.own(token) for token in tokens]
    assert b"".join(spelt) == text.encode()
    assert spelt[1:] == own[1:] or spelt[0] == b""
    assert own[0] in (spelt[0], b" " + spelt[0])


def test_a_half_character_has_its_own_bytes_as_an_alternative(reader: tuple[Any, PieceReader]) -> None:
    from types import SimpleNamespace

    from coala.serve.answers import Other, Replying
    from coala.serve.protocol import _shown, _token

    backbone, read = reader
    half = next(token for token in range(len(backbone.tokenizer)) if read.spelling.own(token) == b"\xe2")
    other = Replying._other(SimpleNamespace(_reader=read), half, -1.5, ())  # type: ignore[arg-type]
    assert other == Other("\N{REPLACEMENT CHARACTER}", -1.5, b"\xe2")
    assert _token(_shown(other), -1.5, other.spelt) == {"token": "\\xe2", "logprob": -1.5, "bytes": [226]}
    assert _shown(other, "bytes:") == "bytes:\\xe2"
    unknown = Other("\N{REPLACEMENT CHARACTER}", -1.5, None)
    assert _token(_shown(unknown), -1.5, None)["bytes"] is None
