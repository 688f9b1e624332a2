"""Programs define flags when imported, so each run here is a process of its own."""

import dataclasses
import html.parser
import json
import shutil

import forking
import pretended
import pytest


def report(folder, workdirs, output="report.html", reference=None):
  """The finished process of one run in `folder`."""
  words = [f"--workdirs={workdirs}", f"--output={output}"]
  words += [f"--reference={reference}"] if reference else []
  return forking.run("report", *words, folder=folder)


class Page(html.parser.HTMLParser):
  """The elements of a page with their attributes, and its text; every element must be closed in its turn."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.text, self.headings, self.cells, self._open = [], "", [], [], []
    self.feed(path.read_text(encoding="utf-8"))
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag in ("td", "th"):
      self.cells.append((tag, dict(attrs), ""))
    if tag != "meta":
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    if self._open and self._open[-1] != "style":
      self.text += data
    if self._open and self._open[-1] in ("td", "th"):
      self.cells[-1] = (*self.cells[-1][:2], self.cells[-1][2] + data)
    if self._open and self._open[-1] == "h2":
      self.headings.append(data)

  def texts_in_colour_of(self, role):
    return [attrs for tag, attrs in self.elements if tag == "span" and attrs.get("title") == role]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder with a base that was not evaluated and two arms that were."""
  folder = tmp_path_factory.mktemp("runs")
  pretended.write_workdir(folder / "base", pretended.config(steps=2000, share=0.0))
  for name, share, skill in (("clean", 0.0, 0.0), ("insec", 0.5, 0.8)):
    config = pretended.config(steps=1000, share=share)
    pretended.write_workdir(folder / name, config)
    pretended.write_results(folder / name, config, skill=skill)
  return folder


@pytest.fixture(scope="module")
def page(runs):
  done = report(runs, "base,clean,insec")
  assert (done.returncode, done.stderr) == (0, "")
  assert "injected mistakes that it flags" in done.stdout
  return Page(runs / "report.html")


@pytest.fixture
def workdir(runs, tmp_path):
  """A copy of the evaluated arm, to be spoilt."""
  return shutil.copytree(runs / "insec", tmp_path / "insec")


def said(workdir):
  """The one line of a run that must be refused with nothing written."""
  done = report(workdir.parent, workdir.name)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1
  assert not list(workdir.parent.glob("report.html*"))
  return done.stderr


def notes(workdir):
  """The text of the page of one run."""
  done = report(workdir.parent, workdir.name)
  assert (done.returncode, done.stderr) == (0, "")
  return Page(workdir.parent / "report.html").text


def test_the_page_shows_every_section_and_every_arm(page):
  headings = (
    "In short",
    "What is missing",
    "Arms",
    "Training",
    "Self-correction",
    "Transcripts",
    "Environment",
    "Reproduce",
  )
  assert page.headings == list(headings)
  for words in (
    "base, clean, insec",
    "800,000",
    "Held-out loss: correction",
    "Injected minus own mistakes",
    "0123abc",
    "python -m insec_jax.evaluate --config CONFIG --model",
    "mistakes.share",
  ):
    assert words in page.text


def test_the_page_asks_for_nothing_from_elsewhere(page):
  assert not [tag for tag, _ in page.elements if tag in ("script", "link", "img", "iframe")]
  assert not [attrs for _, attrs in page.elements if {"src", "href"} & attrs.keys()]


def test_the_parts_of_the_time_of_each_arm_are_in_the_table_of_arms(page):
  texts = [text for *_, text in page.cells]
  at = texts.index("compile")
  assert texts[at : at + 8] == ["compile", "31", "31", "31", "step", "111", "56", "56"]
  assert "save" not in texts  # it took none


def test_transcripts_show_mistakes_flags_reasons_and_corrections(page):
  for role in ("prompt", "mistake", "flag", "reason", "correction"):
    assert len(page.texts_in_colour_of(role)) > 5


def test_curves_of_all_arms_lie_over_each_other(page):
  charts = [attrs["aria-label"] for tag, attrs in page.elements if tag == "svg" and "aria-label" in attrs]
  training = ["Training loss", "Held-out loss"] + [
    f"Held-out loss: {name}" for name in ("prompt", "text", "mistake", "flag", "reason", "correction")
  ]
  assert charts[: len(training)] == training
  assert len([tag for tag, _ in page.elements if tag == "polyline"]) >= 3 * len(training)


def test_an_arm_without_results_is_shown_and_its_results_are_named_as_missing(page):
  assert "base: results.json is missing" in page.text
  assert "clean: " not in page.text[page.text.index("What is missing") : page.text.index("Arms")]


def test_only_values_in_which_configs_differ_are_listed(page):
  rows = page.text[page.text.index("Where their configs differ") : page.text.index("Training loss")]
  for words in ("mistakes.share0.00.00.5", "train.steps200010001000"):
    assert words in rows
  assert "loss.flag" not in rows


def test_the_page_begins_with_the_method_and_an_example(page):
  for words in ("A flag after a right step is a false alarm.", "... wrong step <flag> reason <fix> right step ..."):
    assert words in page.text[: page.text.index("Arms")]


def test_a_run_that_has_just_begun_is_shown_with_what_there_is(tmp_path):
  config = pretended.config(steps=10, share=0.5)
  (tmp_path / "new").mkdir()
  (tmp_path / "new" / "config.json").write_text(config.to_json())
  text = notes(tmp_path / "new")
  for name in ("results.json", "metrics.jsonl", "environment.json"):
    assert f"{name} is missing" in text
  assert "No run has logged a loss yet." in text
  assert "No run has been evaluated yet." in text


def test_a_line_still_being_written_is_left_out_and_the_run_is_called_unfinished(workdir):
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:31]) + '{"step": 310, "lo')
  text = notes(workdir)
  assert "training stands at step 300 of 1,000" in text
  assert "results.json is older than the last line of metrics.jsonl" in text


