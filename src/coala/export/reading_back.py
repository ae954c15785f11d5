"""What was written for others, loaded by plain transformers (and peft) and compared, before it is handed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coala.export.network import ExportError

if TYPE_CHECKING:
    from coala.export.policy_card import Form

PROBES = ("How do I boil an egg?", "x", "one two three four five six seven eight nine ten " * 8)


@dataclass(frozen=True)
class ExportedPolicy:
    """``path`` with its ``form``; ``difference`` is the largest between its log-probabilities and the policy's.

    Over the whole vocabulary after each of ``probes`` prompts, by plain transformers; 0 probes where transformers does
    not read the architecture of a GGUF file, of which the tensor is compared then. ``beside`` are the files that stand
    next to a GGUF file: its card and its Modelfile.
    """

    path: Path
    form: Form
    n_bytes: int
    probes: int
    difference: float
    beside: tuple[Path, ...] = ()

    def summary_rows(self) -> list[list[str]]:
        """What a table says of it."""
        from coala.export.policy_card import checked

        rows = [[self.form, f"{self.path}, {self.n_bytes / 1e6:.1f} MB"]]
        rows += [["read back", checked(self.probes, self.difference)]]
        return rows + ([["next to it", ", ".join(path.name for path in self.beside)]] if self.beside else [])


def plain_model(folder: Path | str, dtype: torch.dtype, adapter: Path | None = None, **options: Any) -> Any:
    """The causal model of a folder as transformers loads it, an adapter beside its weights as peft puts it there."""
    from transformers import AutoModelForCausalLM

    from coala.backbone.silence import quiet

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


@torch.no_grad()
def next_log_probs(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probabilities (V,) float32 of the token after each row, by a model of transformers."""
    found = [model(torch.tensor([list(row)], device=model.device)).logits[0, -1] for row in rows]
    return [logits.float().log_softmax(-1).cpu() for logits in found]


def compare(what: str, wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """The largest difference of log-probabilities; ExportError beyond what ``dtype`` rounds."""
    worst = max(float((a.cpu() - b.cpu()).abs().max()) for a, b in zip(wanted, found, strict=True))
    # Half precision rounds the layer: logits of size 30 are off by about 0.1.
    allowed = 1e-3 if dtype == torch.float32 else 0.5
    if not worst <= allowed:
        raise ExportError(
            f"What was written for {what} is off by {worst:.3g} nats when it is read back, more than rounding: not all "
            "of the change is read from the files. Use another form."
        )
    return worst
