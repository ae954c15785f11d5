"""The bytes a run may take of device, host and disk, against those there are, and the flags that make it fit.

Upper bounds by the formulas of :mod:`coala.costs`; nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from coala.alignment.layer_choice import MOST_LAYERS
from coala.alignment.replies import PORTION
from coala.costs import decoding_bytes, pass_bytes
from coala.plan.tokens import Counts
from coala.recipe import Recipe

if TYPE_CHECKING:
    from coala.backbone import Outline

GIB = 2**30
# What Python, torch and JAX take by themselves, and what CUDA and its libraries take of a card.
LIBRARIES = {"host": GIB, "device": 3 * GIB // 4}
OTHERS = "other workers"  # the part of the processes that help with an extraction

Parts = dict[str, int]
_Change = Callable[[Recipe], Recipe]
_PLACES = {"device": "Device memory", "host": "Memory", "disk": "Disk"}


@dataclass(frozen=True)
class Shortage:
    """``place`` may be asked for ``needed`` bytes in ``stage`` and has ``there``.

    ``certain`` tells that even passes of one row would not fit; if not, the needed bytes are a bound that a run may
    stay below, and on a GPU passes are halved when memory is short.
    """

    place: str
    stage: str
    needed: int
    there: int
    parts: Parts
    certain: bool

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(number)}" for name, number in sorted(self.parts.items(), key=lambda p: -p[1]))
        return (
            f"{self.place}: up to {size(self.needed)} are needed for {self.stage} ({parts}), {size(self.there)} "
            f"available."
        )


class Needs:
    """Upper bounds on the bytes that each stage of a recipe takes on device, host and disk.

    Extraction, by each of ``n_workers`` processes: the weights, :func:`coala.costs.pass_bytes` of its largest passes,
    and on the host the features, of r distinct rows, n pairs, d numbers each and k prefixes 4 d k (2 r + 2 n) while
    they are put together (and n more with prompts). Fit: :func:`coala.convex.rows.solve_bytes`, or that of rows mapped
    from a file where the whole does not fit. Replies: the weights and :func:`coala.costs.decoding_bytes`. Disk:
    features of all pairs 4 d k n 2 (3 with prompts), the shards 4 d k r of one part beside them, mapped rows of the
    fit, and the pairs.
    """

    def __init__(
        self,
        recipe: Recipe,
        outline: Outline,
        counts: Counts,
        on_gpu: bool,
        room: Mapping[str, int | None],
        n_workers: int = 1,
    ) -> None:
        self.recipe, self.outline, self.counts, self.on_gpu, self.room = recipe, outline, counts, on_gpu, room
        self.n_workers = n_workers
        model = recipe.model
        self.layer = outline.n_layers if model.layer == "auto" else model.layer % (outline.n_layers + 1)
        self.dtype = model.dtype if model.dtype != "auto" else "bfloat16" if on_gpu else "float32"
        self.sources = 2 if recipe.prompt_features and recipe.head.gate_on in (None, "auto") else 1
        self._size = 4 if self.dtype == "float32" else 2

    def shortages(self) -> tuple[Shortage, ...]:
        """What has less room than its bound; nothing is known to be short where nobody tells the room."""
        short = []
        least = self._smallest()
        for name, mine, smallest in (
            ("device", self.device(), least.device()),
            ("host", self.host(), least.host()),
            ("disk", {"the run": self.disk()}, {"the run": least.disk()}),
        ):
            there = self.room[name]
            if there is None or not mine:
                continue
            stage, parts = max(mine.items(), key=lambda item: sum(item[1].values()))
            needed = sum(parts.values())
            if needed > there:
                certain = max(sum(parts.values()) for parts in smallest.values()) > there
                short.append(Shortage(_PLACES[name], stage, needed, there, parts, certain))
        return tuple(short)

    def _smallest(self) -> Needs:
        recipe = _with(self.recipe, model={"batch_tokens": 1})
        return Needs(recipe, self.outline, self.counts, self.on_gpu, self.room, self.n_workers)

    def device(self) -> dict[str, Parts]:
        if not self.on_gpu:
            return {}
        own = {"libraries": LIBRARIES["device"], "weights": self._weights()}
        stages = {"extraction": self._shared({**own, **self._passes()}), "replies": {**own, **self._decoding()}}
        if any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
            stages["fit"] = {"libraries": LIBRARIES["device"], **self._solve("device")}
        return stages

    def host(self) -> dict[str, Parts]:
        libraries = {"libraries": LIBRARIES["host"]}
        counts = self.counts
        # Texts as Python's objects; tokens as 4 bytes, twice more while rows are compared.
        text = 3 * counts.text_bytes + 12 * counts.total("reply_tokens") + 1024 * counts.total("rows")
        base = {**libraries, "pairs and tokens": text, "features": self._features()}
        if not self.on_gpu:
            weights = {"weights": self._weights()}
            return {
                "extraction": self._shared({**base, **weights, **self._passes()}),
                "fit": {**libraries, **weights, **self._solve("host")},
                "replies": {**libraries, **weights, **self._decoding()},
            }
        # Weights that are neither quantised nor spread pass through memory whole.
        whole = not self.recipe.model.quantise and self.recipe.model.device != "offload"
        loading = {"weights as they load": self.outline.weight_bytes(self.dtype) if whole else 0}
        return {"extraction": self._shared({**base, **loading}), "fit": {**libraries, **self._solve("host")}}

    def _shared(self, one: Parts) -> Parts:
        """What one process takes, and as much again for each of the others: each reads pairs, model and features."""
        return one if self.n_workers == 1 else {**one, OTHERS: (self.n_workers - 1) * sum(one.values())}

    def disk(self) -> Parts:
        counts, per_row = self.counts, 4 * self.outline.width
        prefixes, kinds = self.recipe.model.prefixes, 3 if self.recipe.prompt_features else 2
        pooled = counts.pairs("train") * prefixes + counts.pairs("eval")
        shards = max(counts.rows("train") * prefixes, counts.rows("eval")) * per_row
        parts = {"features": kinds * pooled * per_row, "shards": shards, "pairs": 2 * counts.text_bytes}
        if self._mapped("host"):
            parts["rows of the fit"] = 2 * counts.pairs("train") * prefixes * (per_row + 4)
        return parts

    def _weights(self) -> int:
        model, outline = self.recipe.model, self.outline
        if model.device == "offload":
            # The card is filled with weights but for the room of the largest piece, which what waits passes through.
            embedding = outline.shape.vocabulary * outline.width
            piece = max(embedding, outline.in_layers // outline.n_layers) * self._size
            there = self.room["device"]
            filled = piece if there is None else max(piece, there - LIBRARIES["device"] - piece)
            return min(outline.weight_bytes(self.dtype), filled)
        # On a CPU they are packed in 8 bits only once they are read, so that the most is all of them whole.
        packed = model.quantise == "8bit" and not self.on_gpu
        return outline.weight_bytes(self.dtype, None if packed else model.quantise)

    def _longest(self) -> int:
        return min(self.counts.longest_row, self.recipe.model.max_tokens or self.outline.context)

    def _passes(self) -> Parts:
        outline, model = self.outline, self.recipe.model
        load = self.counts.load(model.batch_tokens, self._longest())
        parts = pass_bytes(
            outline.shape,
            outline.cached,
            load,
            size=self._size,
            layer=self.layer,
            to_end=self.recipe.log_ratios,
            # A layer is chosen among several that are read at once.
            pooled=min(MOST_LAYERS, outline.n_layers) if model.layer == "auto" else 1,
        )
        if model.quantise:
            # A matrix is made whole again for its product.
            parts["activations of a pass"] += outline.in_layers // outline.n_layers * self._size
        if self.recipe.log_ratios:
            from coala.backbone.network import LOGITS

            parts["logits"] = 12 * LOGITS
        if model.pooling == "attn":
            from coala.backbone.attention import WEIGHTS

            # Products, masked, their softmax, and it rounded; states in float32 beside their scores.
            tokens = max(model.batch_tokens, self._longest())
            parts["attention to be heard"] = 16 * WEIGHTS + 4 * tokens * (outline.width + 1)
        return parts

    def _decoding(self) -> Parts:
        from coala.alignment.parts import guidance_of

        guidance, new = guidance_of(self.recipe), self.recipe.evaluation.max_new_tokens
        replies = min(len(self.counts.prompts), self.recipe.evaluation.prompts)
        if not replies:
            return {}
        # Unguided replies take a row each, guided ones perhaps several.
        rows = max(min(PORTION, replies), min(max(1, PORTION // guidance.rows), replies) * guidance.rows)
        if not self.counts.shares:
            rows *= guidance.candidates
        longest = max(self.counts.prompts)
        found = decoding_bytes(self.outline.shape, self.outline.cached, rows, longest, new, size=self._size)
        return {"keys, values and logits": found}

    def _features(self) -> int:
        counts, prefixes = self.counts, self.recipe.model.prefixes
        kinds = 3 if self.recipe.prompt_features else 2
        return max(
            4 * self.outline.width * k * (2 * counts.rows(part) + kinds * counts.pairs(part))
            for part, k in (("train", prefixes), ("eval", 1))
        )

    def _mapped(self, place: str) -> bool:
        """Whether the rows of the fit go to a file, as the fit decides it."""
        there = self.room[place]
        return there is not None and self._solve_bytes(mapped=False) > there

    def _solve(self, place: str) -> Parts:
        extra = 8 * self.counts.pairs("train") * self.recipe.model.prefixes * (self.outline.width + 1)
        prompts = {"rows of the prompts": extra} if self.recipe.prompt_features else {}
        return {"fit": self._solve_bytes(mapped=self._mapped(place)), **prompts}

    def _solve_bytes(self, *, mapped: bool) -> int:
        from coala.convex.fit import N_PATTERNS
        from coala.convex.rows import solve_bytes

        head = self.recipe.head
        gates = N_PATTERNS[head.method] if head.n_patterns is None else head.n_patterns
        n = self.counts.pairs("train") * self.recipe.model.prefixes
        return solve_bytes(n, self.outline.width + 1, max(1, gates), sides=2, mapped=mapped)


# --- what would fit ----------------------------------------------------------------------------------------------


def _with(recipe: Recipe, **changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in some of its parts."""
    return replace(recipe, **{part: replace(getattr(recipe, part), **values) for part, values in changes.items()})


