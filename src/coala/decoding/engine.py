"""Replies to requests that come and go, through one model: whoever arrives joins those that are being written.

Requests of the same guidance and temperature share every forward pass, from the token at which they arrive (in mode
``block``, from the next block); others take turns. A reply is the one that :func:`coala.decoding.generate` would have
written, whoever wrote beside it, up to floating-point rounding. Knows nothing of networks, threads or queues' limits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence

from coala.backbone import LanguageModel
from coala.decoding.decoder import Batch, Decoder
from coala.decoding.guidance import Guidance
from coala.decoding.replies import Finish
from coala.decoding.requests import Prepared, Request, effective, generation, prepare
from coala.decoding.search import WAYS
from coala.values import ConvexHead, Generation

# Modes whose rows others can join before they are through.
JOINED = ("none", "distilled", "token", "prefix", "shift", "block")


class Job:
    """A request on its way. ``tokens``, ``log_probs`` and ``alternatives`` grow with the reply (``alternatives`` not in
    mode ``beam``); ``generation`` or ``error`` is there once it is ``done``; ``n_prompt_tokens`` counts what was read.
    """

    def __init__(self, request: Request, prepared: Prepared, guidance: Guidance) -> None:
        self.request, self.guidance = request, guidance
        self._prepared, self._reply = prepared, prepared.reply
        self.n_prompt_tokens = len(prepared.row)
        self.generation: Generation | None = None
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.generation is not None or self.error is not None

    @property
    def tokens(self) -> list[int]:
        return self._reply.tokens

    @property
    def log_probs(self) -> list[float]:
        """Log-probabilities of ``tokens`` at temperature 1 under the model that is decoded: the base model, or the
        distilled policy in its mode and where guidance goes over it.
        """
        return self._reply.log_probs

    @property
    def alternatives(self) -> list[list[tuple[int, float]]]:
        """The likeliest tokens where each of ``tokens`` stands, and their log-probabilities, likeliest first."""
        return self._reply.alternatives

    @property
    def finish(self) -> Finish:
        """Why the reply ended: a stop token or string, its length, or :meth:`cancel`; empty until it has."""
        return self._reply.finish

    @property
    def rows(self) -> int:
        """Rows of the model it takes."""
        return self.guidance.rows

    def cancel(self) -> None:
        """End the reply at its next token; may be called from any thread."""
        self._reply.halt.asked = True


class _Lane:
    """Jobs that are written together."""

    def __init__(self, engine: Engine, guidance: Guidance, temperature: float, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self._begun = self._joins = False
        self._engine = engine
        self._decoder = Decoder(engine.backbone, engine.head, guidance, temperature=temperature)
        self._arrived: list[Job] = []
        self._steps = self._write()

    def _write(self) -> Generator[None]:
        batch = self._begin(self.jobs)
        self._begun = True
        self._joins = batch.prefix.joins and self._decoder.guidance.mode in JOINED
        yield from WAYS[self._decoder.guidance.mode](self._decoder, batch, self._arrivals)

    def enter(self, job: Job) -> bool:
        """Let ``job`` join at the next chance; whether there is one."""
        if self._begun and not self._joins:
            return False
        self.jobs.append(job)
        if self._begun:
            self._arrived.append(job)
        return True

    def step(self) -> None:
        """One forward pass, or what is left to do after the last."""
        next(self._steps, None)

    def close(self) -> None:
        """Let go of the model's state at once: the generator and the lane hold each other."""
        self._steps.close()

    def _arrivals(self) -> Sequence[Batch]:
        arrived, self._arrived = self._arrived, []
        return [self._begin(arrived)] if arrived else []

    def _begin(self, jobs: Sequence[Job]) -> Batch:
        parts = [job._prepared for job in jobs]
        return self._decoder.begin(
            [part.row for part in parts], [part.read for part in parts], [part.reply for part in parts]
        )


class Engine:
    """Writes the replies of many requests with one model and, if there is one, its head.

    At most ``max_rows`` rows are written at once (one request may take more: it then has the model for itself); who
    comes later waits. Not thread-safe, but for :meth:`Job.cancel`: one thread submits and steps. Raises
    :class:`SpecMismatch` for a head that was fitted on features of another model.
    """

    def __init__(self, backbone: LanguageModel, head: ConvexHead | None = None, *, max_rows: int = 16) -> None:
        if head is not None:
            backbone.require(head.spec)
        backbone.require_head("Replies")
        self.backbone, self.head, self.max_rows = backbone, head, max_rows
        self._lanes: dict[tuple[Guidance, float, int], _Lane] = {}
        self._waiting: deque[Job] = deque()
        self._numbered = 0

    @property
    def running(self) -> int:
        """Requests being written."""
        return sum(len(lane.jobs) for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        """Requests that no row has been free for."""
        return len(self._waiting)

    def submit(self, request: Request) -> Job:
        """Take a request in; raises :class:`CoalaError` for one that cannot be carried out."""
        guidance = effective(request.guidance, self.head, request.temperature)
        self.backbone.changed(guidance.change)  # refused here, not while others are decoded
        job = Job(request, prepare(request, self.backbone, self.head), guidance)
        self._waiting.append(job)
        return job

    def step(self) -> bool:
        """One forward pass for every group of like requests; whether there was anything to do.

        A job that fails takes with it those it shared a forward pass with, and no others.
        """
        self._admit()
        worked = bool(self._lanes)
        for key, lane in list(self._lanes.items()):
            try:
                lane.step()
                self._finish(lane)
            except Exception as error:  # noqa: BLE001 - whatever it is, its requests are told
                for job in lane.jobs:
                    job.error = error
                lane.jobs.clear()
            if not lane.jobs:
                lane.close()
                del self._lanes[key]
        return worked

    def _admit(self) -> None:
        used = sum(job.rows for lane in self._lanes.values() for job in lane.jobs)
        waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            if job._reply.halt.asked:
                job._reply.finish = "cancelled"
                job.generation = Generation(
                    job.request.prompt_id, "", str(job.guidance), 0, job.request.seed, math.nan, 0.0
                )
            elif not self._waiting and (used == 0 or used + job.rows <= self.max_rows):
                used += job.rows
                self._place(job)
            else:  # first come, first served
                self._waiting.append(job)

    def _place(self, job: Job) -> None:
        guidance, temperature = job.guidance, job.request.temperature
        for (other, warmth, _), lane in self._lanes.items():
            if (other, warmth) == (guidance, temperature) and lane.enter(job):
                return
        self._numbered += 1
        self._lanes[guidance, temperature, self._numbered] = _Lane(self, guidance, temperature, [job])

    def _finish(self, lane: _Lane) -> None:
        for job in [job for job in lane.jobs if job.finish]:
            lane.jobs.remove(job)
            job.generation = generation(job._reply, self.head, job.guidance)
