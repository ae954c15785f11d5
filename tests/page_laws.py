"""What every page keeps to on a screen, on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WIDTHS = (1400, 1000, 390)
PAPER = 680  # CSS pixels of an A4 sheet without its margins
# A row of a grid is filled if its last card ends where the grid ends.
HALF_FILLED = """() => [...document.querySelectorAll('.tiles, .certificate, .figures, .sides')].flatMap((grid) => {
  const rows = new Map();
  for (const card of grid.children) {
    if (!card.offsetWidth) continue;
    const box = card.getBoundingClientRect();
    rows.set(Math.round(box.top), Math.max(rows.get(Math.round(box.top)) ?? 0, box.right));
  }
  const ends = grid.getBoundingClientRect().right;
  return [...rows.values()].filter((right) => ends - right > 2).map(() => grid.className);
})"""
SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# WCAG 2: the contrast of every text that is seen with what is painted below it.
FAINT = """() => {
  const rgba = (said) => (said.match(/[\\d.]+/g) ?? ['0', '0', '0', '0']).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(rgb[i] / 255), 0);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map((i) => a * top[i] + (1 - a) * below[i]); };
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    const style = getComputedStyle(node);
    const said = walk.currentNode.data.trim();
    if (!said || !node.getClientRects().length || node.closest('.hidden, style, script, :disabled')) continue;
    const ink = rgba(node instanceof SVGElement ? style.fill : style.color);
    const below = ground(node);
    const [a, b] = [light(over(ink, below)), light(below)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push(`${said.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""
SEEN = "[...document.querySelectorAll('%s')].filter((one) => one.getClientRects().length)"
CUT_OFF = f"""() => {SEEN % "body *"}.filter((one) => !one.closest('svg, .hidden'))
  .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map((one) => `${{one.tagName}} ${{one.className}} ${{one.textContent.trim().slice(0, 40)}}`)"""
PRESSED = f"() => {SEEN % 'button, .button, details:not([open]) > summary'}.length"


def keeps_to_it(
    browser: Any, show: Callable[[Any], None], *, widths: tuple[int, ...] = WIDTHS, paper: bool = True
) -> None:
    """All laws of the page that ``show`` opens."""
    context = browser.new_context(viewport={"width": widths[0], "height": 900})
    seen = context.new_page()
    show(seen)
    assert seen.locator("h1").count() == 1
    assert seen.locator("main").count() == 1
    for width in widths:
        seen.set_viewport_size({"width": width, "height": 900})
        assert seen.evaluate(HALF_FILLED) == [], width
        assert seen.evaluate(SIDEWAYS) == 0, width
    seen.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for scheme in ("light", "dark"):
        seen.emulate_media(color_scheme=scheme)
        assert seen.evaluate(FAINT) == [], scheme
    assert seen.evaluate(SIDEWAYS) == 0
    if paper:
        seen.set_viewport_size({"width": PAPER, "height": 900})
        seen.emulate_media(media="print")
        assert seen.evaluate(CUT_OFF) == []
        assert seen.evaluate(PRESSED) == 0
        assert seen.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()


def of(made: str) -> Callable[[Any], None]:
    return lambda seen: seen.set_content(made)