def mends_of(
    recipe: Recipe,
    outline: Outline,
    counts: Counts,
    on_gpu: bool,
    room: Mapping[str, int | None],
    n_workers: int = 1,
) -> tuple[tuple[str, ...], bool]:
    """The flags each of which makes the run fit by the same formulas; else those that do together; else none.

    ``--layer auto`` is none of them: it may choose the last layer.
    """

    def fits(changed: Recipe, n_workers: int = n_workers) -> bool:
        return not Needs(changed, outline, counts, on_gpu, room, n_workers).shortages()

    fewer = next((n for n in range(n_workers - 1, 0, -1) if fits(recipe, n)), None)
    alone = [f"--workers {fewer}"] if fewer else []
    for options in _options(recipe, outline, counts, on_gpu):
        found = next((flag for flag, change in options if fits(change(recipe))), None)
        alone += [found] if found else []
    if alone:
        return tuple(alone), False
    if n_workers > 1:
        flags, together = mends_of(recipe, outline, counts, on_gpu, room)
        return ("--workers 1", *(flags if together else flags[:1])) if flags else (), bool(flags)
    so_far, kept = recipe, list[str]()
    for options in _options(recipe, outline, counts, on_gpu):
        # The least of each: quantised weights cannot be spread as well.
        flag, change = options[-1]
        if flag.startswith("--device") and so_far.model.quantise:
            continue
        so_far = change(so_far)
        kept.append(flag)
        if fits(so_far):
            return _needed(recipe, kept, dict(o[-1] for o in _options(recipe, outline, counts, on_gpu)), fits), True
    return (), False


