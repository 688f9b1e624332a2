import copy
import json

import pretended
import pytest
from pretended import rows

from insec_jax.command import InputError
from insec_jax.evaluation import statistics
from insec_jax.pages.correction import breakdown, check, gap_cell, main_rates, rate_cell


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """What evaluate's own code makes of an arm that never flags and of one that flags much."""
  found = []
  for name, skill in (("clean", 0.0), ("insec", 0.8)):
    folder = tmp_path_factory.mktemp(name)
    pretended.write_results(folder, pretended.config(steps=10, share=0.5, num=16), skill=skill)
    found.append(json.loads((folder / "results.json").read_text()))
  return found


@pytest.fixture(scope="module")
def results(whole):
  """The same without what newer versions measure besides."""
  return [pretended.before_variants(one) for one in whole]


def test_every_rate_that_evaluate_wrote_is_in_a_table_with_its_n_and_interval(whole):
  shown = [cell for _, _, cells in rows(breakdown(["clean", "insec"], [[one] for one in whole])) for cell in cells]
  count = 0
  for result in whole:
    for source, metrics in result["rates"].items():
      if ": " not in source:
        for metric, rate in metrics.items():
          assert "".join(rate_cell(metric, rate).itertext()) in shown
          count += 1
  assert count > 2 * (3 * 14 + 2 * 14)


def test_each_arm_stands_in_its_own_column(results):
  cells = next(
    cells
    for title, name, cells in rows(breakdown(["clean", "insec"], [[one] for one in results]))
    if title == "Injected mistakes, greedy" and name.startswith("Detection") and "right after" in name
  )
  injected = [result["rates"]["injected"]["detection"] for result in results]
  assert injected[0]["rate"] == 0 < injected[1]["rate"]
  for cell, rate in zip(cells, injected, strict=True):
    assert cell.startswith(f"{100 * rate['rate']:.1f} %n 16 ")


def test_each_class_has_a_row_for_each_metric_split_by_class(results):
  named = [
    name
    for title, name, _ in rows(breakdown(["clean", "insec"], [[one] for one in results]))
    if title == "Injected mistakes, greedy"
  ]
  for error in ("calc", "copy", "early", "repeat", "value"):
    assert named.count(error) == 4


def test_the_gap_is_shown_with_its_sign_and_never_as_minus_zero():
  assert "".join(gap_cell("", {"difference": 0.123, "low": -0.0001, "high": 0.25}).itertext()) == "+12.3+0.0 to +25.0"


def test_a_rate_out_of_nothing_is_a_dash():
  rate = {"rate": None, "k": 0, "n": 0, "low": 0.0, "high": 1.0}
  assert "".join(rate_cell("detection", rate).itertext()) == "–n 0"


def test_an_auroc_is_a_share_and_a_rate_a_percentage():
  rate = {"rate": 0.5, "k": 5000, "n": 10000, "low": 0.25, "high": 0.75}
  assert "".join(rate_cell("auroc", rate).itertext()) == "0.500n 10,000 · 0.250 to 0.750"
  assert "".join(rate_cell("recovery", rate).itertext()) == "50.0 %n 10,000 · 25.0 to 75.0"


def test_over_seeds_a_cell_says_the_mean_its_t_interval_n_and_each_seed(results):
  other = copy.deepcopy(results[1])
  other["rates"]["own"]["detection"] = {
    "rate": 0.75,
    "k": 3,
    "n": 4,
    "low": statistics.wilson(3, 4)[0],
    "high": statistics.wilson(3, 4)[1],
  }
  results[1]["rates"]["own"]["detection"] = {
    "rate": 0.25,
    "k": 3,
    "n": 12,
    "low": statistics.wilson(3, 12)[0],
    "high": statistics.wilson(3, 12)[1],
  }
  cell = next(
    cells[0]
    for _, name, cells in rows(main_rates(["insec"], [[results[1], other]]))
    if name == "DetectionOwn mistakes, greedy"
  )
  assert cell == "50.0 %0.0 to 100.0n 16 · seeds 25.0, 75.0"


def test_rates_of_a_variant_are_read_first_where_some_arm_has_them(results):
  other = copy.deepcopy(results[1])
  other["rates"]["own, at threshold"] = other["rates"]["own"]
  names = [name for _, name, _ in rows(main_rates(["clean", "insec"], [[results[0]], [other]]))]
  assert "DetectionOwn mistakes, greedy, flag bias from validation" in names
  assert len(names) == 8 + 3


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda result: result.pop("gap"), "no key 'gap'"),
    (lambda result: result["rates"].update(borrowed={}), "'borrowed'"),
    (lambda result: result["solved"].update(borrowed={}), "'borrowed'"),
    (lambda result: result["rates"]["own"].update(luck={}), "'luck'"),
  ],
)
def test_results_of_another_version_are_refused_by_what_they_have(results, change, said, tmp_path):
  other = copy.deepcopy(results[0])
  check(other, tmp_path)
  change(other)
  with pytest.raises(InputError, match=said):
    check(other, tmp_path)


def test_first_tries_are_listed_by_class_where_the_results_have_them(results):
  other = copy.deepcopy(results[1])
  other["first_tries"] = {"solutions": {"right": results[1]["rates"]["own"]["detection"]}}
  assert "First tries" not in [part.text for part in breakdown(["a"], [[results[0]]])]
  found = [cells for title, name, cells in rows(breakdown(["a", "b"], [[results[0]], [other]])) if name == "right"]
  assert found == [["–", "".join(rate_cell("right", results[1]["rates"]["own"]["detection"]).itertext())]]
