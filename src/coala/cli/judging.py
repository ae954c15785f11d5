"""Judges as commands name them: from flags to an object that judges, and what a record says of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from coala.evaluation.harness import Judged
    from coala.evaluation.judges import Cost, Instructions, Judge, OpenAIJudge
    from coala.report import Figure
    from coala.store.verdict_cache import VerdictCache
    from coala.values import Estimate, Generation, Turn

By = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="pairwise (default), weighted, arena or grade; a folder with judge.yaml; a .jsonl of prompt "
        "templates; head:RUN, rule:NAME[:ARGUMENT], words:FILE or replay:JUDGEMENTS.",
    ),
]
Local = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Judge with this model, loaded here, by the log-probabilities of the verdicts."),
]
OneOrder = Annotated[bool, typer.Option("--one-order", help="Ask about each prompt in one order only, at half cost.")]
VERDICTS = "verdicts.sqlite"
NOT_ALL = 1  # exit code: there are results, but the judge stopped before the end

Model = Annotated[str | None, typer.Option(help="Judge model, as the endpoint names it.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(envvar="OPENAI_BASE_URL", help="Base URL of an OpenAI-compatible endpoint (default: OpenAI)."),
]
KeyEnv = Annotated[str, typer.Option(help="Environment variable with the endpoint's API key.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Verdict cache, which runs may share (default: verdicts.sqlite next to the replies)."),
]
Concurrency = Annotated[int, typer.Option(min=1, max=256, help="Concurrent requests.")]
MaxCalls = Annotated[int | None, typer.Option(min=0, help="Stop after so many requests.")]
MaxTokens = Annotated[int | None, typer.Option(min=0, help="Stop once so many tokens have been used.")]
Attempts = Annotated[int, typer.Option(min=1, help="Attempts per verdict when the endpoint fails.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for one request.")]
AskAgain = Annotated[bool, typer.Option("--ask-again", help="Ask again for cached answers that could not be parsed.")]
Sampling = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Override the judge's sampling; NAME without a value is not sent. Repeatable."
    ),
]


@dataclass(frozen=True)
class Service:
    """What the flags say of the endpoint."""

    model: str | None
    base_url: str | None
    key_env: str
    max_calls: int | None
    max_tokens: int | None
    attempts: int
    timeout: float
    ask_again: bool
    sampling: Sequence[str]


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


def choose(by: str, local: str | None, service: Service, cache: Path) -> Chosen:
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
    return asking(read_instructions(by), local, service, cache)


def asking(instructions: Instructions, local: str | None, service: Service, cache: Path) -> Chosen:
    """The judge that asks a model as ``instructions`` say: the one loaded here, or one behind an endpoint."""
    if local is not None:
        return _local(local, instructions, service, cache)
    judge, kept = chat_judge(instructions, service, cache)
    return Chosen(judge, kept, chat_facts(judge), sees_prompts=True, is_local=False)


def kept_beside(replies: Path, out: Path) -> Path:
    """Where answers are kept if nothing is said: in the folder ``replies``, so that another OUT finds them again.

    The folder ``out`` is taken if an earlier judging has kept its answers there, or ``replies`` cannot be written.
    """
    from coala.cli.output import say

    home, other = replies / VERDICTS, out / VERDICTS
    if not home.exists() and (other.exists() or not os.access(replies, os.W_OK)):
        return other
    if other.exists() and other.resolve() != home.resolve():
        say(f"note: answers are kept in {home}; those in {other} are not read. Give --cache {other} to read them.")
    return home


def opened(cache: Path) -> VerdictCache:
    """The file of answers; says so if some that were kept there are lost."""
    from coala.cli.output import say
    from coala.store.verdict_cache import VerdictCache

    cache.parent.mkdir(parents=True, exist_ok=True)
    kept = VerdictCache(cache)
    if kept.damage:
        say(f"warning: {kept.damage}")
    return kept


def chat_facts(judge: OpenAIJudge) -> dict[str, Any]:
    """What a record tells of a judge behind an endpoint; never its key."""
    return {"name": judge.name, "model": judge.model, "endpoint": bare(judge.endpoint), **_told_of(judge.instructions)}


def bare(address: str) -> str:
    """An address without the name and password that it may hold."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", address)


def _told_of(instructions: Instructions) -> dict[str, Any]:
    from coala.store import digest

    return {
        "instructions": instructions.name,
        "mode": instructions.mode,
        "digest": instructions.digest,
        "prompts": {prompt.name: digest(vars(prompt)) for prompt in instructions.prompts},
        "sampling": dict(instructions.sampling),
    }


