"""FLOPs, bytes, seconds and joules of each stage: counted by formula, and measured.

FLOPs are 2 per multiply-add of matrix products only; normalisation, activations and softmax are left out. For a row of
T tokens, with P_mm weights in the layers' matrix products, attention width A = heads * head size and L layers,

    body = 2 P_mm T + 4 T^2 A L        head = 2 T d V        full = body + head

(attention counted in full, not causally, as it is computed). Knows nothing of models: a :class:`Shape` is five numbers.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coala.values import CoalaError

Lengths = Sequence[int] | NDArray[np.integer[Any]]
Method = Literal["sft", "orpo", "simpo", "dpo"]

# Forwards' worth of work per sequence: all weights trained, and adapters on a frozen base. A backward pass costs two
# forwards with weight gradients, one without (adapters themselves neglected); DPO adds one of its reference.
_FORWARDS: dict[str, tuple[int, int]] = {"sft": (3, 2), "orpo": (3, 2), "simpo": (3, 2), "dpo": (4, 3)}


@dataclass(frozen=True)
class Shape:
    """What decides a transformer's FLOPs.

    ``body_matmul_parameters`` counts the weights of all layers' matrix products (no embedding, LM head, norms or
    biases; 12 d^2 L for GPT-2); ``attention_width`` is query heads * head size, which is d in most models.
    """

    n_layers: int
    width: int
    vocabulary: int
    body_matmul_parameters: int
    attention_width: int


def transformer_shape(
    *,
    n_layers: int,
    width: int,
    vocabulary: int,
    mlp_width: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    head_size: int | None = None,
    gated_mlp: bool = True,
) -> Shape:
    """Shape of a decoder with query, key, value, output and two (``gated_mlp``: three) MLP matrices a layer."""
    size = head_size or width // n_heads
    kv_width = (n_kv_heads or n_heads) * size
    layer = 2 * width * n_heads * size + 2 * width * kv_width + (3 if gated_mlp else 2) * width * mlp_width
    return Shape(n_layers, width, vocabulary, n_layers * layer, n_heads * size)


def body_flops(shape: Shape, lengths: Lengths, *, own: Lengths | None = None, layer: int | None = None) -> int:
    """Forward pass without the LM head over rows of these many tokens, up to hidden state ``layer`` (default: all).

    Of each row the last ``own`` tokens are computed (default: all of them), which attend to the whole row.
    """
    computed, products = _sums(lengths, own)
    everything = 2 * shape.body_matmul_parameters * computed + 4 * shape.attention_width * shape.n_layers * products
    if layer is None:
        return everything
    if not -shape.n_layers - 1 <= layer <= shape.n_layers:
        raise CoalaError(
            f"Hidden state {layer} was asked of a model with {shape.n_layers} layers (0 is the embedding)."
        )
    # Negative layers count from the last hidden state, as everywhere; each layer costs the same.
    return everything * (layer % (shape.n_layers + 1)) // shape.n_layers


def head_flops(shape: Shape, lengths: Lengths) -> int:
    """The LM head at every position."""
    return 2 * shape.width * shape.vocabulary * _sums(lengths)[0]


def full_flops(shape: Shape, lengths: Lengths) -> int:
    """Forward pass with logits at every position."""
    return body_flops(shape, lengths) + head_flops(shape, lengths)


def extraction_flops(shape: Shape, lengths: Lengths, *, own: Lengths | None = None, layer: int | None = None) -> int:
    """Feature extraction over rows of ``lengths`` tokens, chosen and rejected alike: body only, no gradients.

    Of each row ``own`` tokens are computed, the others shared with another row (default: none is). Exact for unpadded
    rows; give padded lengths to count padding.
    """
    return body_flops(shape, lengths, own=own, layer=layer)


def work_over_bound(flops: int, least: int) -> float:
    """How many times the least possible work was done; nan for a bound of 0.

    The bound of an extraction is :func:`extraction_flops` of ``coala.features.distinct_lengths``, every token that rows
    have in common computed once.
    """
    return flops / least if least else float("nan")


def training_flops(
    shape: Shape,
    chosen: Lengths,
    rejected: Lengths,
    method: Method,
    *,
    adapters: bool = False,
    checkpointing: bool = False,
    epochs: int = 1,
) -> int:
    """Fine-tuning on pairs of ``chosen`` and ``rejected`` tokens: SFT (chosen only), ORPO or SimPO, DPO.

    In forwards of a sequence, all weights trained: 3, 3, 4 (DPO's reference is the fourth); with ``adapters`` on a
    frozen base: 2, 2, 3. ``checkpointing`` adds one forward per trained forward.
    """
    if method not in _FORWARDS:
        raise CoalaError(f"No cost is known for the method {method!r}; expected one of {', '.join(_FORWARDS)}.")
    everything, frozen = _FORWARDS[method]
    forwards = (frozen if adapters else everything) + checkpointing
    one = full_flops(shape, chosen) + (0 if method == "sft" else full_flops(shape, rejected))
    return epochs * forwards * one


def cronos_flops(rows: int, width: int, n_patterns: int, *, admm_steps: int, pcg_steps: int) -> int:
    """ADMM with ``pcg_steps`` conjugate-gradient steps each (Algorithm 2): K n d P (10 + 12 k).

    One product with F or its transpose is 2 n d P, with G or its transpose 4 n d P; a PCG step has one of each.
    ``rows`` counts responses, two to a pair.
    """
    return admm_steps * rows * width * n_patterns * (10 + 12 * pcg_steps)


def second_phase_flops(rows: int, width: int, n_neurons: int, *, epochs: int) -> int:
    """Fitting the second layer (Eq. 9): hidden layer once, then forward and backward over it each epoch."""
    return 2 * rows * width * n_neurons + epochs * 4 * rows * n_neurons


def pairwise_flops(pairs: int, width: int, n_patterns: int, *, newton_steps: int, pcg_steps: int) -> int:
    """One solve of the pairwise program by Newton's method: 8 n d P (k + 1) a step with k conjugate-gradient steps.

    Two products with the data of two sides each in a conjugate-gradient step, and as many for the gradient.
    """
    return newton_steps * 8 * pairs * width * n_patterns * (pcg_steps + 1)


def search_flops(pairs: int, width: int, *, starts: int, steps: int) -> int:
    """One search for violated gates: two products with the data of two sides for every start and step."""
    return 8 * pairs * width * starts * steps


def score_flops(width: int, n_neurons: int) -> int:
    """Score of one feature vector by a convex head: the linear block, and a gate and a value per neuron."""
    return 2 * (width + 1) * (2 * n_neurons + 1)


def token_flops(shape: Shape, context: int) -> int:
    """One decoded token with a cache of ``context`` tokens: one column through the layers, and the logits."""
    return _column(shape, context + 1) + head_flops(shape, [1])


def guided_token_flops(shape: Shape, context: int, candidates: int, n_neurons: int) -> int:
    """One token guided by a head: ``candidates`` peeked in one forward, scored, and the winner's column kept.

    The peeked columns attend to the cache and, through the tree mask, are computed against each other too.
    """
    peeked = candidates * (_column(shape, context + candidates) + score_flops(shape.width, n_neurons))
    return peeked + head_flops(shape, [1])


def decoding_flops(
    shape: Shape, prompt_tokens: int, new_tokens: int, *, candidates: int = 0, every: int = 1, n_neurons: int = 0
) -> int:
    """A reply of ``new_tokens``: prefill, then each ``every``-th token guided over ``candidates`` (0: none)."""
    total = body_flops(shape, [prompt_tokens])
    for i in range(new_tokens):
        context = prompt_tokens + i
        guided = candidates > 0 and i % every == 0
        total += guided_token_flops(shape, context, candidates, n_neurons) if guided else token_flops(shape, context)
    return total


def _column(shape: Shape, context: int) -> int:
    return 2 * shape.body_matmul_parameters + 4 * context * shape.attention_width * shape.n_layers


def _sums(lengths: Lengths, own: Lengths | None = None) -> tuple[int, int]:
    """Sums of the computed tokens and of their products with the rows' lengths, as integers that do not overflow."""
    values = [int(length) for length in lengths]
    computed = values if own is None else [int(length) for length in own]
    if any(value < 0 for value in values):
        raise CoalaError(f"A row of {min(values)} tokens; lengths must be 0 or more.")
    if len(computed) != len(values) or any(not 0 <= a <= b for a, b in zip(computed, values, strict=False)):
        raise CoalaError("The tokens computed of a row must be 0 to its length, one number for each row.")
    return sum(computed), sum(a * b for a, b in zip(computed, values, strict=True))


# --- bytes by formula ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """The largest forward passes of an extraction, in tokens.

    ``trunk`` are those of a pass over whole rows, ``branch`` those computed in a pass over rows that go on from kept
    ones, ``gathered`` what is gathered in front of them, ``across`` the most that one of them attends to; ``nested``
    are those of the rows that go on from kept ones and are kept themselves, at all depths together.
    """

    trunk: int
    branch: int = 0
    gathered: int = 0
    across: int = 0
    nested: int = 0


def pass_bytes(
    shape: Shape,
    cached: int,
    load: Load,
    *,
    size: int,
    layer: int | None = None,
    to_end: bool = False,
    pooled: int = 1,
) -> dict[str, int]:
    """Upper bounds in bytes, by part, of what an extraction holds on its device besides the weights.

    With T, B, G, K and N the five numbers of ``load``, s bytes a number, l of L layers read, c numbers ``cached`` a
    token over all layers, A = attention width and w = P_mm / (L d), all widths a layer makes taken together:

        kept keys and values   (T + N) c s l / L                              (if rows branch off)
        activations            M (s (w + 2 A + 4 d) + 8 d),  M = max(T, B), and of a pass of branches
                               (2 G + B) c s / L + 2 A (G + B) s + 24 B K     (gathered, repeated per head, masks)
        hidden states          f (T + N + G + 2 B) d s + max(T, G + B) 8 d    (f ``pooled`` layers, the end one more)

    Holds for fused attention; of eager attention the scores, heads * T * K * (s + 4), come on top.
    """
    n_layers, width, attention = shape.n_layers, shape.width, shape.attention_width
    read = n_layers if layer is None or to_end else layer % (n_layers + 1)
    made = -(-shape.body_matmul_parameters // (n_layers * width))
    trunk, branch, gathered = load.trunk, load.branch, load.gathered
    activations = max(trunk, branch) * (size * (made + 2 * attention + 4 * width) + 8 * width)
    if branch:
        activations += (2 * gathered + branch) * cached * size // n_layers
        activations += 2 * attention * (gathered + branch) * size + 24 * branch * load.across
    kinds = pooled + to_end
    states = (
        kinds * (trunk + load.nested + gathered + 2 * branch) * width * size + max(trunk, gathered + branch) * 8 * width
    )
    return {
        "kept keys and values": -(-(trunk + load.nested) * cached * size * read // n_layers) if branch else 0,
        "activations of a pass": activations,
        "hidden states to pool": states,
    }


def decoding_bytes(shape: Shape, cached: int, rows: int, prompt_tokens: int, new_tokens: int, *, size: int) -> int:
    """Upper bound in bytes of decoding ``rows`` replies side by side, besides the weights.

    Keys and values of R rows of T + N tokens, with half as much room to grow in and one layer copied; the pass over
    the prompts as in :func:`pass_bytes`, with masks of 4 bytes; three rows of float32 logits each.
    """
    kept = rows * (prompt_tokens + new_tokens + 64) * cached * size
    read = sum(pass_bytes(shape, cached, Load(rows * prompt_tokens), size=size).values())
    return 3 * kept // 2 + kept // shape.n_layers + read + 4 * rows * prompt_tokens**2 + 12 * rows * shape.vocabulary


# --- measured ----------------------------------------------------------------------------------------------------


class Stopwatch:
    """Wall seconds of a ``with`` block; ``seconds`` runs inside it and stands still after it. May be entered again."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds spent inside so far."""
        return self._spent + (0.0 if self._since is None else time.perf_counter() - self._since)

    def __enter__(self) -> Stopwatch:
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spent, self._since = self.seconds, None


class Meter(Stopwatch):
    """A stopwatch that also reads what energy the block took, where the machine tells.

    Of each NVIDIA GPU the driver's own counter (pynvml, if it is installed), else the power that ``nvidia-smi`` tells
    every second, times the time; of the processor the counters under ``powercap``, which often only root may read.
    Everything the machine does counts, not this process alone.
    """

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        super().__init__()
        self._powercap = powercap
        self._meters: dict[str, _Counter | _Sampler] = {}
        self._spent_joules: dict[str, float] = {}

    @property
    def joules(self) -> dict[str, float] | None:
        """Energy of the finished blocks by part, ``device`` and ``host``; None when nothing reports it."""
        return dict(self._spent_joules) or None

    def facts(self, tokens: int | None = None) -> dict[str, Any]:
        """Seconds, peak bytes, joules, and ``tokens`` a second where their number is given."""
        rate = {} if tokens is None or not self.seconds else {"tokens_per_second": tokens / self.seconds}
        return {"seconds": self.seconds, "peak_bytes": peak_memory(), "joules": self.joules, **rate}

    def __enter__(self) -> Meter:
        device, host = _gpu_energy(), _processor_energy(self._powercap)
        self._meters = {name: found for name, found in (("device", device), ("host", host)) if found is not None}
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for name, meter in self._meters.items():
            used = meter.used()
            if used is not None:
                self._spent_joules[name] = self._spent_joules.get(name, 0.0) + used
        self._meters = {}


class _Counter:
    """Joules since it was made, by counters that only rise but begin again behind their range."""

    def __init__(self, read: Callable[[], list[float]], ranges: Sequence[float]) -> None:
        self._read, self._ranges, self._first = read, ranges, read()

    def used(self) -> float | None:
        try:
            now = self._read()
        except Exception:  # noqa: BLE001  a driver raises its own; a reading lost is no reason to lose the work
            return None
        steps = zip(now, self._first, self._ranges, strict=True)
        return sum(b - a if b >= a else b - a + full for b, a, full in steps)


class _Sampler:
    """Joules since it was made, from watts asked for every second in a thread of its own."""

    def __init__(self, watts: Callable[[], float | None], first: float, every: float = 1.0) -> None:
        self._watts, self._every = watts, every
        self._joules, self._at, self._power = 0.0, time.perf_counter(), first
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            self._advance()

    def _advance(self) -> None:
        # Trapezes: the power between two readings is taken to be their mean.
        power, now = self._watts(), time.perf_counter()
        power = self._power if power is None else power
        self._joules += (now - self._at) * (power + self._power) / 2
        self._at, self._power = now, power

    def used(self) -> float | None:
        self._end.set()
        self._thread.join()
        self._advance()
        return self._joules


def _processor_energy(powercap: Path) -> _Counter | None:
    """The packages' and memory's counters. Cores and graphics lie inside a package and are not counted again."""
    zones = []
    try:
        for zone in sorted(powercap.glob("*/energy_uj")):
            name = (zone.parent / "name").read_text().strip()
            if name.startswith(("package", "dram")):
                zones.append((zone, float((zone.parent / "max_energy_range_uj").read_text()) / 1e6))
        if not zones:
            return None
        return _Counter(lambda: [float(zone.read_text()) / 1e6 for zone, _ in zones], [full for _, full in zones])
    except (OSError, ValueError):
        return None


def _gpu_energy() -> _Counter | _Sampler | None:
    if find_spec("pynvml") is not None:
        try:
            nvml = import_module("pynvml")
            nvml.nvmlInit()
            cards = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            if cards:
                return _Counter(
                    lambda: [nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3 for card in cards],
                    [0.0] * len(cards),
                )
        except Exception:  # noqa: BLE001  NVML's own error class, known only where it is installed
            pass
    first = _gpu_watts()
    return None if first is None else _Sampler(_gpu_watts, first)


def _gpu_watts() -> float | None:
    found = ask_driver("power.draw")
    return sum(found) if found else None


def ask_driver(field: str) -> list[float]:
    """What ``nvidia-smi`` tells of ``field``, one number a GPU in its own unit; nothing without a driver or answer."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return [float(line) for line in done.stdout.split("\n") if line.strip()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def peak_memory() -> dict[str, int]:
    """Highest use so far in bytes: ``host`` of this process, ``device`` of torch's allocator if CUDA is in use."""
    peak = {}
    host = _host_peak()
    if host is not None:
        peak["host"] = host
    # Looked up, never imported: measuring must not load a framework that the process does without.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["device"] = int(max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())))
    return peak


def _host_peak() -> int | None:
    try:
        # ru_maxrss survives exec on Linux, so a child of a large process would report its parent's peak.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # no such module on Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
