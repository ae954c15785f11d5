"""`coala comal train`: a language model towards the Nash policy of an oracle's preferences."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.cli.options import Download, TrustCode
from coala.cli.terminal import write
from coala.comal.named_oracles import ORACLES


class Loss(StrEnum):
    """What a step minimises."""

    inpo = "inpo"
    sppo = "sppo"
    dro = "dro"
    rebel = "rebel"
    dpo = "dpo"


class Pairs(StrEnum):
    """Which of a prompt's answers are compared."""

    random = "random"
    all = "all"
    best_worst = "best_worst"


class Target(StrEnum):
    """What is asked of a pair."""

    soft = "soft"
    bernoulli = "bernoulli"
    hard = "hard"


EPILOG = (
    ORACLES
    + """
\b
Examples:
  `coala comal train ./my-model prompts.jsonl --oracle judge:./judge-model --out runs/comal`
  `coala comal train runs/demo --oracle head --lora-rank 16 --out runs/comal`   model, prompts and pairs of a run

By the same command: iterative IPO is --ref-weight 0, iterative DPO --ref-weight 0 --loss dpo, INPO --outer 1.
"""
)


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub name, or a run (align or comal).")],
    prompts: Annotated[
        Path | None,
        typer.Argument(metavar="PROMPTS", help="Prompts (.txt, .jsonl, ...) or pairs; a COALA run has its own."),
    ] = None,
    *,
    oracle: Annotated[str, typer.Option(help="What prefers one answer to another; see below.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; rerun the same command to resume.")],
    eta: Annotated[float | None, typer.Option(help="Step size (default: 500, as published).")] = None,
    beta: Annotated[float | None, typer.Option(help="1 / eta, instead of --eta.")] = None,
    ref_weight: Annotated[float | None, typer.Option(help="Weight of the reference, eta x tau (default: 1/3).")] = None,
    tau: Annotated[float | None, typer.Option(help="Strength of the regularisation, instead of --ref-weight.")] = None,
    outer: Annotated[int, typer.Option(min=1, help="Updates of the reference.")] = 3,
    inner_steps: Annotated[int, typer.Option("--inner-steps", "-k", min=1, help="Inner steps per update, K.")] = 6,
    loss: Annotated[Loss, typer.Option(help="Inner loss.")] = Loss.inpo,
    candidates: Annotated[int, typer.Option(min=2, help="Answers drawn per prompt and step.")] = 5,
    pairs: Annotated[Pairs, typer.Option(help="Which pairs of candidates are trained on.")] = Pairs.random,
    target: Annotated[
        Target, typer.Option(help="What the loss aims at: the oracle's probability, a draw from it, or its winner.")
    ] = Target.soft,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; anything but 1 changes the game that is solved.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold (1 = off); as --temperature.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    prompts_per_step: Annotated[
        int | None, typer.Option(min=1, help="Prompts per step, in turn (default: all).")
    ] = None,
    anchor_nll: Annotated[
        float, typer.Option(min=0, help="Weight of a likelihood term against drift; see docs/nash.md.")
    ] = 0.0,
    length_normalize: Annotated[bool, typer.Option("--length-normalize", help="Margins per token.")] = False,
    learning_rate: Annotated[
        float, typer.Option(help="AdamW learning rate (optimiser state is reset every step).")
    ] = 5e-7,
    epochs: Annotated[float, typer.Option(help="Epochs over each step's pairs.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per forward pass.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per update.")] = 1,
    schedule: Annotated[str, typer.Option(help="Learning rate schedule: linear, constant, cosine, ...")] = "linear",
    lora_rank: Annotated[int, typer.Option(min=0, help="Train an adapter of this rank; 0: all weights.")] = 0,
    lora_alpha: Annotated[int | None, typer.Option(min=1, help="LoRA alpha (default: 2 x rank).")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Modules the adapter changes, separated by commas (default: peft's choice).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    template: Annotated[
        str, typer.Option(help="How prompts are rendered: auto, chat, dialogue or continuation.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")] = "float32",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 (autocast).")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations to save memory.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all draws.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Verdict cache, which runs may share (default: verdicts.sqlite next to RUN).")
    ] = None,
    keep_policies: Annotated[
        bool, typer.Option("--keep-policies", help="Keep every step's weights, not only the references'.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what RUN holds and start over.")] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Train towards the Nash policy: sample, judge, score and train, step by step, resumable at any moment.

    The trained model is RUN/model, the report RUN/report.html; verdicts are cached, so none is paid for twice.
    """
    from coala.cli.output import emit, progress, say, table
    from coala.comal.llm import LowRank
    from coala.comal.report import update_rows
    from coala.comal.runs import ModelOptions, train_run
    from coala.comal.settings import COMALSettings

    settings = COMALSettings(
        eta=eta,
        beta=beta,
        ref_weight=ref_weight,
        tau=tau,
        outer_steps=outer,
        inner_steps=inner_steps,
        inner_loss=loss.value,
        num_candidates=candidates,
        pair_selection=pairs.value,
        target=target.value,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        prompts_per_step=prompts_per_step,
        length_normalize=length_normalize,
        anchor_nll=anchor_nll,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        schedule=schedule,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    lora = None
    if lora_rank:
        modules = None if lora_targets is None else tuple(name.strip() for name in lora_targets.split(","))
        lora = LowRank(lora_rank, lora_alpha or 2 * lora_rank, modules)
    with progress() as show:
        summary = train_run(
            model,
            prompts,
            out,
            settings,
            oracle=oracle,
            options=ModelOptions(revision, template, dtype, device, lora),
            cache=cache,
            keep_policies=keep_policies,
            restart=restart,
            on_progress=show,
            on_note=say,
        )
    head, rows = update_rows(summary)
    table(rows, head)
    for note in summary["notes"][len(settings.notes()) :]:
        say(f"{note['level']}: {note['text']}")
    write(f"\nmodel: {out / 'model'}\nreport: {out / 'report.html'}")
    emit(_short(out, summary))


def _short(run: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What the last line holds: everything but the steps, which are in the report."""
    short = {name: value for name, value in summary.items() if name not in ("steps", "notes")}
    warnings = [note["text"] for note in summary["notes"] if note["level"] == "warning"]
    return {"run": run, "model": run / "model", "report": run / "report.html", **short, "warnings": warnings}
