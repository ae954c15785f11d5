"""What may still be spent: tokens and money are set aside before a request and settled after it.

Never more than the limit is spent, as long as no request costs more than was set aside for it. Knows nothing of
requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from coala.data.journal import Usage

SHARE = 64  # a lease reaches this part of the whole budget ahead: what a kill can cost besides what was under way


class OutOfBudget(Exception):
    """What is left cannot pay for the next request, and nothing that is under way can free more."""


class Budget:
    """The ledger of one data set. ``limit`` is (tokens, nanodollars), ``None`` for no limit.

    ``lease`` writes down for good how much may be spent from now on, so that after a kill no more is assumed left than
    there is.
    """

    def __init__(
        self,
        limit: tuple[int | None, int | None],
        spent: Usage,
        lease: Callable[[int, int], Awaitable[None]],
    ) -> None:
        self.limit = limit
        self.spent = (spent.tokens, spent.nanodollars)
        self.reserved = (0, 0)
        self._leased = self.spent
        self._lease = lease
        self._changed = asyncio.Condition()

    @property
    def is_limited(self) -> bool:
        return self.limit != (None, None)

    def fits(self, cost: tuple[float, float]) -> bool:
        """Whether ``cost`` (tokens, nanodollars) can be paid beside all that is set aside."""
        return all(
            bound is None or spent + reserved + more <= bound
            for bound, spent, reserved, more in zip(self.limit, self.spent, self.reserved, cost, strict=True)
        )

    def covers(self, cost: tuple[float, float]) -> bool:
        """Whether ``cost`` could be paid if nothing were set aside."""
        return all(
            bound is None or spent + more <= bound
            for bound, spent, more in zip(self.limit, self.spent, cost, strict=True)
        )

    async def reserve(self, cost: tuple[int, int]) -> None:
        """Set ``cost`` aside, waiting for others to settle if need be; raises :class:`OutOfBudget`."""
        if not self.is_limited:
            return
        async with self._changed:
            while not self.fits(cost):
                if self.reserved == (0, 0):
                    raise OutOfBudget
                await self._changed.wait()
            self.reserved = _sum(self.reserved, cost)
            ahead = _sum(self.spent, self.reserved)
            if any(a > b for a, b in zip(ahead, self._leased, strict=True)):
                tokens, money = (
                    a if bound is None else min(bound, a + bound // SHARE)
                    for a, bound in zip(ahead, self.limit, strict=True)
                )
                # Written within the lock: nobody spends on a lease that is not yet on the disk.
                await self._lease(tokens, money)
                self._leased = (tokens, money)

    async def settle(self, cost: tuple[int, int], used: Usage) -> None:
        """Give back what was set aside and count what was used."""
        if not self.is_limited:
            self.spent = _sum(self.spent, (used.tokens, used.nanodollars))
            return
        async with self._changed:
            self.reserved = _sum(self.reserved, (-cost[0], -cost[1]))
            self.spent = _sum(self.spent, (used.tokens, used.nanodollars))
            self._changed.notify_all()


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]
