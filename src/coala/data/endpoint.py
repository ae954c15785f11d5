"""What an agent's endpoint is asked, what that can cost, and how its failures are told.

Knows nothing of conversations, or of how requests are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from coala.data.agents import NANODOLLARS, Agent, SynthesisError, SynthesisRecipe
from coala.data.findings import printable
from coala.endpoint import Client, Completion, Ledger, Post, RequestFailed, RetryPolicy, Server, Usage, bare

# No tokenizer of bytes makes more tokens than there are bytes; chat templates add a few for each message.
TOKENS_PER_MESSAGE, TOKENS_PER_REQUEST = 16, 64


class Endpoint:
    """The agents' endpoints. ``keys`` maps an agent's ``key`` to the secret; CoalaError for what is no address."""

    def __init__(
        self, recipe: SynthesisRecipe, ledger: Ledger, keys: Mapping[str, str], post: Post | None = None
    ) -> None:
        limits = recipe.limits
        policy = RetryPolicy(
            attempts=limits.retries + 1,
            first_wait=limits.backoff,
            timeout=limits.timeout,
            per_minute=limits.requests_per_minute,
        )
        self.client = Client(policy, ledger, keys.values(), post)
        places = {(agent.base_url, agent.key) for agent in (recipe.student, recipe.tutor)}
        self._servers = {(url, key): Server.of(url, keys.get(key, "")) for url, key in places}

    async def ask(
        self,
        agent: Agent,
        chat: Sequence[Mapping[str, str]],
        temperature: float,
        seed: int | None,
        count: Callable[[Usage], None],
    ) -> Completion:
        """The reply to ``chat``; every token spent on the way is told to ``count``.

        Raises :class:`SynthesisError` for what sending again cannot mend, or has not after ``limits.retries`` times;
        :class:`~coala.endpoint.OutOfBudget` before anything is sent that might not be paid for.
        """
        request = {
            "model": agent.model,
            "messages": list(chat),
            "temperature": temperature,
            agent.limit_field: agent.max_tokens,
            **({} if seed is None else {"seed": seed}),
            **agent.options,
        }
        bound = most(agent, chat)

        def cost(found: Completion | None) -> Usage:
            if found is None or found.prompt_tokens is None or found.completion_tokens is None:
                return bound
            prompt, completion = found.prompt_tokens, found.completion_tokens
            return Usage(prompt, completion, 0, price(agent, prompt, completion))

        try:
            return await self.client.ask(self._servers[agent.base_url, agent.key], request, cost, count)
        except RequestFailed as failed:
            if failed.status == 400 and "content_filter" in failed.said:
                return Completion("", "content_filter")
            raise SynthesisError(f"{bare(agent.base_url)}: {self._told(failed, agent)}") from None

    def _told(self, failed: RequestFailed, agent: Agent) -> str:
        said = printable(failed.said)[:300]
        if 300 <= failed.status < 400:
            there = printable(self.client.struck(failed.headers.get("location", "another address")))[:120]
            return (
                f"redirects to {there} (status {failed.status}); redirects are not followed, since the key would go "
                "there. Fix: write that address as base_url, if you trust it. Finished conversations are saved."
            )
        if failed.kind == "rejected" or failed.is_out_of_quota:
            mend = {
                401: f"Set the environment variable {agent.key or '(none is named: set `key`)'} to a valid key.",
                403: "Check that the key may use this model.",
                404: "Check base_url (it usually ends in /v1) and model.",
                429: "The account has no credit left.",
            }.get(failed.status, "Fix the recipe or the endpoint.")
            return (
                f"refused a request to {agent.model} with status {failed.status}: {said}. {mend} Finished "
                "conversations are saved."
            )
        trouble = f"status {failed.status}: {said}" if failed.status else printable(str(failed))
        if failed.kind == "malformed":
            trouble = f"an unreadable answer ({printable(str(failed))}: {said[:60]!r})"
        return (
            f"no usable answer after {failed.attempts} requests (last: {trouble}). Finished conversations are kept: "
            "run the same command again once the endpoint is well, or raise limits.retries."
        )


def price(agent: Agent, prompt: int, completion: int) -> int:
    """Billionths of a dollar."""
    return prompt * round(agent.input_price * NANODOLLARS) + completion * round(agent.output_price * NANODOLLARS)


def most(agent: Agent, chat: Sequence[Mapping[str, str]], bytes_per_token: int = 1) -> Usage:
    """The most that a request can cost, all of it counted as uncertain."""
    size = sum(len(message["content"].encode("utf-8", "replace")) for message in chat)
    prompt = size // bytes_per_token + TOKENS_PER_MESSAGE * len(chat) + TOKENS_PER_REQUEST
    return Usage(uncertain=prompt + agent.max_tokens, nanodollars=price(agent, prompt, agent.max_tokens))
