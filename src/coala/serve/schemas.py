"""What requests may hold: the OpenAI protocol, and what COALA adds to it.

Strict: a field that does not exist, a number in quotes or one out of range is an error, never guessed at. Fields of the
protocol that this server has no use for are taken if they ask for nothing. Limits that a server sets at its start are
not here (see :mod:`coala.serve.app`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_plain_validator_function

from coala.settings import Mode, Over, Rule

LARGEST = 1e6  # of strengths and budgets: far beyond use, far from overflow
MOST = 2**31 - 1  # of counts: what every part that takes one can hold
RANKING = ("block", "best_of")  # modes that choose among samples
MOST_STOPS = 16
LONGEST_STOP = 200
MOST_MESSAGES = 1000
MOST_ALTERNATIVES = 20
LARGEST_SEED = 2**53 - 1  # what every reader of JSON keeps whole

T = TypeVar("T")
# The first entry that does not fit ends it: an error for each of many would cost more than the request.
QUICK = Field(fail_fast=True)
Number = Annotated[float, Field(allow_inf_nan=False)]
Some = Annotated[list[T], QUICK]


def _sound(found: str) -> str:
    """JSON can escape halves of characters, which no tokenizer takes."""
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is not text") from None
    return found


def _whole(found: Any) -> Any:
    """JSON has one kind of number: 4.0 is the whole number 4."""
    return int(found) if isinstance(found, float) and found.is_integer() else found


class Only:
    """A field that is taken where it holds one of ``values``, which ask for nothing, and is refused by name else."""

    def __init__(self, *values: Any, why: str = "not supported by this server") -> None:
        self._values = values
        said = [json.dumps(one) for one in values if one not in ([], {}, "")]
        self._refused = f"{why}. Fix: {' or '.join([*said, 'leave it out'])}"

    def _check(self, found: Any) -> Any:
        if any(_number(found) == _number(one) and found == one for one in self._values):
            return found
        raise ValueError(self._refused)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self._values]}


def _number(value: Any) -> bool:
    """JSON has one kind of number, of which true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


Text = Annotated[str, AfterValidator(_sound)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP), AfterValidator(_sound)]
# Behind the bounds of a field, or its schema would not tell them.
WHOLE = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=1, le=MOST), WHOLE]
# Fields of the protocol for what this server does not do.
Refused = Annotated[Any, Only()]
NoList = Annotated[Any, Only([])]
NoTools = Annotated[Any, Only("none", "auto")]
Zero = Annotated[Any, Only(0)]


class _Strict(BaseModel):
    """Fields that are null say nothing and are taken as absent, those that do not exist too."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _said(cls, found: Any) -> Any:
        return {name: value for name, value in found.items() if value is not None} if isinstance(found, dict) else found

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        made = handler(core)
        handler.resolve_ref_schema(made)["additionalProperties"] = {"type": "null"}
        return made


class TextPart(_Strict):
    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description="ignored")


class Message(_Strict):
    """One turn of a conversation; ``developer`` is the protocol's newer word for ``system``.

    What the server itself answered can be sent back: fields of a reply that hold nothing are taken.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Some[TextPart]
    name: Text | None = Field(None, description="ignored")
    refusal: Refused = None
    annotations: NoList = None
    audio: Refused = None
    function_call: Refused = None
    tool_calls: NoList = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES), QUICK]


