"""Train one baseline into a folder that remembers what it is of, and find it again.

OUT/run.json             method, digests of the base's weights, its template and the pairs, settings
OUT/checkpoints/         TRL's own, from which a run that was killed goes on
OUT/model/               the adapter, or all weights with their tokenizer; safetensors
OUT/score.safetensors    of a reward model: the linear head
OUT/stages/train.json    history, seconds, memory, FLOPs
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch

from coala.backbone import LanguageModel, load_backbone
from coala.backbone.files import located
from coala.backbone.gguf import is_gguf
from coala.baselines import trl_adapter
from coala.baselines.rows import Demonstration, PairRows, Rows, every_row, imitated, render
from coala.baselines.settings import BaselineMethod, Lora, TrainSettings, check_method
from coala.costs import Shape, body_flops, peak_memory, training_flops
from coala.store import RunFolder, StoreError, digest, load_json, save_json, write_atomic
from coala.values import CoalaError, Pair

# on_step(step, steps, logs): what TRL logged at a step, under its names, and the seconds spent so far.
OnStep = Callable[[int, int, Mapping[str, float]], None]
STAGE = "train"
WEIGHTS, HEAD, CHECKPOINTS = "model", "score.safetensors", "checkpoints"


@dataclass(frozen=True)
class Trained:
    """A trained baseline in ``folder``; made by :func:`train` or :func:`load_trained`.

    ``model`` and ``revision`` name the base, ``base_weights`` and ``template`` are digests of what was loaded.
    ``history`` holds TRL's logs in order, its names kept (``loss``, ``rewards/margins``, ``eval_...``; margins of
    different methods are on different scales), with ``step``, ``epoch`` and ``seconds``. ``seconds`` counts training
    with its evaluations over all sessions, but for what was lost after the last checkpoint. ``peak_bytes`` is the
    process's highest use by part; ``flops`` what the formula gives for the real lengths of the pairs read, without
    padding and evaluations. ``facts``: pairs, tokens, tokens cut off, versions, padding token.
    """

    folder: Path
    method: BaselineMethod
    settings: TrainSettings
    model: str
    revision: str
    base_weights: str
    template: str
    history: tuple[Mapping[str, float], ...]
    seconds: float
    peak_bytes: Mapping[str, int]
    flops: int
    facts: Mapping[str, Any]

    def backbone(self, *, device: str = "auto", dtype: str = "auto", **options: Any) -> LanguageModel:
        """The trained model, its adapter in it; ``options`` are those of :func:`coala.backbone.load_backbone`.

        Of a reward model the body alone, which makes features.
        """
        common: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "template": self.template.partition(":")[0],
            "generation": self.method != "reward",
            # A file of the folder names the model, not whoever asks for it.
            "download": False,
            **options,
        }
        weights = self.folder / WEIGHTS
        if self.settings.lora is None:
            return load_backbone(weights, **common)
        return load_backbone(self.model, revision=self.revision or None, adapter=weights, **common)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The checkpoints that are kept, by the steps they were saved at: adapters, or whole models, as TRL saves."""
        return sorted(_checkpoints(self.folder))

    def last(self, name: str) -> float:
        """The last value that was logged under ``name``."""
        for entry in reversed(self.history):
            if name in entry:
                return float(entry[name])
        known = ", ".join(sorted({key for entry in self.history for key in entry}))
        raise CoalaError(f"{self.folder}: nothing was logged as {name!r}; there is {known}.")


