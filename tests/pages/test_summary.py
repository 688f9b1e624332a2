import copy
import json
import re

import pretended

from insec_jax.evaluation import statistics
from insec_jax.pages.summary import summary


def lines(names, arms, trained):
  text = summary(names, arms, trained, reference=0)
  return {line.partition("  ")[0]: [cell for cell in line.split("  ")[1:] if cell] for line in text.splitlines()}


def test_the_table_says_means_seeds_tokens_and_differences_from_the_reference(tmp_path):
  arms = []
  for name, skill in (("clean", 0.0), ("insec", 0.8)):
    (tmp_path / name).mkdir()
    pretended.write_results(tmp_path / name, pretended.config(steps=10, share=0.5, num=16), skill=skill)
    first = json.loads((tmp_path / name / "results.json").read_text())
    second = copy.deepcopy(first)
    second["config"]["seed"] = 1
    arms.append([first, second])
  for arm, right in zip(arms, (0, 1), strict=True):
    for result in arm:
      result["solved"]["solutions"]["t2"] = [right] * 8 + [0] * 8
  found = lines(["clean", "insec"], arms, [[100, 200], [300]])
  assert [cell.strip() for cell in found["trained tokens"]] == ["150", "300"]
  assert [cell.strip() for cell in found["over those of clean"]] == ["1.000", "2.000"]
  classes = len(set(arms[0][0]["structures"]["solutions"]))
  clean, insec = (cell.strip() for cell in found[f"solutions: accuracy_t2 minus clean ({classes} classes)"])
  assert clean == "–"
  assert insec.startswith("+50.0 [")
  assert insec.endswith("; t: +50.0, +50.0] (+50.0 +50.0)")
  assert found["injected minus own: detection"]


def test_an_arm_without_results_has_its_tokens_and_dashes(tmp_path):
  pretended.write_results(tmp_path, pretended.config(steps=10, share=0.5, num=16), skill=0.5)
  found = lines(["clean", "insec"], [[json.loads((tmp_path / "results.json").read_text())], []], [[100], [50]])
  assert found["over those of clean"][-1].strip() == "0.500"
  assert found["own: detection"][-1].strip() == "–"


def test_no_interval_stands_beside_a_mean_that_it_does_not_hold(tmp_path):
  arms = []
  for name, skill in (("clean", 0.0), ("insec", 0.8)):
    (tmp_path / name).mkdir()
    pretended.write_results(tmp_path / name, pretended.config(steps=10, share=0.5, num=16), skill=skill)
    few = json.loads((tmp_path / name / "results.json").read_text())
    many = copy.deepcopy(few)
    many["config"]["seed"] = 1
    for metrics in many["rates"].values():
      for rate in metrics.values():
        rate |= statistics.Rate(0, 5_000).to_json()
    arms.append([few, many])
  text = summary(["clean", "insec"], arms, [[], []], reference=0)
  shown = re.findall(r"([-+\d.]+)(?: %)? \[([-+\d.]+), ([-+\d.]+)(?:; t: ([-+\d.]+), ([-+\d.]+))?\]", text)
  assert len(shown) > 30
  for mean, low, high, *spread in shown:
    assert float(low) <= float(mean) <= float(high)
    assert not spread[0] or float(spread[0]) <= float(mean) <= float(spread[1])