class GuidanceSettings(_Strict):
    """How the head steers this request; what is left out is as in the run's recipe. A budget needs mode shift."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"budget": {"type": "null"}}},
                {"properties": {"mode": {"const": "shift"}}, "required": ["mode"]},
            ],
            "not": {
                "properties": {"mode": {"const": "none"}, "over": {"const": "distilled"}},
                "required": ["mode", "over"],
            },
        }
    )

    mode: Mode | None = None
    strength: Annotated[Number, Field(ge=0, le=LARGEST)] | None = None
    every: Count | None = None
    candidates: Count | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST), WHOLE] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    block_tokens: Count | None = None
    rule: Rule | None = None
    budget: Annotated[Number, Field(ge=0, le=LARGEST)] | None = Field(
        None, description="mode shift: maximum divergence of a reply, in nats"
    )
    width: Count | None = None
    over: Over | None = Field(None, description="what the head guides: the model, or its distilled policy")

    @model_validator(mode="after")
    def _agrees(self) -> GuidanceSettings:
        if self.mode == "none" and self.over == "distilled":
            raise ValueError("mode none is the model as it is, over which nothing goes; mode distilled is its policy")
        if self.budget is not None and self.mode != "shift":
            raise ValueError("budget needs mode shift, whose divergence is known; set that mode too")
        return self


GuidanceField = Literal["default", "none"] | GuidanceSettings


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="ignored")


class TextFormat(_Strict):
    type: Annotated[Any, Only("text", why="this server writes plain text")] = "text"


class Prediction(_Strict):
    """What the client thinks the reply will be, by which others write it sooner."""

    type: Literal["content"]
    content: Text | Some[TextPart]


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
    top_k: Annotated[int, Field(ge=0, le=MOST), WHOLE] | None = Field(
        None, description="0: off; the run's own if absent"
    )
    n: Count | None = None
    best_of: Count | None = Field(
        None, description="replies to draw, of which the n with the best head scores are returned, best first"
    )
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED), WHOLE] | None = Field(
        None, description="random, and reported, if absent"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS), QUICK] | None = None
    guidance: GuidanceField | None = Field(None, description="how the head steers: default, none, or settings")
    user: Text | None = Field(None, description="ignored")
    # Taken only where they ask for nothing.
    frequency_penalty: Zero = Field(None, description="not supported: 0")
    presence_penalty: Zero = Field(None, description="not supported: 0")
    logit_bias: Annotated[Any, Only({})] = Field(None, description="not supported: {}")

    @model_validator(mode="after")
    def _chooses(self) -> _Asked:
        guidance = self.guidance
        if self.temperature == 0 and isinstance(guidance, GuidanceSettings) and guidance.mode in RANKING:
            raise ValueError(f"temperature 0 makes all samples the same, among which mode {guidance.mode} chooses")
        return self


class ChatRequest(_Asked):
    """A conversation to be continued."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = Field(None, description="goes before max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES), WHOLE] | None = Field(
        None, description="alternatives to each token; a number above 0 asks for logprobs too"
    )
    # What does not bear on the reply.
    metadata: dict[str, Text] | None = Field(None, description="ignored")
    store: bool | None = Field(None, description="ignored: nothing is stored")
    parallel_tool_calls: bool | None = Field(None, description="ignored")
    prediction: Prediction | None = Field(None, description="ignored")
    safety_identifier: Text | None = Field(None, description="ignored")
    prompt_cache_key: Text | None = Field(None, description="ignored")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="ignored")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(None, description="ignored")
    # What would, and is taken only where it asks for nothing.
    response_format: TextFormat | None = None
    service_tier: Annotated[Any, Only("auto", "default", why="this server has one tier")] = None
    reasoning_effort: Annotated[Any, Only("none", why="replies here are written without reasoning")] = None
    verbosity: Annotated[Any, Only("medium")] = None
    modalities: Annotated[Any, Only([], ["text"], why="this server writes text alone")] = None
    tools: NoList = Field(None, description="not supported: []")
    tool_choice: NoTools = None
    functions: NoList = Field(None, description="not supported: []")
    function_call: NoTools = None
    audio: Refused = None
    moderation: Refused = None
    web_search_options: Refused = None


class CompletionRequest(_Asked):
    """Texts to be continued as they stand; with render "turn" each is one turn of a user, as in `coala generate`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1), QUICK] | None = Field(
        None, description="what begins a text of the model's own if absent"
    )
    render: Literal["raw", "turn"] | None = Field(None, description="how the model reads a prompt: raw if absent")
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES), WHOLE] | None = None
    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None


class ScoreRequest(_Strict):
    """Replies to one prompt, to be scored by the head."""

    model: Text
    prompt: Text | Messages
    replies: Annotated[list[Text], Field(min_length=1), QUICK]
    positions: bool | None = Field(None, description="also the score of each reply as it stands after every token")


class Document(_Strict):
    text: Text


class RerankRequest(_Strict):
    """Documents, ordered by the head's score of each as a reply to the query."""

    model: Text
    query: Text | Messages
    documents: Annotated[list[Text | Document], Field(min_length=1), QUICK]
    top_n: Count | None = None
    return_documents: bool | None = None
