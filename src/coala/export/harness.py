"""A run's guided model for EleutherAI's lm-evaluation-harness (package ``lm-eval``).

Texts the harness asks for (``generate_until``) are guided by the head; likelihoods are the base model's, for guidance
gives none. The harness renders its prompts itself, by the tokenizer's chat template if told to. Needs ``lm-eval`` to be
imported: it registers the model kind ``coala`` there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import StoppingCriteriaList, StopStringCriteria

from coala.decoding import guide
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead


@register_model("coala")
class GuidedLM(HFLM):  # type: ignore[misc]
    """A model of transformers whose texts are guided: the harness's own ``hf`` model in all else.

    ``run``: the folder of a finished run (``--model coala --model_args run=runs/mine,strength=2``), whose guidance
    ``mode`` and ``strength`` replace; or ``loaded``: backbone, head and guidance. ``batch_size`` as for ``hf``.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        loaded: tuple[LanguageModel, ConvexHead, Guidance] | None = None,
        mode: str | None = None,
        strength: float | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        device: str | None = None,
        **others: Any,
    ) -> None:
        unknown = sorted(set(others) - {"max_batch_size", "trust_remote_code", "chat_template_args", "enable_thinking"})
        if unknown:
            raise CoalaError(f"The model kind 'coala' has no setting {', '.join(unknown)}. Give run, mode, strength.")
        if (run is None) == (loaded is None):
            raise CoalaError("The model kind 'coala' needs the folder of a run: --model_args run=FOLDER.")
        if loaded is None:
            from coala.alignment import load_parts

            assert run is not None
            loaded = load_parts(run)
        backbone, head, guidance = loaded
        guidance = guidance.changed(mode=mode, strength=None if strength is None else float(strength))
        backbone.require_head("Guided texts")
        super().__init__(
            pretrained=backbone.transformer,
            tokenizer=backbone.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=min(max_length or backbone.max_tokens, backbone.max_tokens),
            trust_remote_code=False,
        )
        self._loop = guide(head, guidance, policy=backbone.policy if guidance.change else None)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        # The harness's own criteria remember rows by their place in the batch, which branches of a reply have not.
        stopping = StoppingCriteriaList([StopStringCriteria(self.tokenizer, list(stop))] if stop else [])
        settings = {"temperature": 0.0, **generation_kwargs}
        if settings["temperature"] == 0.0:
            settings.pop("temperature")
            settings["do_sample"] = False
        return self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=stopping,
            pad_token_id=self.tokenizer.pad_token_id,
            custom_generate=self._loop,
            **settings,
        )
