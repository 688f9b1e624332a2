import gzip
import json
import sys

import pytest
from shapes import parquet, zstd

from insec_jax.command import InputError
from insec_jax.files import sources

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


FILES = {
  "r.jsonl": LINES,
  "r.txt": LINES,
  "r.jsonl.gz": gzip.compress(LINES),
  "r.jsonl.zst": zstd(LINES),
  "lines.json": LINES,
  "r.json": b"  " + json.dumps(ROWS, indent=1).encode(),
  "r.json.gz": gzip.compress(json.dumps(ROWS).encode()),
  "r.parquet": parquet(ROWS),
}


def read(path, **options):
  return [
    row for source in sources.find(str(path), "data.path") for row in sources.read(source, "data.path", **options)
  ]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_objects_and_their_places(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(FILES[name])
  place = (
    ": row {}" if name == "r.parquet" else ": object {}" if name.startswith("r.json") and "l" not in name else ":{}"
  )
  assert read(path) == [(row, f"{path}{place.format(number)}") for number, row in enumerate(ROWS, 1)]


def test_several_files_and_patterns_are_read_in_the_order_of_the_text(tmp_path):
  for name in ("c.jsonl", "b2.jsonl", "b10.jsonl", "a,1.jsonl"):
    (tmp_path / name).write_text(json.dumps({"name": name}))
  (tmp_path / "b3.jsonl").mkdir()
  several = [row["name"] for row, _ in read(f"{tmp_path}/c.jsonl,{tmp_path}/b*.jsonl")]
  assert several == ["c.jsonl", "b10.jsonl", "b2.jsonl"]
  assert [row["name"] for row, _ in read(f"{tmp_path}/a,1.jsonl")] == ["a,1.jsonl"]
  assert set(sources.local_files(f"{tmp_path}/c.jsonl,{tmp_path}/b1*")) == {
    f"{tmp_path}/c.jsonl",
    f"{tmp_path}/b10.jsonl",
  }


def test_only_the_columns_asked_for_are_read_of_a_parquet_file(tmp_path):
  (tmp_path / "r.parquet").write_bytes(parquet(ROWS))
  assert [row for row, _ in read(tmp_path / "r.parquet", columns=("b",))] == [{"b": "x"}, {"b": None}]
  with pytest.raises(InputError, match=r"r\.parquet: has no column 'c', it has a, b; correct data\.fields"):
    list(read(tmp_path / "r.parquet", columns=("b", "c")))


def test_blanks_around_a_name_in_a_list_do_not_belong_to_it(tmp_path):
  for name in ("a.jsonl", "b.jsonl"):
    (tmp_path / name).write_bytes(LINES)
  found = sources.find(f" {tmp_path}/a.jsonl, {tmp_path}/b.jsonl", "data.path")
  assert [source.path.name for source in found] == ["a.jsonl", "b.jsonl"]


DEFECTS = {
  "cut.jsonl.zst": (FILES["r.jsonl.zst"][:-9], "cut.jsonl.zst is damaged or no zstd file"),
  "z.jsonl": (FILES["r.jsonl.zst"], "z.jsonl is compressed by zstd; give it a name that ends in .zst"),
  "g.jsonl": (FILES["r.jsonl.gz"], "g.jsonl is compressed by gzip; give it a name that ends in .gz"),
  "cut.parquet": (FILES["r.parquet"][:-9], "cut.parquet is damaged or no parquet file"),
  "none.parquet": (parquet(ROWS[:0]), "none.parquet has no rows"),
  "none.json": (b"[]", "none.json is an empty list"),
  "number.json": (b'[{"a": 1}, 2]', "number.json: object 2 is int; the list must hold objects only"),
  "no.json": (b'[{"a": 1}, ', "no.json: not JSON at column 12"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_one_line_with_the_file(tmp_path, name):
  content, line = DEFECTS[name]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError) as error:
    read(tmp_path / name)
  assert line in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("text", "line"),
  [
    ("{0}/no*.jsonl", "data.path={0}/no*.jsonl matches no file"),
    ("{0}/a.jsonl,{0}/*.jsonl", "data.path: {0}/a.jsonl is given twice"),
    ("{0}/a.jsonl,", "data.path='{0}/a.jsonl,' has an empty name"),
  ],
)
def test_a_text_that_names_no_file_or_one_twice_is_refused(tmp_path, text, line):
  (tmp_path / "a.jsonl").write_bytes(LINES)
  with pytest.raises(InputError) as error:
    sources.find(text.format(tmp_path), "data.path")
  assert line.format(tmp_path) in str(error.value)


def test_without_pyarrow_the_line_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "r.parquet").write_bytes(FILES["r.parquet"])
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(InputError, match=r"r\.parquet.*pip install 'insec_jax\[data\]'"):
    read(tmp_path / "r.parquet")


def test_a_pattern_and_a_list_of_a_bucket_name_its_objects_in_order(bucket):
  for name in ("b.jsonl.gz", "a.jsonl", "sub/c.jsonl", "a.txt"):
    line = json.dumps({"from": name}).encode() + b"\n"
    bucket.write(f"d/{name}", gzip.compress(line) if name.endswith(".gz") else line)
  found = sources.find(f"{bucket.url}/d/*.jsonl*,{bucket.url}/d/sub/c.jsonl", "data.path")
  named = ("a.jsonl", "b.jsonl.gz", "sub/c.jsonl")
  assert [source.shown for source in found] == [f"{bucket.url}/d/{name}" for name in named]
  records = [record for source in found for record in sources.read(source, "data.path")]
  assert records[1] == ({"from": "b.jsonl.gz"}, f"{bucket.url}/d/b.jsonl.gz:1")
  assert [values["from"] for values, _ in records] == [*named]
  with pytest.raises(InputError, match=r"data\.path=gs://.*/d/x\*\.jsonl matches no file"):
    sources.find(f"{bucket.url}/d/x*.jsonl", "data.path")
