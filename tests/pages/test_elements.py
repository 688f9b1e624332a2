import html.parser

from insec_jax.method import roles
from insec_jax.pages.elements import document, element, role_text, table


class Reader(html.parser.HTMLParser):
  """Tags with their attributes in order, and all text outside <style>."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.text, self._in_style = [], "", False
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self._in_style = tag == "style"

  def handle_data(self, data):
    if not self._in_style:
      self.text += data

  def handle_endtag(self, tag):  # noqa: ARG002, the end of any element ends a style
    self._in_style = False


def test_text_and_attributes_cannot_become_markup():
  evil = '<script>alert("&amp;")</script>'
  read = Reader(document(evil, element("p", evil, title=evil), role_text(roles.FLAG, evil)))
  assert "script" not in [tag for tag, _ in read.tags]
  assert read.text.count(evil) == 3
  assert ("p", {"title": evil}) in read.tags


def test_text_before_between_and_after_elements_keeps_its_place():
  page = document("", element("p", "a", element("b", "c"), "d", "e", element("i", "f"), "g"))
  assert "<p>a<b>c</b>de<i>f</i>g</p>" in page


def test_control_and_direction_characters_are_spelled_out():
  page = document("", element("p", "a\x1b[0m\x00b\u202ec\ud800d\r\n\te"))
  assert r"<p>a\x1b[0m\x00b\u202ec\ud800d\r" + "\n\te</p>" in page
  page.encode("utf-8")


def test_every_role_but_text_has_a_colour_of_its_own():
  page = document("")
  colours = dict(zip(roles.NAMES, roles.COLOURS, strict=True))
  assert colours.pop("text") == ""
  assert len(set(colours.values())) == len(colours)
  for name, colour in colours.items():
    assert f".{name} {{ background: {colour}40;" in page


def test_every_row_of_a_table_has_a_cell_for_each_column():
  groups = [("g", [("x", "1", "2")]), ("", [("y", "3", element("b", "4"))])]
  read = Reader(document("", table("t", ["a", "b"], groups)))
  tags = [tag for tag, _ in read.tags]
  assert tags.count("td") == 4
  assert ("th", {"colspan": "3"}) in read.tags
  assert read.text.strip() == "tabgx12y34"


def test_the_page_asks_for_nothing_from_elsewhere():
  read = Reader(document("t", element("p", "x")))
  assert not [tag for tag, _ in read.tags if tag in ("script", "link", "img", "iframe")]
  assert not [attrs for _, attrs in read.tags if {"src", "href"} & attrs.keys()]
  assert "url(" not in document("t")
  assert "@import" not in document("t")
