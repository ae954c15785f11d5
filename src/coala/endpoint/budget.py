"""What may still be spent: set aside before a request and settled after it.

Never more than the limit is spent, as long as no request costs more than was set aside for it. Knows nothing of
requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

SHARE = 64  # a lease reaches this part of the whole budget ahead: what a kill can cost besides what was under way
NAMES = ("calls", "tokens", "nanodollars")


@dataclass(frozen=True)
class Usage:
    """Tokens and billionths of a dollar. ``uncertain`` tokens are those of requests whose fate is unknown, at most."""

    prompt: int = 0
    completion: int = 0
    uncertain: int = 0
    nanodollars: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion + self.uncertain

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.uncertain + other.uncertain,
            self.nanodollars + other.nanodollars,
        )


class OutOfBudget(Exception):
    """What is left of ``name`` (``spent`` of ``limit``) cannot pay for the next request, and nothing that is under way
    can free more."""

    def __init__(self, name: str, limit: int, spent: int) -> None:
        super().__init__(f"{spent} of {limit} {name} are spent")
        self.name, self.limit, self.spent = name, limit, spent


class Ledger:
    """A budget and what is spent of it. ``limit`` is (calls, tokens, nanodollars), ``None`` for no limit.

    ``lease`` writes down for good how many tokens and nanodollars may be spent from now on, so that after a kill no
    more is assumed left than there is.
    """

    def __init__(
        self,
        limit: tuple[int | None, int | None, int | None],
        spent: Usage = Usage(),
        lease: Callable[[int, int], Awaitable[None]] | None = None,
    ) -> None:
        self.limit = limit
        self.spent = (0, spent.tokens, spent.nanodollars)
        self.reserved = (0, 0, 0)
        self._leased = self.spent
        self._lease = lease if self.is_limited else None
        self._changed = asyncio.Condition()

    @property
    def is_limited(self) -> bool:
        return self.limit != (None, None, None)

    def covers(self, tokens: float, nanodollars: float) -> bool:
        """Whether so much could be paid if nothing were set aside."""
        return self._short_of((0, tokens, nanodollars)) is None

    async def reserve(self, bound: Usage) -> None:
        """Set the ``bound`` of a request aside, waiting for others to settle if need be; may raise OutOfBudget.

        Where nothing is known beforehand, a request is taken to need one token.
        """
        async with self._changed:
            cost = _cost(bound)
            while (place := self._short_of(_sum(self.reserved, cost))) is not None:
                if self.reserved == (0, 0, 0):
                    raise OutOfBudget(NAMES[place], self.limit[place] or 0, self.spent[place])
                await self._changed.wait()
            self.reserved = _sum(self.reserved, cost)
            ahead = _sum(self.spent, self.reserved)
            if self._lease and any(a > b for a, b in zip(ahead[1:], self._leased[1:], strict=True)):
                calls, tokens, money = (
                    a if bound is None else min(bound, a + bound // SHARE)
                    for a, bound in zip(ahead, self.limit, strict=True)
                )
                # Written within the lock: nobody spends on a lease that is not yet on the disk.
                await self._lease(tokens, money)
                self._leased = (calls, tokens, money)

    async def settle(self, bound: Usage, used: Usage) -> None:
        """Give back what was set aside and count what was used."""
        async with self._changed:
            self.reserved = _sum(self.reserved, _cost(bound), -1)
            self.spent = _sum(self.spent, (1, used.tokens, used.nanodollars))
            self._changed.notify_all()

    def _short_of(self, more: tuple[float, float, float]) -> int | None:
        """The place of the first limit that ``more`` would pass."""
        sums = zip(self.limit, self.spent, more, strict=True)
        return next((k for k, (bound, a, b) in enumerate(sums) if bound is not None and a + b > bound), None)


def _cost(bound: Usage) -> tuple[int, int, int]:
    return 1, max(1, bound.tokens), bound.nanodollars


def _sum(a: tuple[int, int, int], b: tuple[int, int, int], sign: int = 1) -> tuple[int, int, int]:
    return a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2]
