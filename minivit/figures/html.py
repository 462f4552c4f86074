"""Elements of a page that needs nothing but itself: texts are escaped, figures are SVG elements, images are data."""

from __future__ import annotations

import base64
import html

STYLE = """
:root { color-scheme: light dark; --ink: #1e293b; --soft: #475569; --page: #ffffff; --card: #f1f5f9; --line: #cbd5e1;
  --mark: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --soft: #a3b1c6; --page: #0f172a; --card: #1e293b;
  --line: #3b4a61; --mark: #fb923c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
p { max-width: 48rem; margin: 0.5rem 0; }
a { color: inherit; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
.soft { color: var(--soft); }
.mark { color: var(--mark); font-weight: 600; }
.tiles, .figures, .mistakes { display: grid; gap: 1rem; margin: 1rem 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.tiles div, .mistakes div { background: var(--card); border-radius: 0.5rem; padding: 0.6rem 0.8rem; }
.tiles strong { display: block; font-size: 1.3rem; line-height: 1.3; }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); align-items: start; }
.mistakes { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.mistakes p { margin: 0; }
.mistakes img { width: 48%; margin-right: 2%; image-rendering: pixelated; border: 1px solid var(--line); }
figure { margin: 0; max-width: 36rem; }
figure svg { width: 100%; height: auto; fill: currentColor; }
.scroll { overflow-x: auto; max-width: 100%; }
.large { max-width: 42rem; }
.large svg { min-width: 28rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start; }
.pair > * { flex: 1 1 20rem; min-width: 0; }
.pair > .large { flex-grow: 2; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.15rem 0.9rem 0.15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
#settings td:first-child { white-space: nowrap; }
#settings td:last-child { min-width: 13rem; }
@media (max-width: 40rem) { th, td { padding-right: 0.5rem; } }
pre { background: var(--card); padding: 0.7rem; border-radius: 0.5rem; overflow-x: auto; font-size: 0.85rem; }
summary { cursor: pointer; color: var(--soft); }
.formula { font-size: 1.05rem; margin-left: 1.5rem; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # a browser is to load nothing


class Html(str):
    """Text that is HTML already and is not to be escaped again."""


def tag(name, /, *children, **attributes):
    """An HTML element: children and values of attributes are escaped unless they are `Html`; ``class_`` is class."""
    inside = "".join(child if isinstance(child, Html) else html.escape(str(child)) for child in children)
    named = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{named}>" if name in ("br", "img", "meta") else f"<{name}{named}>{inside}</{name}>")


def table(head, rows, *, numbers=()):
    """A table that scrolls within a narrow page; ``numbers`` are the columns that are flush right."""

    def row(name, cells):
        return tag("tr", *(tag(name, c, **({"class_": "number"} if i in numbers else {})) for i, c in enumerate(cells)))

    body = tag("tbody", *(row("td", cells) for cells in rows))
    return tag("div", tag("table", tag("thead", row("th", head)), body), class_="scroll")


def svg_figure(svg, says, *, large=False):
    """An SVG element of `minivit.figures` with a description for those who cannot see it."""
    element = Html(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(says)}" ', 1))
    return tag("figure", element, **({"class_": "large scroll"} if large else {}))


def percent(share, digits=2):
    """A share as a percentage; a dash for None."""
    return "\N{EN DASH}" if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def duration(seconds):
    """A time in words, from seconds."""
    if seconds < 60:
        return f"{seconds:.3g}\N{NO-BREAK SPACE}s"
    if seconds < 3600:
        return f"{seconds / 60:.1f}\N{NO-BREAK SPACE}min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}\N{NO-BREAK SPACE}h {minutes}\N{NO-BREAK SPACE}min"


def image(png, text):
    """An image from the bytes of a PNG file, with a text for those who cannot see it."""
    return tag("img", src="data:image/png;base64," + base64.b64encode(png).decode(), alt=text)


def document(title, *body):
    """A whole page, as a text."""
    head = tag(
        "head", tag("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title), tag("style", Html(STYLE)),
    )  # fmt: skip
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{tag("body", *body)}\n</html>\n'
