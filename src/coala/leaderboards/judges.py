"""Judges by their names: an object that judges, where its answers are kept, and what a record says of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnNote, quiet

if TYPE_CHECKING:
    from coala.evaluation.judges import Instructions, Judge, OpenAIJudge
    from coala.store.verdict_cache import VerdictCache
    from coala.values import Generation, Turn

    Making = Callable[[VerdictCache], tuple[Judge, Mapping[str, Any]]]  # a judge and what a record tells of it

VERDICTS = "verdicts.sqlite"


@dataclass(frozen=True)
class Service:
    """An endpoint and what may be asked of it; ``key_env`` names where ``key`` comes from, for messages.

    ``headers`` are sent with every request.
    """

    model: str | None
    base_url: str | None
    key_env: str
    key: str
    max_calls: int | None
    max_tokens: int | None
    attempts: int
    timeout: float
    ask_again: bool
    sampling: Sequence[str]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """A judge, where its answers are kept if they are paid for, and what a record tells of it: facts and files.

    ``is_local`` judges run here, one comparison at a time; ``sees_prompts`` those that cannot do without them.
    """

    judge: Judge
    kept: VerdictCache | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    sees_prompts: bool = False
    is_local: bool = True

    def at_once(self, concurrency: int) -> int:
        """How many comparisons at a time."""
        return 1 if self.is_local else concurrency

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was asked otherwise than the judge's file says."""
        return tuple(getattr(self.judge, "remarks", ()))


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, by its name; with ``local`` a model loaded here, else ``service``; and where its answers are kept.

    ``cache`` is the run's own file of verdicts unless given.
    """

    name: str
    service: Service
    local: str | None = None
    cache: Path | None = None
    concurrency: int = 8


def choose(by: str, local: str | None, service: Service, cache: Path, note: OnNote = quiet) -> Chosen:
    """The judge by its name; ``cache`` is made if it needs one."""
    from coala.evaluation.judges import ReplayJudge, named_judge, read_instructions
    from coala.store import MisfitError, load_judgements
    from coala.values import CoalaError

    named = named_judge(by)
    if named is not None:
        if local is not None:
            raise CoalaError(f"--judge {by} asks no model: leave --local out.")
        if named.kind == "head":
            return _head(Path(named.rest))
        if named.kind == "replay":
            try:
                replay = ReplayJudge(load_judgements(Path(named.rest)))
            except MisfitError:
                raise CoalaError(
                    f"{named.rest}: holds no judgements. Give a judgements-*.jsonl, as judging writes it."
                ) from None
            facts = {"name": replay.name, "how": "stored judgements"}
            return Chosen(replay, facts=facts, files={"judge": Path(named.rest)})
        scorer = named.scorer()
        files = {} if named.path is None else {"judge": named.path}
        return Chosen(scorer, facts={"name": scorer.name}, files=files)
    return asking(read_instructions(by), local, service, cache, note)


def asking(
    instructions: Instructions, local: str | None, service: Service, cache: Path, note: OnNote = quiet
) -> Chosen:
    """The judge that asks a model as ``instructions`` say: the one loaded here, or one behind an endpoint."""
    from coala.store.verdict_cache import open_cache

    # What is wrong with a model or a key is told before a file is made.
    make = _served(instructions, service, note) if local is None else _local(local, instructions, service)
    kept = open_cache(cache, note)
    try:
        judge, facts = make(kept)
    except BaseException:
        kept.close()
        raise
    return Chosen(judge, kept, facts, sees_prompts=True, is_local=local is not None)


def kept_beside(replies: Path, out: Path, note: OnNote = quiet) -> Path:
    """Where answers are kept if nothing is said: in the folder ``replies``, so that another OUT finds them again.

    The folder ``out`` is taken if an earlier judging has kept its answers there, or ``replies`` cannot be written.
    """
    home, other = replies / VERDICTS, out / VERDICTS
    if not home.exists() and (other.exists() or not os.access(replies, os.W_OK)):
        return other
    if other.exists() and other.resolve() != home.resolve():
        note(f"note: answers are kept in {home}; those in {other} are not read. Give --cache {other} to read them.")
    return home


def chat_facts(judge: OpenAIJudge) -> dict[str, Any]:
    """What a record tells of a judge behind an endpoint; never its key."""
    from coala.endpoint import bare

    return {"name": judge.name, "model": judge.model, "endpoint": bare(judge.endpoint), **_told_of(judge.instructions)}


def _told_of(instructions: Instructions) -> dict[str, Any]:
    from coala.store import digest

    return {
        "instructions": instructions.name,
        "mode": instructions.mode,
        "digest": instructions.digest,
        "prompts": {prompt.name: digest(vars(prompt)) for prompt in instructions.prompts},
        "sampling": dict(instructions.sampling),
    }


def _served(instructions: Instructions, service: Service, note: OnNote) -> Making:
    from coala.endpoint import bare, is_loopback
    from coala.evaluation.judges import Budget, OpenAIJudge, Patience
    from coala.values import CoalaError

    key = service.key
    if not key and service.base_url is None:
        raise CoalaError(
            f"The environment variable {service.key_env} holds no key. Set it, name another with --key-env, or give "
            "the --base-url of an endpoint that needs none."
        )
    address = service.base_url or ""
    if key and address.startswith("http://") and not is_loopback(address):
        note(f"warning: the key in {service.key_env} goes to {bare(address)} unencrypted. Use https if it is a secret.")

    def make(kept: VerdictCache) -> tuple[Judge, Mapping[str, Any]]:
        judge = OpenAIJudge(
            instructions,
            model=service.model,
            base_url=service.base_url,
            key=key,
            keeper=kept,
            sampling=_changes(service.sampling),
            ask_again=service.ask_again,
            patience=Patience(attempts=service.attempts, timeout=service.timeout),
            budget=Budget(service.max_calls, service.max_tokens),
            headers=service.headers,
        )
        return judge, chat_facts(judge)

    return make


def _local(name: str, instructions: Instructions, service: Service) -> Making:
    from coala.backbone import load_backbone
    from coala.decoding import log_likelihood
    from coala.evaluation.judges import ChatJudge, JudgeFailure, LocalEndpoint
    from coala.values import CoalaError, Pair

    if service.sampling:
        raise CoalaError("--sampling has no effect on --local, which samples nothing. Leave it out.")
    model = load_backbone(name)

    def log_probs(prompt: Sequence[Turn], replies: Sequence[str]) -> list[float]:
        tokens = max(model.count_tokens(Pair(tuple(prompt), reply, reply, "")) for reply in replies)
        if tokens > model.max_tokens:
            # Rendering would cut the question off and the model judge what is left of it.
            raise JudgeFailure("too long", f"The question takes {tokens} tokens; {name} reads {model.max_tokens}.")
        return [value for value, _ in log_likelihood([prompt] * len(replies), replies, model)]

    spec = model.spec()
    # The model by its content: a folder that was moved judges nothing again, one that was changed does.
    endpoint = LocalEndpoint(instructions, log_probs, f"local {spec.weights} {spec.template} {model.max_tokens}")

    def make(kept: VerdictCache) -> tuple[Judge, Mapping[str, Any]]:
        judge = ChatJudge(instructions, endpoint, model=Path(name).name, keeper=kept, ask_again=service.ask_again)
        return judge, {"name": judge.name, "model": name, "weights": spec.weights, **_told_of(instructions)}

    return make


def _head(run: Path) -> Chosen:
    """The head of a run as a reward model: the higher score is preferred."""
    from coala.alignment import load_parts
    from coala.evaluation.judges import HeadJudge
    from coala.export import score_replies
    from coala.store import RunFolder, StoreError

    if not (RunFolder.open(run).path / "head" / "head.json").is_file():
        raise StoreError(f"{run}: has no fitted head yet, so it cannot judge. Finish it with `coala align`.")
    backbone, head, _ = load_parts(run)
    known: dict[tuple[str, str], float] = {}

    def score(prompt: Sequence[Turn], reply: Generation) -> float:
        # Each reply is shown in both orders; one forward pass tells its score.
        key = reply.prompt_id, reply.text
        if key not in known:
            known[key] = float(score_replies([prompt], [reply.text], head, backbone)[0])
        return known[key]

    facts = {"name": f"head {run.resolve().name}", "weights": head.spec.weights, "layer": head.spec.layer}
    files = {"judge": run / "head" / "head.safetensors"}
    return Chosen(HeadJudge(str(facts["name"]), score), facts=facts, files=files, sees_prompts=True)


def _changes(items: Sequence[str]) -> dict[str, Any]:
    import yaml

    from coala.values import CoalaError

    found: dict[str, Any] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not name.strip():
            raise CoalaError(f"--sampling {item!r}: expected NAME=VALUE, such as temperature=0.")
        found[name.strip()] = yaml.safe_load(value) if sign else None
    return found


def stem(judge: str) -> str:
    """A judge's name as part of a file's."""
    kind, sign, rest = judge.partition(":")
    name = f"{kind}-{rest}" if sign and kind == "rule" else Path(rest if sign else judge).name.partition(".")[0]
    return re.sub(r"[^\w.-]+", "-", name)


def load_replies(path: Path) -> list[Generation]:
    """Replies of a run's generations file; CoalaError for a file of something else or of none."""
    from coala.store import MisfitError, load_generations
    from coala.values import CoalaError

    try:
        found = load_generations(path)
    except MisfitError:
        found = []
    if not found:
        raise CoalaError(
            f"{path}: holds no replies. Give a generations-*.jsonl, as `coala align` writes them in a run."
        )
    return found
