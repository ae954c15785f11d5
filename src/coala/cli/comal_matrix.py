"""`coala comal matrix`: policies against each other, from checkpoints of a run to COALA-guided models."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.cli.options import Download, TrustCode
from coala.cli.terminal import write
from coala.comal.named_oracles import ORACLES


class Mode(StrEnum):
    """What a win is."""

    hard = "hard"
    mean = "mean"


EPILOG = (
    """
\b
Entrants, each with a name before it if you like (NAME=...):
  FOLDER or hub name    a model
  RUN                   of `coala comal train`: the last policy; RUN@start, RUN@2 (after update 2), RUN@all
  RUN                   of `coala align`: guided by its head as the run says; RUN@unguided
  FILE.jsonl            answers that are there already (generations of these prompts)
"""
    + ORACLES
    + """
\b
Example:
  `coala comal matrix runs/comal@all guided=runs/demo -p prompts.txt --oracle judge:./judge -o runs/matrix`
"""
)


def matrix(
    entrants: Annotated[list[str], typer.Argument(metavar="ENTRANTS...", help="Two or more; see below.")],
    *,
    prompts: Annotated[Path, typer.Option("--prompts", "-p", help="Prompts (.txt, .jsonl, ...) or pairs.")],
    oracle: Annotated[str, typer.Option(help="What prefers one answer to another; see below.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; answers are kept, so that entrants can be added.")],
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of entrants that are not guided by a run.")] = 1.0,
    template: Annotated[str, typer.Option(help="Of entrants that are models: auto, chat, ...")] = "auto",
    mode: Annotated[Mode, typer.Option(help="Who is preferred, or the mean probability.")] = Mode.hard,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Verdict cache, which runs may share (default: verdicts.sqlite next to OUT).")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what OUT holds and start over.")] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Win rates of every entrant against every other, with intervals over prompts, and the mixture that none beats.

    M + M^T = 100; both orders of a pair are judged and averaged. Writes OUT/matrix.json and OUT/matrix.html.
    """
    from contextlib import nullcontext

    from coala.cli.output import emit, progress, say, table
    from coala.comal.entrants import entrants_of, texts_of
    from coala.comal.inputs import examples_of
    from coala.comal.matrix import win_rate_matrix
    from coala.comal.named_oracles import check_oracle, oracle_of
    from coala.comal.oracles import prompt_of
    from coala.comal.report import matrix_page, matrix_rows, nash_rows
    from coala.leaderboards.judges import opened
    from coala.store import RunFolder, digest, load_generations, save_generations, save_json, write_atomic
    from coala.values import CoalaError, prompt_id

    check_oracle(oracle)
    found = [entrant for text in entrants for entrant in entrants_of(text, template, device)]
    names = [entrant.name for entrant in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(found) < 2 or twice:
        what = f"the name {twice[0]!r} twice" if twice else f"{len(found)} entrant"
        raise CoalaError(f"Found {what}; expected two entrants at least, by different names (NAME=ENTRANT).")
    examples = examples_of(prompts)
    run = RunFolder(out)
    if restart:
        run.restart()
    sampling = {"samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    rules = {"prompts": digest([prompt_id(prompt_of(example)) for example in examples]), **sampling, "seed": seed}
    answers: dict[str, list[str]] = {}
    with run.held(), progress() as show:
        run.start({"command": "comal matrix", **rules})
        for number, entrant in enumerate(found):
            show("answers", number, len(found), entrant.name)
            file = f"answers-{entrant.name}.jsonl"
            made = {"entrant": entrant.identity, **rules}
            if not run.done(f"answers-{entrant.name}", made):
                drawn = entrant.answer(examples, samples, max_new_tokens, temperature, top_p, seed)
                save_generations(run.path / file, drawn)
                run.finish(f"answers-{entrant.name}", made, [file])
            answers[entrant.name] = texts_of(load_generations(run.path / file), examples, samples, entrant.name)
        show("answers", len(found), len(found))
        named = oracle_of(oracle, device=device)
        for remark in named.remarks:
            say(remark)
        rows = [example for example in examples for _ in range(samples)]
        group = [number for number in range(len(examples)) for _ in range(samples)]
        verdicts = cache or run.path.parent / "verdicts.sqlite"
        with opened(verdicts, say) if named.kept else nullcontext() as keeper:
            rates = win_rate_matrix(
                answers,
                rows,
                named.oracle,
                mode=mode.value,
                group=group,
                keeper=keeper,
                tell=lambda share: show("judge", share, 1.0),
            )
    nash = rates.nash()
    result: dict[str, Any] = {
        "out": str(run.path),
        "oracle": named.oracle.name,
        "mode": rates.mode,
        "prompts": len(examples),
        "samples": samples,
        "names": list(rates.names),
        "percent": rates.percent.tolist(),
        "intervals": [list(row) for row in rates.intervals],
        "average": list(rates.averages),
        "average_with_self": rates.average(include_self=True).tolist(),
        "nash": nash.mixture,
        "nash_unique": nash.unique,
        "gap": nash.gap,
        "failures": rates.failures,
        "disagreement": rates.disagreement,
        "characters": rates.characters.tolist(),
    }
    save_json(run.path / "matrix.json", result)
    sentences = [
        f"{len(examples)} prompts, {samples} answer(s) each, oracle {named.oracle.name}. Row beats column, in %, with "
        f"95 % intervals over prompts; the mean is over the others. {rates.failures} pairs without a verdict were left "
        f"out; the oracle's two orders disagree by {rates.disagreement:.3f} on average.",
        *(f"{entrant.name}: {entrant.how}." for entrant in found),
    ]
    write_atomic(run.path / "matrix.html", matrix_page(rates, nash, "Win rates", sentences))
    head, cells = matrix_rows(rates)
    table(cells, head)
    write()
    head, cells = nash_rows(nash)
    table(cells, head)
    if rates.failures:
        say(f"{rates.failures} pairs have no verdict and were left out.")
    write(f"\npage: {run.path / 'matrix.html'}")
    emit(result)
