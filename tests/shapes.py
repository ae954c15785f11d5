"""The shapes that annotations state, checked while tests run (docs/notation.md names the axes).

``check`` installs an import hook that wraps every function of the packages, inside ``jax.jit``: tracers are checked
and compiled code stays as it is. Arguments and results that are arrays, or hold some, are held to their annotations by
beartype, within one jaxtyping context a call: n is n throughout it, and what it is in the fields of the first argument
that is a dataclass or a named tuple of arrays, which ``self`` may be.

Not by jaxtyping's own hook, which takes 60 microseconds a call, and three milliseconds to wrap a function, those inside
of others at each call anew. Here a function is checked once for each combination of shapes and types; where a test file
calls it more than ``LOOKS`` times, only every fiftieth call is looked at from then on.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args, get_origin

PACKAGES: list[str] = []
LOOKS, OFTEN = 200, 50


class ShapeError(TypeError):
    """An array is not what its annotation states."""


def check(*packages: str) -> None:
    """Check what will be imported of these packages."""
    assert not any(name.startswith(packages) for name in sys.modules), "imported before their shapes can be checked"
    PACKAGES.extend(packages)
    sys.meta_path.insert(0, _Finder())


def begin() -> None:
    """Look at the next calls of every function again, whatever has been called before."""
    for form in _FORMS.values():
        form.looks = LOOKS


def checked(target: Any) -> Any:
    """The function, or the dataclass, with its arrays checked."""
    if isinstance(target, type):
        if dataclasses.is_dataclass(target):
            target.__init__ = checked(target.__init__)  # type: ignore[misc]
        return target
    form = _FORMS.setdefault(target.__code__, _Form(target))
    seen = form.seen

    @functools.wraps(target)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        form.looks -= 1
        if form.looks < 0 and form.looks % OFTEN:
            return target(*args, **kwargs)
        shapes = tuple([_shape(value) for value in args])
        if kwargs:
            shapes += (*kwargs, *map(_shape, kwargs.values()))
        if shapes in seen:
            return target(*args, **kwargs)
        result = form.call(target, args, kwargs)
        seen.add(shapes)
        return result

    return wrapper


def annotations(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function states of its arrays; what only a function around it, or a base class, can resolve stays out."""
    found = {}
    for name, text in function.__annotations__.items():
        try:
            hint = eval(text, function.__globals__) if isinstance(text, str) else text
        except NameError:
            # A dataclass's own methods name what the module of its base class imports, and are checked there.
            if "<locals>" not in function.__qualname__ and function.__code__.co_filename != "<string>":
                raise
        else:
            found |= {name: hint} if _of_arrays(hint) else {}
    return found


class _Form:
    """The annotations of a function, whatever closures are made of it, and the shapes it has been called with."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seen: set[tuple[Any, ...]] = set()
        self.looks = LOOKS

    @functools.cached_property
    def stated(self) -> tuple[inspect.Signature, dict[str, Any]]:
        return inspect.signature(self.function), annotations(self.function)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from jaxtyping import jaxtyped

        signature, stated = self.stated
        given = signature.bind(*args, **kwargs).arguments
        with jaxtyped("context"):
            bound = function.__name__ == "__init__"
            for name, value in given.items():
                # The first that has arrays says what the names of axes mean; others may mean others by theirs.
                if not bound and _fields(type(value)):
                    self._hold_fields(name, value)
                    bound = True
            for name, value in given.items():
                if name in stated:
                    several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
                    for part in value if several else (value,):
                        self._hold(name, part, stated[name])
            result = function(*args, **kwargs)
            if "return" in stated:
                self._hold("the result", result, stated["return"])
        for name, value in (*given.items(), ("the result", result)):
            with jaxtyped("context"):
                self._hold_fields(name, value)
        return result

    def _hold_fields(self, name: str, value: Any) -> None:
        for field, hint in _fields(type(value)).items():
            if hasattr(value, field):
                self._hold(f"{name}.{field}", getattr(value, field), hint)

    def _hold(self, name: str, value: Any, hint: Any) -> None:
        from beartype.door import is_bearable

        # Beartype needs a millisecond to look at a hint for the first time; most are a plain class.
        if not (isinstance(value, hint) if isinstance(hint, type) else is_bearable(value, hint)):
            where = f"{self.function.__module__}.{self.function.__qualname__}"
            raise ShapeError(f"{where}: {name} is {_shape(value)}, expected {hint}")


_FORMS: dict[CodeType, _Form] = {}


def _shape(value: Any) -> Any:
    """What checks look at."""
    kind = value.__class__
    try:
        parts = _PARTS[kind]
    except KeyError:
        parts = _PARTS[kind] = _parts(kind)
    return parts(value) if parts else kind


def _parts(kind: type) -> Callable[[Any], Any] | None:
    """How the shapes of a value of this class are found, as fast as may be; None for one that has none."""
    if hasattr(kind, "shape") and hasattr(kind, "dtype"):
        return lambda value: (kind, value.shape, value.dtype)
    if kind in (tuple, list):
        return lambda value: (kind, *map(_shape, value))
    if names := tuple(_fields(kind)):
        return lambda value: (kind, *[_shape(getattr(value, name, None)) for name in names])
    return None


_PARTS: dict[type, Callable[[Any], Any] | None] = {}


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """The fields of a dataclass or named tuple that are arrays, of JAX or NumPy, and their annotations."""
    if not kind.__module__.startswith(tuple(PACKAGES)) or "<locals>" in kind.__qualname__:
        return {}
    if not (dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")):
        return {}
    from jaxtyping import AbstractArray

    found = {}
    for field, text in kind.__annotations__.items():
        hint = eval(getattr(text, "__forward_arg__", text), vars(sys.modules[kind.__module__]))
        if isinstance(hint, type) and issubclass(hint, AbstractArray):
            found[field] = hint.dtype[Any, hint.dim_str]
    return found


def _of_arrays(hint: Any) -> bool:
    from jaxtyping import AbstractArray

    if get_origin(hint) is None:
        return isinstance(hint, type) and issubclass(hint, AbstractArray)
    return get_origin(hint) is not Callable and any(map(_of_arrays, get_args(hint)))


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(tuple(PACKAGES)):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, name: str) -> CodeType:
        # Nothing is kept in files: those of Python are for what is not wrapped.
        tree = _Wrap().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__checked__"] = checked
        super().exec_module(module)


class _Wrap(ast.NodeTransformer):
    """Functions are wrapped before their other decorators see them, classes after."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(ast.copy_location(ast.Name("__checked__", ast.Load()), node))
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list.insert(0, ast.copy_location(ast.Name("__checked__", ast.Load()), node))
        return self.generic_visit(node)
