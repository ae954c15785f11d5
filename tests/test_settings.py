"""Settings are declared once: recipes, flags, the engine and the documentation hold the same ones."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from annotated_types import Ge
from click.testing import Result
from typer.testing import CliRunner

from coala.cli import app
from coala.cli.flags import Given, Of, every, with_settings
from coala.decoding import Guidance
from coala.recipe import FLAGS, RecipeError, recipe_of, set_option
from coala.settings import (
    SECTIONS,
    EvaluationSettings,
    GuidanceSettings,
    HeadSettings,
    ModelSettings,
    PairSettings,
    Setting,
    flag_of,
    setting_of,
    table,
    taken_apart,
    told,
)

ROOT = Path(__file__).resolve().parent.parent
NAMED = [
    (section, one.name)
    for section, kind in SECTIONS.items()
    for one in fields(kind)
    if told(kind, one.name) is not None
]


def options(*command: str) -> Mapping[str, Any]:
    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    return {option: param for param in found.params for option in param.opts if option.startswith("--")}


def example(section: str, name: str) -> Any:
    """A value that the setting may have and does not have by default."""
    kind = SECTIONS[section]
    forms, marks = taken_apart(get_type_hints(kind, include_extras=True)[name])
    default = next(one.default for one in fields(kind) if one.name == name)
    words = [word for form in forms if get_origin(form) is Literal for word in get_args(form) if word != default]
    if words:
        return words[-1]
    form = next(one for one in forms if one is not type(None))
    if form is bool:
        return True
    if form is int:
        return 3 + max((one.ge for one in marks if isinstance(one, Ge)), default=0)
    return 0.5 if form is float else ["text"] if form not in (str,) else "text"


@pytest.mark.parametrize("command", ["align", "plan", "distil"])
def test_every_flag_of_a_setting_is_there_in_its_own_words(command: str) -> None:
    there = options(command)
    for section, name in NAMED:
        setting, flag = told(SECTIONS[section], name), flag_of(SECTIONS[section], name)
        assert setting is not None
        if flag is not None and (section == "distil") == (command == "distil"):
            assert there[flag].help.startswith(setting.help)
            assert FLAGS.get(f"{section}.{name}".lstrip(".")) == (None if section == "distil" else flag)


@pytest.mark.parametrize(("section", "name"), NAMED, ids=lambda part: part or "top")
def test_a_flag_lands_where_set_does(section: str, name: str) -> None:
    value, kind = example(section, name), SECTIONS[section]
    heard: list[Any] = []

    @with_settings
    def command(given: Annotated[Given, Of(kind, (name,))]) -> None:
        heard.append(given)

    alone = typer.Typer()
    alone.command()(command)
    flag = flag_of(kind, name) or "--" + name.replace("_", "-")
    words = [flag] if value is True else [flag, str(value[0] if isinstance(value, list) else value)]
    result = CliRunner().invoke(alone, words)
    assert result.exit_code == 0, result.output
    assert heard == [{name: value}]
    base: dict[str, Any] = {"pairs": ["x"], "model": {"name": "m"}}
    above = set_option(f"{section}.{name}".lstrip(".") + f"={json.dumps(value)}")
    part = {**base.get(section, {}), **above.get(section, {})} if section else above
    document = {**base, **({section: part} if section else part)}
    if (section, name) == ("guidance", "budget"):
        document["guidance"]["mode"] = "shift"
    if name == "paper":
        document["head"]["method"] = "two-phase"
    recipe = recipe_of(document)
    found = getattr(getattr(recipe, section) if section else recipe, name)
    assert (list(found) if isinstance(found, tuple) else found) == value
    assert recipe_of(recipe.plain()) == recipe


def test_no_setting_is_given_where_no_flag_is() -> None:
    heard: list[Any] = []

    @with_settings
    def command(head: Annotated[Given, Of(HeadSettings)], model: Annotated[Given, Of(ModelSettings)]) -> None:
        heard.append((head, model))

    alone = typer.Typer()
    alone.command()(command)
    assert CliRunner().invoke(alone, []).exit_code == 0
    assert heard == [({}, {})]


def invoked(*words: str) -> tuple[Result, list[Any]]:
    heard: list[Any] = []

    @with_settings
    def command(settings: Annotated[HeadSettings, every(HeadSettings)]) -> None:
        heard.append(settings)

    alone = typer.Typer()
    alone.command()(command)
    return CliRunner().invoke(alone, list(words)), heard


def test_a_whole_section_has_its_defaults() -> None:
    result, heard = invoked("--n-patterns", "7", "--paper")
    assert result.exit_code == 0
    assert heard == [HeadSettings(n_patterns=7, paper=True)]
    result, heard = invoked("--method", "lernt")
    assert result.exit_code == 2
    assert not heard
    assert "'lernt' is not one of 'learnt'" in result.output


def test_two_groups_of_one_name_are_refused() -> None:
    @dataclass
    class One:
        seed: Annotated[int, Setting("One.")] = 0

    def command(one: One, which: Annotated[Given, Of(PairSettings)]) -> None: ...

    with pytest.raises(AssertionError, match="seed"):
        with_settings(command)


def test_guidance_has_the_defaults_of_its_settings() -> None:
    assert Guidance() == Guidance(**vars(GuidanceSettings()))
    assert {one.name for one in fields(Guidance)} == {one.name for one in fields(GuidanceSettings)}


def test_defaults_are_settings_that_hold() -> None:
    """A default is checked by nobody: it has to satisfy its own bounds."""
    for section, kind in SECTIONS.items():
        own = {one.name: one.default for one in fields(kind) if one.default is not MISSING}
        document: dict[str, Any] = {"pairs": ["x"], "model": {"name": "m"}}
        document |= {section: {**document.get(section, {}), **own}} if section else own
        recipe_of(document)


def test_a_section_given_as_a_value_is_checked() -> None:
    base: dict[str, Any] = {"pairs": ["x"], "model": ModelSettings(name="m")}
    assert recipe_of(base).model.layer == -1
    with pytest.raises(RecipeError, match=r"evaluation\.temperature: found -1\.0, expected at least 0"):
        recipe_of({**base, "evaluation": EvaluationSettings(temperature=-1.0)})


def test_settings_say_what_they_are() -> None:
    for section, kind in SECTIONS.items():
        for name, hint in get_type_hints(kind, include_extras=True).items():
            setting = setting_of(hint)
            if f"{section}.{name}" in (".pairs", "model.trust_remote_code"):  # an argument; a permission, no setting
                assert setting is None
            else:
                assert setting is not None, f"{section}.{name}"
                assert setting.help.endswith((".", ")"))


def test_the_documentation_lists_them() -> None:
    page = ROOT / "docs" / "settings.md"
    fix = "python -c 'import coala.settings as s; print(s.table(), end=\"\")' > docs/settings.md"
    assert page.read_text(encoding="utf-8") == table(), f"docs/settings.md is out of date. Fix: {fix}"
