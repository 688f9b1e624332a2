"""Building blocks of pages: escaped elements, tables, texts coloured by role, and a self-contained document."""

from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from insec_jax.method import roles


def element(tag: str, *children: Element | str, **attributes: object) -> Element:
  """Return an element; text is escaped on writing. `class_` and `stroke_width` become class and stroke-width."""
  node = Element(tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()})
  for child in children:
    if isinstance(child, Element):
      node.append(child)
    elif len(node):
      node[-1].tail = (node[-1].tail or "") + child
    else:
      node.text = (node.text or "") + child
  return node


def table(title: str, head: Sequence[str], groups: Sequence[tuple[str, Sequence[tuple]]]) -> Element:
  """Return a table with `title` in its corner and `head` over its columns.

  A group is (name or "", rows); a row is (name, one cell a column).
  """
  top = element("tr", element("th", title), *(element("th", name, scope="col") for name in head))
  bodies = []
  for name, rows in groups:
    over = element("tr", element("th", name, colspan=len(head) + 1), class_="group")
    bodies.append(
      element(
        "tbody",
        *([over] if name else []),
        *(
          element("tr", element("th", row, scope="row"), *(element("td", cell) for cell in cells))
          for row, *cells in rows
        ),
      )
    )
  return element("div", element("table", element("thead", top), *bodies), class_="scroll", tabindex=0)


def role_text(role: int, text: str) -> Element:
  """Return the text in the colour of its role."""
  return element("span", text, class_=roles.NAMES[role], title=roles.NAMES[role])


def role_legend() -> Element:
  """Return the name of each role in its colour."""
  return element("p", *(element("span", name, class_=name) for name in roles.NAMES), class_="legend code")


def document(title: str, *body: Element) -> str:
  """Return the whole page: self-contained, light or dark as the reader's system is set."""
  head = element(
    "head",
    element("meta", charset="utf-8"),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("title", title),
    element("style", STYLE),
  )
  text = ElementTree.tostring(
    element("html", head, element("body", element("main", *body)), lang="en"), encoding="unicode", method="html"
  )
  return "<!doctype html>\n" + "".join(map(_visible, text)) + "\n"


def _visible(letter: str) -> str:
  # A generated text may hold control or direction characters; they must not hide or reorder text.
  return letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode("ascii")


ROLE_STYLE = "\n".join(
  f".{name} {{ background: {colour}40; text-decoration: 2px underline {colour}; }}"
  for name, colour in zip(roles.NAMES, roles.COLOURS, strict=True)
  if colour
)

STYLE = (
  """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #5a636e; --line: #d5dae0; --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e4e8ec; --soft: #9aa5b1; --line: #343b44; --panel: #1c2127; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .7rem; border-top: 1px solid var(--line); padding-top: .8rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { max-width: 48rem; margin: .7rem 0; }
small, .soft { color: var(--soft); }
small { font-size: .8rem; }
.notes li { margin: .3rem 0; }
.code, code, pre { font: 14px/1.75 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem;
  margin: .5rem 0; white-space: pre-wrap; text-align: left; }
summary { cursor: pointer; padding: .3rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; max-width: none; }
.legend svg { vertical-align: middle; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.scroll { overflow-x: auto; max-width: 100%; width: fit-content; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; line-height: 1.35; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
td { min-width: 5.5rem; max-width: 18rem; }
th { font-weight: 600; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--page); max-width: min(20rem, 45vw);
  overflow-wrap: break-word; }
.tables tr > :first-child { max-width: min(12.5rem, 45vw); }
tbody th { font-weight: 400; }
thead > tr > *, thead > tr > :first-child { border-top: 0; background: var(--panel); vertical-align: bottom; }
.group > :first-child { background: var(--panel); font-weight: 600; max-width: none; }
td small, tr > th small { display: block; font-weight: 400; }
td small { white-space: nowrap; font-size: .77rem; }
td small.seeds { white-space: normal; }
tbody > tr > :first-child { min-width: 7.5rem; }
.number { display: inline-block; min-width: 4.2rem; }
.bar { width: 5rem; height: .6rem; fill: var(--ink); }
.track { stroke: var(--line); stroke-width: 2; }
.interval { stroke: var(--soft); stroke-width: 4; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem .6rem .3rem; }
figcaption { font-weight: 600; font-size: .92rem; }
figcaption small { font-weight: 400; }
figure svg { display: block; width: 100%; height: auto; }
figure text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
.transcripts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
article header { padding: .4rem .8rem; background: var(--panel); border-bottom: 1px solid var(--line);
  font-size: .92rem; }
article header small { display: block; }
article.success { border-left: 4px solid #009E73; }
article.failure { border-left: 4px solid #D55E00; }
article .code { padding: .6rem .8rem; white-space: pre-wrap; }
.legend > .prompt, .legend > .text, .legend > .mistake, .legend > .flag, .legend > .reason, .legend > .correction {
  padding: 0 .4rem; }
"""
  + ROLE_STYLE
  + """
.prompt, .mistake, .flag, .reason, .correction { border-radius: 3px; text-underline-offset: 3px;
  text-decoration-skip-ink: none; box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.mistake { text-decoration-style: wavy; text-decoration-thickness: 1px; }
.flag { font-weight: 700; }
.reason { font-style: italic; }
.masked { opacity: .6; }
"""
)
