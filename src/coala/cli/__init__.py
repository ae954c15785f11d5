"""The `coala` command: arguments in, one library call, a short summary and one JSON line out.

Nothing heavy is imported until a command runs, so that `coala --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from coala.cli import (
    align,
    audit,
    chat,
    comal,
    compare,
    data,
    demo,
    distil,
    evaluate,
    export,
    extract,
    fit,
    forget,
    generate,
    influence,
    live,
    plan,
    report,
    serve,
    survey,
)
from coala.cli.output import wants_json
from coala.cli.terminal import styled, visible, write
from coala.cli.xla_cache import keep_compiled
from coala.messages import CoalaError

INTERRUPTED = 130


class _Commands(TyperGroup):
    """Commands that all take ``--json``; says in our own words what is wrong with the value of a flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups: list[Any] = [self]
        while groups:
            for command in groups.pop().commands.values():
                is_group = hasattr(command, "commands")
                if is_group:
                    groups.append(command)
                runs = not is_group or command.invoke_without_command
                if runs and all("--json" not in one.opts for one in command.params):
                    command.params.append(_json_option())

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            cause: Any = error.__cause__
            if hasattr(error, "message") and hasattr(cause, "errors"):
                from coala.messages import joined, sentences

                error.message = joined(sentences([{**fault, "loc": ()} for fault in cause.errors()]))
            raise


def _asked(value: bool) -> None:
    wants_json.set(value)


def _takes_json(
    json: Annotated[
        bool, typer.Option("--json", callback=_asked, help="Print a last line of JSON on a terminal too.")
    ] = False,
) -> None:
    """Nothing but its option, which typer makes of it in whatever way it makes options."""


def _json_option() -> Any:
    alone = typer.Typer(add_completion=False)
    alone.command()(_takes_json)
    option: Any = typer.main.get_command(alone).params[0]
    option.expose_value = False
    return option


app = typer.Typer(
    name="coala",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with `coala demo`, then `coala align PAIRS --model MODEL --out RUN`. "
    "Results go to stdout, progress to stderr. In a pipe, or with --json, the last line is JSON.",
)
app.command("align")(align.align)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("live")(live.live)
app.command("report")(report.report)
app.command("plan")(plan.plan)
app.command("compare")(compare.compare)
app.command("extract")(extract.extract)
app.command("fit")(fit.fit)
app.command("distil")(distil.distil)
app.add_typer(demo.app, name="demo")
app.command("audit")(audit.audit)
app.command("influence")(influence.influence)
app.command("forget")(forget.forget)
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="eval")
app.add_typer(survey.app, name="survey")
app.add_typer(comal.app, name="comal")
app.command("export")(export.export)
app.add_typer(export.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        write(f"coala {version('coala-align')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Align a frozen language model with preference pairs by convex optimisation, with a certificate."""


def main() -> None:
    """Entry point: turns the library's errors into one message on stderr and an exit code."""
    _settle_environment()
    keep_compiled()
    try:
        app()
    except SystemExit as end:
        # typer turns Ctrl-C into this code and says nothing.
        if end.code == INTERRUPTED:
            write("interrupted; finished work is saved. Rerun the same command to resume.", err=True)
        raise
    except BrokenPipeError:
        # The reader of our output has gone (`coala ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except CoalaError as error:
        told = visible(f"error: {error}")
        styled(typer.style(told, fg="red") if sys.stderr.isatty() else told, err=True)
        sys.exit(2)


def _settle_environment() -> None:
    # No telemetry, ours or a library's; set before anything heavy is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that spin while they wait make two runs on one machine many times slower than one after the other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # A head needs little memory; JAX would otherwise take most of a GPU at its first array.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
