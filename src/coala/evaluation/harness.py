"""Runs a judge over many comparisons or answers, several at a time; knows nothing of how a judge decides.

Stops early without loss: what a budget, an interruption or a dead endpoint leaves undone is counted as not judged,
never as lost or tied.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

from coala.callbacks import OnFailure
from coala.evaluation.judges import Cost, Judge, JudgeFailure, JudgeStopped, Paid
from coala.evaluation.win_rates import Consistency, consistency
from coala.values import CoalaError, Generation, Judgement, Turn

OnDone = Callable[[int, int], None]
Result = TypeVar("Result")
NO_PREFERENCE = "no preference"


@dataclass(frozen=True)
class Judged:
    """The judgements of whole comparisons, failures among them, and what became of the others.

    ``failures`` counts failed verdicts by kind; ``n_unjudged`` of the ``n_comparisons`` have no verdict in one order
    at least because judging ``stopped`` (why, or empty). ``cost`` is that of this call alone. ``words`` holds the first
    message of each kind of failure.
    """

    judgements: tuple[Judgement, ...]
    failures: Mapping[str, int]
    n_comparisons: int
    n_unjudged: int
    stopped: str
    consistency: Consistency
    cost: Cost
    words: Mapping[str, str] = field(default_factory=dict)


def judge(
    ours: Sequence[Generation],
    reference: Sequence[Generation],
    by: Judge,
    *,
    swap: bool = True,
    prompts: Mapping[str, Sequence[Turn]] | None = None,
    on_failure: OnFailure | None = None,
) -> list[Judgement]:
    """:func:`judge_many`, one comparison after the other, for the judgements alone.

    Raises :class:`coala.evaluation.judges.JudgeStopped` when the judge stops before the end.
    """
    found = judge_many(ours, reference, by, swap=swap, prompts=prompts, on_failure=on_failure)
    if found.stopped:
        raise JudgeStopped(f"{found.n_unjudged} of {found.n_comparisons} comparisons are not judged. {found.stopped}")
    return list(found.judgements)


def judge_many(
    ours: Sequence[Generation],
    reference: Sequence[Generation],
    by: Judge,
    *,
    swap: bool | Literal["drawn"] = True,
    prompts: Mapping[str, Sequence[Turn]] | None = None,
    concurrency: int = 1,
    on_progress: OnDone | None = None,
    on_failure: OnFailure | None = None,
) -> Judged:
    """Compare each of ``ours`` with the reply of ``reference`` to the same prompt, in both orders with ``swap``.

    Without it ours comes first; with "drawn" each prompt has one order, drawn from its id, half of them swapped.
    Replies are matched by ``prompt_id``, and by ``seed`` too where a prompt has several. The judgements come in the
    order of ``ours``, the swapped one right after the straight one; sides are named by ``method`` (the reference's
    gets the suffix `` (reference)`` when both have one name). A judge that raises gives the preference ``None`` and is
    told to ``on_failure(prompt_id, error)``. Replies that have no counterpart are a :class:`CoalaError`.

    Up to ``concurrency`` threads call the judge (1: the calling thread does). ``on_progress(done, total)`` counts
    verdicts; it and ``on_failure`` run in the calling thread. Whatever they raise, an interrupt too, ends the judging
    once the calls in flight are done; a judge that keeps its answers has then kept those.
    """
    matched = matched_replies(ours, reference)
    orders = [_orders(mine.prompt_id, swap) for mine, _ in matched]
    places = [(number, swapped) for number, both in enumerate(orders) for swapped in both]

    def compare(number: int, swapped: bool) -> float | None:
        mine, theirs = matched[number]
        sides = (theirs, mine) if swapped else (mine, theirs)
        return by.compare((prompts or {}).get(mine.prompt_id, ()), *sides).preference

    verdicts: dict[tuple[int, bool], float | None] = {}
    failures: Counter[str] = Counter()
    words: dict[str, str] = {}
    before = by.cost if isinstance(by, Paid) else Cost()
    stopped = ""
    with closing(run([partial(compare, *place) for place in places], by, concurrency)) as results:
        for task, value in results:
            number, swapped = places[task]
            if isinstance(value, JudgeStopped):
                stopped = stopped or str(value)
                continue
            if isinstance(value, Exception):
                failures[kind_of(value)] += 1
                words.setdefault(kind_of(value), str(value))
                if on_failure is not None:
                    on_failure(matched[number][0].prompt_id, value)
            elif value is None:
                failures[NO_PREFERENCE] += 1
            verdicts[number, swapped] = None if isinstance(value, Exception) else value
            if on_progress is not None:
                on_progress(len(verdicts), len(places))
    judgements: list[Judgement] = []
    n_unjudged = 0
    for number, (mine, theirs) in enumerate(matched):
        if any((number, swapped) not in verdicts for swapped in orders[number]):
            n_unjudged += 1
            continue
        names = sides_of(mine, theirs)
        for swapped in orders[number]:
            straight = Judgement(mine.prompt_id, *names, verdicts[number, swapped], by.name)
            judgements.append(replace(straight, first=names[1], second=names[0]) if swapped else straight)
    return Judged(
        judgements=tuple(judgements),
        failures=dict(sorted(failures.items())),
        n_comparisons=len(matched),
        n_unjudged=n_unjudged,
        stopped=stopped,
        consistency=consistency(judgements),
        cost=by.cost - before if isinstance(by, Paid) else Cost(),
        words=dict(sorted(words.items())),
    )


def _orders(prompt_id: str, swap: bool | Literal["drawn"]) -> tuple[bool, ...]:
    """Whether the sides are swapped, in each order in which a prompt is judged."""
    if swap == "drawn":
        return (hashlib.sha256(prompt_id.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1,)
    return (False, True) if swap else (False,)


def sides_of(mine: Generation, theirs: Generation) -> tuple[str, str]:
    """The names of the two sides in judgements, which differ."""
    return mine.method, theirs.method if theirs.method != mine.method else f"{theirs.method} (reference)"


def kind_of(error: Exception) -> str:
    """What a failure is counted by."""
    return error.kind if isinstance(error, JudgeFailure) else type(error).__name__


def run(
    tasks: Sequence[Callable[[], Result]], by: object, concurrency: int
) -> Generator[tuple[int, Result | Exception], None, None]:
    """Results or errors of ``tasks`` with their numbers, as they come; nothing new is begun after a JudgeStopped.

    Closing the generator early interrupts a judge that waits, and waits for the calls in flight.
    """
    if concurrency < 1:
        raise CoalaError(f"concurrency is {concurrency}; expected at least 1.")
    if isinstance(by, Paid):
        by.begin()
    return _serial(tasks) if concurrency == 1 else _parallel(tasks, by, concurrency)


def _attempt(task: Callable[[], Result]) -> Result | Exception:
    try:
        return task()
    except Exception as error:  # noqa: BLE001 - whatever a judge dies of, the others' verdicts stand
        return error


def _serial(tasks: Sequence[Callable[[], Result]]) -> Generator[tuple[int, Result | Exception], None, None]:
    for number, task in enumerate(tasks):
        value = _attempt(task)
        yield number, value
        if isinstance(value, JudgeStopped):
            return


def _parallel(
    tasks: Sequence[Callable[[], Result]], by: object, concurrency: int
) -> Generator[tuple[int, Result | Exception], None, None]:
    waiting = iter(enumerate(tasks))
    flying: dict[Future[Result | Exception], int] = {}
    stopped = False
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
    try:
        while True:
            # Only as many as there are threads are handed over, so that an early end finds none in line.
            while not stopped and len(flying) < concurrency:
                following = next(waiting, None)
                if following is None:
                    break
                flying[pool.submit(_attempt, following[1])] = following[0]
            if not flying:
                return
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                number, value = flying.pop(future), future.result()
                stopped = stopped or isinstance(value, JudgeStopped)
                yield number, value
    finally:
        if flying and isinstance(by, Paid):
            by.interrupt()
        pool.shutdown(wait=True, cancel_futures=True)


def matched_replies(ours: Sequence[Generation], reference: Sequence[Generation]) -> list[tuple[Generation, Generation]]:
    """Each of ``ours`` with its counterpart; CoalaError where one has none."""
    sides: list[dict[str, list[Generation]]] = []
    for replies in (ours, reference):
        by_prompt: dict[str, list[Generation]] = defaultdict(list)
        for reply in replies:
            by_prompt[reply.prompt_id].append(reply)
        sides.append(by_prompt)
    mine, theirs = sides
    only = sorted(set(mine) ^ set(theirs))
    if only:
        where = "the reference" if only[0] in mine else "ours"
        raise CoalaError(
            f"{len(only)} of {len({*mine, *theirs})} prompts have replies on one side only (the first is {only[0]!r}, "
            f"missing from {where}). Generate both sides from the same prompts."
        )
    partner: dict[tuple[str, int], Generation] = {}
    for prompt_id, replies in mine.items():
        others = theirs[prompt_id]
        if len(replies) == len(others) == 1:
            partner[prompt_id, replies[0].seed] = others[0]
            continue
        seeds, other_seeds = [reply.seed for reply in replies], [reply.seed for reply in others]
        if sorted(seeds) != sorted(other_seeds) or len(set(seeds)) < len(seeds):
            raise CoalaError(
                f"Prompt {prompt_id!r} has replies with the seeds {sorted(seeds)} on one side and "
                f"{sorted(other_seeds)} on the other; several replies to one prompt are matched by seed, so each seed "
                "must be there once on both sides. Generate both sides with the same seeds."
            )
        partner |= {(prompt_id, other.seed): other for other in others}
    return [(reply, partner[reply.prompt_id, reply.seed]) for reply in ours]