def chat_judge(instructions: Instructions, service: Service, cache: Path) -> tuple[OpenAIJudge, VerdictCache]:
    from coala.cli.output import say
    from coala.data.http import is_loopback
    from coala.evaluation.judges import Budget, OpenAIJudge, Patience
    from coala.values import CoalaError

    key = os.environ.get(service.key_env, "")
    if not key and service.base_url is None:
        raise CoalaError(
            f"The environment variable {service.key_env} holds no key. Set it, name another with --key-env, or give "
            "the --base-url of an endpoint that needs none."
        )
    address = service.base_url or ""
    if key and address.startswith("http://") and not is_loopback(address):
        say(f"warning: the key in {service.key_env} goes to {bare(address)} unencrypted. Use https if it is a secret.")
    kept = opened(cache)
    try:
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
        )
    except BaseException:
        kept.close()
        raise
    return judge, kept


def _local(name: str, instructions: Instructions, service: Service, cache: Path) -> Chosen:
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
    kept = opened(cache)
    judge = ChatJudge(instructions, endpoint, model=Path(name).name, keeper=kept, ask_again=service.ask_again)
    facts = {"name": judge.name, "model": name, "weights": spec.weights, **_told_of(instructions)}
    return Chosen(judge, kept, facts, sees_prompts=True)


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


def tell_failures() -> Any:
    """Says the first failures, and that there are more."""
    from coala.cli.output import say

    n = 0

    def tell(name: str, error: Exception) -> None:
        nonlocal n
        n += 1
        if n <= 5:
            say(f"failed: {name}: {error}")
        elif n == 6:
            say("failed: more; they are counted below")

    return tell


def about(found: Judged) -> dict[str, Any]:
    """Order effects, failures and cost for the JSON line."""
    costs = spent(found.failures, found.n_unjudged, found.stopped, found.cost, found.words)
    return {"n_comparisons": found.n_comparisons, **vars(found.consistency), **costs}


def spent(
    failures: Mapping[str, int], n_unjudged: int, stopped: str, cost: Cost, words: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "failures": failures,
        "failure_words": words,
        "n_unjudged": n_unjudged,
        "stopped": stopped,
        "cost": {**vars(cost), "tokens": cost.tokens},
    }


def order_figures(found: Judged) -> list[Figure]:
    """What order does to the judge, for a record; nothing where no comparison was judged in both orders."""
    from coala.report import Figure

    about = found.consistency
    if not about.position_bias.n:
        return []
    return [
        Figure("position bias", about.position_bias),
        Figure("inconsistency", about.inconsistency),
        Figure("preference for the reply shown first", about.first_place, "share", 0.5),
    ]


def spending(n_unjudged: int, n: int, stopped: str, cost: Cost, words: Mapping[str, str]) -> dict[str, Any]:
    """What was judged and at what cost, for a record."""
    said = f"{cost.calls} calls, {cost.answers} answers, {cost.tokens} tokens; {cost.kept} taken from the cache"
    found: dict[str, Any] = {"not judged": f"{n_unjudged} of {n}"}
    found |= {f"the first failure, {kind}": text for kind, text in words.items()}
    return found | ({"stopped": stopped} if stopped else {}) | {"cost of the last call": said}


def judged_rows(found: Judged) -> list[list[str]]:
    about = found.consistency
    return [
        *(
            [
                [
                    "position bias",
                    f"{about.position_bias}; {about.n_first} times the first, {about.n_second} the second",
                ],
                ["inconsistency", str(about.inconsistency)],
                ["preference for the first", str(about.first_place)],
            ]
            if about.position_bias.n
            else [["position bias", "no verdicts in both orders"]]
        ),
        *cost_rows(found.failures, found.cost, f"{found.n_unjudged} of {found.n_comparisons} comparisons", found.words),
    ]


def told(found: Estimate) -> str:
    """An estimate over verdicts, for a table."""
    return str(found) if found.n else "no verdicts"


def told_interval(found: Estimate) -> str:
    """The same without its n, for tables that have it in a column."""
    from coala.cli.output import interval

    return interval(found) if found.n else "no verdicts"


def cost_rows(failures: Mapping[str, int], cost: Cost, unjudged: str, words: Mapping[str, str]) -> list[list[str]]:
    return [
        ["failed verdicts", ", ".join(f"{kind} {n}" for kind, n in failures.items()) or "none"],
        *([f"the first of them ({kind})", text] for kind, text in words.items()),
        ["not judged", unjudged],
        ["cost", f"{cost.calls} calls, {cost.answers} answers, {cost.tokens} tokens; {cost.kept} taken from the cache"],
    ]
