"""The plan of a study: written before its first run, and held against every later one."""

import dataclasses
import json
import pathlib

import datakit
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


@pytest.mark.parametrize(
  ("name", "value", "said"),
  [
    ("configs", [], "configs is \\[\\], which no study writes"),
    ("configs", {"clean": 1}, "configs has 1 for arm clean"),
    ("seeds", None, "seeds is null"),
    ("later_arms", "no", 'later_arms is "no"'),
    ("digest", 1, "digest is 1"),
    ("digest", "a", "its digest is not that of its configs"),
    (None, "{", "not JSON at column 2"),
    (None, "[]", "holds \\[\\]"),
    (None, "", "not JSON at column 1"),
  ],
)
def test_a_damaged_plan_is_one_line_that_says_what_is_wrong_and_what_to_do(tmp_path, name, value, said):
  study_plan.hold(*study(tmp_path))
  path = tmp_path / "plan.json"
  path.write_text(value if name is None else json.dumps(json.loads(path.read_text()) | {name: value}))
  with pytest.raises(InputError, match=f"plan.json:? .*{said}") as caught:
    study_plan.hold(*study(tmp_path))
  assert str(caught.value).endswith("bring the plan back as it was, or give another --output")
  assert "\n" not in str(caught.value)


def evaluation(tmp_path, config=None, **changes):
  """A study and the evaluation of its only arm, with these values of the evaluate section."""
  config = config or pretended.config(steps=20, share=0.5)
  config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **changes))
  return Study(tmp_path / "out", "config.py", {}, ["clean"], [0], []), [
    dataclasses.replace(stage("clean", config), program="evaluate")
  ]


def test_what_only_evaluation_reads_is_seen_before_anything_is_trained(tmp_path):
  path = tmp_path / "results.json"
  swaps = {"rivals": ("swapped",), "swapped_path": str(path)}
  with pytest.raises(InputError, match=r"arm clean could not be evaluated: .*results.json"):
    study_plan.check_evaluations(*evaluation(tmp_path, **swaps))
  wrong = {"prompt": "no such problem", "before": [], "wrong": "a", "error": "calc"}
  for held, said in (
    ({}, "has no 'mistakes'"),
    ({"mistakes": []}, "has no mistake to continue from"),
    ({"mistakes": [wrong]}, "in a problem that is not solved here"),
  ):
    path.write_text(json.dumps(held))
    with pytest.raises(InputError, match=said):
      study_plan.check_evaluations(*evaluation(tmp_path, **swaps))
  with pytest.raises(InputError, match=r"evaluate.max_size=1000, taken as task.max_size"):
    study_plan.check_evaluations(*evaluation(tmp_path, max_size=1_000))
  with pytest.raises(InputError, match=r"task.name='records' has no step checker"):
    study_plan.check_evaluations(*evaluation(tmp_path, datakit.config()))
  own = tmp_path / "out" / "seed0" / "clean" / "results.json"  # the study makes it
  study_plan.check_evaluations(*evaluation(tmp_path, rivals=("swapped",), swapped_path=str(own)))


ARMS = """
from insec_jax.config import defaults

def get_config(arm):
  c = defaults()
  c.model.size, c.model.path = ({"vocab_size": 64}, "") if arm == "base" else (None, "there")
  c.task.update(name="graph", min_size=1, max_size=2, modulus=10)
  c.data.num_records = 10
  c.mistakes.rewind = arm in ("base", "rewinds")
  if arm == "file":
    c.mistakes.update(rewind=True, mined=0.5, mined_path="mined.jsonl", mined_from="next_seed")
  return c
"""


@pytest.mark.parametrize(
  ("arm", "said"),
  [
    ("rewinds", None),
    ("plain", "arm plain goes on from base, which is trained with mistakes.rewind=True, and would lose it; set it in"),
    ("file", "arm file has mistakes.mined_from='next_seed', and with mistakes.mined_path nothing is mined"),
  ],
)
def test_an_arm_that_would_lose_a_value_of_its_base_or_leave_one_unread_is_refused(tmp_path, arm, said):
  (tmp_path / "config.py").write_text(ARMS)
  made = Study(tmp_path / "out", str(tmp_path / "config.py"), {}, [arm], [0, 1], ["base"])
  if said is None:
    assert made.stages()
    return
  with pytest.raises(InputError, match=said):
    made.stages()


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
