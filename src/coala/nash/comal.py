"""COMAL on a language model: the one outer loop, with sample, judge, score and train as stages of a run folder.

A stage that finished is skipped, so that a run which was killed goes on where it was and makes the same pairs: every
random draw is a function of (seed, outer, inner) alone. Knows no torch; what a model does is behind :class:`Policy`.

    RUN/outer-01/inner-01/candidates.jsonl   distinct answers of mu_k with their tokens and how often each was drawn
    RUN/outer-01/inner-01/judgements.jsonl   P(first beats second) and how far the two orders disagreed
    RUN/outer-01/inner-01/pairs.jsonl        what is trained on: two answers, weight, targets
    RUN/outer-01/inner-01/logps.safetensors  log mu_k and log ref of every candidate, nats, summed over tokens
    RUN/outer-01/inner-01/policy/            mu_{k+1}
    RUN/outer-01/inner-01/log.json           what was asked, what was reached

The settings, losses and targets of a step are those of ``coala.nash.pairs``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from coala.nash.criteria import Note
from coala.nash.game import Float
from coala.nash.oracles import Example, Keeper, PreferenceOracle, ask, prompt_of
from coala.nash.pairs import (
    COMALSettings,
    Sampled,
    TrainRow,
    by_prompt,
    measure,
    remarks,
    select,
    shard_of,
    targets,
)
from coala.store import Run, digest, load_json, save_json, write_atomic
from coala.store.files import load_lines, save_lines
from coala.values import CoalaError, Turn


class Policy(Protocol):
    """What the loop needs of a model; ``coala.nash.llm.LanguagePolicy`` is one."""

    @property
    def identity(self) -> str:
        """What it is and how it is trained, for the run's settings."""

    def prompt_tokens(self, prompt: Sequence[Turn]) -> list[int]: ...

    def sample(self, prompts: Sequence[list[int]], settings: COMALSettings, seed: int) -> list[list[Sampled]]: ...

    def log_probs(self, prompts: Sequence[list[int]], answers: Sequence[list[int]], settings: COMALSettings) -> Float:
        """log pi(answer | prompt), nats, summed over tokens, (n,)."""

    def train(
        self, rows: Sequence[TrainRow], settings: COMALSettings, seed: int, folder: Path
    ) -> Mapping[str, Any]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Progress:
    """One inner step done: its numbers as in ``log.json``, and the remarks on them."""

    outer: int
    inner: int
    log: dict[str, Any]
    notes: tuple[Note, ...]


# --- the loop ----------------------------------------------------------------------------------------------------


