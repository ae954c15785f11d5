"""`coala eval judge` and `coala eval grade`: verdicts from a judge, paid for once, with what they are worth."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from coala.cache import VerdictCache
    from coala.evaluation.harness import Judged
    from coala.evaluation.judges import Cost, Instructions, Judge, LanguageModelJudge, OpenAIJudge
    from coala.values import Generation, Turn

NOT_ALL = 1  # exit code: there are results, but the judge stopped before the end

Model = Annotated[str | None, typer.Option(help="Model that judges, as the endpoint names it.")]
BaseUrl = Annotated[
    str | None, typer.Option(envvar="OPENAI_BASE_URL", help="An OpenAI-compatible endpoint; none: OpenAI's own.")
]
KeyEnv = Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key.")]
Cache = Annotated[
    Path | None, typer.Option(help="File in which answers are kept, to be shared at will; beside OUT if not given.")
]
Concurrency = Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")]
MaxCalls = Annotated[int | None, typer.Option(min=0, help="Stop after so many requests.")]
MaxTokens = Annotated[int | None, typer.Option(min=0, help="Send nothing more once so many tokens were used.")]
Attempts = Annotated[int, typer.Option(min=1, help="Requests for one verdict when the endpoint fails.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")]
AskAgain = Annotated[
    bool, typer.Option("--ask-again", help="Buy kept answers anew from which no verdict could be read.")
]
Sampling = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Change the judge's sampling; without VALUE the name is not sent. Repeat."),
]


def judge(
    ours: Annotated[Path, typer.Argument(metavar="GENERATIONS_A", help="Replies: a generations-*.jsonl of a run.")],
    reference: Annotated[Path, typer.Argument(metavar="GENERATIONS_B", help="Replies to the same prompts.")],
    by: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="pairwise (default), weighted, arena or grade; a folder with judge.yaml; a .jsonl of prompt "
            "templates; rule:NAME[:ARGUMENT], words:FILE or replay:JUDGEMENTS.",
        ),
    ] = None,
    model: Model = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    local: Annotated[
        str | None, typer.Option(help="Judge with this model, loaded here, by the log-probabilities of the verdicts.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs with the prompts; pairs-eval.jsonl beside the replies if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where judgements go; judgements-JUDGE.jsonl beside A if not given.")
    ] = None,
    cache: Cache = None,
    one_order: Annotated[
        bool, typer.Option("--one-order", help="Ask with A first only; biased, at half cost.")
    ] = False,
    concurrency: Concurrency = 8,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    attempts: Attempts = 6,
    timeout: Timeout = 180.0,
    ask_again: AskAgain = False,
    sampling: Sampling = None,
) -> None:
    """Judge A's replies against B's in both orders: win rate, position bias, inconsistency and cost.

    An interrupted or stopped judging goes on with the same command; nothing is bought twice. Exit code 1: judged in
    part.

    `coala eval judge RUN/generations-guided.jsonl RUN/generations-unguided.jsonl --model gpt-4o`
    """
    from coala.cli.evaluate import finish
    from coala.cli.screen import progress, say, table
    from coala.evaluation import win_rate
    from coala.evaluation.arena import score
    from coala.evaluation.arena_judging import battles
    from coala.evaluation.harness import judge_many
    from coala.evaluation.judges import ChatJudge
    from coala.store import load_generations, save_judgements
    from coala.values import CoalaError

    named = by or ("weighted" if local else "pairwise")
    sides = [_replies_file(path) for path in (ours, reference)]
    mine, theirs = (load_generations(path) for path in sides)
    target = out or sides[0].parent / f"judgements-{_stem(named)}.jsonl"
    service = _Service(model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ())
    chosen, kept = _judge(named, local, service, cache or target.parent / "verdicts.sqlite")
    with nullcontext() if kept is None else kept, progress() as show:
        prompts = _prompts(pairs, sides[0], mine, needed=kept is not None or local is not None)
        found = judge_many(
            mine,
            theirs,
            chosen,
            swap=not one_order,
            prompts=prompts,
            concurrency=concurrency if kept is not None else 1,
            on_progress=lambda done, total: show("judge", done, total),
            on_failure=_told(),
        )
        if found.stopped and not found.judgements:
            raise CoalaError(found.stopped)
        fought = None
        if isinstance(chosen, ChatJudge) and chosen.instructions.mode == "arena":
            fought = battles(mine, theirs, chosen, prompts)
    save_judgements(target, found.judgements)
    rate = win_rate(found.judgements)
    result: dict[str, Any] = {"out": str(target), "judge": chosen.name, "win_rate": rate, **_about(found)}
    rows = [["win rate", str(rate)], *_rows(found)]
    if fought is not None and len(fought):
        points = next(iter(score(fought, str(fought.second[0])).values())).score
        result["arena"] = points
        rows.insert(1, ["percent of battles, a strong verdict being three", str(points)])
    table(rows, [found.judgements[0].first if found.judgements else "nothing to judge", f"judged by {chosen.name}"])
    if found.stopped:
        say(f"stopped: {found.stopped}")
    finish(result, ())
    if found.stopped:
        raise typer.Exit(NOT_ALL)


def grade(
    questions: Annotated[Path, typer.Argument(help="Questions: question_id, category, turns; JSON Lines, also .gz.")],
    answers: Annotated[Path, typer.Argument(help="Answers: question_id, model_id, choices with turns.")],
    out: Annotated[Path, typer.Option(help="Where the graded rows go.")],
    references: Annotated[Path | None, typer.Option(help="Reference answers, in the form of answers.")] = None,
    by: Annotated[
        str, typer.Option("--judge", help="grade, a folder with judge.yaml, or a .jsonl of prompt templates.")
    ] = "grade",
    model: Model = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    cache: Cache = None,
    concurrency: Concurrency = 8,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    attempts: Attempts = 6,
    timeout: Timeout = 180.0,
    ask_again: AskAgain = False,
    sampling: Sampling = None,
) -> None:
    """Grade answers from 1 to 10, turn by turn, the way MT-Bench does; `coala eval mtbench` reads what is written.

    `coala eval grade question.jsonl answers.jsonl --references gpt-4.jsonl --model gpt-4 --out graded.jsonl`
    """
    import json

    from coala.cli.evaluate import finish
    from coala.cli.screen import progress, say, table
    from coala.evaluation import mtbench
    from coala.evaluation.grading import grade_many, read_answered
    from coala.evaluation.judges import read_instructions
    from coala.store import write_atomic
    from coala.values import CoalaError

    answered = read_answered(questions, answers, references)
    service = _Service(model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ())
    chosen, kept = _chat(read_instructions(by, kind="single"), service, cache or out.parent / "verdicts.sqlite")
    with kept, progress() as show:
        found = grade_many(
            answered,
            chosen,
            concurrency=concurrency,
            on_progress=lambda done, total: show("grade", done, total),
            on_failure=_told(),
        )
    if found.stopped and not found.rows:
        raise CoalaError(found.stopped)
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    ratings, _ = mtbench.read_ratings(out)
    scores = mtbench.scores(ratings)
    for one in scores.values():
        parts = {"overall": one.overall, **{f"turn {turn}": value for turn, value in one.by_turn.items()}}
        table([[name, str(value)] for name, value in parts.items()], [one.model, f"graded by {chosen.name}"])
    table(_cost_rows(found.failures, found.cost, f"{found.n_unjudged} of {found.n_grades} grades"))
    if found.stopped:
        say(f"stopped: {found.stopped}")
    finish(
        {
            "out": str(out),
            "judge": chosen.name,
            "scores": {name: {"overall": one.overall, "by_turn": one.by_turn} for name, one in scores.items()},
            **_spent(found.failures, found.n_unjudged, found.stopped, found.cost),
        },
        (),
    )
    if found.stopped:
        raise typer.Exit(NOT_ALL)


@dataclass(frozen=True)
class _Service:
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


def _judge(by: str, local: str | None, service: _Service, cache: Path) -> tuple[Judge, VerdictCache | None]:
    """The judge by its name, and the cache if it needs one."""
    from coala.evaluation.judges import ReplayJudge, RuleJudge, WordJudge, read_instructions
    from coala.store import load_judgements

    kind, sign, rest = by.partition(":")
    if sign and kind == "rule":
        return RuleJudge.parse(rest), None
    if sign and kind == "words":
        return WordJudge.load(rest), None
    if sign and kind == "replay":
        return ReplayJudge(load_judgements(Path(rest))), None
    instructions = read_instructions(by)
    if local is not None:
        return _local(local, instructions), None
    return _chat(instructions, service, cache)


def _chat(instructions: Instructions, service: _Service, cache: Path) -> tuple[OpenAIJudge, VerdictCache]:
    from coala.cache import VerdictCache
    from coala.evaluation.judges import Budget, OpenAIJudge, Patience
    from coala.values import CoalaError

    key = os.environ.get(service.key_env, "")
    if not key and service.base_url is None:
        raise CoalaError(
            f"The environment variable {service.key_env} holds no key. Set it, name another with --key-env, or give "
            "the --base-url of an endpoint that needs none."
        )
    cache.parent.mkdir(parents=True, exist_ok=True)
    kept = VerdictCache(cache)
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


def _local(name: str, instructions: Instructions) -> LanguageModelJudge:
    from coala.backbone import load_backbone
    from coala.decoding import log_likelihood
    from coala.evaluation.judges import JudgeFailure, LanguageModelJudge
    from coala.values import Pair

    model = load_backbone(name)

    def log_probs(prompt: Sequence[Turn], replies: Sequence[str]) -> list[float]:
        tokens = max(model.count_tokens(Pair(tuple(prompt), reply, reply, "")) for reply in replies)
        if tokens > model.max_tokens:
            # Rendering would cut the question off and the model judge what is left of it.
            raise JudgeFailure("too long", f"The question takes {tokens} tokens; {name} reads {model.max_tokens}.")
        return [value for value, _ in log_likelihood([prompt] * len(replies), replies, model)]

    return LanguageModelJudge(f"{instructions.name} {Path(name).name}", instructions, log_probs)


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


def _stem(judge: str) -> str:
    """A judge's name as part of a file's."""
    kind, sign, rest = judge.partition(":")
    name = f"{kind}-{rest}" if sign and kind == "rule" else Path(rest if sign else judge).name.partition(".")[0]
    return re.sub(r"[^\w.-]+", "-", name)


def _replies_file(path: Path) -> Path:
    """The file itself, or the only generations-*.jsonl of a folder."""
    from coala.values import CoalaError

    if not path.is_dir():
        return path
    found = sorted(path.glob("generations-*.jsonl"))
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise CoalaError(f"{path}: is a folder; expected one generations-*.jsonl in it, found {names}. Name the file.")
    return found[0]


def _prompts(
    pairs: Path | None, replies: Path, mine: Sequence[Generation], *, needed: bool
) -> Mapping[str, Sequence[Turn]]:
    from coala.align.stages import prompt_id
    from coala.store import load_pairs
    from coala.values import CoalaError

    path = pairs or replies.parent / "pairs-eval.jsonl"
    if not needed or (pairs is None and not path.exists()):
        found: dict[str, Sequence[Turn]] = {}
    else:
        found = {prompt_id(pair): pair.prompt for pair in load_pairs(path)}
    lacking = [reply.prompt_id for reply in mine if reply.prompt_id not in found]
    if needed and lacking:
        raise CoalaError(
            f"{len(lacking)} of {len(mine)} replies are to prompts that {path} does not hold (the first is "
            f"{lacking[0]!r}), and this judge has to see them. Give the run's pairs with --pairs."
        )
    return found


def _told() -> Any:
    """Says the first failures, and that there are more."""
    from coala.cli.screen import say

    n = 0

    def tell(name: str, error: Exception) -> None:
        nonlocal n
        n += 1
        if n <= 5:
            say(f"failed: {name}: {error}")
        elif n == 6:
            say("failed: more; they are counted below")

    return tell


def _about(found: Judged) -> dict[str, Any]:
    spent = _spent(found.failures, found.n_unjudged, found.stopped, found.cost)
    return {"n_comparisons": found.n_comparisons, **vars(found.consistency), **spent}


def _spent(failures: Mapping[str, int], n_unjudged: int, stopped: str, cost: Cost) -> dict[str, Any]:
    return {
        "failures": failures,
        "n_unjudged": n_unjudged,
        "stopped": stopped,
        "cost": {**vars(cost), "tokens": cost.tokens},
    }


def _rows(found: Judged) -> list[list[str]]:
    about = found.consistency
    return [
        ["position bias", f"{about.position_bias}; {about.n_first} times the first, {about.n_second} the second"],
        ["inconsistency", str(about.inconsistency)],
        ["preference for the first", str(about.first_place)],
        *_cost_rows(found.failures, found.cost, f"{found.n_unjudged} of {found.n_comparisons} comparisons"),
    ]


def _cost_rows(failures: Mapping[str, int], cost: Cost, unjudged: str) -> list[list[str]]:
    return [
        ["failed verdicts", ", ".join(f"{kind} {n}" for kind, n in failures.items()) or "none"],
        ["not judged", unjudged],
        ["cost", f"{cost.calls} calls, {cost.answers} answers, {cost.tokens} tokens; {cost.kept} taken from the cache"],
    ]
