"""The only place that touches TRL, pinned to 1.16: a trainer of a method on rows that are tokens already.

Nothing of TRL's losses is repeated or changed. Its own tokenisation is left out, its telemetry, trackers and progress
bars are off while it runs, and the hub is not asked for anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coala.backbone.silence import quiet
from coala.baselines.rows import Rows, collate_pairs, columns
from coala.baselines.settings import GPT2_TARGETS, TARGETS, BaselineMethod, Lora, TrainSettings
from coala.values import CoalaError

PACKAGES = ("trl", "peft", "datasets", "accelerate", "transformers", "torch")
PINNED = "1.16."
# Module, trainer, configuration.
_PLACES: dict[BaselineMethod, tuple[str, str, str]] = {
    "sft": ("trl", "SFTTrainer", "SFTConfig"),
    "dpo": ("trl", "DPOTrainer", "DPOConfig"),
    "orpo": ("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig"),
    "simpo": ("trl.experimental.cpo", "CPOTrainer", "CPOConfig"),
    "reward": ("trl", "RewardTrainer", "RewardConfig"),
}


def require(settings: TrainSettings) -> None:
    """Raise :class:`CoalaError` unless the packages of the extra ``baselines`` are here, TRL in its pinned version."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise CoalaError(
            f"Training a baseline needs {', '.join(missing)}, which is not installed: "
            "pip install 'coala-align[baselines]'"
        )
    if not version("trl").startswith(PINNED):
        raise CoalaError(
            f"Baselines are written for TRL {PINNED}*; found {version('trl')}. pip install 'coala-align[baselines]'"
        )
    if settings.deepspeed is not None and find_spec("deepspeed") is None:
        raise CoalaError(
            "settings.deepspeed needs the package deepspeed, which is not installed: pip install deepspeed"
        )


def versions() -> dict[str, str]:
    """The versions of what trained."""
    return {name: version(name) for name in PACKAGES}


@contextmanager
def silence() -> Iterator[None]:
    """No telemetry, no request to the hub, no progress bars or notices. The caller's settings are put back.

    TRL reports every trainer that is built, unless the hub's client is offline or told not to.
    """
    constants, datasets = import_module("huggingface_hub.constants"), import_module("datasets")
    before = {name: getattr(constants, name) for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")}
    no_bars = datasets.are_progress_bars_disabled()
    for name in before:
        setattr(constants, name, True)
    datasets.disable_progress_bars()
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)
        if not no_bars:
            datasets.enable_progress_bars()