def train(
    method: BaselineMethod,
    pairs: Sequence[Pair] | Sequence[Demonstration],
    model: str | Path,
    *,
    out: str | Path,
    settings: TrainSettings,
    eval_pairs: Sequence[Pair] | None = None,
    on_step: OnStep | None = None,
    revision: str | None = None,
    template: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    n_checkpoints: int | None = 2,
) -> Trained:
    """Train ``model`` (a folder or hub name) on ``pairs`` by TRL's trainer of ``method``, into the folder ``out``.

    Every method sees the tokens that :meth:`LanguageModel.render` makes, and its loss the tokens of replies only (but
    ORPO's likelihood term, which TRL takes over prompt and reply); ``sft`` sees the chosen replies alone, or
    demonstrations in place of pairs. With
    ``eval_pairs`` TRL evaluates at the end of every epoch and of the run. A folder that is finished for the same
    pairs, weights, template and settings is returned as it is, one that was begun goes on from its last checkpoint.
    On a CPU the weights are decided by these and the seed, bit for bit, killed on the way or not; GPU kernels may
    differ in the last bits. The newest ``n_checkpoints`` are kept, all if None. The process's own random generators are
    seeded on the way. ``device`` is ``auto`` (a GPU if there is one) or ``cpu``.

    Nothing is sent anywhere: the base is fetched if it is a hub name, and all else runs with the hub's client offline.

    Raises :class:`CoalaError` without the extra ``baselines`` and for pairs or settings that cannot be trained on,
    ``StoreError`` if ``out`` holds another run, ``BackboneError`` for a model that our backbone cannot read.
    """
    check_method(method)
    trl_adapter.require(settings)
    if method != "sft" and any(isinstance(one, Demonstration) for one in pairs):
        raise CoalaError(
            f"Found demonstrations to train by {method}, which learns from pairs. Fix: give pairs, or sft."
        )
    if device not in ("auto", "cpu"):
        raise CoalaError(f"device is {device!r}; expected auto (a GPU if there is one) or cpu.")
    _refuse_gguf(model)
    base = _Base.of(model, revision, template, trust_remote_code, pairs, eval_pairs, settings)
    run = RunFolder(out)
    about = {
        "baseline": method,
        "weights": base.weights,
        "template": base.template,
        "pairs": digest([asdict(pair) for pair in pairs]),
        "eval_pairs": None if eval_pairs is None else digest([asdict(pair) for pair in eval_pairs]),
        "settings": asdict(settings),
    }
    with run.held():
        run.start(about)
        if run.done(STAGE, about):
            return load_trained(run.path)
        with trl_adapter.silence():
            on_cpu = device == "cpu" or not torch.accelerator.is_available()
            facts = _train(method, base, run.path, settings, on_cpu, trust_remote_code, on_step, n_checkpoints)
        # A trainer refers to itself: its model would stay on the card until the collector happens to run.
        gc.collect()
        torch.cuda.empty_cache()  # nothing without a GPU
        outputs = [WEIGHTS, HEAD] if method == "reward" else [WEIGHTS]
        run.finish(STAGE, about, outputs, facts)
    return load_trained(run.path)


def _refuse_gguf(model: str | Path) -> None:
    if is_gguf(located(Path(model).expanduser())):
        raise CoalaError(
            f"{model}: is GGUF, which TRL does not train; expected a model folder. Fix: write one of its dequantised "
            f"weights: m = coala.backbone.load_backbone({str(model)!r}), m.transformer.save_pretrained(NEW) and "
            "m.tokenizer.save_pretrained(NEW)."
        )


def load_trained(folder: str | Path) -> Trained:
    """The baseline in a folder; ``StoreError`` if there is none or it is not finished."""
    run = RunFolder(folder)
    if not (run.path / "run.json").is_file() or "baseline" not in run.settings:
        raise StoreError(f"{folder}: is not the folder of a baseline. Make one with coala.baselines.train.")
    if not (run.path / "stages" / f"{STAGE}.json").is_file():
        raise StoreError(f"{folder}: this baseline is not finished. Rerun its training to resume.")
    about, facts = run.settings, run.facts(STAGE)
    lora = about["settings"].pop("lora")
    settings = TrainSettings(**about["settings"], lora=None if lora is None else Lora(**lora))
    return Trained(
        folder=run.path,
        method=cast(BaselineMethod, about["baseline"]),
        settings=settings,
        model=facts["model"],
        revision=facts["revision"],
        base_weights=about["weights"],
        template=about["template"],
        history=tuple(facts["history"]),
        seconds=facts["seconds"],
        peak_bytes=facts["peak_bytes"],
        flops=facts["flops"],
        facts=facts["facts"],
    )


