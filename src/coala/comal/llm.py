"""A language model as the policy of COMAL: sampling, scoring and one training step by TRL's DPOTrainer.

One copy of the model is in memory; another policy is scored by putting its weights in. Knows nothing of judges, of
pairs, of the loop (``coala.comal.loop``) or of the losses (``coala.comal.trainer``).

Torch, transformers, TRL and peft are imported inside functions; training needs the extra ``baselines``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from coala.comal.pairs import SampledPairs, TrainRow
from coala.comal.settings import COMALSettings
from coala.comal.trainer import arguments, trainer_types
from coala.nash.game import Float
from coala.permission import permission
from coala.store import digest, write_atomic
from coala.values import CoalaError, Turn

PACKAGES = ("trl", "peft", "datasets", "accelerate")
PINNED = "1.16."
WEIGHTS = "trained.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
Tell = Callable[[float], None]


@dataclass(frozen=True)
class LowRank:
    """Train a LoRA adapter instead of all weights; ``targets`` None leaves the choice of modules to peft."""

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] | None = None


def require_training() -> None:
    """Raise :class:`CoalaError` unless the packages of the extra ``baselines`` are here, TRL in its pinned version."""
    mend = "pip install 'coala-align[baselines]'"
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise CoalaError(f"COMAL on a language model needs {', '.join(missing)}, which is not installed: {mend}")
    if not version("trl").startswith(PINNED):
        raise CoalaError(f"COMAL is written for TRL {PINNED}*; found {version('trl')}: {mend}")


def load_policy(
    model: str | Path,
    *,
    revision: str | None = None,
    lora: LowRank | None = None,
    device: str = "auto",
    template: str = "auto",
    dtype: str = "float32",
    download: bool = True,
) -> LanguagePolicy:
    """A causal language model and its tokenizer from a folder, a GGUF file or the hub, ready to be trained.

    ``download=False`` reads hub models from the local cache alone, for names that were found in a file. Raises
    :class:`CoalaError` for pickled weights, for a model with code of its own and for what is no model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from coala.backbone.files import check_files, find
    from coala.backbone.kinds import refuse_foreign_code
    from coala.backbone.load import load_tokenizer, pretrained

    require_training()
    if dtype not in DTYPES:
        raise CoalaError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    folder, name, _ = find(str(model), revision, download=download)
    refuse_foreign_code(check_files(folder), name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder, name, permission().code)
    # Said either way, or transformers asks on the terminal.
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": permission().code}
    kind: Any = AutoModelForCausalLM
    try:
        with _quiet():
            loaded, info = pretrained(kind, folder, options)
    except Exception as error:  # transformers raises whatever its models do
        raise CoalaError(f"{name}: cannot be loaded as a causal model ({type(error).__name__}: {error}).") from error
    unset = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if unset:
        raise CoalaError(
            f"{name}: {len(unset)} weight(s) are not in the checkpoint and would be random ({', '.join(unset[:3])}). "
            "Save the model again with save_pretrained() from the class it was trained as."
        )
    return LanguagePolicy(loaded.to(device), tokenizer, name=name, lora=lora, template=template)


