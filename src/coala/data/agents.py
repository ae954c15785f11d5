"""Two agents and what is drawn for each of their conversations: the recipe of a synthetic data set.

Plain values, checked once where they are read. Knows nothing of endpoints, journals or how a conversation is held.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen

from coala.documents import DocumentError, parse_yaml
from coala.messages import joined, sentences
from coala.values import CoalaError, Role

Speaker = Literal["student", "tutor"]
ROLE_OF: Mapping[Speaker, Role] = {"student": "user", "tutor": "assistant"}
PLACEHOLDERS = ("field", "mood", "persona", "language", "turns")
LONGEST = 200  # utterances in one conversation
Name = Annotated[str, MinLen(1)]
Names = Annotated[tuple[Name, ...], MinLen(1)]
NANODOLLARS = 1000  # one dollar per million tokens is this many billionths of a dollar per token


class SynthesisError(CoalaError):
    """A recipe, a journal or an endpoint with which no conversation can be held."""


@dataclass(frozen=True)
class Agent:
    """One speaker: where its model answers, what it is told, and what a token of it costs.

    ``system`` and ``opening`` may hold ``{field}``, ``{mood}``, ``{persona}``, ``{language}`` and ``{turns}``.
    ``opening`` stands in for the other's words where this agent speaks first. ``key`` names the environment variable
    of the API key, empty for none. Prices are dollars per million tokens. ``options`` are further fields of the
    request; ``limit_field`` is what the endpoint calls its limit on generated tokens. ``keep_cut`` takes replies that
    reach that limit as they stand, for models that do not end by themselves.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    system: Name
    model: Name = "gpt-4o"
    base_url: str = "https://api.openai.com/v1"
    key: str = "OPENAI_API_KEY"
    opening: Name = "Begin the conversation."
    personas: Annotated[tuple[str, ...], MinLen(1)] = ("",)
    max_tokens: Annotated[int, Ge(1)] = 400
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    input_price: Annotated[float, Ge(0)] = 0.0
    output_price: Annotated[float, Ge(0)] = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    keep_cut: bool = False

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, found {self.base_url!r}")
        for name, text in (("system", self.system), ("opening", self.opening)):
            try:
                # The whole of what stands in braces, so that a format such as {turns:>9} is refused too.
                asked = {
                    place + (f"!{how}" if how else "") + (f":{form}" if form else "")
                    for _, place, form, how in Formatter().parse(text)
                    if place is not None
                }
            except ValueError as error:
                raise ValueError(f"{name} is not a template ({error}); double literal braces") from None
            if unknown := sorted(asked - set(PLACEHOLDERS)):
                known = ", ".join(f"{{{place}}}" for place in PLACEHOLDERS)
                raise ValueError(f"{name} holds {{{unknown[0]}}}; expected one of {known}")
        if held := sorted(
            {"model", "messages", "temperature", "seed", "stream", "n", self.limit_field} & {*self.options}
        ):
            raise ValueError(f"options.{held[0]} is set by the recipe itself; take it out of options")


