"""COMAL on a language model: the one outer loop, with sample, judge, score and train as stages of a run folder.

A stage that finished is skipped, so that a run which was killed goes on where it was and makes the same pairs: every
random draw is a function of (seed, outer, inner) alone. Knows no torch; what a model does is behind :class:`Policy`.

    RUN/outer-01/inner-01/candidates.jsonl   distinct answers of mu_k with their tokens and how often each was drawn
    RUN/outer-01/inner-01/judgements.jsonl   P(first beats second) and how far the two orders disagreed
    RUN/outer-01/inner-01/pairs.jsonl        what is trained on: two answers, weight, targets
    RUN/outer-01/inner-01/logps.safetensors  log mu_k and log ref of every candidate, nats, summed over tokens
    RUN/outer-01/inner-01/policy/            mu_{k+1}; deleted when mu_{k+2} is there, unless it became a reference
    RUN/outer-01/inner-01/log.json           what was asked, what was reached
    RUN/model/                               the last policy, as transformers (or peft) saves and loads it

The losses and targets of a step are those of ``coala.comal.pairs``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from coala.comal.measures import measure, remarks
from coala.comal.oracles import Example, PreferenceOracle, ask, prompt_of
from coala.comal.pairs import SampledPairs, TrainRow, by_prompt, select, shard_of, targets
from coala.comal.settings import COMALSettings
from coala.costs import peak_memory
from coala.evaluation.judges import VerdictStore
from coala.nash.criteria import Note
from coala.nash.game import Float
from coala.store import (
    RunFolder,
    digest,
    file_digest,
    load_json,
    load_lines,
    load_object,
    save_json,
    save_lines,
    write_atomic,
)
from coala.values import CoalaError, Turn

Tell = Callable[[float], None]  # how much of a stage is done, from 0 to 1
OnLoopWork = Callable[[float, int, str], None]  # stages done and stages to do in this session, and which one is at work
STAGES = ("sample", "judge", "score", "train")


class Policy(Protocol):
    """What the loop needs of a model; ``coala.comal.llm.LanguagePolicy`` is one."""

    @property
    def identity(self) -> str:
        """What it is and how it is trained, for the run's settings."""

    def prompt_tokens(self, prompt: Sequence[Turn]) -> list[int]: ...

    def sample(
        self, prompts: Sequence[list[int]], settings: COMALSettings, seed: int, *, tell: Tell | None = None
    ) -> list[list[SampledPairs]]: ...

    def log_probs(
        self,
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        settings: COMALSettings,
        *,
        tell: Tell | None = None,
    ) -> Float:
        """log pi(answer | prompt), nats, summed over tokens, (n,)."""

    def train(
        self, rows: Sequence[TrainRow], settings: COMALSettings, seed: int, folder: Path, *, tell: Tell | None = None
    ) -> Mapping[str, Any]: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """A folder that loads without this package."""


@dataclass(frozen=True)
class LoopProgress:
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
    keeper: VerdictStore | None = None,
    on_step: Callable[[LoopProgress], None] | None = None,
    on_work: OnLoopWork | None = None,
    about: Mapping[str, Any] | None = None,
    keep_policies: bool = False,
) -> list[LoopProgress]:
    """Train ``policy`` in place, from what it is, for ``outer_steps`` updates of the reference; returns what was done.

    Call it again with the same arguments (and the policy as it was at the start) to go on with a run that ended early.
    ``about`` is kept in the run's settings, for whoever has to load the model again. Policies that nothing reads any
    more are deleted unless ``keep_policies``; references and the last one stay. Raises :class:`CoalaError` if the
    judge has no verdict on any pair of a step.
    """
    if not examples:
        raise CoalaError("Found no prompts; COMAL needs at least one.")
    run = RunFolder(folder)
    prompts = [policy.prompt_tokens(prompt_of(example)) for example in examples]
    with run.held():
        run.start(
            {
                "command": "comal",
                "settings": asdict(settings),
                "policy": policy.identity,
                "oracle": oracle.name,
                "prompts": digest(prompts),
                **({"about": dict(about)} if about is not None else {}),
            }
        )
        if not run.done("start", {}):
            policy.save(run.path / "start")
            run.finish("start", {}, ["start"])
        loop = _Loop(run, policy, prompts, examples, oracle, settings, keeper, on_work, keep_policies)
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
        last = {"policy": loop.made(current)}
        if not run.done("model", last):
            policy.export(run.path / "model")
            run.finish("model", last, ["model"])
    return found


