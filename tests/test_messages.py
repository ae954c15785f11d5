"""Validators' faults in sentences: every kind of fault is worded here, none in the validator's own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from coala.messages import sentences, shown, suggestion, unknown_name
from coala.recipe import RecipeError, load_recipe, set_option


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tolerance: float = Field(1e-4, gt=0, lt=1)
    method: Literal["learnt", "direct"] = "learnt"


@dataclass(frozen=True)
class Speaker:
    model: str
    names: tuple[str, ...] = field(default=())


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    count: int = Field(0, ge=0, le=9)
    share: float = 0.5
    even: int = Field(0, multiple_of=2)
    flag: bool = False
    name: str = Field("x", min_length=1, max_length=4, pattern="^[a-z]+$")
    path: Path = Path()
    items: list[int] = Field([], max_length=2)
    least: Annotated[tuple[str, ...], Field(min_length=1)] = ("a",)
    table: dict[str, int] = {}
    layer: Annotated[int, Field(ge=-1)] | Literal["auto"] = -1
    inner: Inner = Inner()
    speaker: Speaker = Speaker("m")
    many: Sequence[Inner] = ()
    odd: int = 1

    @field_validator("odd")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("an odd number is needed.")
        return value


def faults(document: Any) -> list[dict[str, Any]]:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate(document)
    return [dict(error) for error in caught.value.errors()]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"count": "many"}, "count: found 'many', expected a whole number"),
        ({"count": 1.5}, "count: found 1.5, expected a whole number"),
        ({"count": -1}, "count: found -1, expected at least 0"),
        ({"count": 12}, "count: found 12, expected at most 9"),
        ({"even": 3}, "even: found 3, expected a multiple of 2"),
        ({"share": [1]}, "share: found [1], expected a number"),
        ({"flag": "perhaps"}, "flag: found 'perhaps', expected true or false"),
        ({"name": ""}, "name: found '', expected at least 1 character"),
        ({"name": "abcdef"}, "name: found 'abcdef', expected at most 4 characters"),
        ({"name": "A1"}, "name: found 'A1', expected a text that matches ^[a-z]+$"),
        ({"name": None}, "name: found null, expected a text"),
        ({"path": 3}, "path: found 3, expected a path"),
        ({"items": 3}, "items: found 3, expected a list"),
        ({"items": [1, 2, 3]}, "items: found [1, 2, 3], expected at most 2 items"),
        ({"items": [1, "b"]}, "items.1: found 'b', expected a whole number"),
        ({"least": []}, "least: found [], expected at least 1 item"),
        ({"table": [1]}, "table: found [1], expected a mapping"),
        ({"table": {"a": "b"}}, "table.a: found 'b', expected a whole number"),
        ({"layer": "deep"}, "layer: found 'deep', expected a whole number or auto"),
        ({"layer": -5}, "layer: found -5, expected at least -1 or auto"),
        ({"inner": 3}, "inner: found 3, expected a mapping of settings"),
        ({"inner": {"tol": 1}}, "unknown setting inner.tol; did you mean inner.tolerance?"),
        ({"inner": {"tolerence": 1}}, "unknown setting inner.tolerence; did you mean inner.tolerance?"),
        ({"inner": {"colour": 1}}, "unknown setting inner.colour; expected one of method, tolerance"),
        ({"tolerance": 0.1}, "unknown setting tolerance; did you mean inner.tolerance?"),
        ({"Count": 1}, "unknown setting Count; did you mean count?"),
        ({"inner": {"tolerance": 1}}, "inner.tolerance: found 1, expected less than 1"),
        ({"inner": {"method": "lernt"}}, "inner.method: found 'lernt', expected one of learnt, direct; did you mean "
                                         "learnt?"),
        ({"many": [{"method": 1}]}, "many.0.method: found 1, expected one of learnt, direct"),
        ({"speaker": {}}, "speaker.model is missing"),
        ({"speaker": {"model": "m", "nams": []}}, "unknown setting speaker.nams; did you mean speaker.names?"),
        ({"speaker": 1}, "speaker: found 1, expected a mapping of settings"),
        ({"odd": 2}, "odd: an odd number is needed"),
    ],
)  # fmt: skip
def test_a_fault_is_one_plain_sentence(document: dict[str, Any], said: str) -> None:
    assert sentences(faults(document), Whole) == [said]


ANYTHING = [None, True, -3, 2.5, float("nan"), 10**30, "", "word", "A\x1b[2J", b"x", [], [[]], {}, {"a": {}}, object()]


@pytest.mark.parametrize("name", sorted(Whole.model_fields))
@pytest.mark.parametrize("value", ANYTHING, ids=lambda value: type(value).__name__)
def test_no_word_of_the_validator_reaches_anyone(name: str, value: Any) -> None:
    try:
        Whole.model_validate({name: value})
    except ValidationError as error:
        told = sentences([dict(one) for one in error.errors()], Whole)
        assert told
        for one in error.errors():
            if one["type"] != "value_error":
                assert not any(one["msg"] in sentence for sentence in told)
        for sentence in told:
            assert sentence.isprintable()
            assert len(sentence) < 300
            assert not any(word in sentence.lower() for word in ("input should", "pydantic", "value error", "extra "))


def test_a_fault_of_a_kind_that_is_not_known_is_worded_all_the_same() -> None:
    told = sentences([{"type": "of_tomorrow", "loc": ("a", 1), "msg": "Input should be of tomorrow", "input": {}}])
    assert told == ["a.1: found {}, expected another value"]


def test_adapters_of_plain_types() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python(["a"])
    assert sentences([dict(e) for e in caught.value.errors()], list[int]) == ["0: found 'a', expected a whole number"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("tol", "tolerance"), ("TOLERANCE", "tolerance"), ("tolerence", "tolerance"), ("n", ""), ("colour", "")],
)
def test_what_was_meant(given: str, meant: str) -> None:
    assert suggestion(given, ["tolerance", "n_patterns", "method"]) == meant


def test_long_values_are_cut_and_control_characters_shown() -> None:
    assert len(shown("x" * 1000)) == 60
    assert "\x1b" not in shown("\x1b]52;c;x\x07")
    assert unknown_name("a", []) == "unknown setting a"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {}}, "--model is missing. Give a model folder or hub name"),
        ({"model": None, "head": {"tol": 1}}, "--model is missing"),
        ({"pairs": None}, "The pairs are missing. Name a file"),
        ({"head": {"tol": 1}}, "unknown setting head.tol; did you mean head.tolerance?"),
        ({"strength": 1}, "unknown setting strength; did you mean guidance.strength or distil.strength?"),
        ({"model": {"name": "m", "dtype": "bf17"}}, "model.dtype (--dtype): found 'bf17', expected one of auto,"),
        ({"guidance": {"mode": "blok"}}, "guidance.mode (--mode): found 'blok', expected one of token, block, prefix, "
                                         "shift, best_of, beam, distilled, none; did you mean block?"),
        ({"head": {"reference_scale": 1.0}, "model": {"name": "m", "prefixes": 2}}, "leave one of them out"),
    ],
)  # fmt: skip
def test_a_recipe_s_faults(changes: dict[str, Any], said: str) -> None:
    document = {"pairs": ["p"], "model": {"name": "m"}, **changes}
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, {name: value for name, value in document.items() if value is not None})
    assert said in str(caught.value)
    assert str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp32", "float32"), ("BFloat16", "bfloat16")],
)
def test_types_by_their_usual_names(given: str, dtype: str) -> None:
    made = load_recipe(None, {"pairs": ["p"], "model": {"name": "m"}}, set_option(f"model.dtype={given}"))
    assert made.model.dtype == dtype
