"""The parts of a page, from an element to the whole: every text is escaped unless it is markup made here.

A :data:`Part` is a text, markup, a value that knows its markup (:class:`Table`,
:class:`coala.pages.drawing.Drawing`), or nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent


class HasMarkup(Protocol):
    def __html__(self) -> str: ...


Part = str | HasMarkup | None
# A text, or turns of ``role`` and ``text``.
Conversation = str | Sequence[Mapping[str, str]]


def element(tag: str, /, *inside: Part, **attributes: object) -> Markup:
    """``<tag ...>inside</tag>``; in names of attributes an underscore is a hyphen, or nothing at the end.

    An attribute that is ``None`` is absent.
    """
    given = Markup("").join(
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), value)
        for name, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, given, Markup("").join(part for part in inside if part))


def joined(parts: Iterable[Part]) -> Markup:
    """One below the other, without those that are nothing."""
    return Markup("\n").join(part for part in parts if part)


def paragraphs(*texts: Part) -> Markup:
    return joined(element("p", text) for text in texts)


def aside(text: Part) -> Part:
    return element("p", text, class_="aside") if text else None


def missing(text: str) -> Markup:
    """That something is not there."""
    return element("p", text, class_="missing")


def listing(items: Iterable[Part], class_: str | None = None) -> Part:
    told = [element("li", item) for item in items]
    return element("ul", *told, class_=class_) if told else None


def facts_line(facts: Iterable[Part]) -> Markup:
    """Short facts on a line, with dots between."""
    return element("p", *(element("span", fact) for fact in facts), class_="facts-line")


def code_block(text: str) -> Part:
    return element("pre", element("code", text), class_="command") if text else None


def section(title: str, *parts: Part, name: str | None = None) -> Part:
    """A card under its title; ``name`` is for addresses that lead to it. Without parts it is nothing, as all below."""
    inside = joined(parts)
    label = {"aria_labelledby": name} if name else {"aria_label": title}
    return element("section", "\n", element("h2", title, id=name), "\n", inside, "\n", **label) if inside else None


def details(summary: str, *parts: Part, opened: bool = False) -> Part:
    """What is shown when asked for."""
    inside = joined(parts)
    head = element("summary", summary)
    return element("details", head, "\n", inside, "\n", open="" if opened else None) if inside else None


def step(question: str, *answer: Part, commands: Iterable[tuple[str, str]] = ()) -> Markup:
    """A question of the reader's, its answer, and what to type next, each command with what it is for."""
    typed = [element("dd", code_block(command), element("small", why)) for command, why in commands]
    return element("div", element("dt", question), element("dd", *answer), *typed)


def steps(*each: Part) -> Part:
    """What a reader does next: any number of :func:`step`."""
    inside = joined(each)
    return element("dl", inside, class_="next") if inside else None


def titled(title: str, *parts: Part) -> Part:
    """Parts of a section under a title of their own."""
    inside = joined(parts)
    return joined([element("h3", title), inside]) if inside else None


def tiles(label: str, *inside: Part) -> Part:
    """Cards on a row of their own; a phone has two on a row, the first alone where they are odd."""
    there = [part for part in inside if part]
    # Six and more would be too narrow for one row: two rows if they come out even, else three.
    n = len(there)
    columns = n if n < 6 else next((k for k in (4, 3, 5) if n % k == 0), 1)
    style = f"--columns: {columns}"
    return element("section", joined(there), class_="tiles", style=style, aria_label=label) if there else None


def gallery(*drawings: HasMarkup | None, small: bool = False) -> Part:
    """Drawings two on a row (``small``: three), wide ones alone; one that is left over has its caption beside it."""
    rows: list[list[HasMarkup]] = []
    for one in filter(None, drawings):
        wide = getattr(one, "wide", False)
        if wide or not rows or len(rows[-1]) == (3 if small else 2) or getattr(rows[-1][0], "wide", False):
            rows.append([])
        rows[-1].append(one)
    made = [element("div", joined(row), class_=f"figures of-{len(row)}{' small' if small else ''}") for row in rows]
    return joined(made) if made else None


def beneath(text: Part, comment: Part) -> Markup:
    """A text with a small one below it, if there is one."""
    return Markup("{}<br><small>{}</small>").format(text, comment) if comment else Markup("{}").format(text)


def bar(low: float, value: float, high: float, mark: float = 0.5) -> Markup:
    """An interval on a scale from 0 to 1, with a thin line at ``mark``."""
    start, at, end = (100 * min(1.0, max(0.0, place)) for place in (low, value, high))
    return element(
        "span",
        element("i", class_="half", style=f"left:{100 * mark:.2f}%"),
        element("i", class_="span", style=f"left:{start:.2f}%;width:{end - start:.2f}%"),
        element("i", class_="dot", style=f"left:{at:.2f}%"),
        class_="bar",
        aria_hidden="true",
    )