def tokenizer_of(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The model's tokenizer with a padding token, the closing one if it has none; padding is never looked at."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CoalaError(
                f"{model}: its tokenizer has neither a padding nor a closing token, and batches need one. Set "
                "pad_token and save the tokenizer again."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_trainer(
    method: BaselineMethod,
    rows: Rows,
    eval_rows: Rows | None,
    model: str,
    revision: str | None,
    settings: TrainSettings,
    *,
    folder: Path,
    tokenizer: Any,
    on_cpu: bool,
    trust_remote_code: bool,
    on_log: Callable[[int, int, dict[str, float]], None],
    n_checkpoints: int | None = 2,
) -> Any:
    """TRL's trainer of ``method``, its checkpoints in ``folder``; ``on_log(step, steps, logs)`` may add to the logs.

    The newest ``n_checkpoints`` are kept, all if None; two, for the newest may be half written when the process is
    killed. Errors of TRL and peft about settings become :class:`CoalaError`.
    """
    import transformers

    datasets = import_module("datasets")
    module, trainer_name, config_name = _PLACES[method]
    place = import_module(module)
    data = datasets.Dataset.from_list(columns(method, rows))
    eval_data = None if eval_rows is None else datasets.Dataset.from_list(columns(method, eval_rows))
    given: dict[str, Any] = {}
    if method == "dpo":
        given["data_collator"] = partial(collate_pairs, pad=tokenizer.pad_token_id)
    # float32 weights whatever the checkpoint's: bf16 is TRL's mixed precision.
    init: dict[str, Any] = {"dtype": "float32", "revision": revision, "trust_remote_code": trust_remote_code}
    if on_cpu:
        init["device_map"] = None
    try:
        config = getattr(place, config_name)(
            **_arguments(method, settings, folder, evaluated=eval_data is not None, on_cpu=on_cpu),
            save_total_limit=n_checkpoints,
            model_init_kwargs=None if method == "reward" else init,
        )
        start = _reward_model(model, init, settings.seed) if method == "reward" else model
        trainer = _on_tokens(method, getattr(place, trainer_name))(
            model=start,
            args=config,
            train_dataset=data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            peft_config=None
            if settings.lora is None
            else _peft_config(method, settings.lora, model, revision, trust_remote_code),
            **given,
        )
    except ValueError as error:
        raise CoalaError(f"{model} cannot be trained by {method} with these settings: {error}") from error
    for noisy in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(_watcher(on_log))
    return trainer


def _arguments(
    method: BaselineMethod, settings: TrainSettings, folder: Path, *, evaluated: bool, on_cpu: bool
) -> dict[str, Any]:
    """Our settings under TRL's names."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "max_steps": -1 if settings.steps is None else settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup if settings.warmup < 1 else int(settings.warmup),
        "optim": settings.optimiser,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_betas[0],
        "adam_beta2": settings.adam_betas[1],
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.clip,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "deepspeed": settings.deepspeed,
        "max_length": None if method in ("sft", "dpo", "reward") else _longest(settings),
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "logging_steps": settings.log_every,
        "eval_strategy": "no" if not evaluated else "epoch" if settings.eval_every is None else "steps",
        "eval_steps": settings.eval_every,
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "remove_unused_columns": method in ("sft", "reward"),
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }
    if method in ("dpo", "orpo", "simpo"):
        arguments["beta"] = settings.beta
    if method != "sft":
        arguments["disable_dropout"] = settings.disable_dropout
    if method == "simpo":
        arguments |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": settings.gamma}
    if method == "sft":
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
    return arguments


def _longest(settings: TrainSettings) -> int:
    # ORPO's and CPO's trainers insist on a number, which the rows never reach: they are cut already.
    return settings.max_length if settings.max_length is not None else 1 << 30


def _reward_model(model: str, init: dict[str, Any], seed: int) -> Any:
    """The model with a random linear head, all else as it was stored.

    Not loaded by TRL, which would draw the embedding at random where a checkpoint holds it under its tied head's name.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

    set_seed(seed)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, output_loading_info=True, **init
    )
    if set(info["missing_keys"]) != {"score.weight"}:
        whole = AutoModelForCausalLM.from_pretrained(model, **init)
        loaded.base_model.load_state_dict(whole.base_model.state_dict())
    return loaded


def _on_tokens(method: BaselineMethod, trainer: Any) -> Any:
    """TRL's trainer for rows that are tokens; SFT's and the reward model's take them as they are."""
    if method == "dpo":
        return type(trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})
    if method in ("orpo", "simpo"):
        # Static, for datasets would take a digest of a bound method's trainer, weights and all.
        return type(trainer.__name__, (trainer,), {"tokenize_row": staticmethod(lambda row: row)})
    return trainer


def _peft_config(method: BaselineMethod, lora: Lora, model: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    targets = lora.targets
    if targets is None:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        kind = config.model_type
        targets = GPT2_TARGETS if kind == "gpt2" else TARGETS
    reward = (
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if method == "reward" else {"task_type": "CAUSAL_LM"}
    )
    return import_module("peft").LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=list(targets),
        **reward,
    )


def _watcher(on_log: Callable[[int, int, dict[str, float]], None]) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.log_history:
                on_log(state.global_step, state.max_steps, state.log_history[-1])

    return Watcher()
