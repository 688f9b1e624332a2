"""Endpoints: parsed, tested together over seeds, and void where they were not the same before and after."""

import dataclasses

import pretended
import pytest
from pretended import rows as table_rows

from insec_jax.command import InputError
from insec_jax.config_endpoints import Measure, parse
from insec_jax.evaluation import over_seeds, statistics
from insec_jax.pages import endpoints
from insec_jax.pages.runs import Run

SOLVED, OWN = "mined - clean: solutions t2", "mined: own correction"


def result(seed, right, correction=None, named=(), classes="aabb", **solved):
  """The results of a seed that solved so many of four problems; `correction` is that rate of own mistakes."""
  right_P = [1] * right + [0] * (4 - right)
  rate = statistics.Rate(right, 4).to_json()
  own = {"correction": {"rate": correction, "k": 0, "n": 8, "low": 0.0, "high": 1.0}}
  return {
    "config": {
      "seed": seed,
      "task": {"name": "graph"},
      "mistakes": {"unit": "line"},
      "evaluate": {"num_problems": 4, "max_tokens": 8, "max_size": 0, "endpoints": list(named)},
    },
    "rates": {"solutions": {"accuracy_t2": rate}, "own": own if correction is not None else {}}
    | {source: {"accuracy_t2": statistics.Rate(sum(values), 4).to_json()} for source, values in solved.items()},
    "solved": {"solutions": {"t2": right_P}} | {source: {"t2": values} for source, values in solved.items()},
    "structures": {"solutions": list(classes)},
  }


ARMS = {
  "clean": [result(0, 1), result(1, 2), result(2, 1)],
  "mined": [result(0, 3, 0.5), result(1, 3, 0.7), result(2, 4, 0.9)],
}


@pytest.mark.parametrize(
  ("text", "arm", "measure", "minus"),
  [
    (SOLVED, "mined", ("solutions", "accuracy_t2"), ("clean", ("solutions", "accuracy_t2"))),
    (OWN, "mined", ("own", "correction"), None),
    ("a b: own, at threshold correction, forced", "a b", ("own, at threshold", "correction, forced"), None),
    ("mined: own: open detection", "mined", ("own: open", "detection"), None),
    (
      "mined - clean: solutions t2 - solutions sampled, redraw t2",
      "mined",
      ("solutions", "accuracy_t2"),
      ("clean", ("solutions sampled, redraw", "accuracy_t2")),
    ),
    (
      "mined: solutions t2 - solutions sampled, majority t1",
      "mined",
      ("solutions", "accuracy_t2"),
      ("mined", ("solutions sampled, majority", "accuracy_t1")),
    ),
  ],
)
def test_an_endpoint_is_a_rate_of_an_arm_or_a_difference(text, arm, measure, minus):
  found = parse(text)
  assert (found.arm, found.measure) == (arm, Measure(*measure))
  assert found.minus == (minus and (minus[0], Measure(*minus[1])))


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("mined", "needed is 'ARM: SOURCE METRIC'"),
    ("mined - clean - base: solutions t2", "needed is 'ARM: SOURCE METRIC'"),
    ("mined - mined: solutions t2", "needed is 'ARM: SOURCE METRIC'"),
    (" - clean: solutions t2", "needed is 'ARM: SOURCE METRIC'"),
    ("mined: solutions t2 - solutions t2", "which is 0 in any case"),
    ("mined: solution t2", "'solution t2' begins with no source; those are injected,"),
    ("mined: solutions t3", "'t3' is no metric of 'solutions'; those are accuracy_t1,"),
    ("mined: own t2", "'t2' is no metric of 'own'; those are detection,"),
    ("mined: solutions, redrawn t2", "is no metric of 'solutions'|begins with no source"),
  ],
)
def test_a_text_that_is_no_endpoint_is_answered_in_one_line(text, said):
  with pytest.raises(InputError, match=said) as caught:
    parse(text)
  assert "\n" not in str(caught.value)


def test_a_difference_is_tested_over_seeds_with_both_intervals():
  found = endpoints.measured(parse(SOLVED), ARMS)
  assert found.seeds == [0.5, 0.25, 0.75]
  assert found.mean == 0.5
  assert found.spread == statistics.t_interval([0.5, 0.25, 0.75])
  assert found.interval[0] < found.spread[0] < found.spread[1] < found.interval[1]
  assert found.p == over_seeds.p_value([0.5, 0.25, 0.75])
  assert (found.num, found.classes) == (12, 2)


