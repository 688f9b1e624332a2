import json

import pretended

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