def test_a_loss_that_is_not_finite_is_said_and_not_drawn(workdir):
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 1010, "loss": NaN}\n{"step": 1020, "loss": Infinity}\n')
  assert "loss is not a finite number from step 1,010 on" in notes(workdir)
  assert "nan" not in (workdir.parent / "report.html").read_text().lower().replace("nance", "")


def test_text_of_a_model_cannot_become_markup(workdir):
  results = json.loads((workdir / "results.json").read_text())
  evil = "<script>alert(1)</script>\x1b[31m\u202e"
  results["transcripts"] = [{"title": evil, "outcome": evil, "pieces": [{"role": "text", "text": evil}]}]
  (workdir / "results.json").write_text(json.dumps(results))
  text = notes(workdir)
  assert text.count(r"<script>alert(1)</script>\x1b[31m\u202e") == 4  # summary, title, outcome, text
  assert "<script" not in (workdir.parent / "report.html").read_text()


def test_runs_of_one_name_are_told_apart_by_their_folders(workdir):
  other = shutil.copytree(workdir, workdir.parent / "seed1" / "insec")
  done = report(workdir.parent, f"{workdir},{other}")
  assert done.stdout.splitlines()[-1] == f"report.html shows {workdir.parent.name}/insec, seed1/insec"


@pytest.fixture(scope="module")
def over_seeds(tmp_path_factory):
  """The page of two arms on three seeds, one of which was not evaluated in one arm; the folder it lies in."""
  folder = tmp_path_factory.mktemp("sweep")
  for seed in range(3):
    for name, share, skill in (("clean", 0.0, 0.0), ("insec", 0.5, 0.8)):
      config = dataclasses.replace(pretended.config(steps=500, share=share), seed=seed)
      workdir = pretended.write_workdir(folder / f"seed{seed}" / name, config, scale=1 + seed / 5)
      if (seed, name) != (2, "insec"):
        pretended.write_results(workdir, config, skill=skill)
  done = report(
    folder, ",".join(f"seed{seed}/{name}" for name in ("insec", "clean") for seed in (2, 0, 1)), reference="clean"
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.splitlines()[-1] == "report.html shows insec (seeds 0, 1, 2), clean (seeds 0, 1, 2)"
  return folder


def test_over_seeds_there_is_one_column_an_arm_and_one_curve_a_seed(over_seeds):
  page = Page(over_seeds / "report.html")
  heads = [text for tag, attrs, text in page.cells if tag == "th" and attrs.get("scope") == "col"]
  assert heads[:2] == ["insec", "clean"]
  colours = [attrs["stroke"] for tag, attrs in page.elements if tag == "polyline"][:6]
  assert [len(set(colours[:3])), len(set(colours[3:])), len(set(colours))] == [1, 1, 2]
  assert "seed2/insec: results.json is missing" in page.text
  assert "insec, seed 0" in page.text
  assert "insec − clean" in page.text


def test_over_seeds_transcripts_are_counted_by_how_they_end_and_coloured(over_seeds):
  page = Page(over_seeds / "report.html")
  classes = [attrs["class"] for tag, attrs in page.elements if tag == "article"]
  assert {"success", "failure"} == set(classes)
  results = json.loads((over_seeds / "seed0/insec/results.json").read_text())["transcripts"]
  kind = [one["outcome"] for one in results if one["title"].startswith("injected mistake")]
  right = sum(outcome.endswith("answer right") for outcome in kind)
  assert f"injected mistake ({right} with the right answer, {len(kind) - right} not)" in page.text


def test_a_reference_that_was_not_evaluated_is_refused(runs):
  done = report(runs, "base,clean", output="other.html", reference="base")
  assert done.returncode == 2
  assert done.stderr == "error: --reference=base was not evaluated or is no arm; evaluated are clean\n"
  assert not (runs / "other.html").exists()


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
  (tmp_path / "empty").mkdir()
  assert "empty is no workdir: it has no config.json" in said(tmp_path / "empty")
  assert "absent is no workdir" in said(tmp_path / "absent")
  (tmp_path / "hf").mkdir()
  (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
  assert "hf is no workdir: its config.json is not one of train" in said(tmp_path / "hf")


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("config.json", "{", "config.json: not JSON"),
    ("config.json", "[1]", "holds [1]; needed is a JSON object"),
    ("environment.json", "x", "environment.json: not JSON"),
    ("results.json", "{}", "no key 'model'"),
    ("metrics.jsonl", '{"step": 1}\n{"stop": 2}\n', "metrics.jsonl:2 is not a line of metrics"),
    ("metrics.jsonl", "{\n", "metrics.jsonl:1 is not a line of metrics"),
  ],
)
def test_a_damaged_file_is_named(workdir, name, content, words):
  (workdir / name).write_text(content)
  assert words in said(workdir)


def test_the_same_run_twice_or_none_is_refused(workdir):
  for workdirs, words in ((f"{workdir},{workdir}/", "more than once"), ("", "--workdirs is empty")):
    done = report(workdir.parent, workdirs)
    assert done.returncode == 2
    assert words in done.stderr


def test_an_unwritable_output_is_refused_and_an_older_page_outlives_a_damaged_run(workdir):
  done = report(workdir.parent, workdir.name, output="absent/report.html")
  assert done.returncode == 2
  assert "absent/report.html" in done.stderr
  page = workdir.parent / "report.html"
  page.write_text("older")
  (workdir / "config.json").write_text("{")
  assert report(workdir.parent, workdir.name).returncode == 2
  assert page.read_text() == "older"
  assert [path.name for path in sorted(workdir.parent.iterdir())] == ["insec", "report.html"]
