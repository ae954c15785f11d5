"""A run as a model of Inspect AI (package ``inspect-ai``): ``inspect eval task.py --model coala/runs/mine``.

Replies are guided as the run says; samples that Inspect asks for at one time are written together. Found by Inspect
through the package's entry point, so importing this loads neither torch nor JAX.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from coala.values import CoalaError, Turn, prompt_id

if TYPE_CHECKING:
    from coala.decoding import Job

_SETTINGS = ("mode", "strength", "budget", "candidates", "over", "rater")
_ENDED: dict[str, StopReason] = {"stop": "stop", "length": "max_tokens"}


class GuidedModel(ModelAPI):  # type: ignore[misc]
    """The guided model of a finished run; ``model_name`` is its folder.

    Model arguments (``-M NAME=VALUE``): ``mode``, ``strength``, ``budget`` and ``candidates`` in place of the run's
    own; ``max_rows``, how many rows of the model are written together; ``trust_remote_code`` and ``download``, which a
    run cannot allow itself. CoalaError for others, and for a folder that is no finished run.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - Inspect's own default
        **model_args: Any,
    ) -> None:
        from coala.alignment import load_parts
        from coala.decoding import Engine
        from coala.recipe import recipe_of
        from coala.store import RunFolder

        super().__init__(model_name, base_url, api_key, [], config)
        permitted = {name: bool(model_args.pop(name, False)) for name in ("trust_remote_code", "download")}
        self._max_rows = int(model_args.pop("max_rows", 16))
        if unknown := sorted(set(model_args) - set(_SETTINGS)):
            known = (*_SETTINGS, "max_rows", *permitted)
            raise CoalaError(f"Found the model argument {', '.join(unknown)}, expected {', '.join(known)}.")
        run = RunFolder.open(model_name)
        self._length = recipe_of(run.settings, run.path / "run.json").evaluation.max_new_tokens
        self._temperature = recipe_of(run.settings, run.path / "run.json").evaluation.temperature
        backbone, head, guidance = load_parts(model_name, rater=model_args.get("rater"), **permitted)
        self._guidance = guidance.changed(**model_args)
        self._engine = Engine(backbone, head, max_rows=self._max_rows)
        self._turn = anyio.Lock()
        self._asked: Counter[str] = Counter()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Replies to one conversation, ``config.num_choices`` of them; each asking of it has noise of its own.

        CoalaError for tools, and for what is not text.
        """
        if tools:
            raise CoalaError("Found tools, expected none. Fix: a task of plain text; a guided model calls no tools.")
        prompt = tuple(map(_turn, input))
        jobs = [await self._submit(prompt, config) for _ in range(config.num_choices or 1)]
        while not all(job.done for job in jobs):
            async with self._turn:
                if not all(job.done for job in jobs):
                    await anyio.to_thread.run_sync(self._engine.step)
        for job in jobs:
            if job.error is not None:
                raise job.error
        read, written = jobs[0].n_prompt_tokens, sum(len(job.tokens) for job in jobs)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(job) for job in jobs],
            usage=ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written),
            metadata={"head_score": [job.generation.score for job in jobs if job.generation is not None]},
        )

    async def _submit(self, prompt: tuple[Turn, ...], config: GenerateConfig) -> Job:
        from coala.decoding import Request

        async with self._turn:
            name = prompt_id(prompt)
            self._asked[name] += 1
            request = Request(
                prompt,
                self._guidance.changed(top_p=config.top_p, top_k=config.top_k),
                config.max_tokens or self._length,
                config.seed or 0,
                self._temperature if config.temperature is None else config.temperature,
                tuple(config.stop_seqs or ()),
                name if self._asked[name] == 1 else f"{name}-{self._asked[name]}",
            )
            return await anyio.to_thread.run_sync(partial(self._engine.submit, request))

    def _choice(self, job: Job) -> ChatCompletionChoice:
        assert job.generation is not None
        message = ChatMessageAssistant(content=job.generation.text, model=self.model_name, source="generate")
        return ChatCompletionChoice(message=message, stop_reason=_ENDED.get(job.finish, "unknown"))

    def max_connections(self) -> int:
        """As many samples at a time as the model writes together."""
        return self._max_rows

    def max_tokens(self) -> int | None:
        """As in the run's recipe, unless the task says more or less."""
        return self._length


def _turn(message: ChatMessage) -> Turn:
    said = message.content
    if not isinstance(said, str):
        if any(part.type != "text" for part in said):
            raise CoalaError("Found a message that holds more than text, expected text. Fix: a task of plain text.")
        said = message.text
    if message.role == "tool":
        raise CoalaError("Found a tool's message, expected none. Fix: a task of plain text.")
    return Turn(message.role, said)


@modelapi(name="coala")  # type: ignore[untyped-decorator]
def coala() -> type[ModelAPI]:
    """The provider under its name; Inspect finds it by the entry point of this package."""
    return GuidedModel
