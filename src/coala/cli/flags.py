"""Flags made of settings: a parameter that is a dataclass becomes one flag for each of its fields.

A command says ``head: HeadSettings`` and gets the value; ``Annotated[HeadSettings, every(HeadSettings)]`` has a flag
for each setting, and ``Annotated[Given, Of(HeadSettings)]`` gets those alone that were given, to lay over a recipe.
A parameter whose type is itself a setting (``seed: Seed``) becomes its flag.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Le

from coala.settings import Setting, Spellings, flag_of, hints_of, setting_of, taken_apart, told

Given = Mapping[str, Any]
Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True)
class Of:
    """The settings of ``section`` that may be given: the named ones, or all that have a flag of their own."""

    section: type
    names: tuple[str, ...] = ()


def every(section: type) -> Of:
    """All settings of ``section``, those too that have no flag of their own on ``coala align``."""
    return Of(section, tuple(one.name for one in fields(section) if told(section, one.name)))


def with_settings(command: Command) -> Command:
    """The command with its dataclass parameters taken apart into flags, which typer can read."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        of = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Of)), None)
        kind = get_args(hint)[0] if of else hint
        if of is None and not is_dataclass(kind):
            if (setting := setting_of(hint)) is not None:
                hint = _annotation(name, hint, setting, optional=False)
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        whole = is_dataclass(kind)
        made = list(_flags(of.section if of else kind, of.names if of else (), whole))
        groups[name] = kind if whole else None, [one.name for one in made]
        parameters += made

    @wraps(command)
    def called(**values: Any) -> None:
        for name, (kind, names) in groups.items():
            own = {one: values.pop(one) for one in names}
            values[name] = {k: v for k, v in own.items() if v not in (None, [])} if kind is None else kind(**own)
        command(**values)

    twice = [one.name for one in parameters if sum(one.name == other.name for other in parameters) > 1]
    assert not twice, f"{command.__name__}: {twice} in two groups of settings"
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called  # type: ignore[return-value]


def _flags(section: Any, names: tuple[str, ...], whole: bool) -> Iterator[inspect.Parameter]:
    """The parameters for fields of ``section``: with their defaults where it is made ``whole``, else None."""
    hints = hints_of(section)
    for field in fields(section):
        wanted = field.name in names if names else flag_of(section, field.name) is not None
        hint = hints[field.name]
        own = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, typer.models.ParameterInfo)]
        if own:  # the field is a flag as it stands
            annotation, default = hint, _default(field)
        elif wanted:
            setting = setting_of(hint)
            assert setting is not None, f"{section.__name__}.{field.name} has no Setting"
            annotation, default = _annotation(field.name, hint, setting, not whole), _default(field)
        else:
            continue
        if not whole:
            annotation, default = _shown(annotation, default), None
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _shown(annotation: Any, default: Any) -> Any:
    """The option of a setting that need not be given, with the default that then holds."""
    for option in annotation.__metadata__:
        if default is not inspect.Parameter.empty and default not in (None, ()) and default is not False:
            option.help += f" [default: {default}]"
    return annotation


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def _annotation(name: str, hint: Any, setting: Setting, optional: bool) -> Any:
    """A type and option for typer: bounds and choices from the type, words from the setting."""
    forms, marks = taken_apart(hint)
    names = [setting.flag or "--" + name.replace("_", "-"), *filter(None, [setting.letter])]
    option: dict[str, Any] = {"help": setting.help}
    words = [word for form in forms if get_origin(form) is Literal for word in get_args(form)]
    kinds = [form for form in forms if get_origin(form) is not Literal and form is not NoneType]
    spellings = next((one for one in marks if isinstance(one, Spellings)), None)
    if words and (kinds or spellings):
        option["parser"] = _reader(words, kinds, spellings)
        listed = [kind.__name__.upper().replace("INT", "INTEGER") for kind in kinds] + words
        option |= {"metavar": f"[{'|'.join(listed)}]", "autocompletion": _beginning(words)}
        kind: Any = str
    elif words:
        kind = Literal[tuple(words)]
    else:
        (kind,) = kinds
        if get_origin(kind) is tuple:
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        if kind in (int, float):
            option |= {"min": next((one.ge for one in marks if isinstance(one, Ge)), None)}
            option |= {"max": next((one.le for one in marks if isinstance(one, Le)), None)}
    return Annotated[kind | None if optional or NoneType in forms else kind, typer.Option(*names, **option)]


def _reader(words: list[str], kinds: list[Any], spellings: Spellings | None) -> Callable[[str], Any]:
    """Reads a choice by any of its names, or a number where the setting takes one."""

    def read(given: str) -> Any:
        word = spellings.usual(given) if spellings else given
        if word in words:
            return word
        for kind in kinds:
            try:
                return kind(given)
            except ValueError:
                continue
        expected = f"neither a number nor {words[0]}" if kinds else f"not one of {', '.join(words)}"
        raise typer.BadParameter(f"{given!r} is {expected}.")

    return read


def _beginning(words: list[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]
