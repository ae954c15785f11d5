"""Frozen dataclasses as arguments of compiled functions.

Not by ``jax.tree_util.register_dataclass``: with jaxlib 0.10.2 the structures of two classes registered that way are
equal if they have as many fields, although their hashes differ. Where the hashes meet in the cache of ``jax.jit``,
about once in a hundred processes, a function compiled for one class was then run for the other: the bound of one loss
with the formula of another. Structures of classes registered as below are equal only for one class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def pytree(*static: str) -> Callable[[type[T]], type[T]]:
    """Make a dataclass a pytree whose fields are leaves or trees, but for those named ``static``, which are hashed."""

    def register(cls: type[T]) -> type[T]:
        dynamic = [field.name for field in fields(cls) if field.name not in static]  # type: ignore[arg-type]

        def flatten(value: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in dynamic]
            return children, tuple(getattr(value, name) for name in static)

        def flatten_quickly(value: T) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(value, name) for name in dynamic], tuple(getattr(value, name) for name in static)

        def unflatten(fixed: tuple[Any, ...], children: Any) -> T:
            # Not by `__init__`: JAX also fills its trees with what is no array.
            value = object.__new__(cls)
            vars(value).update(zip((*dynamic, *static), (*children, *fixed), strict=True))
            return value

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten, flatten_quickly)
        return cls

    return register
