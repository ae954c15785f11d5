"""What decides the outcome of training a baseline, and two sets of values with a source. Knows nothing of TRL."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from coala.values import CoalaError

BaselineMethod = Literal["sft", "dpo", "orpo", "simpo", "reward"]
METHODS: tuple[BaselineMethod, ...] = get_args(BaselineMethod)

# Table 13, "Target_modules (Gpt-2 base)" and "(all other models)".
GPT2_TARGETS = ("c_attn", "c_proj")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter: ``alpha`` / ``rank`` scales it. ``targets`` are names of modules; None is Table 13's choice.

    TRL turns all dropout off, this one too, for every method but SFT, unless ``TrainSettings.disable_dropout`` is off.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.targets is not None:
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise CoalaError(
                f"An adapter of rank {self.rank} with dropout {self.dropout}; expected a rank of at least 1 and a "
                "dropout in [0, 1)."
            )


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one training run, TRL's names where it has one; the values given here are TRL's of DPO.

    A step is one update by ``batch_size * accumulation`` pairs. ``steps`` ends the run before ``epochs`` do.
    ``warmup`` counts steps from 1 on, and is a share of all steps below 1. ``beta`` is the reward scale of DPO and
    SimPO and the weight of ORPO's odds ratio (lambda there); ``gamma`` is SimPO's target margin. ``lora`` None trains
    all weights. Prompt and reply are cut to ``max_length`` tokens as the renderer cuts them (None: the context), and
    replies end with the stop token if ``ends_with_eos``. ``save_every``, ``log_every`` and ``eval_every`` count steps;
    held-out pairs are evaluated at the end of every epoch unless ``eval_every`` is given. ``deepspeed`` is the path of
    a DeepSpeed configuration.
    """

    learning_rate: float = 1e-6
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    beta: float = 0.1
    gamma: float = 0.5
    lora: Lora | None = None
    bf16: bool = True
    gradient_checkpointing: bool = True
    disable_dropout: bool = True
    max_length: int | None = 1024
    ends_with_eos: bool = True
    schedule: str = "linear"
    warmup: float = 0.0
    optimiser: str = "adamw_torch_fused"
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    clip: float = 1.0
    seed: int = 42
    save_every: int = 500
    log_every: int = 10
    eval_every: int | None = None
    deepspeed: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "adam_betas", tuple(self.adam_betas))
        for name in ("batch_size", "accumulation", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise CoalaError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.eval_every is not None and self.eval_every < 1:
            raise CoalaError(f"eval_every is {self.eval_every}; expected at least 1, or None for every epoch.")
        if self.learning_rate < 0 or self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise CoalaError(
                f"learning_rate {self.learning_rate}, epochs {self.epochs}, steps {self.steps}; expected a rate of at "
                "least 0 and a positive length."
            )
        if self.beta <= 0 or self.warmup < 0:
            raise CoalaError(
                f"beta {self.beta}, warmup {self.warmup}; expected a positive beta and a warmup from 0 on."
            )
        if self.max_length is not None and self.max_length < 2:
            raise CoalaError(f"max_length is {self.max_length}; expected at least 2, one for prompt and reply each.")


# TRL 1.16's own rates: SFTConfig, DPOConfig, ORPOConfig, CPOConfig (for SimPO), RewardConfig.
_RATES: dict[str, float] = {"sft": 2e-5, "dpo": 1e-6, "orpo": 1e-6, "simpo": 1e-6, "reward": 1e-4}
# Table 10, the last value of each set ("beta in {0.01, 0.05, 0.1}", "lambda in {0.1, 0.5, 1.0, 2.0}") but for ORPO,
# whose 0.1 is its own paper's; of SimPO's gamma the middle.
_PAPER_BETAS: dict[str, float] = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.5}
_PAPER_GAMMA = 1.0


def trl(method: BaselineMethod) -> TrainSettings:
    """TRL 1.16's defaults for a method: all weights trained, three epochs of batches of 8, no warm-up."""
    check_method(method)
    return TrainSettings(learning_rate=_RATES[method])


def paper(method: BaselineMethod) -> TrainSettings:
    """The COALA paper's settings for the methods it compares with (Tables 13 and 14), and the like for a reward model.

    What these tables leave open is marked; the tables are the same for every method.
    """
    check_method(method)
    return TrainSettings(
        learning_rate=2e-4,  # Table 14: optimizer.lr 2.0e-4 (scheduler.warmup_max_lr the same)
        epochs=1.0,  # "SFT fine-tuned for one epoch"; of the others only "one epoch of training" is spoken of
        batch_size=2,  # Table 14: train_micro_batch_size_per_gpu 2
        accumulation=8,  # Table 14: gradient_accumulation_steps 8, train_batch_size 16
        beta=_PAPER_BETAS.get(method, 0.1),  # Table 10 gives sets; which value was used is not said
        gamma=_PAPER_GAMMA,  # likewise
        lora=Lora(rank=16, alpha=32, dropout=0.05),  # Table 13 ("up to 256" and "up to 128 in Dpo setting")
        bf16=True,  # Table 14: bf16.enabled true
        max_length=1024,  # not said; TRL's
        schedule="linear",  # Table 14: WarmupDecayLR, total_num_steps auto (its warm-up is logarithmic, this linear)
        warmup=1000,  # Table 14: scheduler.warmup_num_steps 1 000
        optimiser="adamw_torch_fused",  # Table 14: AdamW
        weight_decay=0.01,  # Table 14: optimizer.weight_decay 0.01
        adam_betas=(0.9, 0.999),  # Table 14: optimizer.betas [0.9, 0.999]
        adam_epsilon=1e-8,  # Table 14: optimizer.eps 1e-8
        clip=1.0,  # Table 14: gradient_clipping 1.0
    )


def sweep(settings: TrainSettings, rates: Iterable[float]) -> tuple[TrainSettings, ...]:
    """``settings`` at each of these learning rates: a baseline is only as good as its rate was chosen."""
    return tuple(replace(settings, learning_rate=float(rate)) for rate in rates)


def check_method(method: str) -> None:
    """Raise :class:`CoalaError` unless there is such a baseline."""
    if method not in METHODS:
        raise CoalaError(f"No baseline is called {method!r}; expected one of {', '.join(METHODS)}.")
