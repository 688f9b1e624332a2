import json

import pretended
import pytest

from insec_jax.command import InputError
from insec_jax.config_build import REMOVED
from insec_jax.pages.runs import in_words, over_seeds, read_run


def runs(tmp_path, *places):
  """Runs at (folder, seed, share of mistakes)."""
  found = []
  for place, seed, share in places:
    folder = pretended.write_workdir(tmp_path / place, pretended.config(steps=10, share=share))
    config = json.loads((folder / "config.json").read_text()) | {"seed": seed}
    config["model"] |= {"path": f"{place}_start", "size": None}
    (folder / "config.json").write_text(json.dumps(config))
    found.append(read_run(folder, place))
  return found


def test_runs_that_differ_in_seed_and_in_what_they_began_with_are_one_arm(tmp_path):
  arms = over_seeds(runs(tmp_path, ("1/clean", 1, 0.0), ("1/insec", 1, 0.5), ("0/clean", 0, 0.0), ("0/insec", 0, 0.5)))
  assert [in_words(arm) for arm in arms] == ["clean (seeds 0, 1)", "insec (seeds 0, 1)"]


def test_runs_of_one_name_but_another_config_are_an_arm_each(tmp_path):
  arms = over_seeds(runs(tmp_path, ("a/insec", 0, 0.1), ("b/insec", 1, 0.5)))
  assert [arm.name for arm in arms] == ["a/insec", "b/insec"]


def test_runs_of_one_seed_are_never_put_together(tmp_path):
  arms = over_seeds(runs(tmp_path, ("a/insec", 0, 0.5), ("b/insec", 0, 0.5), ("c/insec", 1, 0.5)))
  assert [arm.name for arm in arms] == ["a/insec", "b/insec", "c/insec"]


def test_a_run_of_a_version_with_removed_keys_has_the_config_of_this_one(tmp_path):
  config = pretended.config(steps=10, share=0.5)
  folder = pretended.write_workdir(tmp_path / "w", config)
  pretended.write_results(folder, config, skill=0.9)
  now = read_run(folder, "w")
  results = json.loads((folder / "results.json").read_text())
  earlier = json.loads((folder / "config.json").read_text())
  for name, (value, _) in REMOVED.items():
    section, key = name.split(".")
    earlier[section][key] = value
  for name, content in (("config.json", earlier), ("results.json", {**results, "config": earlier})):
    (folder / name).write_text(json.dumps(content))
  run = read_run(folder, "w")
  assert (run.config, run.results["config"]["task"]) == (now.config, now.results["config"]["task"])
  earlier["evaluate"]["within"] = 5
  (folder / "results.json").write_text(json.dumps({**results, "config": earlier}))
  with pytest.raises(InputError, match=r"w/results\.json: config has evaluate\.within=5, a key that version"):
    read_run(folder, "w")
