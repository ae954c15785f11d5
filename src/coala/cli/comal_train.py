"""`coala comal train`: a language model towards the Nash policy of an oracle's preferences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coala.cli.flags import with_settings
from coala.cli.options import Download, TrustCode
from coala.cli.terminal import write
from coala.cli.tracking import Track, tracked
from coala.comal.named_oracles import ORACLES
from coala.comal.settings import COMALSettings
from coala.settings import Device, Template

if TYPE_CHECKING:
    from coala.comal.llm import LowRank


EPILOG = (
    ORACLES
    + """
\b
Examples:
  `coala comal train ./my-model prompts.jsonl --oracle judge:./judge-model --out runs/comal`
  `coala comal train runs/demo --oracle head --lora-rank 16 --out runs/comal`   model, prompts and pairs of a run

Other methods: iterative IPO is --ref-weight 0, iterative DPO --ref-weight 0 --loss dpo, INPO --outer 1.
"""
)


@dataclass(frozen=True, kw_only=True)
class LoRAFlags:
    """The adapter that is trained instead of all weights."""

    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the LoRA adapter to train; 0 trains all weights.")] = 0
    lora_alpha: Annotated[int | None, typer.Option(min=1, help="LoRA scaling, alpha (default: 2 x rank).")] = None
    lora_targets: Annotated[
        str | None, typer.Option(help="Modules the adapter changes, comma-separated (default: peft's choice).")
    ] = None

    def adapter(self) -> LowRank | None:
        from coala.comal.llm import LowRank

        if not self.lora_rank:
            return None
        targets = self.lora_targets
        modules = None if targets is None else tuple(name.strip() for name in targets.split(","))
        return LowRank(self.lora_rank, self.lora_alpha or 2 * self.lora_rank, modules)


@with_settings
def train(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, GGUF file, hub name, or a run (align or comal).")
    ],
    prompts: Annotated[
        Path | None,
        typer.Argument(
            metavar="PROMPTS", help="File of prompts (.txt, .jsonl, ...) or pairs (default: those of a COALA run)."
        ),
    ] = None,
    *,
    oracle: Annotated[str, typer.Option(help="Judge of which answer is better; see below.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; rerun the same command to resume.")],
    settings: COMALSettings,
    lora: LoRAFlags,
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model (default: the latest).")] = None,
    template: Template = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the weights.")
    ] = "float32",
    device: Device = "auto",
    cache: Annotated[
        Path | None, typer.Option(help="Verdict cache; runs can share it (default: verdicts.sqlite next to RUN).")
    ] = None,
    keep_policies: Annotated[
        bool, typer.Option("--keep-policies", help="Save the weights of every step, not only of the references.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Delete everything in RUN and start over.")] = False,
    track: Track = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Train towards the Nash policy: sample, judge, score, train; resumable at any point.

    The trained model is RUN/model, the report RUN/report.html; verdicts are cached, so none is paid twice.
    """
    from coala.cli.output import emit, progress, say, table
    from coala.comal.report import policy_sentence, update_rows
    from coala.comal.runs import ModelOptions, train_run

    about = {**asdict(settings), "model": model, "oracle": oracle, "dtype": dtype, "lora_rank": lora.lora_rank}
    with tracked(track, out, about) as told, progress() as show:
        summary = train_run(
            model,
            prompts,
            out,
            settings,
            oracle=oracle,
            options=ModelOptions(revision, template, dtype, device, lora.adapter()),
            cache=cache,
            keep_policies=keep_policies,
            restart=restart,
            on_progress=told.following(show),
            on_note=say,
            on_step=told.log,
        )
        told.summarise(summary)
    head, rows = update_rows(summary)
    table(rows, head)
    for note in summary["notes"][len(settings.notes()) :]:
        say(f"{note['level']}: {note['text']}")
    write(f"\n{policy_sentence(summary)}")
    write(f"\nmodel: {out / 'model'}\nreport: {out / 'report.html'}")
    emit(_short(out, summary))


def _short(run: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What the last line holds: everything but the steps, which are in the report."""
    short = {name: value for name, value in summary.items() if name not in ("steps", "notes")}
    warnings = [note["text"] for note in summary["notes"] if note["level"] == "warning"]
    return {"run": run, "model": run / "model", "report": run / "report.html", **short, "warnings": warnings}
