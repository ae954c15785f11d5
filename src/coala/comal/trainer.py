"""TRL's DPOTrainer taught the losses of COMAL: rows that carry log v, a squared loss on summed log-probabilities.

The only module of this package that knows TRL's inside. Knows nothing of judges, runs or how the rows were made.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from coala.comal.settings import COMALSettings
from coala.values import CoalaError


def arguments(settings: COMALSettings, seed: int, folder: Path, device: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "seed": seed,
        "data_seed": seed,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "beta": settings.beta,
        "max_length": None,  # what was sampled fits the context; cutting it here would not cut log v
        "precompute_ref_log_probs": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
    }


@cache
def trainer_types() -> tuple[Any, Any, Any]:
    """DPOTrainer with our loss and its columns, its configuration, and the collator's factory."""
    import torch

    trl, place = import_module("trl"), import_module("trl.trainer.dpo_trainer")

    class COMALTrainer(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        """The losses of ``coala.comal.loop`` on rows that carry log v, targets and weights."""

        settings: COMALSettings
        _signature_columns: list[str] | None

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # tokens already

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            if not {"ref_chosen_logps", "ref_rejected_logps"} <= set(dataset.column_names):
                raise CoalaError(f"The {name} rows have no log v: score the candidates first.")
            return dataset

        def _set_signature_columns_if_needed(self) -> None:
            if self._signature_columns is None:
                super()._set_signature_columns_if_needed()
                self._signature_columns = [*(self._signature_columns or []), "target", "weight"]

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            # What the model's forward does not know must not reach it.
            target, weight = inputs["target"], inputs["weight"]
            completion = inputs["completion_mask"]
            labels = inputs["input_ids"].masked_fill(completion == 0, -100)
            out = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            log_probs = out.log_probs[:, -(completion.shape[1] - 1) :].float().sum(dim=1)
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            d = log_probs - reference
            if self.settings.length_normalize:
                d = d / completion.sum(dim=1)
            first, second = d.chunk(2)
            if self.settings.inner_loss == "sppo":
                per_pair = ((first - target[:, 0]) ** 2 + (second - target[:, 1]) ** 2) / 2
            elif self.settings.inner_loss == "dpo":
                # The targets' difference is eta (P - 1/2); the label 0 or 1 of a drawn or hard one comes out as well.
                wins = 0.5 + (target[:, 0] - target[:, 1]) / self.settings.step
                logits = (first - second) / self.settings.step
                per_pair = torch.nn.functional.binary_cross_entropy_with_logits(logits, wins, reduction="none")
            else:
                per_pair = (first - second - (target[:, 0] - target[:, 1])) ** 2
            loss = (weight * per_pair).mean()
            if self.settings.anchor_nll:
                loss = loss - self.settings.anchor_nll * (torch.cat([weight, weight]) * log_probs).mean()
            return (loss, out) if return_outputs else loss

    def collator(pad: int) -> Any:
        plain = place.DataCollatorForPreference(pad_token_id=pad)

        def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = plain(examples)
            for name in ("target", "weight"):
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
            return batch

        return collate

    return COMALTrainer, trl.DPOConfig, collator
