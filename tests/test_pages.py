"""What all pages share: no text becomes markup, wherever it stands; figures keep their ids and words apart."""

from __future__ import annotations

import re
import xml.etree.ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from coala.pages.drawing import BLUE, COLOURS, PALETTE, Drawing, colours, drawing
from coala.pages.parts import (
    Part,
    Table,
    aside,
    bar,
    beneath,
    code_block,
    conversation,
    details,
    element,
    environment,
    facts,
    facts_line,
    gallery,
    headed,
    joined,
    listing,
    missing,
    page,
    paragraphs,
    section,
    sides,
    step,
    steps,
    style_sheet,
    tiles,
)
from coala.pages.words import Interval
from coala.values import Estimate

# Texts that would end an element, an attribute, a script or a template's expression.
NASTY = st.text(st.sampled_from("<>&\"'/={}%!-;# \nabcstyle")) | st.sampled_from(
    ["</style><script>alert(1)</script>", '" onload="x', "{{ 7 * 7 }}", "{% raw %}", "<!--", "&lt;b&gt;", "]]>"]
)
# Every place of every part that holds a text.
PLACES: dict[str, Callable[[str], Part]] = {
    "element": lambda text: element("p", text),
    "attribute": lambda text: element("p", "x", title=text, aria_label=text),
    "paragraphs": lambda text: paragraphs(text, text),
    "aside": aside,
    "missing": missing,
    "listing": lambda text: listing([text], "conclusions"),
    "facts line": lambda text: facts_line([text, text]),
    "code": code_block,
    "section": lambda text: section(text, text, name="here"),
    "section without a name": lambda text: section(text, text),
    "details": lambda text: details(text, text, opened=True),
    "gallery": lambda text: gallery(Drawing("<svg></svg>", text, text)),
    "beneath": lambda text: beneath(text, text),
    "sides": lambda text: sides(text, {text: (text, text)}, text),
    "turns": lambda text: conversation([{"role": text, "text": text}, {"role": "assistant", "text": text}]),
    "steps": lambda text: steps(step(text, text, commands=[(text, text)])),
    "tiles": lambda text: tiles(text, text, text),
    "facts": lambda text: facts(text, [(text, text)]),
    "headed": lambda text: headed(Table(text, (text,), [(text,)])),
    **{
        kind: lambda text, kind=kind: Table(text, (text, text), [(text, text)], text, kind=kind, foot=(text, text))
        for kind in ("amounts", "words", "facts", "measures")
    },
}