def test_a_rate_of_an_arm_is_an_estimate_without_a_test():
  found = endpoints.measured(parse(OWN), ARMS)
  assert (found.mean, found.p, found.interval) == (pytest.approx(0.7), None, None)
  assert found.spread == statistics.t_interval([0.5, 0.7, 0.9])
  accuracy = endpoints.measured(parse("mined: solutions t2"), ARMS)
  assert accuracy.interval[0] < accuracy.mean < accuracy.interval[1]


def test_another_measure_of_the_other_arm_is_subtracted_problem_by_problem():
  arms = {"clean": [result(seed, 0, redraw=[1, 1, 1, 0]) for seed in (0, 1)], "mined": ARMS["mined"]}
  arms["clean"] = [one | {"rates": {"solutions, redraw": one["rates"]["redraw"]}} for one in arms["clean"]]
  for one in arms["clean"]:
    one["solved"]["solutions, redraw"] = one["solved"].pop("redraw")
  found = endpoints.measured(parse("mined - clean: solutions t2 - solutions, redraw t2"), arms)
  assert found.seeds == [0.0, 0.0]  # of seed 2 there is no partner
  assert found.num == 8


def test_differences_are_adjusted_together_and_those_not_measured_count():
  named = [SOLVED, "mined - clean: own correction", OWN, "mined - clean: solutions accuracy_t2 - solutions, redraw t2"]
  header, *found = endpoints.rows(list(map(parse, named)), ARMS)
  assert header[0] == "endpoint"
  cells = {row[0]: dict(zip(header, row, strict=True)) for row in found}
  p = over_seeds.p_value([0.5, 0.25, 0.75])
  assert cells[SOLVED]["p"] == over_seeds.p_text(p)
  assert cells[SOLVED]["p after Holm"] == over_seeds.p_text(3 * p)
  assert cells[SOLVED]["mean"] == "+50.0"
  assert cells[SOLVED]["n"] == "12 in 2 classes"
  assert (cells[OWN]["mean"], cells[OWN]["p"], cells[OWN]["p after Holm"]) == ("70.0 %", "–", "–")
  assert [row[1] for row in found] == ["+50.0", "not measured", "70.0 %", "not measured"]


def test_with_two_seeds_there_is_an_interval_and_no_p():
  arms = {arm: results[:2] for arm, results in ARMS.items()}
  (_, row) = endpoints.rows([parse(SOLVED)], arms)
  assert row[2] != "–"
  assert row[4:7] == ("–", "–", "2")


def test_a_measure_that_few_seeds_have_says_so_and_has_no_interval_of_one():
  arms = {"mined": [result(0, 3, 0.5), result(1, 3), {}]}
  (header, row) = endpoints.rows([parse(OWN)], arms)
  cells = dict(zip(header, row, strict=True))
  assert (cells["mean"], cells["seeds"], cells["t-interval over seeds"]) == ("50.0 %", "1 of 3", "–")
  (_, alone) = endpoints.rows([parse("mined: solutions t2")], {"mined": arms["mined"][:1]})
  assert alone[2:4] == ("–", "–")


def run(name, before, measured):
  """A run whose config named some endpoints, and whose results name some."""
  return Run(name, None, {"evaluate": {"endpoints": before}}, {}, [], result(0, 1, named=measured), (), {})


def test_endpoints_that_changed_or_differ_between_runs_are_void_in_one_line():
  same = [run("a", [SOLVED], [SOLVED]), run("b", [SOLVED], [SOLVED])]
  assert endpoints.named(same) == ([parse(SOLVED)], [])
  assert endpoints.named([run("a", [], [])]) == ([], [])
  for runs, said in (
    ([run("a", [], [SOLVED])], "the endpoints of a changed after its training began (none; then 'mined - clean"),
    ([same[0], run("b", [OWN], [OWN])], "a and b name different endpoints ('mined - clean: solutions t2'; 'mined: own"),
  ):
    found, (note,) = endpoints.named(runs)
    assert found == []
    assert note.startswith(said)
    assert note.endswith("everything here is description")


def test_the_page_has_the_table_of_endpoints_or_says_that_all_is_description():
  section = endpoints.section([parse(SOLVED)], ARMS, [])
  assert section[0].text == "Endpoints"
  ((_, name, cells),) = table_rows(section)
  assert (name, cells[0]) == (SOLVED, "+50.0")
  (said,) = endpoints.section([], ARMS, [])
  assert said.text == endpoints.NONE_NAMED
  assert endpoints.text([], ARMS, ["why"]) == "why"


def test_larger_problems_as_an_endpoint_need_a_size():
  config = pretended.config(steps=10, share=0.5)
  evaluate = dataclasses.replace(config.evaluate, max_size=5, endpoints=("a: solutions, larger t2",))
  with pytest.raises(InputError, match=r"evaluate\.max_size=0 solves no larger problems"):
    dataclasses.replace(evaluate, max_size=0)
