"""Jinja as transformers sets it up for chat templates, with bounds on what a template may run and write.

A template comes with a model, so it is somebody else's program. The sandbox keeps it from files and processes; steps
are counted here, so that it ends. What a template could read from outside, the clock and chance, is held.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a template is told the time is, so that the same conversation is the same text on every day.
CLOCK = datetime(2025, 1, 1, 12)
LONGEST_SOURCE = 1 << 20
# The templates of released models take 1 to 10 steps a turn; what is said buys more, a step a character.
STEPS, CHARACTERS = 100_000, 1 << 22
# Characters that cost as much as a step.
PER_STEP = 1024
# Filters that look at one end of a list or ask for its length cost the same for every length.
INSTANT = frozenset({"length", "count", "first", "last"})
_DIGITS = 4096
_WIDE = re.compile(r"[0-9]{5,}")


class TooMuch(TemplateError):
    """A template that runs or writes more than any conversation needs."""


class _Budget(threading.local):
    """Steps left and the longest text of the render of this thread."""

    steps = STEPS
    longest = CHARACTERS

    def start(self, given: int) -> None:
        self.steps, self.longest = STEPS + given, CHARACTERS + 8 * given

    def spend(self, *values: Any) -> None:
        """Pay for a step over these values."""
        cost = 1
        for value in values:
            if isinstance(value, str):
                if len(value) > self.longest:
                    raise TooMuch(f"it makes a text of more than {self.longest:,} characters")
                cost += len(value) // PER_STEP
            elif isinstance(value, list | tuple | Mapping | range):
                cost += len(value)
        self.steps -= cost
        if self.steps < 0:
            raise TooMuch(f"it takes more than {STEPS:,} steps")

    def room(self, size: int) -> None:
        if size > self.longest:
            raise TooMuch(f"it makes something of more than {self.longest:,} parts")


class Sandbox(ImmutableSandboxedEnvironment):
    """One environment per template; :meth:`start` sets the bounds of the render that follows, for texts of a size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Private, but all of what a template may use is there and nowhere else.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs: Any = _compile_jinja_template("").environment
        kinds = [type(extension) for extension in theirs.extensions.values()]
        super().__init__(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=kinds)
        self.budget = _Budget()
        self.globals = {**theirs.globals, "strftime_now": _time_held, "lipsum": _by_chance}
        filters = {**theirs.filters, "random": _by_chance}
        self.filters = {name: _paid(self.budget, f, name in INSTANT) for name, f in filters.items()}
        self.filters |= {"_counted": self._counted, "_joined": self._joined}

    def start(self, given: int) -> None:
        self.budget.start(given)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        joined: nodes.Template = _with_joins(tree)
        return joined

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.spend()
            yield item

    def _joined(self, parts: Iterable[Any]) -> str:
        text = "".join(map(str, parts))
        self.budget.spend(text)
        return text

    def concat(self, parts: Iterable[str]) -> str:
        """Where every piece of text that a template writes comes together."""
        found, size = [], 0
        for part in parts:
            size += len(part)
            self.budget.room(size)
            found.append(part)
        text = "".join(found)
        self.budget.spend(text)
        return text

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        values = (*args, *kwargs.values())
        self.budget.spend(*values)
        _check_numbers(self.budget, values)
        if isinstance(owner, str):
            self.budget.spend(owner)
            if _WIDE.search(owner) and getattr(obj, "__name__", "") in ("format", "format_map"):
                raise TooMuch("it formats a text to a great width")
            if getattr(obj, "__name__", "") in ("replace", "join", "translate"):
                texts = [len(value) for value in values if isinstance(value, str)]
                several = [sum(len(str(v)) + len(owner) for v in value) for value in values if isinstance(value, list)]
                grown = owner.count(args[0]) * max(texts) if len(texts) > 1 and args[0] else 0
                self.budget.room(max([grown, *several, 0]))
        found = super().call(context, obj, *args, **kwargs)
        self.budget.spend(*((found,) if isinstance(found, str) else ()))
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * max(right, 0) > _DIGITS:
            raise TooMuch("it makes a number of more digits than it can need")
        if operator == "*":
            if numbers and left.bit_length() + right.bit_length() > _DIGITS:
                raise TooMuch("it makes a number of more digits than it can need")
            for many, times in ((left, right), (right, left)):
                if isinstance(many, Sized) and isinstance(times, int):
                    self.budget.room(len(many) * max(times, 0))
        if operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            _check_numbers(self.budget, values)
            if _WIDE.search(left):
                raise TooMuch("it formats a text to a great width")
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            self.budget.room(len(left) + len(right))
        found = super().call_binop(context, operator, left, right)
        self.budget.spend(found)
        return found


def _with_joins(tree: Any) -> Any:
    """The tree with every ``a ~ b`` made by a filter that is paid for."""
    for name, value in tree.iter_fields():
        if isinstance(value, list):
            setattr(tree, name, [_with_joins(one) if isinstance(one, nodes.Node) else one for one in value])
        elif isinstance(value, nodes.Node):
            setattr(tree, name, _with_joins(value))
    if isinstance(tree, nodes.Concat):
        parts = nodes.List(tree.nodes, lineno=tree.lineno)
        joined = nodes.Filter(parts, "_joined", [], [], None, None, lineno=tree.lineno)
        return joined.set_environment(tree.environment) if tree.environment is not None else joined
    return tree


def _paid(budget: _Budget, function: Callable[..., Any], instant: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        budget.spend(*(() if instant else values))
        _check_numbers(budget, values)
        if function.__name__ == "do_format" and isinstance(args[0], str) and _WIDE.search(args[0]):
            raise TooMuch("it formats a text to a great width")
        if function.__name__ == "do_replace":
            budget.room(str(args[1]).count(str(args[2])) * len(str(args[3])) if len(args) > 3 and args[2] else 0)
        found = function(*args, **kwargs)
        budget.spend(*((found,) if isinstance(found, str) else ()))
        return found

    return paid


def _check_numbers(budget: _Budget, values: Iterable[Any]) -> None:
    """A width, an indent or a count of copies is never this large."""
    for value in values:
        if isinstance(value, int):
            budget.room(abs(value))


def _time_held(format: str) -> str:
    return CLOCK.strftime(format)


def _by_chance(*_: Any, **__: Any) -> Any:
    raise TemplateError("it draws at random, so that no conversation would be the same text twice")