class Outline(HTMLParser):
    """Elements with their attributes' names, and the text that a reader sees; fails where elements do not nest."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.open: list[str] = []
        self.text = ""
        self.values: list[str | None] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value for _, value in attrs]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def shown(part: Part) -> str:
    return str(joined([part]))


@given(text=NASTY.filter(str.strip))
@pytest.mark.parametrize("place", PLACES)
def test_no_text_becomes_markup(place: str, text: str) -> None:
    made = PLACES[place]
    found, plain = Outline(shown(made(text))), Outline(shown(made("x")))
    assert found.found == plain.found
    assert found.text.count(text) >= plain.text.count("x") or place == "attribute"
    assert text in [*found.values, found.text] or text in found.text


@given(text=NASTY.filter(str.strip))
def test_no_text_becomes_markup_of_a_page(text: str) -> None:
    def made(text: str) -> Outline:
        return Outline(page(text, text, section(text, text), facts=[text], footer=text, tab=text))

    assert made(text).found == made("x").found
    assert text in made(text).text


def test_a_page_stands_alone_and_is_the_same_bytes() -> None:
    made = page("A title", "COALA", section("One", Table("t", ("a",), [("b",)])), facts=["fact"], footer="end")
    assert made == page("A title", "COALA", section("One", Table("t", ("a",), [("b",)])), facts=["fact"], footer="end")
    found = Outline(made)
    assert not {tag for tag, _ in found.found} & {"script", "link", "img", "iframe", "form", "base"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in found.values
    assert f"<style>\n{style_sheet()}</style>" in made
    assert "url(" not in style_sheet()
    assert "@import" not in style_sheet()


def test_a_served_page_takes_style_from_its_server() -> None:
    shown = environment().get_template("page.html").render(title="<t>", content=Markup("<p>in</p>"))
    found = Outline(shown)
    assert ("link", ("rel", "href")) in found.found
    assert "/page.css" in found.values
    assert "style" not in [tag for tag, _ in found.found]
    assert "<p>in</p>" in shown
    assert "<title>&lt;t&gt;</title>" in shown


def test_nothing_leaves_nothing_behind() -> None:
    assert shown(gallery(None, None)) == shown(aside("")) == shown(code_block("")) == ""
    assert joined([None, "a", "", Markup(""), "b"]) == "a\nb"


@given(*[st.floats(-1, 2) | st.just(float("nan"))] * 4)
def test_bars_stay_on_their_scale(low: float, value: float, high: float, mark: float) -> None:
    places = [float(x) for x in re.findall(r"(?:left|width):(-?[\d.]+)%", bar(low, value, max(low, high), 0.5))]
    assert len(places) == 4
    assert all(0 <= place <= 100 for place in places)


def test_cells_say_what_they_are_to_those_who_hear_them() -> None:
    stacked = shown(Table("t", ("a", "b"), [("c", "d")], kind="measures"))
    assert re.findall(r'role="(\w+)"', stacked) == [
        "table",
        "row",
        "columnheader",
        "columnheader",
        "row",
        "rowheader",
        "cell",
    ]
    wide = Outline(shown(Table("t", ("a", "b"), [("c", "d")], left=(1,), marked=(0,), foot=("e", "f"))))
    assert [tag for tag, _ in wide.found] == [
        *("div", "table", "caption", "thead", "tr", "th", "th", "tbody", "tr", "th", "td", "tfoot", "tr", "th", "td"),
    ]
    assert "selected" in wide.values
    assert "amount" not in wide.values


# --- figures -----------------------------------------------------------------------------------------------------


def line(name: str, label: str, **options: Any) -> Drawing:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0.123456789, 1], label=label)
        axes.annotate("0.123456789", (0.5, 0.5))
        axes.legend()

    return drawing(name, "title", "caption", draw, **options)


def test_figures_share_no_ids_and_are_the_same_bytes() -> None:
    one, other = line("a b", "x"), line("a-b", "x")
    assert one == line("a b", "x")
    ids = [set(re.findall(r'\bid="([^"]+)"', figure.svg)) for figure in (one, other)]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
    for figure, own in zip((one, other), ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', figure.svg)) <= own


@pytest.mark.parametrize("label", ["$\\frac{a}{b}$", "</svg><script>", "a & b", "price $5 and $6", "\u202e"])
def test_labels_of_figures_are_text(label: str) -> None:
    svg = line("n", label).svg
    texts = [one.text for one in xml.etree.ElementTree.fromstring(svg).iter() if one.tag.endswith("text")]
    assert label in texts
    assert "0.123456789" in texts  # rounding is for coordinates alone
    assert not re.search(r'd="[^"]*\.\d{3}', svg)


def test_figures_take_their_colours_from_the_page_and_nowhere_else() -> None:
    def draw(axes: Any) -> None:
        axes.plot([0, 1], color=BLUE, label=BLUE)
        axes.legend()

    made = drawing("n", "title", "caption", draw)
    assert "var(" not in made.svg  # a file of its own may be shown by what knows no style sheets
    drawn = shown(made)
    assert f"var(--c0, {BLUE})" in drawn
    assert f">{BLUE}</text>" in drawn
    assert not re.findall(r"(?<!, )#[0-9a-f]{6}\b(?!</text>)", re.sub(r"<defs>.*?</defs>", "", drawn, flags=re.DOTALL))
    dark = style_sheet().split("prefers-color-scheme: dark")[1]
    assert len(re.findall(r"--c\d+: #[0-9a-f]{6};", dark)) == len(PALETTE)


def test_a_wide_figure_has_its_own_row_and_colours_come_again() -> None:
    assert 'class="wide"' in shown(line("n", "x", wide=True))
    assert list(colours(12))[10:] == list(COLOURS[:2])


def test_an_estimate_is_worded_alike_as_a_value_and_as_json() -> None:
    found = Estimate(0.725, 0.641, 0.796, 40, "Wilson 95 %")
    assert Interval(found).percent() == Interval(vars(found)).percent() == "72.5 % (64.1 to 79.6 %)"
    assert Interval(found).how == "n = 40; Wilson 95 %"
    assert Interval(Estimate(float("nan"), 0, 1, 0, "none")).percent() == Interval(None).percent() == "unknown"
