import copy
import json

import pretended
import pytest

from insec_jax.command import InputError
from insec_jax.pages.correction import check, gap_cell, paired, rate_cell, self_correction


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """What evaluate's own code makes of an arm that never flags and of one that flags much."""
  found = []
  for name, skill in (("clean", 0.0), ("insec", 0.8)):
    folder = tmp_path_factory.mktemp(name)
    pretended.write_results(folder, pretended.config(steps=10, share=0.5, num=16), skill=skill)
    found.append(json.loads((folder / "results.json").read_text()))
  return found


def text(parts):
  return "\n".join(" ".join(part.itertext()) for part in parts)


def rows(parts):
  """(table's title, name of the row, texts of its cells) of every table."""
  for part in parts:
    for table in part.iter("table"):
      title = "".join(next(table.iter("th")).itertext())
      for row in table.iter("tr"):
        cells = ["".join(cell.itertext()) for cell in row.iter("td")]
        if cells:
          yield title, "".join(next(row.iter("th")).itertext()), cells


def test_every_rate_that_evaluate_wrote_is_in_a_table_with_its_n_and_interval(results):
  shown = [cell for _, _, cells in rows(self_correction(["clean", "insec"], results)) for cell in cells]
  count = 0
  for result in results:
    for source, metrics in result["rates"].items():
      if ": " not in source:
        for metric, rate in metrics.items():
          assert "".join(rate_cell(metric, rate).itertext()) in shown
          count += 1
  assert count == 2 * (3 * 14 + 2 * 14)


def test_each_arm_stands_in_its_own_column(results):
  cells = next(cells for title, name, cells in rows(self_correction(["clean", "insec"], results))
               if title == "Injected mistakes, greedy" and name.startswith("Detection") and "right after" in name)
  injected = [result["rates"]["injected"]["detection"] for result in results]
  assert injected[0]["rate"] == 0 < injected[1]["rate"]
  for cell, rate in zip(cells, injected, strict=True):
    assert cell.startswith(f"{100 * rate['rate']:.1f} %n 16 ")


def test_each_class_has_a_row_for_each_metric_split_by_class(results):
  named = [name for title, name, _ in rows(self_correction(["clean", "insec"], results))
           if title == "Injected mistakes, greedy"]
  for error in ("calc", "copy", "early", "repeat", "value"):
    assert named.count(error) == 4


def test_the_gap_is_shown_with_its_sign_and_never_as_minus_zero():
  assert "".join(gap_cell("", {"difference": .123, "low": -.0001, "high": .25}).itertext()) == "+12.3+0.0 to +25.0"


def test_a_rate_out_of_nothing_is_a_dash():
  rate = {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}
  assert "".join(rate_cell("detection", rate).itertext()) == "–n 0"


def test_an_auroc_is_a_share_and_a_rate_a_percentage():
  rate = {"rate": .5, "k": 5000, "n": 10000, "low": .25, "high": .75}
  assert "".join(rate_cell("auroc", rate).itertext()) == "0.500n 10,000 · 0.250 to 0.750"
  assert "".join(rate_cell("recovery", rate).itertext()) == "50.0 %n 10,000 · 25.0 to 75.0"


def test_arms_are_compared_problem_by_problem_only_when_they_met_the_same_problems(results):
  assert "insec − clean" in text(paired(["clean", "insec"], results))
  other = copy.deepcopy(results[1])
  other["config"]["seed"] = 7
  said = text(paired(["clean", "insec"], [results[0], other]))
  assert said == "Not compared, since they met other problems: clean was evaluated with seed=0, insec with 7."
  other = copy.deepcopy(results[1])
  other["config"]["data"]["path"] = "mined.jsonl"  # of no weight where the task makes the problems
  assert "insec − clean" in text(paired(["clean", "insec"], [results[0], other]))


def test_the_paired_difference_is_other_minus_first(results):
  first, other = copy.deepcopy(results)
  for times in first["solved"].values():
    times["t2"] = [0] * 16
  for times in other["solved"].values():
    times["t2"] = [1] * 12 + [0] * 4
  cells = [cells for _, name, cells in rows(paired(["a", "b"], [first, other])) if name.startswith("Acc@t2")]
  assert all(cell.startswith("+75.0") and cell.endswith("n 16 · p below 0.001") for cell, in cells)
  assert len(cells) == 2


def test_one_arm_alone_needs_no_comparison(results):
  assert "minus that of" not in text(self_correction(["insec"], results[1:]))


@pytest.mark.parametrize(("change", "said"), [
  (lambda result: result.pop("gap"), "no key 'gap'"),
  (lambda result: result["rates"].update(borrowed={}), "'borrowed'"),
  (lambda result: result["rates"]["own"].update(luck={}), "'luck'")])
def test_results_of_another_version_are_refused_by_what_they_have(results, change, said, tmp_path):
  other = copy.deepcopy(results[0])
  check(other, tmp_path)
  change(other)
  with pytest.raises(InputError, match=said):
    check(other, tmp_path)
