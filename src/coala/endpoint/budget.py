"""What may still be spent: set aside before a request and settled after it.

Never more than the limit is spent, as long as no request costs more than was set aside for it. Knows nothing of
requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from operator import add, gt, sub

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
        return Usage(*map(add, vars(self).values(), vars(other).values()))


class OutOfBudget(Exception):
    """What is left cannot pay for the next request, and nothing that is under way can free more.

    ``args`` are what ran out (one of ``NAMES``), the limit and what is spent of it.
    """


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
        self.spent: tuple[int, ...] = (0, spent.tokens, spent.nanodollars)
        self.reserved: tuple[int, ...] = (0, 0, 0)
        self._leased = self.spent[1:]
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
            while (place := self._short_of(map(add, self.reserved, cost))) is not None:
                if not any(self.reserved):
                    raise OutOfBudget(NAMES[place], self.limit[place], self.spent[place])
                await self._changed.wait()
            self.reserved = tuple(map(add, self.reserved, cost))
            ahead = tuple(map(add, self.spent, self.reserved))
            if self._lease and any(map(gt, ahead[1:], self._leased)):
                sums = zip(ahead[1:], self.limit[1:], strict=True)
                tokens, money = (a if limit is None else min(limit, a + limit // SHARE) for a, limit in sums)
                # Written within the lock: nobody spends on a lease that is not yet on the disk.
                await self._lease(tokens, money)
                self._leased = (tokens, money)

    async def settle(self, bound: Usage, used: Usage) -> None:
        """Give back what was set aside and count what was used."""
        async with self._changed:
            self.reserved = tuple(map(sub, self.reserved, _cost(bound)))
            self.spent = tuple(map(add, self.spent, (1, used.tokens, used.nanodollars)))
            self._changed.notify_all()

    def _short_of(self, more: Iterable[float]) -> int | None:
        """The place of the first limit that ``more`` would pass."""
        sums = enumerate(zip(self.limit, map(add, self.spent, more), strict=True))
        return next((place for place, (limit, total) in sums if limit is not None and total > limit), None)


def _cost(bound: Usage) -> tuple[int, int, int]:
    return 1, max(1, bound.tokens), bound.nanodollars
