"""The values that flow through COALA, read first: pairs, features, a head, generations, judgements, estimates.

Frozen dataclasses over NumPy arrays. This module validates shapes and computes scores; it knows nothing of files,
models or solvers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from coala.messages import CoalaError as CoalaError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
Float32 = NDArray[np.float32]


class SpecMismatch(CoalaError):
    """Two values that must share one :class:`FeatureSpec` do not."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise CoalaError(f"A turn has role {self.role!r}; expected one of {', '.join(ROLES)}.")
        if not isinstance(self.text, str):
            raise CoalaError(f"A turn has text of type {type(self.text).__name__}; expected a string.")


@dataclass(frozen=True)
class Pair:
    """A prompt with a preferred and a rejected reply. Pairs of one ``group`` never straddle a split.

    ``rater`` names who preferred it and ``source`` the data set or domain it is from, where that is known.

    ``prompt`` may also be given as :func:`turns` takes it: a text, or messages with role and content.
    """

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    group: str
    rater: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if type(self.prompt) is not tuple or not all(type(turn) is Turn for turn in self.prompt):
            object.__setattr__(self, "prompt", turns(self.prompt, "the prompt of a pair"))

    @classmethod
    def from_trl(cls, row: Mapping[str, Any]) -> Pair:
        """The pair of a row in TRL format: ``prompt`` (or what both sides share), ``chosen``, ``rejected``.

        Texts or messages with role and content, as ``datasets.Dataset`` gives them. ``group`` and ``rater`` are read
        where they are there. CoalaError for a row that is no pair, and for ``tools`` or ``chat_template_kwargs``.
        """
        from coala.data import pair_from_trl

        return pair_from_trl(row)

    def to_trl(self, *, conversational: bool = True, implicit_prompt: bool = False) -> dict[str, Any]:
        """A row of TRL's preference format, with ``group`` beside it; :meth:`from_trl` gives the same pair back.

        ``conversational``: messages, for models with a chat template; else texts, for a prompt of one user turn.
        ``implicit_prompt``: the prompt is what both sides begin with, as reward trainers take it. CoalaError where the
        row would not read back as this pair.
        """
        from coala.data import pair_to_trl

        return pair_to_trl(self, conversational=conversational, implicit_prompt=implicit_prompt)