class LanguagePolicy:
    """A transformers model that is trained in place; see :class:`coala.comal.loop.Policy`.

    ``lora`` puts an adapter into it, and only that is trained and saved. ``template`` is that of
    :func:`coala.backbone.load_backbone`. ``rows_per_forward`` bounds memory when sampling and scoring.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        lora: LowRank | None = None,
        template: str = "auto",
        rows_per_forward: int = 32,
    ) -> None:
        from coala.backbone.template import Renderer

        require_training()
        stops = _stop_tokens(model, tokenizer)
        if not stops:
            raise CoalaError(
                f"{name}: has no stop token, so its answers would never end. Fix: set the tokenizer's eos_token."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer, self.name, self.lora = tokenizer, name, lora
        self.rows_per_forward = rows_per_forward
        self._renderer = Renderer(tokenizer, template, stop_tokens=stops)
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 20))
        if lora is not None:
            peft = import_module("peft")
            config = peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=0.0,
                target_modules=None if lora.targets is None else list(lora.targets),
                task_type="CAUSAL_LM",
            )
            try:
                with _quiet():
                    model = peft.get_peft_model(model, config)
            except ValueError as error:
                raise CoalaError(f"{name}: LoRA does not fit this model ({error}). Give `targets`.") from error
        # The reference has no dropout, so the policy must have none: else d = log pi - v is not 0 at the start.
        import_module("trl.trainer.utils").disable_dropout_in_model(model)
        self.model = model.eval()

    @property
    def identity(self) -> str:
        how = "all weights" if self.lora is None else f"lora {asdict(self.lora)}"
        return f"{self.name}, {how}, template {self._renderer.kind}:{self._renderer.digest}"

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    # --- text and tokens -----------------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Sequence[Turn]) -> list[int]:
        """Tokens of a prompt ready to be continued; beyond half the context it loses its beginning."""
        return self._renderer.render(prompt, None, max_tokens=max(self.context // 2, 1)).tokens

    def sample(
        self, prompts: Sequence[list[int]], settings: COMALSettings, seed: int, *, tell: Tell | None = None
    ) -> list[list[SampledPairs]]:
        """``num_candidates`` answers to each prompt, independently drawn; a function of weights, prompts and seed."""
        import torch
        import transformers

        base = self._base
        n = settings.num_candidates
        # Defaults of the checkpoint (penalties, top-k) would draw from another policy than the one that is scored.
        config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            repetition_penalty=1.0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self._renderer.stop_tokens),
        )
        rows = [prompt for prompt in prompts for _ in range(n)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[SampledPairs | None] = [None] * len(rows)
        before, base.generation_config = base.generation_config, config
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), _quiet():
                for first in range(0, len(rows), self.rows_per_forward):
                    batch = order[first : first + self.rows_per_forward]
                    width = max(len(rows[i]) for i in batch)
                    new = min(settings.max_new_tokens, self.context - width)
                    pads = [width - len(rows[i]) for i in batch]
                    pad = self.tokenizer.pad_token_id
                    tokens = torch.tensor([[pad] * k + rows[i] for k, i in zip(pads, batch, strict=True)])
                    mask = torch.tensor([[0] * k + [1] * (width - k) for k in pads])
                    torch.manual_seed((seed * 1_000_003 + first) & 0x7FFFFFFF)
                    out = self.model.generate(
                        input_ids=tokens.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=new
                    )
                    for i, answer in zip(batch, out[:, width:].tolist(), strict=True):
                        found[i] = self._answer(rows[i], answer)
                    if tell is not None:
                        tell(min(1.0, (first + len(batch)) / len(rows)))
        finally:
            base.generation_config = before
        whole = [answer for answer in found if answer is not None]
        return [whole[i : i + n] for i in range(0, len(whole), n)]

    def _answer(self, prompt: list[int], tokens: list[int]) -> SampledPairs:
        end = next((k for k, token in enumerate(tokens) if token in self._renderer.stop_tokens), None)
        said = tokens if end is None else tokens[:end]
        text = self._renderer.decode(said)
        if self._renderer.kind == "dialogue":
            text = text.removeprefix(" ")
        elif self._renderer.kind == "continuation":
            # Many tokenizers drop the space a text begins with; here it parts the answer from the prompt.
            before, whole = self._renderer.decode(prompt[-1:]), self._renderer.decode([*prompt[-1:], *said])
            text = whole[len(before) :] if whole.startswith(before) else text
        return SampledPairs(tokens if end is None else tokens[: end + 1], text, end is not None)

    # --- likelihoods ---------------------------------------------------------------------------------------------

    def log_probs(
        self,
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
        settings: COMALSettings,
        *,
        tell: Tell | None = None,
    ) -> Float:
        """log pi(answer | prompt), nats, summed over its tokens, (n,): the forward that the training uses."""
        import torch

        found = np.zeros(len(answers))
        order = sorted(range(len(answers)), key=lambda i: len(prompts[i]) + len(answers[i]))
        with torch.no_grad(), self._fused(), self._precision(settings):
            for first in range(0, len(order), self.rows_per_forward):
                batch = order[first : first + self.rows_per_forward]
                rows = [[*prompts[i], *answers[i]] for i in batch]
                width = max(map(len, rows))
                pad = self.tokenizer.pad_token_id
                tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
                at = torch.arange(width)
                start = torch.tensor([len(prompts[i]) for i in batch])
                labels = tokens.masked_fill((at < start[:, None]) | (mask == 0), -100)
                out = self.model(
                    input_ids=tokens.to(self.device),
                    attention_mask=mask.to(self.device),
                    labels=labels.to(self.device),
                    use_cache=False,
                    fused_lm_head=True,
                )
                found[batch] = out.log_probs.float().sum(dim=1).cpu().numpy()
                if tell is not None:
                    tell((first + len(batch)) / len(order))
        return found

    def _precision(self, settings: COMALSettings) -> Any:
        import torch

        return torch.autocast(self.device.type, dtype=torch.bfloat16) if settings.bf16 else nullcontext()

    @contextmanager
    def _fused(self) -> Iterator[None]:
        """TRL's head that never makes a whole row's logits; taken off again, for it goes on top of what is there."""
        with self._own_forward():
            import_module("trl.trainer.utils").add_fused_lm_head(self._base)
            yield

    @contextmanager
    def _own_forward(self) -> Iterator[None]:
        """Whatever replaces ``forward`` of the model meanwhile is gone at the end."""
        modules = [self.model, self._base]
        before = [vars(module).get("forward") for module in modules]
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward

    @property
    def _base(self) -> Any:
        return self.model if self.lora is None else self.model.get_base_model()

    # --- training ------------------------------------------------------------------------------------------------

    def train(
        self, rows: Sequence[TrainRow], settings: COMALSettings, seed: int, folder: Path, *, tell: Tell | None = None
    ) -> Mapping[str, Any]:
        """Minimise the loss over ``rows`` with a new AdamW; the trainer's own numbers are returned."""
        import transformers

        datasets = import_module("datasets")
        mean = float(np.mean([row.weight for row in rows]))
        data = datasets.Dataset.from_list(
            [
                {
                    "prompt_ids": row.prompt,
                    "chosen_ids": row.first,
                    "rejected_ids": row.second,
                    "ref_chosen_logps": row.reference[0],
                    "ref_rejected_logps": row.reference[1],
                    "target": list(row.target),
                    "weight": row.weight / mean,
                }
                for row in rows
            ]
        )
        trainer_class, config_class, collator = trainer_types()
        from coala.baselines.trl_adapter import silence

        with silence(), self._own_forward():
            trainer = trainer_class(
                model=self.model,
                args=config_class(**arguments(settings, seed, folder, self.device.type)),
                train_dataset=data,
                processing_class=self.tokenizer,
                data_collator=collator(self.tokenizer.pad_token_id),
            )
            trainer.settings = settings
            for noisy in (transformers.PrinterCallback, transformers.ProgressCallback):
                trainer.remove_callback(noisy)
            if tell is not None:
                trainer.add_callback(_telling(tell))
            # TRL copies a given adapter for a reference that is never asked: ours is in the columns.
            if self.lora is not None and "ref" in self.model.peft_config:
                self.model.delete_adapter("ref")
            out = trainer.train()
            self.model.eval()
            trainer.accelerator.free_memory()
        return {"train_loss": float(out.training_loss), "updates": int(trainer.state.global_step)}

    def save(self, folder: Path) -> None:
        """The trained tensors, in their own precision."""
        from safetensors.torch import save

        write_atomic(Path(folder) / WEIGHTS, save({k: p.detach().cpu().contiguous() for k, p in self._trained()}))

    def load(self, folder: Path) -> None:
        """Put the tensors that :meth:`save` wrote into the model."""
        import torch
        from safetensors import safe_open

        with safe_open(Path(folder) / WEIGHTS, framework="pt") as file, torch.no_grad():
            trained = dict(self._trained())
            if set(file.keys()) != set(trained):
                raise CoalaError(f"{folder}: holds the weights of another model than {self.identity}.")
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(name))

    def export(self, folder: Path) -> None:
        """The policy as transformers (or, with an adapter, peft) saves it, and its tokenizer."""
        with _quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    @property
    def digest(self) -> str:
        """Of the trained tensors."""
        return digest(*(p.detach().float().cpu().numpy() for _, p in self._trained()))

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def _telling(tell: Tell) -> Any:
    """A trainer's callback that tells what share of its steps is made."""
    import transformers

    class Telling(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tell(state.global_step / max(state.max_steps, 1))

    return Telling()


def _stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for ids in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


@contextmanager
def _quiet() -> Iterator[None]:
    from coala.backbone.silence import quiet

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
