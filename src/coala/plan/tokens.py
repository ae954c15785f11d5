"""What a run will encode, counted before a weight is read: the rows of its pairs, in tokens or about as many.

Tokens are those of the model's tokenizer where it is here; else as many as the user says a text has; else one for
every four characters. Rows are surveyed as :func:`coala.features.extract` does it, so that what they share is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from coala.costs import Load
from coala.recipe import Recipe
from coala.settings import ModelSettings
from coala.values import CoalaError, FeatureSpec, Pair, Turn, one_per_prompt, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel, Outline, RenderedRow
    from coala.features.prefix_tree import PrefixTree

CHARACTERS_PER_TOKEN = 4
# Pairs that stand in for as many as are asked for, where none are given: all are alike.
STAND_INS = 60


@dataclass(frozen=True)
class Guess:
    """Tokens of every prompt and every reply, as the user gives them."""

    prompt: int
    reply: int


@dataclass(frozen=True, eq=False)
class Counts:
    """The rows of a run. ``surveys`` hold those of ``train`` and ``eval``, which stand for ``scale`` times as many.

    ``prompts`` are the tokens of the held-out prompts that get replies, ``how`` says what a token is, ``shares``
    whether what rows begin with is encoded once.
    """

    surveys: dict[str, PrefixTree]
    scale: Fraction
    prompts: list[int]
    text_bytes: int
    how: str
    shares: bool

    def scaled(self, number: int) -> int:
        return round(number * self.scale)

    def total(self, fact: str) -> int:
        """One of :attr:`PrefixTree.facts`, of both parts together."""
        return self.scaled(sum(survey.facts.get(fact, 0) for survey in self.surveys.values()))

    def pairs(self, part: str) -> int:
        train, everything = len(self.surveys["train"].index), sum(len(s.index) for s in self.surveys.values())
        # The parts add up to the pairs asked for.
        return self.scaled(train) if part == "train" else self.scaled(everything) - self.scaled(train)

    def rows(self, part: str) -> int:
        """Distinct rows."""
        return self.scaled(len(self.surveys[part].tokens))

    def prompts_of(self, part: str) -> list[int]:
        """Tokens of the prompts of a part, each once."""
        survey = self.surveys[part]
        rows = survey.index[:, 0].tolist()
        distinct = {tuple(survey.tokens[row][: survey.start[row]]): int(survey.start[row]) for row in rows}
        return list(islice(cycle(distinct.values()), self.scaled(len(distinct))))

    @property
    def longest_row(self) -> int:
        return max(int(survey.lengths.max(initial=0)) for survey in self.surveys.values())

    def load(self, batch_tokens: int, longest: int) -> Load:
        """Bounds on the largest passes if rows are cut to ``longest`` tokens.

        A pass has at most ``batch_tokens`` tokens, but for a longer row, and no more than there are; what is gathered
        in front of branches is bounded by the extraction as a multiple of that.
        """
        from coala.features.encoding import MOST_GATHERED

        loads = []
        for survey in self.surveys.values():
            lengths, branches = np.minimum(survey.lengths, longest), survey.shared > 0
            own, shared = (
                np.minimum(survey.own_lengths[branches], longest),
                np.minimum(survey.shared[branches], longest),
            )

            def bound(most: int, of: Any) -> int:
                highest = int(of.max(initial=0))
                # Padding: as many tokens as if every row were as long as the longest.
                return max(min(most, self.scaled(len(of)) * highest), highest)

            across = int(own.max(initial=0) + shared.max(initial=0))
            depth = survey.depth
            # Rows that others branch off while being branches themselves: one pass of them at every depth but the last.
            between = np.unique(survey.parent[depth > 1])
            loads.append(
                Load(
                    bound(batch_tokens, lengths[~branches]),
                    bound(batch_tokens, own),
                    bound(MOST_GATHERED * batch_tokens, shared),
                    across,
                    bound(batch_tokens, lengths[between]) * max(int(depth.max(initial=0)) - 1, 0),
                )
            )
        return Load(*(max(getattr(load, f.name) for load in loads) for f in fields(Load)))


def count(
    recipe: Recipe,
    outline: Outline,
    *,
    tokenizer: Path | None,
    guess: Guess | None = None,
    rows: int | None = None,
    shares: bool | None = None,
) -> Counts:
    """PrefixTree the pairs of ``recipe``, or stand-ins for ``rows`` pairs of ``guess`` tokens if it names none.

    ``tokenizer`` is a folder with one; ``rows`` the number of pairs to plan for, like those given; ``shares`` whether
    the model can share what rows begin with (default: every decoder with keys and values can).

    Raises :class:`CoalaError` for pairs that cannot be read, and for none without ``rows`` and ``guess``.
    """
    from coala.features import survey

    model = recipe.model
    parts = _parts(recipe, guess, rows)
    sharing = not outline.encoder and outline.cached > 0 if shares is None else shares
    reader, how = _reader(model, outline, tokenizer, guess, sharing)
    layer = outline.n_layers if model.layer == "auto" else model.layer % (outline.n_layers + 1)
    spec = FeatureSpec(
        outline.name, "", "", "", layer, model.pooling, model.ends_with_eos, model.max_tokens or outline.context
    )
    surveys = {
        part: survey(pairs, cast("LanguageModel", reader), spec, prompt_features=recipe.prompt_features)
        for part, pairs in parts.items()
    }
    n = sum(map(len, parts.values()))
    held_out = one_per_prompt(parts["eval"])
    answered = held_out[: recipe.evaluation.prompts]
    most = max(outline.context - recipe.evaluation.max_new_tokens, outline.context // 2)
    prompts = [len(reader.render(pair.prompt, max_tokens=most).tokens) for pair in answered]
    texts = (text for pairs in parts.values() for pair in pairs for text in _texts(pair))
    scale = Fraction(n if rows is None else rows, n)
    if not recipe.pairs:
        prompts = prompts[:1] * min(recipe.evaluation.prompts, round(len(parts["eval"]) * scale))
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return Counts(surveys, scale, prompts, round(size * scale), how, sharing)


def _texts(pair: Pair) -> Iterator[str]:
    yield from (turn.text for turn in pair.prompt)
    yield from (pair.chosen, pair.rejected)


def _parts(recipe: Recipe, guess: Guess | None, rows: int | None) -> dict[str, list[Pair]]:
    """The pairs as ``align`` would part them."""
    from coala.data import check, split

    if rows is not None and rows < 2:
        raise CoalaError(f"A plan for {rows} pairs; expected at least 2, one to train on and one to hold out.")
    if not recipe.pairs:
        if rows is None or guess is None:
            raise CoalaError(
                "Found no pairs to count. Fix: name a file of pairs, or give their number and length: "
                "`--rows N --tokens-per-prompt N --tokens-per-reply N`."
            )
        pairs = [Pair(user(f"prompt {i}"), f"first {i}", f"second {i}", str(i)) for i in range(min(rows, STAND_INS))]
        return dict(zip(("train", "eval"), split(pairs, recipe.eval_fraction, seed=recipe.seed), strict=True))
    findings = [check(recipe.pairs, recipe.format, against=recipe.eval_pairs or None)]
    findings += [check(recipe.eval_pairs, recipe.format)] if recipe.eval_pairs else []
    for found in findings:
        if not (recipe.skip_bad and found.pairs):
            found.raise_for_errors()
    if recipe.eval_pairs:
        return {"train": list(findings[0].pairs), "eval": list(findings[1].pairs)}
    train, held_out = split(findings[0].pairs, recipe.eval_fraction, seed=recipe.seed)
    return {"train": train, "eval": held_out}


# --- tokens without a model --------------------------------------------------------------------------------------


class _Reader:
    """What a survey asks of a language model: to render, and whether beginnings can be shared."""

    def __init__(self, shares: bool, context: int) -> None:
        self.shares = shares
        self._context = context

    def require(self, spec: FeatureSpec) -> None:
        """Any spec will do: nothing is extracted."""

    def render(
        self,
        prompt: Sequence[Turn],
        reply: str | None = None,
        *,
        max_tokens: int | None = None,
        ends_with_eos: bool = False,
    ) -> RenderedRow:
        longest = self._context if max_tokens is None else min(max_tokens, self._context)
        return self._row(prompt, reply, longest, ends_with_eos)

    def _row(self, prompt: Sequence[Turn], reply: str | None, longest: int, ends_with_eos: bool) -> RenderedRow:
        raise NotImplementedError


class _Tokenized(_Reader):
    def __init__(self, shares: bool, context: int, renderer: Any) -> None:
        super().__init__(shares, context)
        self._renderer = renderer

    def _row(self, prompt: Sequence[Turn], reply: str | None, longest: int, ends_with_eos: bool) -> RenderedRow:
        row: RenderedRow = self._renderer.render(prompt, reply, max_tokens=longest, ends_with_eos=ends_with_eos)
        return row


class _Guessed(_Reader):
    """Tokens are pieces of four characters, or as many of a text's own as are given; texts that begin alike share."""

    def __init__(self, shares: bool, context: int, guess: Guess | None) -> None:
        super().__init__(shares, context)
        self._guess = guess
        self._names: dict[str, int] = {}

    def _row(self, prompt: Sequence[Turn], reply: str | None, longest: int, ends_with_eos: bool) -> RenderedRow:
        from coala.backbone import RenderedRow

        asked = "\n\n".join([*(f"{turn.role}: {turn.text}" for turn in prompt), "assistant:"])
        begin = self._tokens(asked, None if self._guess is None else self._guess.prompt)
        rest = []
        if reply is not None:
            rest = self._tokens(f" {reply}", None if self._guess is None else self._guess.reply)
            rest += [self._name("")] if ends_with_eos else []
        whole = len(begin) + len(rest)
        if whole > longest:  # as the renderer cuts: the prompt from the left, then the reply from the right
            kept = max(min(len(begin), max(longest // 4, 1)), longest - len(rest))
            begin = begin[-kept:]
            rest = rest[: max(longest - len(begin), 0)]
        return RenderedRow([*begin, *rest], len(begin), whole - len(begin) - len(rest))

    def _tokens(self, text: str, number: int | None) -> list[int]:
        if number is not None:
            return [self._name(text)] * number
        size = CHARACTERS_PER_TOKEN
        return [self._name(text[i : i + size]) for i in range(0, len(text), size)]

    def _name(self, piece: str) -> int:
        return self._names.setdefault(piece, len(self._names))


def _reader(
    model: ModelSettings, outline: Outline, tokenizer: Path | None, guess: Guess | None, shares: bool
) -> tuple[_Reader, str]:
    if guess is not None:
        if guess.prompt < 1 or guess.reply < 0:
            raise CoalaError(
                f"{guess.prompt} tokens a prompt and {guess.reply} a reply; expected at least 1 and at least 0."
            )
        how = f"as given: {guess.prompt} tokens a prompt, {guess.reply} a reply"
        return _Guessed(shares, outline.context, guess), how
    if tokenizer is None:
        how = f"about: characters / {CHARACTERS_PER_TOKEN}, because no tokenizer is available"
        return _Guessed(shares, outline.context, None), how
    from coala.backbone.load import load_tokenizer
    from coala.backbone.silence import quiet
    from coala.backbone.template import Renderer

    with quiet():
        loaded = load_tokenizer(tokenizer, str(tokenizer), model.trust_remote_code)
        renderer = Renderer(loaded, model.template, stop_tokens=frozenset(), encoder=outline.encoder)
    return _Tokenized(shares, outline.context, renderer), "by the model's tokenizer"
