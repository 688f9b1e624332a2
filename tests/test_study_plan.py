"""The plan of a study: written before its first run, and held against every later one."""

import dataclasses
import json
import pathlib

import pretended
import pytest

from insec_jax import study_plan
from insec_jax.command import InputError
from insec_jax.study import Study, StudyStage

NAMED = ("mined - clean: solutions t2",)


def study(output, *, arms=("clean", "mined"), seeds=(0, 1), endpoints=NAMED, **train):
  """A study and its stages; a `train` value is one of every arm."""
  made = Study(output, "config.py", {}, list(arms), list(seeds), [])
  config = pretended.config(steps=20, share=0.5)
  config = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, **train),
    evaluate=dataclasses.replace(config.evaluate, endpoints=endpoints),
  )
  return made, [stage(arm, dataclasses.replace(config, seed=seed)) for seed in seeds for arm in arms]


def stage(arm, config):
  fields = {"program": "train", "arm": arm, "config": config, "start": None}
  return StudyStage(f"{config.seed} {arm}", (), "log", lambda: False, **fields)


def test_the_same_study_goes_on_with_values_that_change_no_result(tmp_path):
  study_plan.hold(*study(tmp_path))
  first = json.loads((tmp_path / "plan.json").read_text())
  assert (first["endpoints"], first["seeds"]) == (list(NAMED), [0, 1])
  assert first["configs"]["mined"]["train.steps"] == 20
  assert "seed" not in first["configs"]["mined"]
  study_plan.hold(*study(tmp_path, minutes=5.0, keep=7))
  assert json.loads((tmp_path / "plan.json").read_text()) == first


@pytest.mark.parametrize(
  ("changed", "said"),
  [
    ({"seeds": (0, 1, 2)}, r"now differ: seeds \[0, 1, 2\] \(was \[0, 1\]\); give the values"),
    ({"endpoints": ("clean - mined: solutions t2",)}, r'endpoints \["clean - mined: solutions t2"\] \(was \["mined'),
    ({"endpoints": ()}, r"endpoints \[\] \(was"),
    ({"steps": 30}, r"train.steps=30 in arm clean \(was 20\), train.steps=30 in arm mined \(was 20\)"),
    ({"curve_points": 4}, r"train.curve_points=4 in arm clean \(was 0\)"),
  ],
)
def test_a_study_with_other_values_is_refused_by_what_differs(tmp_path, changed, said):
  study_plan.hold(*study(tmp_path))
  before = (tmp_path / "plan.json").read_bytes()
  with pytest.raises(InputError, match=said) as caught:
    study_plan.hold(*study(tmp_path, **changed))
  assert "\n" not in str(caught.value)
  assert (tmp_path / "plan.json").read_bytes() == before


def test_another_commit_or_change_of_the_package_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(study_plan.workdir, "commit", lambda: ("a" * 40, "d"))
  study_plan.hold(*study(tmp_path))
  monkeypatch.setattr(study_plan.workdir, "commit", lambda: ("b" * 40, "e"))
  with pytest.raises(InputError, match=f'commit "{"b" * 40}" .was "{"a" * 40}"., changes "e" .was "d".'):
    study_plan.hold(*study(tmp_path))


def test_changes_are_those_of_the_whole_package(monkeypatch):
  asked = []
  monkeypatch.setattr(study_plan.workdir, "_git", lambda *words: asked.append(words) or "x")
  assert study_plan.workdir.commit()[0] == "x"
  assert (pathlib.Path(asked[-1][-1]) / "study_plan.py").is_file()


def test_arms_may_be_added_and_are_named_as_later(tmp_path):
  study_plan.hold(*study(tmp_path))
  study_plan.hold(*study(tmp_path, arms=("clean", "mined", "dagger")))
  study_plan.hold(*study(tmp_path))
  plan = json.loads((tmp_path / "plan.json").read_text())
  assert (plan["later_arms"], set(plan["configs"])) == (["dagger"], {"clean", "mined", "dagger"})


def test_results_without_the_plan_that_they_were_measured_by_are_refused(tmp_path):
  (tmp_path / "seed1/mined").mkdir(parents=True)
  (tmp_path / "seed1/mined/results.json").write_text("{}")
  for given in ({}, {"endpoints": ()}):
    with pytest.raises(InputError, match=r"mined/results.json was measured before, and its plan, .*plan.json, is not"):
      study_plan.hold(*study(tmp_path, **given))
  assert not (tmp_path / "plan.json").exists()


def test_endpoints_are_of_arms_that_run_and_the_same_in_all(tmp_path):
  with pytest.raises(InputError, match="--arms=clean,dagger has no 'mined'; add the arm"):
    study_plan.endpoints(*study(tmp_path, arms=("clean", "dagger")))
  made, stages = study(tmp_path)
  evaluate = dataclasses.replace(stages[0].config.evaluate, endpoints=())
  other = dataclasses.replace(stages[0], config=dataclasses.replace(stages[0].config, evaluate=evaluate))
  with pytest.raises(InputError, match=r"is \[\] in arm clean and \[.*\] in arm mined; name the same"):
    study_plan.endpoints(made, [other, stages[1]])


def test_a_plan_that_was_edited_is_refused(tmp_path):
  study_plan.hold(*study(tmp_path))
  path = tmp_path / "plan.json"
  path.write_text(path.read_text().replace('"train.steps": 20', '"train.steps": 30'))
  with pytest.raises(InputError, match="its digest is not that of its configs"):
    study_plan.hold(*study(tmp_path, steps=30))