@dataclass
class _Loop:
    run: RunFolder
    policy: Policy
    prompts: list[list[int]]
    examples: Sequence[Example]
    oracle: PreferenceOracle
    settings: COMALSettings
    keeper: VerdictStore | None
    on_work: OnLoopWork | None
    keep_policies: bool
    loaded: str | None = None  # which policy the model holds, so that skipped stages load nothing

    def __post_init__(self) -> None:
        steps = self.settings.outer_steps * self.settings.inner_steps
        self.finished, self.total = 0, len(STAGES) * steps
        # Policies before the last one that was made may be gone, and are not missed.
        self.last = next((n for n in reversed(range(steps)) if self._intact(self._name(n) + "-train")), -1)

    def _name(self, number: int) -> str:
        outer, inner = divmod(number, self.settings.inner_steps)
        return f"outer-{outer + 1:02d}-inner-{inner + 1:02d}"

    def step(self, outer: int, inner: int, current: str, reference: str) -> tuple[LoopProgress, str]:
        """The four stages of one inner step; the name of the policy it made."""
        where = f"outer-{outer:02d}/inner-{inner:02d}"
        name = where.replace("/", "-")
        seed = int(digest([self.settings.seed, outer, inner])[:8], 16) & 0x7FFFFFFF
        files = {stage: f"{where}/{stage}.jsonl" for stage in ("candidates", "judgements", "pairs")}
        logps, after, log = f"{where}/logps.safetensors", f"{where}/policy", f"{where}/log.json"
        before = {"policy": self.made(current), "reference": self.made(reference)}
        number = (outer - 1) * self.settings.inner_steps + inner - 1

        note = f"update {outer}/{self.settings.outer_steps}, step {inner}/{self.settings.inner_steps}"

        def stage(
            kind: str, inputs: Mapping[str, Any], outputs: list[str], make: Callable[[Tell], Any], spent: str = ""
        ) -> None:
            self._stage(f"{name}-{kind}", inputs, outputs, make, f"{note}: {kind}", spent)

        stage("sample", before, [files["candidates"]], lambda tell: self._sample(files, current, number, seed, tell))
        drawn = list(load_lines(self.run.path / files["candidates"]))
        chain = {"candidates": digest(drawn)}
        judged = [files["judgements"], files["pairs"]]
        stage("judge", chain, judged, lambda tell: self._judge(files, drawn, seed, tell))
        pairs = list(load_lines(self.run.path / files["pairs"]))
        scored = {**chain, **before}
        stage("score", scored, [logps], lambda tell: self._score(logps, drawn, current, reference, tell))
        known = _read_tensors(self.run.path / logps)
        chain |= {"pairs": digest(pairs), "logps": digest(known["policy"], known["reference"])}
        becomes_reference = inner == self.settings.inner_steps
        stage(
            "train",
            {**chain, **before},
            [after, log],
            lambda tell: self._train(
                after, log, drawn, pairs, known, current, seed, self.run.path / files["judgements"], tell
            ),
            spent=after if number < self.last and not becomes_reference else "",
        )
        if not self.keep_policies and current not in ("start", reference):
            shutil.rmtree(self.run.path / current, ignore_errors=True)
        numbers = load_json(self.run.path / log)
        return LoopProgress(outer, inner, numbers, tuple(remarks(numbers))), after

    def _stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: list[str],
        make: Callable[[Tell], Any],
        note: str,
        spent: str,
    ) -> None:
        if self.run.done(name, inputs) or (spent and self._intact(name, spent) and self._inputs(name) == dict(inputs)):
            self.total -= 1
            return

        def tell(share: float) -> None:
            if self.on_work is not None:
                self.on_work(self.finished + min(max(share, 0.0), 1.0), self.total, note)

        tell(0.0)
        began = time.perf_counter()
        facts = make(tell)
        about = {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory()}
        self.run.finish(name, inputs, outputs, {**(facts or {}), **about})
        self.finished += 1
        tell(0.0)

    def _inputs(self, stage: str) -> Any:
        record = self.run.record(stage)
        return None if record is None else record["inputs"]

    def _intact(self, stage: str, without: str = "") -> bool:
        """Whether a stage is recorded and what it made, ``without`` one output, is as it was."""
        record = self.run.record(stage)
        if record is None:
            return False
        kept = {name: made for name, made in record["outputs"].items() if name != without}
        return all((self.run.path / n).exists() and file_digest(self.run.path / n) == d for n, d in kept.items())

    def made(self, policy: str) -> str:
        """The digest of a policy that is there, from the record of the stage that made it."""
        stage = "start" if policy == "start" else policy.removesuffix("/policy").replace("/", "-") + "-train"
        record = load_object(self.run.path / "stages" / f"{stage}.json", "outputs")
        return str(record["outputs"][policy])

    def _hold(self, policy: str) -> None:
        if self.loaded != policy:
            self.policy.load(self.run.path / policy)
            self.loaded = policy

    def _sample(self, files: Mapping[str, str], current: str, number: int, seed: int, tell: Tell) -> dict[str, Any]:
        self._hold(current)
        shard = shard_of(len(self.prompts), self.settings.prompts_per_step, number, self.settings.seed)
        drawn = self.policy.sample([self.prompts[i] for i in shard], self.settings, seed, tell=tell)
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

    def _judge(self, files: Mapping[str, str], drawn: list[dict[str, Any]], seed: int, tell: Tell) -> dict[str, Any]:
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
            tell=tell,
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
                f"Found no pair to train on: of {len(pairs)} pairs the judge {self.oracle.name!r} has no verdict on "
                f"{failures}, and the others have identical answers. Fix: sample more candidates, or correct the "
                "judge."
            )
        save_lines(self.run.path / files["judgements"], judged)
        save_lines(self.run.path / files["pairs"], rows)
        return {"judged": len(asked), "failures": failures, "pairs": len(rows)}

    def _score(
        self, output: str, drawn: list[dict[str, Any]], current: str, reference: str, tell: Tell
    ) -> dict[str, Any]:
        prompts, answers = [self.prompts[c["prompt"]] for c in drawn], [c["tokens"] for c in drawn]
        found: dict[str, Float] = {}
        for name, policy in (("reference", reference), ("policy", current)):
            if name == "policy" and reference == current:
                found["policy"] = found["reference"]
                continue
            self._hold(policy)
            found[name] = self.policy.log_probs(prompts, answers, self.settings, tell=tell)
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
        tell: Tell,
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
        trained = policy.train(rows, settings, seed, self.run.path / after, tell=tell)
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