def run_comal(
    policy: Policy,
    examples: Sequence[Example],
    oracle: PreferenceOracle,
    settings: COMALSettings,
    folder: Path | str,
    *,
    keeper: Keeper | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> list[Progress]:
    """Train ``policy`` in place, from what it is, for ``outer_steps`` updates of the reference; returns what was done.

    Call it again with the same arguments (and the policy as it was at the start) to go on with a run that ended early.
    Raises :class:`CoalaError` if the judge has no verdict on any pair of a step.
    """
    if not examples:
        raise CoalaError("There are no prompts; COMAL needs at least one.")
    run = Run(folder)
    prompts = [policy.prompt_tokens(prompt_of(example)) for example in examples]
    with run.held():
        run.start(
            {
                "command": "comal",
                "settings": asdict(settings),
                "policy": policy.identity,
                "oracle": oracle.name,
                "prompts": digest(prompts),
            }
        )
        if not run.done("start", {}):
            policy.save(run.path / "start")
            run.finish("start", {}, ["start"])
        loop = _Loop(run, policy, prompts, examples, oracle, settings, keeper)
        found = []
        reference = current = "start"
        for outer in range(1, settings.outer_steps + 1):
            for inner in range(1, settings.inner_steps + 1):
                progress, after = loop.step(outer, inner, current, reference)
                current = after
                found.append(progress)
                if on_step is not None:
                    on_step(progress)
            reference = current
        policy.load(run.path / current)
    return found


@dataclass
class _Loop:
    run: Run
    policy: Policy
    prompts: list[list[int]]
    examples: Sequence[Example]
    oracle: PreferenceOracle
    settings: COMALSettings
    keeper: Keeper | None
    loaded: str | None = None  # which policy the model holds, so that skipped stages load nothing

    def step(self, outer: int, inner: int, current: str, reference: str) -> tuple[Progress, str]:
        """The four stages of one inner step; the name of the policy it made."""
        where = f"outer-{outer:02d}/inner-{inner:02d}"
        name = where.replace("/", "-")
        seed = int(digest([self.settings.seed, outer, inner])[:8], 16) & 0x7FFFFFFF
        files = {stage: f"{where}/{stage}.jsonl" for stage in ("candidates", "judgements", "pairs")}
        logps, after, log = f"{where}/logps.safetensors", f"{where}/policy", f"{where}/log.json"
        before = {"policy": self._made(current), "reference": self._made(reference)}
        number = (outer - 1) * self.settings.inner_steps + inner - 1

        self._stage(f"{name}-sample", before, [files["candidates"]], lambda: self._sample(files, current, number, seed))
        drawn = list(load_lines(self.run.path / files["candidates"]))
        chain = {"candidates": digest(drawn)}
        self._stage(
            f"{name}-judge", chain, [files["judgements"], files["pairs"]], lambda: self._judge(files, drawn, seed)
        )
        pairs = list(load_lines(self.run.path / files["pairs"]))
        self._stage(
            f"{name}-score", {**chain, **before}, [logps], lambda: self._score(logps, drawn, current, reference)
        )
        known = _read_tensors(self.run.path / logps)
        chain |= {"pairs": digest(pairs), "logps": digest(known["policy"], known["reference"])}
        self._stage(
            f"{name}-train",
            {**chain, **before},
            [after, log],
            lambda: self._train(after, log, drawn, pairs, known, current, seed, self.run.path / files["judgements"]),
        )
        numbers = load_json(self.run.path / log)
        return Progress(outer, inner, numbers, tuple(remarks(numbers))), after

    def _stage(self, name: str, inputs: Mapping[str, Any], outputs: list[str], make: Callable[[], Any]) -> None:
        if self.run.done(name, inputs):
            return
        began = time.perf_counter()
        facts = make()
        self.run.finish(name, inputs, outputs, {**(facts or {}), "seconds": time.perf_counter() - began})

    def _made(self, policy: str) -> str:
        """The digest of a policy that is there, from the record of the stage that made it."""
        stage = "start" if policy == "start" else policy.removesuffix("/policy").replace("/", "-") + "-train"
        return str(load_json(self.run.path / "stages" / f"{stage}.json")["outputs"][policy])

    def _hold(self, policy: str) -> None:
        if self.loaded != policy:
            self.policy.load(self.run.path / policy)
            self.loaded = policy

    def _sample(self, files: Mapping[str, str], current: str, number: int, seed: int) -> dict[str, Any]:
        self._hold(current)
        shard = shard_of(len(self.prompts), self.settings.prompts_per_step, number, self.settings.seed)
        drawn = self.policy.sample([self.prompts[i] for i in shard], self.settings, seed)
        rows = []
        for i, answers in zip(shard, drawn, strict=True):
            # Identical answers are one row: sampled once, they are judged, scored and trained on once, with a weight.
            kept: dict[tuple[int, ...], dict[str, Any]] = {}
            for answer in answers:
                key = tuple(answer.tokens)
                if key in kept:
                    kept[key]["count"] += 1
                elif answer.tokens:
                    kept[key] = {"prompt": i, "count": 1, **asdict(answer)}
            rows += list(kept.values())
        save_lines(self.run.path / files["candidates"], rows)
        return {"answers": sum(map(len, drawn)), "distinct": len(rows)}

    def _judge(self, files: Mapping[str, str], drawn: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        settings = self.settings
        chosen = {i: select(places, drawn, settings, seed) for i, places in by_prompt(drawn).items()}
        pairs = [(a, b) for i in chosen for a, b in chosen[i].judged]
        asked = [(a, b) for a, b in pairs if drawn[a]["text"] != drawn[b]["text"]]
        verdicts = ask(
            self.oracle,
            [self.examples[drawn[a]["prompt"]] for a, _ in asked],
            [drawn[a]["text"] for a, _ in asked],
            [drawn[b]["text"] for _, b in asked],
            keeper=self.keeper,
        )
        said = dict(zip(asked, verdicts, strict=True))
        P: dict[tuple[int, int], float | None] = {
            pair: said[pair].preference if pair in said else 0.5 for pair in pairs
        }
        judged = [
            {"first": a, "second": b, "preference": v.preference, "disagreement": v.disagreement}
            for (a, b), v in said.items()
        ]
        failures = sum(v.preference is None for v in verdicts)
        rows = [row for i in chosen for row in targets(chosen[i], P, drawn, settings, seed + i)]
        if not rows:
            raise CoalaError(
                f"No pair is left to train on: of {len(pairs)} pairs the judge {self.oracle.name!r} has no verdict on "
                f"{failures}, and the others are of identical answers. Draw more candidates or mend the judge."
            )
        save_lines(self.run.path / files["judgements"], judged)
        save_lines(self.run.path / files["pairs"], rows)
        return {"judged": len(asked), "failures": failures, "pairs": len(rows)}

    def _score(self, output: str, drawn: list[dict[str, Any]], current: str, reference: str) -> dict[str, Any]:
        prompts, answers = [self.prompts[c["prompt"]] for c in drawn], [c["tokens"] for c in drawn]
        found: dict[str, Float] = {}
        for name, policy in (("reference", reference), ("policy", current)):
            if name == "policy" and reference == current:
                found["policy"] = found["reference"]
                continue
            self._hold(policy)
            found[name] = self.policy.log_probs(prompts, answers, self.settings)
        _write_tensors(self.run.path / output, found)
        return {}

    def _train(
        self,
        after: str,
        log: str,
        drawn: list[dict[str, Any]],
        pairs: list[dict[str, Any]],
        known: Mapping[str, Float],
        current: str,
        seed: int,
        judgements: Path,
    ) -> dict[str, Any]:
        settings, policy = self.settings, self.policy
        v = settings.weight * known["reference"] + (1 - settings.weight) * known["policy"]
        rows = [
            TrainRow(
                prompt=self.prompts[drawn[p["first"]]["prompt"]],
                first=drawn[p["first"]]["tokens"],
                second=drawn[p["second"]]["tokens"],
                reference=(float(v[p["first"]]), float(v[p["second"]])),
                weight=p["weight"],
                target=(p["target_first"], p["target_second"]),
            )
            for p in pairs
        ]
        # Always from the file: a policy that a killed training left half moved must not be trained on.
        policy.load(self.run.path / current)
        self.loaded = None
        trained = policy.train(rows, settings, seed, self.run.path / after)
        policy.save(self.run.path / after)
        self.loaded = after
        prompts, answers = [self.prompts[c["prompt"]] for c in drawn], [c["tokens"] for c in drawn]
        new = policy.log_probs(prompts, answers, settings)
        measured = measure(
            drawn, pairs, v, known, new, list(load_lines(judgements)), length_normalize=settings.length_normalize
        )
        numbers = {**measured, **trained}
        save_json(self.run.path / log, numbers)
        return {}


def _write_tensors(path: Path, arrays: Mapping[str, Float]) -> None:
    from safetensors.numpy import save

    write_atomic(path, save(dict(arrays)))


def _read_tensors(path: Path) -> dict[str, Float]:
    from safetensors.numpy import load_file

    return dict(load_file(path))