@dataclass(frozen=True)
class FeatureSpec:
    """Everything that decides what a feature vector means; a head works only on features of an equal spec.

    ``backbone`` is the model's folder or hub name and ``revision`` its commit (empty for a folder); ``weights`` and
    ``template`` are digests of what was loaded, so that a changed model is noticed whatever its name. ``template``
    begins with the template's name (``chat:``, ``dialogue:`` or ``continuation:``). ``layer`` counts hidden states:
    0 is the embedding, ``n_layers`` the final, normalised state. ``max_tokens`` bounds prompt plus reply.
    """

    backbone: str
    revision: str
    weights: str
    template: str
    layer: int
    pooling: str
    ends_with_eos: bool
    max_tokens: int

    def same_features(self, other: FeatureSpec) -> bool:
        """Equal up to the name and revision under which the same weights were found."""
        return replace(self, backbone="", revision="") == replace(other, backbone="", revision="")


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Pooled hidden states of n pairs: ``chosen`` and ``rejected`` (n, d) float32, ``group`` (n,) of str.

    Optional: ``prompt`` (n, d), the pooled hidden states of the prompts alone, on which gates may act; and
    ``log_ratio`` (n,), log pi(chosen | prompt) - log pi(rejected | prompt) under the frozen model, for losses with a
    reference.
    """

    chosen: Float32
    rejected: Float32
    group: NDArray[np.str_]
    spec: FeatureSpec
    prompt: Float32 | None = None
    log_ratio: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", np.ascontiguousarray(self.chosen, dtype=np.float32))
        object.__setattr__(self, "rejected", np.ascontiguousarray(self.rejected, dtype=np.float32))
        object.__setattr__(self, "group", np.asarray(self.group, dtype=str))
        if self.chosen.ndim != 2 or self.chosen.shape != self.rejected.shape:
            raise CoalaError(
                f"Features must be two (n, d) arrays of one shape; found {self.chosen.shape} and {self.rejected.shape}."
            )
        if self.group.shape != (len(self.chosen),):
            raise CoalaError(f"{len(self.chosen)} pairs need as many group names; found {self.group.shape}.")
        if self.prompt is not None:
            object.__setattr__(self, "prompt", np.ascontiguousarray(self.prompt, dtype=np.float32))
            if self.prompt.shape != self.chosen.shape:
                raise CoalaError(f"Prompt features must be {self.chosen.shape}; found {self.prompt.shape}.")
        if self.log_ratio is not None:
            object.__setattr__(self, "log_ratio", np.asarray(self.log_ratio, dtype=np.float64))
            if self.log_ratio.shape != (len(self.chosen),):
                raise CoalaError(f"{len(self.chosen)} pairs need as many log ratios; found {self.log_ratio.shape}.")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def width(self) -> int:
        """d, the length of one feature vector."""
        return int(self.chosen.shape[1])

    def take(self, rows: NDArray[Any]) -> FeatureSet:
        """The pairs selected by an index or boolean array."""
        return replace(
            self,
            chosen=self.chosen[rows],
            rejected=self.rejected[rows],
            group=self.group[rows],
            prompt=None if self.prompt is None else self.prompt[rows],
            log_ratio=None if self.log_ratio is None else self.log_ratio[rows],
        )


@dataclass(frozen=True)
class Certificate:
    """What was proved of a head: the optimal value of ``program`` lies in [lower_bound, objective].

    ``violation`` is the largest amount by which the returned weights leave the program's constraints (0 without any);
    ``n_patterns`` counts the gates the program held. Both numbers are computed in float64 whatever the ``precision``
    of the iterations. ``statement`` says all of it in words, and what is only estimated. ``facts`` holds what was
    chosen and how: regularisation, validation, estimates.
    """

    program: str
    statement: str
    objective: float
    lower_bound: float
    violation: float
    n_patterns: int
    status: str
    tolerance: float
    precision: str
    seed: int
    versions: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        return self.objective - self.lower_bound

    @property
    def relative_gap(self) -> float:
        """Gap over the size of the objective; 0 for an objective of 0."""
        return self.gap / abs(self.objective) if self.objective else 0.0

    def __str__(self) -> str:
        return (
            f"{self.program}: objective {self.objective:.6g}, lower bound {self.lower_bound:.6g}, certified relative "
            f"gap {self.relative_gap:.1e} ({self.status}; tolerance {self.tolerance:.0e})"
        )


@dataclass(frozen=True, eq=False)
class ConvexHead:
    """A fitted reward head; one form for linear, gated and ReLU networks.

    score(h) = linear . x + sum_i 1(gates_i . z >= 0) weights_i . x  with x = (h, 1); any feature scaling is folded in.
    With ``gate_on`` "reply", z = x; with "prompt", z = (p, 1) for the features p of the prompt, and for any one prompt
    the head is linear. A ReLU neuron (Theta_1i, theta_2i) is gates_i = Theta_1i, weights_i = theta_2i Theta_1i; a
    linear probe has m = 0. ``gates`` and ``weights`` are (m, d + 1), ``linear`` is (d + 1,). ``temperature`` turns
    score differences into probabilities; ``least_slope``, at most 1 / temperature, is the lower end of the 99 %
    interval of log-odds per unit of score (0: no better than chance, as far as held-out pairs tell), ``None`` where it
    was not estimated. ``certificate`` says what was proved.
    """

    gates: Float32
    weights: Float32
    linear: Float32
    spec: FeatureSpec
    gate_on: Literal["reply", "prompt"] = "reply"
    temperature: float = 1.0
    certificate: Certificate | None = None
    least_slope: float | None = None

    def __post_init__(self) -> None:
        for name in ("gates", "weights", "linear"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.float32))
        if self.linear.ndim != 1 or self.gates.shape != self.weights.shape or self.gates.ndim != 2:
            raise CoalaError(
                "A head needs linear (d+1,) and equal gates and weights (m, d+1); "
                f"found {self.linear.shape}, {self.gates.shape}, {self.weights.shape}."
            )
        if self.gates.shape[1] != len(self.linear):
            raise CoalaError(f"Gates have {self.gates.shape[1]} columns, the linear block {len(self.linear)}.")
        for name in ("gates", "weights", "linear"):
            if not np.isfinite(getattr(self, name)).all():
                raise CoalaError(f"The head's {name} hold a value that is not finite: fit again.")
        if self.gate_on not in ("reply", "prompt"):
            raise CoalaError(f"A head's gates act on {self.gate_on!r}; expected 'reply' or 'prompt'.")
        if not 0 < self.temperature < float("inf"):
            raise CoalaError(f"The head's temperature is {self.temperature}; expected a positive number.")
        if self.least_slope is not None and not 0 <= self.least_slope < float("inf"):
            raise CoalaError(f"The head's least slope is {self.least_slope}; expected a finite number of at least 0.")

    def save(self, folder: Path | str) -> None:
        """Write ``folder``/head.safetensors and head.json; :meth:`load` reads them."""
        from coala.store import save_head

        save_head(Path(folder), self)

    @classmethod
    def load(cls, folder: Path | str) -> ConvexHead:
        """The head of a folder that :meth:`save` or a run wrote; CoalaError for one that is not whole."""
        from coala.store import load_head

        return load_head(Path(folder))

    @property
    def width(self) -> int:
        """d, the length of the feature vectors it scores."""
        return len(self.linear) - 1

    @property
    def n_neurons(self) -> int:
        return len(self.gates)

    @property
    def evidence(self) -> float:
        """Log-odds of preference that a unit of score stands for when it guides; 0 for a head at chance.

        The least slope where it is known, else 1 / temperature, which doubts nothing.
        """
        return 1 / self.temperature if self.least_slope is None else self.least_slope

    @property
    def needs_prompt(self) -> bool:
        """Whether scores depend on the prompt's features."""
        return self.gate_on == "prompt" and self.n_neurons > 0

    def given(self, prompt: NDArray[np.floating[Any]]) -> ConvexHead:
        """The head for one prompt with features (d,): linear if its gates act on the prompt, else itself."""
        if not self.needs_prompt:
            return self
        is_open = self._gate_values(prompt) >= 0
        none = self.gates[:0]
        linear = cast(Float32, self.linear + is_open @ self.weights)
        return replace(self, linear=linear, gates=none, weights=none, gate_on="reply")

    def score(self, h: NDArray[np.floating[Any]], prompt: NDArray[np.floating[Any]] | None = None) -> Float32:
        """Scores (...,) of feature vectors h (..., d), higher is preferred; ``prompt`` (..., d) if gates act on it."""
        if h.shape[-1] != self.width:
            raise SpecMismatch(f"The head scores vectors of length {self.width}; these have {h.shape[-1]}.")
        linear = h @ self.linear[:-1] + self.linear[-1]
        if not self.n_neurons:
            return cast(Float32, linear.astype(np.float32))
        if self.gate_on == "prompt" and prompt is None:
            raise SpecMismatch(
                "The head's gates act on the prompt, whose features are not there. Extract features with prompts "
                "(`--prompt-features`), or fit with gates on the reply."
            )
        values = h @ self.weights[:, :-1].T + self.weights[:, -1]
        open_gates = self._gate_values(prompt if self.gate_on == "prompt" and prompt is not None else h) >= 0
        return cast(Float32, (linear + np.where(open_gates, values, 0).sum(-1)).astype(np.float32))

    def margins(self, features: FeatureSet) -> Float32:
        """Score differences chosen - rejected (n,)."""
        return self.score(features.chosen, features.prompt) - self.score(features.rejected, features.prompt)

    def preference(
        self,
        first: NDArray[np.floating[Any]],
        second: NDArray[np.floating[Any]],
        prompt: NDArray[np.floating[Any]] | None = None,
    ) -> Float32:
        """P(first is preferred) in [0, 1], calibrated by the temperature found on held-out pairs."""
        difference = (self.score(first, prompt) - self.score(second, prompt)) / self.temperature
        return cast(Float32, np.exp(-np.logaddexp(0, -difference.astype(np.float64))).astype(np.float32))

    def _gate_values(self, z: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        return cast(NDArray[np.floating[Any]], z @ self.gates[:, :-1].T + self.gates[:, -1])


@dataclass(frozen=True)
class Generation:
    """One reply. ``score`` is the head's (nan without one), ``log_prob`` the base model's own log-probability of it.

    ``method`` tells how it was decoded; ``n_tokens`` counts generated tokens, the stop token not among them.
    ``divergence``, where the decoder accounts for it (mode ``shift``), is the nats spent on guidance: the sum over the
    steps of KL(guided || restricted base) along this reply, whose mean over replies is the divergence between the two
    distributions of replies.
    """

    prompt_id: str
    text: str
    method: str
    n_tokens: int
    seed: int
    score: float
    log_prob: float
    divergence: float | None = None


@dataclass(frozen=True)
class Judgement:
    """P(``first`` is better than ``second``) in [0, 1] for one prompt; ``None`` when the judge failed."""

    prompt_id: str
    first: str
    second: str
    preference: float | None
    judge: str


@dataclass(frozen=True)
class Estimate:
    """A number with its interval (95 % unless ``method`` says otherwise), sample size and how it was made."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"{self.absent} (n={self.n})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"

    @property
    def absent(self) -> str:
        """Why there is no value, in a word or two: ``void`` if what there is says nothing."""
        return "void" if "; void: " in self.method else "no value" if self.n else "none"


def user(text: str) -> tuple[Turn, ...]:
    """A prompt of one user turn."""
    return (Turn("user", text),)


Prompt = str | Sequence["Turn | Mapping[str, Any]"]


def turns(prompt: Prompt, what: str = "a prompt") -> tuple[Turn, ...]:
    """A conversation from whatever says one: a text of the user, turns, or messages with ``role`` and ``content``.

    Raises :class:`CoalaError`, which calls it ``what``, for anything else.
    """
    if isinstance(prompt, str):
        return user(prompt)
    if isinstance(prompt, Turn | Mapping):
        raise CoalaError(
            f"Found one message as {what}; expected a conversation. Fix: put the messages of each prompt in a list, "
            'as in [[{"role": "user", "content": "..."}]].'
        )
    given: Any = prompt  # callers have no types to keep them
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise CoalaError(f"Found a {_kind(given)} as {what}; expected a text, or a list of turns or messages.")
    return tuple(turn if isinstance(turn, Turn) else _turn(turn, what) for turn in prompt)


def _turn(message: Any, what: str) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        found = f"a mapping with {sorted(map(str, message))}" if isinstance(message, Mapping) else f"a {_kind(message)}"
        raise CoalaError(
            f"Found {found} among the messages of {what}; expected Turn(role, text) or a mapping with role and content."
        )
    role, content = message["role"], message["content"]
    if isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise CoalaError(f"Found content of type {_kind(content)} in a message of {what}; expected text.")
    return Turn("system" if role == "developer" else role, content)


def prompts_of(prompts: Sequence[Prompt]) -> list[tuple[Turn, ...]]:
    """The conversation of each of ``prompts``; refused if they are one text, which would be taken apart."""
    if isinstance(prompts, str):
        raise CoalaError(f"Found one text, {prompts[:40]!r}, as prompts; expected a list. Fix: [{prompts[:40]!r}].")
    if not isinstance(prompts, Sequence):
        raise CoalaError(f"Found prompts of type {_kind(prompts)}; expected a list of texts or conversations.")
    return [turns(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]


def _kind(value: object) -> str:
    return type(value).__name__


def prompt_id(prompt: Sequence[Turn]) -> str:
    """A short stable name of a prompt: 12 hex digits of what its conversation says."""
    return hashlib.sha256(conversation_text(prompt).encode()).hexdigest()[:12]


def conversation_text(turns: Sequence[Turn]) -> str:
    """A conversation as one readable text, for reports and error messages; never fed to a model."""
    return turns[0].text if len(turns) == 1 else "\n".join(f"{turn.role}: {turn.text}" for turn in turns)


def one_per_prompt(pairs: Iterable[Pair]) -> list[Pair]:
    """One pair of each prompt, its last, in the order of the prompts."""
    return list({conversation_text(pair.prompt): pair for pair in pairs}.values())
