"""What requests may hold and what replies look like: the OpenAI protocol, and what COALA adds to it.

Strict: a field that does not exist, a number in quotes or one out of range is an error, never guessed at. Fields of the
protocol that this server has no use for are taken if they ask for nothing. Limits that a server sets at its start are
not here (see :mod:`coala.serve.app`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LARGEST = 1e6  # of strengths and budgets: far beyond use, far from overflow
RANKING = ("block", "best_of")  # modes that choose among samples
MOST_STOPS = 16
LONGEST_STOP = 200
MOST_MESSAGES = 1000
MOST_ALTERNATIVES = 20
LARGEST_SEED = 2**53 - 1  # what every reader of JSON keeps whole

Number = Annotated[float, Field(allow_inf_nan=False)]


def _sound(found: str) -> str:
    """JSON can escape halves of characters, which no tokenizer takes."""
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is no text") from None
    return found


def _whole(found: Any) -> Any:
    """JSON has one kind of number: 4.0 is the whole number 4."""
    return int(found) if isinstance(found, float) and found.is_integer() else found


def _off(found: bool) -> bool:
    if found:
        raise ValueError("this server does not do that; false, or leave it out")
    return found


Text = Annotated[str, AfterValidator(_sound)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP), AfterValidator(_sound)]
# Behind the bounds of a field, or its schema would not tell them.
WHOLE = BeforeValidator(_whole)
Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --- what is asked --------------------------------------------------------------------------------------------------


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn of a conversation; ``developer`` is the protocol's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]


class GuidanceSettings(_Strict):
    """How the head steers this request; what is left out is as in the run's recipe. A budget needs mode shift."""

    model_config = ConfigDict(
        json_schema_extra={
            "dependentSchemas": {"budget": {"properties": {"mode": {"const": "shift"}}, "required": ["mode"]}}
        }
    )

    mode: Literal["token", "prefix", "shift", "block", "best_of", "beam", "none"] | None = None
    strength: Annotated[Number, Field(ge=0, le=LARGEST)] | None = None
    every: Annotated[int, Field(ge=1), WHOLE] | None = None
    candidates: Annotated[int, Field(ge=1), WHOLE] | None = None
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    block_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    rule: Literal["calibrated", "min-max", "raw", "z-score"] | None = None
    budget: Annotated[Number, Field(ge=0, le=LARGEST)] | None = Field(
        None, description="of mode shift: nats a reply may spend"
    )
    width: Annotated[int, Field(ge=1), WHOLE] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> GuidanceSettings:
        if "budget" in self.model_fields_set and self.mode != "shift":
            raise ValueError("budget goes with mode shift, whose divergence is known; name that mode beside it")
        return self


GuidanceField = Literal["default", "none"] | GuidanceSettings


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class _Asked(_Strict):
    """What both ways of asking for a reply share."""

    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "properties": {
                    "temperature": {"const": 0},
                    "guidance": {
                        "type": "object",
                        "properties": {"mode": {"enum": list(RANKING)}},
                        "required": ["mode"],
                    },
                },
                "required": ["temperature", "guidance"],
            }
        }
    )

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = Field(None, description="the run's own if absent")
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = Field(None, description="0: off; the run's own if absent")
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        None, description="replies to draw, of which the n with the best head scores are returned, best first"
    )
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED), WHOLE] | None = Field(
        None, description="drawn, and told, if absent"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    guidance: GuidanceField | None = Field(None, description="how the head steers: default, none, or settings")
    user: Text | None = Field(None, description="not looked at")
    # Taken only where they ask for nothing.
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = Field(None, description="not supported: 0")
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = Field(None, description="not supported: 0")
    logit_bias: Annotated[dict[str, Number], Field(max_length=0)] | None = Field(None, description="not supported: {}")

    @model_validator(mode="after")
    def _chooses(self) -> _Asked:
        guidance = self.guidance
        if self.temperature == 0 and isinstance(guidance, GuidanceSettings) and guidance.mode in RANKING:
            raise ValueError(f"temperature 0 makes all samples the same, among which mode {guidance.mode} chooses")
        return self


class ChatRequest(_Asked):
    """A conversation to be continued."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(None, description="goes before max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES), WHOLE] | None = Field(
        None, description="alternatives to each token; a number above 0 asks for logprobs too"
    )
    response_format: TextFormat | None = None
    metadata: dict[str, Text] | None = Field(None, description="not looked at")
    store: Off | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="not supported: []")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = Field(None, description="not looked at")
    prompt_cache_key: Text | None = Field(None, description="not looked at")


class CompletionRequest(_Asked):
    """Texts to be replied to, each rendered as one turn of a user, as `coala generate` does."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES), WHOLE] | None = None
    echo: Off | None = None
    suffix: Literal[""] | None = None


class ScoreRequest(_Strict):
    """Replies to one prompt, to be scored by the head."""

    model: Text
    prompt: Text | Messages
    replies: Annotated[list[Text], Field(min_length=1)]
    positions: bool | None = Field(None, description="also the score of each reply as it stands after every token")


class Document(_Strict):
    text: Text


class RerankRequest(_Strict):
    """Documents, ordered by the head's score of each as a reply to the query."""

    model: Text
    query: Text | Messages
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1), WHOLE] | None = None
    return_documents: bool | None = None


# --- what is answered -----------------------------------------------------------------------------------------------


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: Problem


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Facts(BaseModel):
    """What COALA tells of a reply: the head's score, the model's own log-probability, nats spent on guidance."""

    score: float | None
    log_prob: float | None
    divergence: float | None


class Settings(BaseModel):
    """What a reply can be had again with."""

    seed: int
    guidance: str


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
    coala: Facts


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
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
    coala: Facts


class CompletionAnswer(_Answer):
    object: Literal["text_completion"]
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
    usage: Usage


class Ranked(BaseModel):
    index: int
    relevance_score: float
    document: Document | None


class RerankAnswer(BaseModel):
    id: str
    model: str
    results: list[Ranked]
    usage: Usage


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
