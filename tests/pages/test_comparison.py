import copy
import json

import pretended
import pytest
from pretended import rows

from insec_jax.pages.comparison import controls, paired


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


def text(parts):
  return "\n".join(" ".join(part.itertext()) for part in parts)


def seeded(result, seed):
  return copy.deepcopy(result) | {"config": {**result["config"], "seed": seed}}


def test_arms_are_compared_problem_by_problem_only_when_they_met_the_same_problems(results):
  assert "insec − clean" in text(paired(["clean", "insec"], [[one] for one in results], reference=0))
  said = text(paired(["clean", "insec"], [[results[0]], [seeded(results[1], 7)]], reference=0))
  assert said == "Not compared, since they met other problems: clean was evaluated with seed=0, insec with 7."
  other = copy.deepcopy(results[1])
  other["config"]["data"]["path"] = "mined.jsonl"  # of no weight where the task makes the problems
  assert "insec − clean" in text(paired(["clean", "insec"], [[results[0]], [other]], reference=0))


def test_the_paired_difference_is_other_minus_reference(results):
  first, other = copy.deepcopy(results)
  for times in first["solved"].values():
    times["t2"] = [0] * 16
  for times in other["solved"].values():
    times["t2"] = [1] * 12 + [0] * 4
  for names, arms, reference in ((["a", "b"], [[first], [other]], 0), (["b", "a"], [[other], [first]], 1)):
    cells = [cells for _, name, cells in rows(paired(names, arms, reference=reference)) if name.startswith("Acc@t2")]
    assert all(cell.startswith("+75.0") and cell.endswith("n 16") for (cell,) in cells)
    assert len(cells) == 2


def test_over_seeds_the_difference_of_each_seed_and_students_interval_are_shown(results):
  arms = [[seeded(one, seed) for seed in (0, 1)] for one in results]
  for number, arm in enumerate(arms):
    for seed, result in enumerate(arm):
      result["solved"] = {"solutions": {"t2": [number] * (4 + 4 * seed) + [0] * (12 - 4 * seed)}}
  ((_, _, (cell,)),) = rows(paired(["clean", "insec"], arms, reference=0))
  assert cell.startswith("+37.5")
  assert "n 32" in cell
  assert cell.endswith("seeds +25.0, +50.0: -121.3 to +196.3")


def test_a_correction_is_compared_with_the_redraw_of_the_reference_tokens_included(results):
  clean, insec = copy.deepcopy(results)
  for result, times in ((clean, 5.0), (insec, 2.0)):
    for source in ("solutions sampled, redraw", "solutions sampled, confidence"):
      result["rates"][source] = result["rates"]["solutions sampled"]
      result["solved"][source] = {"t2": [0] * 16}
      result["tokens_per_problem"][source] = {"mean": times, "low": None, "high": None, "n": 16}
  clean["solved"]["solutions sampled, confidence"] = {"t2": [1] * 16}
  insec["solved"]["solutions sampled, confidence"] = {"t2": [1] * 8 + [0] * 8}
  found = list(rows(controls(["clean", "insec"], [[clean], [insec]], reference=0)))
  cells = [cells for _, name, cells in found if name == "sampled, flag forced by low confidence"]
  assert [cell.endswith(f"{tokens} tokens") for cell, tokens in zip(cells[0], (5.0, 2.0), strict=True)] == [True] * 2
  assert cells[1][0].startswith("+100.0")
  assert cells[1][1].startswith("+50.0")


def test_results_without_variants_have_no_controls(results):
  assert controls(["clean", "insec"], [[one] for one in results], reference=0) == []


def test_larger_problems_are_compared_between_arms_but_not_with_controls(results):
  clean, insec = copy.deepcopy(results)
  for result, right in ((clean, 0), (insec, 1)):
    for how in ("", " sampled"):
      for source in (f"solutions{how}, larger", f"solutions{how}, flags banned"):
        result["rates"][source] = result["rates"]["solutions"]
        result["solved"][source] = {"t2": [right] * 16}
        result["tokens_per_problem"][source] = {"mean": 5.0, "low": None, "high": None, "n": 16}
  names, arms = ["clean", "insec"], [[clean], [insec]]
  assert text(paired(names, arms, reference=0)).count("sizes beyond training") == 2
  found = list(rows(controls(names, arms, reference=0)))
  cost = [name for _, name, cells in found if cells[0].endswith("tokens")]
  minus = [name for _, name, cells in found if not cells[0].endswith("tokens")]
  assert [name for name in cost if "sizes" in name] == [
    "greedy, sizes beyond training",
    "sampled, sizes beyond training",
  ]
  assert minus
  assert not [name for name in minus if "sizes" in name]


@pytest.mark.parametrize("key", ["num_problems", "max_size"])
def test_arms_that_solved_other_numbers_or_sizes_of_problems_are_not_compared(results, key):
  other = copy.deepcopy(results[1])
  other["config"]["evaluate"][key] = 7
  assert f"evaluated with evaluate.{key}=" in text(paired(["clean", "insec"], [[results[0]], [other]], reference=0))


def test_results_older_than_larger_problems_are_compared_with_those_that_solved_none(results):
  old = copy.deepcopy(results[0])
  del old["config"]["evaluate"]["max_size"]
  assert "insec − clean" in text(paired(["clean", "insec"], [[old], [results[1]]], reference=0))
  del old["config"]["evaluate"]["num_problems"]
  with pytest.raises(KeyError):
    paired(["clean", "insec"], [[old], [results[1]]], reference=0)