def _needed(
    recipe: Recipe, flags: list[str], changes: Mapping[str, _Change], fits: Callable[[Recipe], bool]
) -> tuple[str, ...]:
    """Those of the flags without which the run would not fit, the last taken away first."""
    kept = list(flags)
    for flag in reversed(flags):
        changed = recipe
        for other in kept:
            changed = changes[other](changed) if other != flag else changed
        kept = [other for other in kept if other != flag] if fits(changed) else kept
    return tuple(kept)


def _options(recipe: Recipe, outline: Outline, counts: Counts, on_gpu: bool) -> Iterator[list[tuple[str, _Change]]]:
    """For each flag its values, the gentlest first."""
    model = recipe.model

    def values(flag: str, part: str, name: str, numbers: list[Any]) -> list[tuple[str, _Change]]:
        def setting(number: Any) -> _Change:
            return lambda recipe: _with(recipe, **{part: {name: number}})

        return [(f"{flag} {number}", setting(number)) for number in numbers]

    longest = min(counts.longest_row, model.max_tokens or outline.context)
    found = [
        values("--batch-tokens", "model", "batch_tokens", _halves(model.batch_tokens, 256)),
        values("--max-tokens", "model", "max_tokens", _halves(longest, 128)),
    ]
    if model.dtype in ("auto", "float32") and not (on_gpu and model.dtype == "auto"):
        found.append(values("--dtype", "model", "dtype", ["bfloat16"]))
    if on_gpu and model.device != "offload" and model.quantise != "4bit":
        found.append(values("--quantise", "model", "quantise", ["4bit"]))
    if on_gpu and not model.quantise and model.device != "offload" and not model.adapter:
        found.append(values("--device", "model", "device", ["offload"]))
    found.append(values("--layer", "model", "layer", [outline.n_layers // 2] if model.layer in (-1, "auto") else []))
    found.append(values("--prompts", "evaluation", "prompts", _halves(min(PORTION, recipe.evaluation.prompts), 1)))
    found.append(values("--prefixes", "model", "prefixes", [1] if model.prefixes > 1 else []))
    plain = recipe.head.method == "direct" and recipe.head.gate_on != "prompt"
    found.append(values("--method", "head", "method", ["linear"] if plain else []))
    return (options for options in found if options)


def _halves(number: int, least: int) -> list[int]:
    """Powers of two below ``number``, down to ``least``."""
    powers = [2**k for k in range(40)]
    return [n for n in reversed(powers) if least <= n < number]


def size(number: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number / 1024:,.1f} KiB"