@dataclass(frozen=True)
class SynthesisLimits:
    """How hard the endpoint is worked and when to stop; nothing here changes what is drawn.

    ``tokens`` and ``dollars`` bound the whole data set over all runs. ``retries`` is how often one request is sent
    again after a passing failure, the n-th after ``backoff`` * 2^n seconds or what Retry-After asks for. ``attempts``
    is how often a conversation is tried before it is given up.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    concurrency: Annotated[int, Ge(1), Le(4096)] = 64
    requests_per_minute: Annotated[float, Gt(0)] | None = None
    tokens: Annotated[int, Ge(1)] | None = None
    dollars: Annotated[float, Gt(0)] | None = None
    retries: Annotated[int, Ge(0)] = 8
    backoff: Annotated[float, Gt(0)] = 0.5
    attempts: Annotated[int, Ge(1)] = 5
    timeout: Annotated[float, Gt(0)] = 120.0


@dataclass(frozen=True)
class SynthesisRecipe:
    """Everything that decides a synthetic data set of conversations between a student and a tutor.

    ``turns`` is the shortest and the longest number of utterances, drawn uniformly, or a weight for each number;
    the student speaks first. ``distinct`` says what may not come twice: a whole conversation, or already its opening.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    student: Agent
    tutor: Agent
    fields: Names
    moods: Names
    conversations: Annotated[int, Ge(1)] = 26_621
    turns: tuple[int, int] | dict[int, float] = (4, 8)
    temperature: tuple[Annotated[float, Ge(0)], Annotated[float, Ge(0)]] = (0.2, 0.9)
    languages: Names = ("English",)
    seed: Annotated[int, Ge(0)] = 0
    send_seed: bool = True
    distinct: Literal["conversation", "opening"] = "conversation"
    limits: SynthesisLimits = SynthesisLimits()

    def __post_init__(self) -> None:
        low, high = self.temperature
        if not low <= high <= 2:
            raise ValueError(f"temperature is drawn from [low, high] with low <= high <= 2; found {[low, high]}")
        lengths = self.lengths
        if not lengths or any(not 2 <= n <= LONGEST for n in lengths):
            raise ValueError(f"turns are from 2 to {LONGEST} with low <= high; found {self.turns}")
        if any(not 0 <= weight < float("inf") for weight in lengths.values()) or not sum(lengths.values()) > 0:
            raise ValueError(f"the weights of turns are at least 0 and not all 0; found {self.turns}")

    @property
    def lengths(self) -> dict[int, float]:
        """Number of utterances to its weight."""
        if isinstance(self.turns, dict):
            return dict(sorted(self.turns.items()))
        low, high = self.turns
        return dict.fromkeys(range(low, min(high, LONGEST + 1) + 1), 1.0)

    def agent(self, speaker: Speaker) -> Agent:
        return self.student if speaker == "student" else self.tutor

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between the runs that make one data set: all but how many, how fast and how dear."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for free in ("limits", "conversations"):
            del settings[free]
        for agent in (settings["student"], settings["tutor"]):
            for free in ("base_url", "key", "input_price", "output_price"):
                del agent[free]
        return settings

    @property
    def prompts_digest(self) -> str:
        """A short name for the two agents' instructions."""
        said = [[agent.system, agent.opening] for agent in (self.student, self.tutor)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """What was drawn for one attempt at one conversation."""

    index: int
    attempt: int
    field: str
    mood: str
    language: str
    student_persona: str
    tutor_persona: str
    turns: int
    temperature: float
    seed: int


def draw(recipe: SynthesisRecipe, index: int, attempt: int = 0) -> Draw:
    """The draws of conversation ``index``: a function of (seed, index, attempt) and the lists alone.

    Each quantity has a hash of its own, so that a longer list of moods leaves the fields as they were. A later attempt
    keeps the design (field, mood, language, personas, length), which dropping must not tilt, and draws the temperature
    and the endpoint's seed anew.
    """

    def unit(what: str, attempt: int = 0) -> float:
        return chance(recipe.seed, index, attempt, what)

    def one_of(what: str, values: Sequence[str]) -> str:
        return values[int(unit(what) * len(values))]

    low, high = recipe.temperature
    return Draw(
        index=index,
        attempt=attempt,
        field=one_of("field", recipe.fields),
        mood=one_of("mood", recipe.moods),
        language=one_of("language", recipe.languages),
        student_persona=one_of("student persona", recipe.student.personas),
        tutor_persona=one_of("tutor persona", recipe.tutor.personas),
        turns=_weighted(recipe.lengths, unit("turns")),
        temperature=round(low + (high - low) * unit("temperature", attempt), 4),
        seed=int(unit("seed", attempt) * 2**31),
    )


def chance(*parts: object) -> float:
    """A number in [0, 1) that is a function of ``parts``, the same on every machine."""
    raw = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    # 53 bits: more would round up to 1 as a float.
    return (int.from_bytes(raw, "big") >> 11) / 2**53


def _weighted(weights: Mapping[int, float], unit: float) -> int:
    left = unit * sum(weights.values())
    for value, weight in weights.items():
        left -= weight
        if left < 0:
            return value
    return max(value for value, weight in weights.items() if weight > 0)


def instructions(recipe: SynthesisRecipe, drawn: Draw, speaker: Speaker) -> tuple[str, str]:
    """The system prompt and the opening of one agent, filled in."""
    agent = recipe.agent(speaker)
    values = {
        "field": drawn.field,
        "mood": drawn.mood,
        "language": drawn.language,
        "persona": drawn.student_persona if speaker == "student" else drawn.tutor_persona,
        "turns": drawn.turns,
    }
    return agent.system.format(**values).strip(), agent.opening.format(**values).strip()


def messages(recipe: SynthesisRecipe, drawn: Draw, speaker: Speaker, said: Sequence[str]) -> list[dict[str, str]]:
    """The chat as ``speaker`` sees it: its own words are the assistant's, the other's the user's.

    ``said`` are the utterances so far, the student's first.
    """
    system, opening = instructions(recipe, drawn, speaker)
    chat = [{"role": "system", "content": system}]
    own = 0 if speaker == "student" else 1
    if own == 0:
        # Chat endpoints answer a user's turn: the one who begins is asked to.
        chat.append({"role": "user", "content": opening})
    for place, text in enumerate(said):
        chat.append({"role": "assistant" if place % 2 == own else "user", "content": text})
    return chat


def parse_recipe(
    document: Any, source: str = "recipe", conversations: int | None = None, **limits: Any
) -> SynthesisRecipe:
    """A checked recipe from a parsed YAML document.

    ``conversations`` and those ``limits`` that are not ``None`` replace what the document says.

    Raises :class:`SynthesisError` naming every setting that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(document, Mapping):
        raise SynthesisError(
            f"{source}: holds {type(document).__name__}; expected a mapping with student, tutor, fields and moods. "
            "Start from src/coala/recipes/edufeedback.yaml."
        )
    try:
        given_number = {} if conversations is None else {"conversations": conversations}
        recipe = TypeAdapter(SynthesisRecipe).validate_python({**document, **given_number})
        if given := {name: value for name, value in limits.items() if value is not None}:
            above = TypeAdapter(SynthesisLimits).validate_python({**asdict(recipe.limits), **given})
            recipe = replace(recipe, limits=above)
    except (ValidationError, RecursionError) as error:
        raise SynthesisError(f"{source}: invalid settings: {_worded(error)}") from None
    return recipe


def read_recipe(text: str, source: str = "recipe", conversations: int | None = None, **limits: Any) -> SynthesisRecipe:
    """A checked recipe from YAML text; see :func:`parse_recipe`."""
    try:
        document = parse_yaml(text)
    except DocumentError as error:
        raise SynthesisError(f"{source}: is {error}. Fix it there.") from None
    return parse_recipe(document, source, conversations, **limits)


def _worded(error: Any) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep."
    return joined(sentences(error.errors(), SynthesisRecipe))