def whole_model(trained: Trained, folder: str | Path, *, trust_remote_code: bool = False) -> Path:
    """A folder with all weights of a trained model, from which another method may start: an adapter is merged.

    What was trained whole is returned where it lies; else the base with the adapter in it is written to ``folder``, in
    float32, with the base's tokenizer. Raises :class:`CoalaError` for a reward model, which writes no text.
    """
    if trained.method == "reward":
        raise CoalaError("A reward model writes no replies, so that no method can start from it.")
    if trained.settings.lora is None:
        return trained.folder / WEIGHTS
    from transformers import AutoModelForCausalLM

    target, revision = Path(folder), trained.revision or None
    if not (target / "merged.json").is_file():
        with trl_adapter.silence():
            base = AutoModelForCausalLM.from_pretrained(
                trained.model, revision=revision, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
            adapted = import_module("peft").PeftModel.from_pretrained(base, str(trained.folder / WEIGHTS))
            adapted.merge_and_unload().save_pretrained(str(target))
            _plain_tokenizer(trained.model, revision, trust_remote_code).save_pretrained(str(target))
        save_json(target / "merged.json", {"base": trained.base_weights, "adapter": str(trained.folder.name)})
    return target


@dataclass(frozen=True)
class _Base:
    """What is known of the base once its pairs are rendered; the model itself is let go before TRL loads it."""

    name: str
    revision: str
    weights: str
    template: str
    shape: Shape
    rows: Rows
    eval_rows: Rows | None

    @classmethod
    def of(
        cls,
        model: str | Path,
        revision: str | None,
        template: str,
        trust_remote_code: bool,
        pairs: Sequence[Pair] | Sequence[Demonstration],
        eval_pairs: Sequence[Pair] | None,
        settings: TrainSettings,
    ) -> _Base:
        # Loaded for its rendering and digest only, so without a head and in half the memory.
        backbone = load_backbone(
            model,
            revision=revision,
            device="cpu",
            dtype="bfloat16",
            template=template,
            trust_remote_code=trust_remote_code,
            generation=False,
        )
        return cls(
            backbone.name,
            backbone.revision,
            backbone.weights,
            backbone.template,
            backbone.shape,
            render(pairs, backbone, settings),
            None if eval_pairs is None else render(eval_pairs, backbone, settings),
        )


def _train(
    method: BaselineMethod,
    base: _Base,
    out: Path,
    settings: TrainSettings,
    on_cpu: bool,
    trust_remote_code: bool,
    on_step: OnStep | None,
    n_checkpoints: int | None,
) -> dict[str, Any]:
    """Run TRL's trainer to its end and save what it made; the facts for ``stages/train.json``."""
    revision = base.revision or None
    checkpoint = max(_checkpoints(out), default=(0, None))[1]
    before = 0.0
    if checkpoint is not None:
        logged = load_json(checkpoint / "trainer_state.json")["log_history"]
        before = max((entry.get("seconds", 0.0) for entry in logged), default=0.0)
    tokenizer = trl_adapter.tokenizer_of(base.name, revision, trust_remote_code)
    begun = time.perf_counter()

    def on_log(step: int, steps: int, logs: dict[str, float]) -> None:
        logs["seconds"] = before + time.perf_counter() - begun  # kept with the checkpoints, being TRL's own entry
        if on_step is not None:
            on_step(step, steps, logs)

    trainer = trl_adapter.build_trainer(
        method,
        base.rows,
        base.eval_rows,
        base.name,
        revision,
        settings,
        folder=out / CHECKPOINTS,
        tokenizer=tokenizer,
        on_cpu=on_cpu,
        trust_remote_code=trust_remote_code,
        on_log=on_log,
        n_checkpoints=n_checkpoints,
    )
    begun = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = before + time.perf_counter() - begun
    trainer.processing_class = None  # the adapter's folder has no tokenizer of its own, a whole model the base's
    trainer.save_model(str(out / WEIGHTS))
    if settings.lora is None:
        _plain_tokenizer(base.name, revision, trust_remote_code).save_pretrained(out / WEIGHTS)
    if method == "reward":
        _split_head(out)
    epochs = float(trainer.state.epoch or 0.0)
    return {
        "model": base.name,
        "revision": base.revision,
        "history": trainer.state.log_history,
        "seconds": seconds,
        "peak_bytes": peak_memory(),
        "flops": round(epochs * epoch_flops(method, base.shape, base.rows, settings)),
        "facts": {
            "pairs": len(base.rows),
            "steps": trainer.state.global_step,
            "epochs": epochs,
            "tokens": sum(len(row.tokens) for row in every_row(base.rows)),
            "dropped_tokens": sum(row.dropped for row in every_row(base.rows)),
            "padding_token": int(tokenizer.pad_token_id),
            "device": str(trainer.args.device),
            "versions": trl_adapter.versions(),
        },
    }


def epoch_flops(method: BaselineMethod, shape: Shape, rows: Rows, settings: TrainSettings) -> int:
    """FLOPs of one epoch by :mod:`coala.costs`; a reward model is trained like SFT on both replies, without a head."""
    chosen = [len(row.tokens) for row in imitated(rows)]
    rejected = [len(pair.rejected.tokens) for pair in rows if isinstance(pair, PairRows)]
    adapters, checkpointing = settings.lora is not None, settings.gradient_checkpointing
    if method == "reward":
        return (2 + (not adapters) + checkpointing) * body_flops(shape, [*chosen, *rejected])
    return training_flops(shape, chosen, rejected, method, adapters=adapters, checkpointing=checkpointing)


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints that were written to their ends: the trainer's state is the last file."""
    whole = [path.parent for path in (out / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")]
    return [(int(path.name.rpartition("-")[2]), path) for path in whole]


def _plain_tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)


def _split_head(out: Path) -> None:
    """Put a reward model's head into a file of its own, so that its body loads as any model or adapter does."""
    from safetensors import safe_open

    tensors = import_module("safetensors.torch")
    folder = out / WEIGHTS
    head: Any = None
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            mine = [name for name in file.keys() if name.endswith("score.weight")]  # noqa: SIM118 (no mapping)
            head = file.get_tensor(mine[0]) if mine else head
    if head is None or tuple(head.shape[:1]) != (1,):
        raise CoalaError(f"{folder}: expected a reward model with one linear head called score; found none.")
    write_atomic(out / HEAD, tensors.save({"score": head.float().contiguous()}))
    adapter = folder / "adapter_model.safetensors"
    if adapter.is_file():
        rest = {name: t for name, t in tensors.load_file(adapter).items() if not name.endswith("score.weight")}
        write_atomic(adapter, tensors.save(rest, metadata={"format": "pt"}))
        about = load_json(folder / "adapter_config.json")
        save_json(folder / "adapter_config.json", {**about, "modules_to_save": None})