def conversation(said: Conversation) -> Markup:
    """A prompt as one text; of several turns each for itself, under the role of who speaks."""
    if isinstance(said, str) or len(said) == 1:
        return element("p", said if isinstance(said, str) else said[0]["text"], class_="prompt", dir="auto")
    turns = [
        element(
            "div",
            element("p", turn["role"], class_="side-name"),
            element("p", turn["text"], class_="said", dir="auto"),
            class_="turn reply-turn" if turn["role"] == "assistant" else "turn",
        )
        for turn in said
    ]
    return element("div", joined(turns), class_="turns")


def sides(prompt: Conversation, replies: Mapping[str, tuple[Part, str]], *after: Part) -> Markup:
    """A prompt with the replies to it beside each other: by name, what stands above a reply, and the reply."""
    shown = [
        element(
            "div",
            element("p", above, class_="side-name"),
            element("p", reply or "(empty reply)", class_="reply", dir="auto"),
            class_=f"side {name}" if name in ("guided", "chosen") else "side",
        )
        for name, (above, reply) in replies.items()
    ]
    beside = element("div", *shown, class_="sides") if shown else None
    return element("article", conversation(prompt), beside, *after, class_="sample")


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head (or none); the first cell of a row is its name.

    ``kind``: ``amounts`` are aligned on the right, except in the columns ``left``; ``words`` are sentences, which wrap;
    ``facts`` are a name and a value; ``measures`` are a name, a value and how it was made, stacked on a phone. Rows
    whose places are in ``marked`` stand out; ``foot`` is the row of sums. Without rows a table is nothing.
    """

    caption: str
    head: Sequence[Part]
    rows: Sequence[Sequence[Part]]
    note: str = ""
    kind: Literal["amounts", "words", "facts", "measures"] = "amounts"
    left: Collection[int] = ()
    marked: Collection[int] = ()
    foot: Sequence[Part] = ()

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __html__(self) -> str:
        inside = [element("caption", self.caption, class_="hidden")]
        if self.head:
            inside.append(element("thead", self._row(self.head, head=True)))
        rows = [self._row(row, "selected" if place in self.marked else None) for place, row in enumerate(self.rows)]
        inside.append(element("tbody", "\n", joined(rows), "\n"))
        if self.foot:
            inside.append(element("tfoot", self._row(self.foot)))
        drawn = element("table", *inside, class_=self.kind, role=self._role("table"))
        # Stacked rows are never wider than their page.
        shown = drawn if self.kind == "measures" else element("div", drawn, class_="scroll")
        return joined([shown, aside(self.note)])

    def _role(self, role: str) -> str | None:
        """Rows that are stacked are no table to the eye; the roles keep it one for those who have it read aloud."""
        return role if self.kind == "measures" else None

    def _row(self, cells: Sequence[Part], class_: str | None = None, *, head: bool = False) -> Markup:
        made = []
        for column, cell in enumerate(cells):
            class_of = "amount" if self.kind == "amounts" and column not in (0, *self.left) else None
            if head or not column:
                scope, role = ("col", "columnheader") if head else ("row", "rowheader")
                made.append(element("th", cell, class_=class_of, scope=scope, role=self._role(role)))
            else:
                made.append(element("td", cell, class_=class_of, role=self._role("cell")))
        return element("tr", *made, class_=class_, role=self._role("row"))


def facts(caption: str, rows: Iterable[tuple[str, Part]]) -> Table:
    return Table(caption, (), list(rows), kind="facts")


def headed(*tables: Table) -> Markup:
    """Tables, each under its caption."""
    return joined(titled(table.caption, table) for table in tables)


def environment(*folders: Path) -> Environment:
    """Templates of ``folders`` and the skeleton ``page.html``, which they extend; all texts are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader([*folders, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"served": True, "tab": "", "brand": "", "facts": "", "footer": "", "conversation": conversation}
    return made


def page(title: str, brand: str, *parts: Part, facts: Sequence[str] = (), footer: str = "", tab: str = "") -> str:
    """A whole page that stands alone, ``parts`` below its title; ``tab`` is what its tab is called, if not so."""
    shown = {"facts": facts_line(facts) if facts else "", "footer": footer, "tab": tab, "content": joined(parts)}
    made = environment().get_template("page.html").render(title=title, brand=brand, served=False, **shown)
    return made.rstrip() + "\n"


def style_sheet(*more: Path) -> str:
    """The style of every page, and what ``more`` files add to it."""
    return "".join(path.read_text("utf-8") for path in (HERE / "page.css", *more))
