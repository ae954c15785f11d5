"""What answers look like: the OpenAI protocol, and what COALA adds to it. For the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from coala.serve.schemas import Document


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: Problem


class ReplyUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyFacts(BaseModel):
    """What COALA tells of a reply: the head's score, the model's own log-probability, nats spent on guidance."""

    score: float | None
    log_prob: float | None
    divergence: float | None


class Settings(BaseModel):
    """What a reply can be had again with."""

    seed: int
    guidance: str


class CompletionSettings(Settings):
    """How the model read the prompts, and what follows of it for the head, if anything does."""

    render: Literal["raw", "turn"]
    note: str | None


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenFacts(Alternative):
    top_logprobs: list[Alternative]


class ChatLogProbs(BaseModel):
    content: list[TokenFacts]
    refusal: None


class ChatReply(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatReply
    logprobs: ChatLogProbs | None
    finish_reason: Literal["stop", "length"]
    coala: ReplyFacts


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: ReplyUsage
    coala: Settings


class ChatAnswer(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogProbs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogProbs | None
    finish_reason: Literal["stop", "length"]
    coala: ReplyFacts


class CompletionAnswer(_Answer):
    object: Literal["text_completion"]
    coala: CompletionSettings
    choices: list[CompletionChoice]


class Position(BaseModel):
    text: str
    score: float


class ReplyScore(BaseModel):
    object: Literal["score"]
    index: int
    score: float
    dropped_tokens: int
    positions: list[Position] | None


class ScoreAnswer(BaseModel):
    object: Literal["list"]
    model: str
    data: list[ReplyScore]
    usage: ReplyUsage


class Ranked(BaseModel):
    index: int
    relevance_score: float
    document: Document | None


class RerankAnswer(BaseModel):
    id: str
    model: str
    results: list[Ranked]
    usage: ReplyUsage


class ModelFacts(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelFacts]


class Health(BaseModel):
    status: Literal["ok", "ending", "broken"]
    model: str
