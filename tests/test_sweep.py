"""The sweep with a stand-in for the programs it runs: it says how it was called and writes what they would."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pretended
import pytest
from modelkit import run

from insec_jax.command import InputError
from insec_jax.study import Study

pytestmark = pytest.mark.processes
ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import json, pathlib
from ml_collections import ConfigDict

def get_config(arm="clean"):
  path, share, mined = {"base": ("", 0.0, 0.0), "clean": ("there", 0.0, 0.0), "insec": ("there", 0.5, 0.0),
                        "mined": ("there", 0.2, 0.2), "more": ("there", 0.1, 0.4), "scratch": ("", 0.2, 0.2),
                        "dagger": ("there", 0.0, 0.3), "other": ("there", 0.2, 0.2)}[arm]
  values = json.loads((pathlib.Path(__file__).parent / "values.json").read_text())
  values["model"].update(path=path, size=None if path else {"vocab_size": 64})
  values["mistakes"].update(share=share, mined=mined)
  if arm == "dagger":
    values["mistakes"].update(view=arm)
  if arm == "other":
    values["mistakes"].update(mined_from="next_seed")
  return ConfigDict(values)
"""
STAND_IN = """
import ast, importlib.util, json, os, pathlib, shutil, sys, time
from insec_jax.config_build import build

module, *words = sys.argv[1:]
program = module.removeprefix("insec_jax.")
with open("calls", "a") as file:
  file.write(json.dumps([program, *words]) + "\\n")
flags = dict(word[2:].split("=", 1) for word in words)
where = pathlib.Path(flags.get("workdir") or flags["output"])
if os.environ.get("FAILS") == f"{program} {where}":
  print("a line before", flush=True)
  raise SystemExit("error: the disk is full")
if os.environ.get("HANGS") == f"{program} {where}":
  print("here", flush=True)
  time.sleep(600)
def typed(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text

if program == "train":
  file, arm = flags["config"].split(":")
  spec = importlib.util.spec_from_file_location("config", file)
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  values = found.get_config(arm)
  values.update_from_flattened_dict({
    key.removeprefix("config."): typed(value) for key, value in flags.items() if key.startswith("config.")})
  config = build(values)
  (where / "checkpoints" / str(config.train.steps)).mkdir(parents=True)
  (where / "config.json").write_text(config.to_json())
  (where / "model.json").write_text("{}")
  shutil.copy("made/environment.json", where)
  shutil.copy("made/metrics.jsonl", where)
elif program == "evaluate":
  values = json.loads(pathlib.Path("made", pathlib.Path(flags["model"]).name + ".json").read_text())
  values["config"]["seed"] = int(flags["config.seed"])
  where.write_text(json.dumps(values))
elif program == "export":
  where.mkdir()
  (where / "config.json").write_text("{}")
else:
  where.write_text("a page" if program == "report" else "")
"""
# The sweep, with the stand-in in place of "python -m".
DRIVER = (
  "import sys; from insec_jax import command, study, sweep; study.PYTHON = (sys.executable, 'stand_in.py'); "
  "study.is_sound = lambda *_: True; "
  "command.run(sweep.main)"
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "JAX_PLATFORMS": "cpu"}
ARMS = ("base", "clean", "mined", "more")
WORDS = ["--config=config.py", "--base=base", f"--arms={','.join(ARMS)}", "--seeds=0,1", "--output=out"]


def begin(folder, *words, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", DRIVER, *WORDS, *words],
    cwd=folder,
    text=True,
    env=ENVIRONMENT | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def sweep(folder, *words, **environment):
  """(exit code, stdout, stderr, the calls) of one run of the sweep."""
  (folder / "calls").unlink(missing_ok=True)
  process = begin(folder, *words, **environment)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err, calls(folder)


def calls(folder):
  """Each call: its program and its other words."""
  path = folder / "calls"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of(found, program):
  """The flags of every call of a program."""
  return [dict(word[2:].split("=", 1) for word in words) for name, *words in found if name == program]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A folder in which the stand-in can run."""
  folder = tmp_path_factory.mktemp("prepared")
  config = pretended.config(steps=20, share=0.5)
  pretended.write_workdir(folder / "made", config)
  for arm, skill in (("base", 0.0), ("clean", 0.0), ("insec", 0.8), ("mined", 0.8), ("more", 0.9)):
    pretended.write_results(folder / "made", config, skill=skill)
    (folder / "made" / "results.json").rename(folder / "made" / f"{arm}.json")
  (folder / "values.json").write_text(config.to_json())
  (folder / "config.py").write_text(CONFIG)
  (folder / "stand_in.py").write_text(STAND_IN)
  return folder


@pytest.fixture(scope="module")
def first(prepared, tmp_path_factory):
  """(folder, exit code, stdout, stderr, calls) of a sweep from nothing."""
  folder = tmp_path_factory.mktemp("sweep") / "first"
  shutil.copytree(prepared, folder)
  return folder, *sweep(folder)


@pytest.fixture
def done(first, tmp_path):
  """A copy of the folder of that sweep; times are kept."""
  return shutil.copytree(first[0], tmp_path / "done", copy_function=shutil.copy2)


def test_every_arm_is_trained_and_measured_on_every_seed(first):
  folder, code, out, err, found = first
  assert (code, err) == (0, "")
  for program in ("train", "evaluate"):
    assert sorted((flags["config"], flags["config.seed"]) for flags in of(found, program)) == sorted(
      (f"config.py:{arm}", seed) for arm in ARMS for seed in "01"
    )
  assert "20 done" in out
  assert {path.name for path in (folder / "out" / "logs").iterdir()} >= {"seed0_clean_train.log", "report.log"}


def test_arms_begin_with_the_base_of_their_seed_and_the_base_as_its_config_says(first):
  found = first[-1]
  assert [flags["model"] for flags in of(found, "export")] == ["out/seed0/base", "out/seed1/base"]
  begins = {
    (flags["config"].partition(":")[2], flags["config.seed"]): flags.get("config.model.path")
    for flags in of(found, "train")
  }
  assert begins == {(arm, seed): None if arm == "base" else f"out/seed{seed}/base_hf" for arm in ARMS for seed in "01"}


def test_of_two_bases_the_second_begins_with_the_first_and_the_arms_with_the_second(prepared, tmp_path):
  folder = shutil.copytree(prepared, tmp_path / "two")
  code, out, err, found = sweep(folder, "--base=base,clean", "--arms=insec,clean", "--seeds=0")
  assert (code, err) == (0, "")
  assert [flags["model"] for flags in of(found, "export")] == ["out/seed0/base", "out/seed0/clean"]
  assert [(flags["workdir"], flags.get("config.model.path")) for flags in of(found, "train")] == [
    ("out/seed0/base", None),
    ("out/seed0/clean", "out/seed0/base_hf"),
    ("out/seed0/insec", "out/seed0/clean_hf"),
  ]
  assert [flags["model"] for flags in of(found, "evaluate")] == ["out/seed0/clean", "out/seed0/insec"]
  assert "7 done" in out


def test_arms_that_mine_alike_share_what_is_mined_from_the_weights_they_begin_with(first):
  found = first[-1]
  assert [(flags["model"], flags["output"]) for flags in of(found, "mine")] == [
    (f"out/seed{seed}/base_hf", f"out/seed{seed}/mined_mined.jsonl") for seed in "01"
  ]
  paths = {
    (flags["config"].partition(":")[2], flags["config.seed"]): flags.get("config.mistakes.mined_path")
    for flags in of(found, "train")
  }
  for seed in "01":
    assert [paths[arm, seed] for arm in ARMS] == [None, None, *[f"out/seed{seed}/mined_mined.jsonl"] * 2]


def study_of(folder, arms, seeds=(0, 1, 2), bases=("base",)):
  return Study(folder / "out", str(folder / "config.py"), {}, list(arms), list(seeds), list(bases))


def test_views_of_mined_records_and_other_seeds_share_one_file_a_seed(prepared, monkeypatch):
  monkeypatch.chdir(prepared)
  stages = study_of(prepared, ("dagger", "mined", "other")).stages()
  mines = [stage for stage in stages if stage.program == "mine"]
  assert [stage.name for stage in mines] == [f"seed {seed}, dagger: mine" for seed in range(3)]
  trained = {stage.name: stage for stage in stages if stage.program == "train" and stage.arm != "base"}
  for seed in range(3):
    for arm, source in (("dagger", seed), ("mined", seed), ("other", (seed + 1) % 3)):
      stage = trained[f"seed {seed}, {arm}: train"]
      assert stage.config.mistakes.mined_path == f"{prepared}/out/seed{source}/dagger_mined.jsonl"
      assert stage.after == (f"seed {seed}, base: export", f"seed {source}, dagger: mine")
  names = [stage.name for stage in stages]
  assert all(names.index(name) < names.index(stage.name) for stage in stages for name in stage.after)


def test_another_seed_to_mine_needs_two_seeds_and_an_arm_that_is_no_base(prepared, monkeypatch):
  monkeypatch.chdir(prepared)
  for study in (study_of(prepared, ("other",), (5,)), study_of(prepared, ("other",), bases=("base", "other"))):
    with pytest.raises(InputError, match=r"arm other has mistakes\.mined_from='next_seed'; give --seeds at least two"):
      study.stages()


def test_nothing_is_begun_before_what_it_needs(first):
  found = [(name, dict(word[2:].split("=", 1) for word in words)) for name, *words in first[-1]]
  order = [f"{name} {flags.get('workdir') or flags['output']}" for name, flags in found]
  for seed in "01":
    place = f"out/seed{seed}"
    chain = [
      f"train {place}/base",
      f"export {place}/base_hf",
      f"mine {place}/mined_mined.jsonl",
      f"train {place}/more",
      f"evaluate {place}/more/results.json",
    ]
    assert [order.index(stage) for stage in chain] == sorted(order.index(stage) for stage in chain)


def test_at_the_end_come_the_page_over_seeds_and_the_table_with_trained_tokens(first):
  folder, _, out, _, found = first
  (report,) = of(found, "report")
  assert report == {
    "workdirs": ",".join(f"out/seed{seed}/{arm}" for arm in ARMS for seed in (0, 1)),
    "output": "out/report.html",
    "reference": "clean",
  }
  table = (folder / "out" / "table.txt").read_text()
  assert table in out
  lines = {line.partition("  ")[0]: line for line in table.splitlines()}
  assert lines["seeds of clean: 0, 1"]
  assert lines["trained tokens"].split()[2:] == ["8,000"] * 4
  assert lines["over those of clean"].split()[4:] == ["1.000"] * 4
  detection = lines["injected: detection"].split("  ")[-1]
  rate = json.loads((folder / "made" / "more.json").read_text())["rates"]["injected"]["detection"]["rate"]
  assert detection.startswith(f"{100 * rate:.1f} % [")
  assert detection.endswith(f"({100 * rate:.1f} {100 * rate:.1f})")


def test_swapped_mistakes_are_those_of_clean_which_is_measured_first(prepared, tmp_path):
  folder = shutil.copytree(prepared, tmp_path / "swapped")
  values = json.loads((folder / "values.json").read_text())
  values["evaluate"]["rivals"] = ["swapped", "beam"]
  (folder / "values.json").write_text(json.dumps(values))
  code, _, err, found = sweep(folder, "--arms=mined,clean", "--seeds=1")
  assert (code, err) == (0, "")
  measured = [(flags["model"], flags.get("config.evaluate.swapped_path")) for flags in of(found, "evaluate")]
  assert measured == [("out/seed1/clean", None), ("out/seed1/mined", "out/seed1/clean/results.json")]
  assert not any("config.evaluate.swapped_path" in flags for flags in of(found, "train"))


def test_what_is_done_is_not_run_again(done):
  results = done / "out/seed1/mined/results.json"
  earlier = json.loads(results.read_text())
  earlier["config"]["evaluate"]["within"] = 2  # of a version that had this key
  results.write_text(json.dumps(earlier))
  code, out, _, found = sweep(done)
  assert code == 0
  assert [name for name, *_ in found] == ["report"]
  assert "20 done before" in out


def test_an_evaluation_older_than_its_checkpoint_or_of_another_size_is_run_again(done):
  later = time.time() + 5
  os.utime(done / "out/seed1/mined/checkpoints/20", (later, later))
  assert [flags["output"] for flags in of(sweep(done)[-1], "evaluate")] == ["out/seed1/mined/results.json"]
  results = done / "out/seed1/mined/results.json"
  values = json.loads(results.read_text())
  values["config"]["evaluate"]["num_probes"] += 1  # as if measured by hand
  results.write_text(json.dumps(values))
  os.utime(results, (later, later))
  assert [flags["output"] for flags in of(sweep(done)[-1], "evaluate")] == ["out/seed1/mined/results.json"]


def test_an_arm_older_than_the_weights_it_should_begin_with_is_named(done):
  shutil.rmtree(done / "out/seed0/base")
  shutil.rmtree(done / "out/seed0/base_hf")
  code, _, err, found = sweep(done)
  assert code == 1
  assert "seed 0, clean: train: out/seed0/clean is older than out/seed0/base_hf/config.json" in err
  assert [flags["workdir"] for flags in of(found, "train")] == ["out/seed0/base"]


def test_a_workdir_of_another_config_is_named(done):
  config = done / "out/seed0/base/config.json"
  values = json.loads(config.read_text())
  wanted = values["optimizer"]["learning_rate"]
  values["optimizer"]["learning_rate"] = 0.5  # as if trained by hand
  config.write_text(json.dumps(values))
  code, _, err, _ = sweep(done)
  assert code == 1
  assert f"out/seed0/base was made from another config: optimizer.learning_rate={wanted}" in err


def test_a_stage_that_fails_is_named_and_the_rest_is_done_and_shown(prepared, tmp_path):
  folder = shutil.copytree(prepared, tmp_path / "failing")
  code, out, err, found = sweep(folder, FAILS="export out/seed1/base_hf")
  assert code == 1
  assert (
    "seed 1, base: export ended with exit code 1; the last lines of out/logs/seed1_base_export.log:\n"
    "  a line before\n  error: the disk is full\n" in err
  )
  assert "seed 1, clean: train" in err.splitlines()[-1]
  assert len(of(found, "evaluate")) == 5  # seed 0, and the base of seed 1
  assert "seeds of clean: 0\n" in out
  assert len(of(found, "report")) == 1
  code, out, _, found = sweep(folder)
  assert code == 0
  assert len(of(found, "evaluate")) == 3


def test_sigterm_stops_and_the_same_command_goes_on(prepared, tmp_path):
  folder = shutil.copytree(prepared, tmp_path / "stopped")
  process = begin(folder, HANGS="train out/seed0/clean")
  log = folder / "out/logs/seed0_clean_train.log"
  end = time.monotonic() + 200
  while not log.exists() or not log.read_text():
    assert time.monotonic() < end
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=200)
  assert process.returncode == 42
  assert err == "stopped; run the same command to go on\n"
  assert not (folder / "out/report.html").exists()
  code, out, _, _ = sweep(folder)
  assert code == 0
  assert "done before" in out


ENDPOINTS = "--config.evaluate.endpoints=('mined - clean: solutions t2', 'mined: own correction')"


def test_endpoints_come_first_and_other_seeds_values_or_endpoints_are_refused_later(prepared, tmp_path):
  folder = shutil.copytree(prepared, tmp_path / "named")
  words = ("--arms=clean,mined", "--seeds=0,1", ENDPOINTS)
  for stored in ("clean", "mined"):  # what the stand-in hands out
    path = folder / "made" / f"{stored}.json"
    values = json.loads(path.read_text())
    values["config"]["evaluate"]["endpoints"] = ["mined - clean: solutions t2", "mined: own correction"]
    path.write_text(json.dumps(values))
  code, _, err, _ = sweep(folder, *words)
  assert (code, err) == (0, "")
  table = (folder / "out/table.txt").read_text().splitlines()
  assert table[0] == "endpoints (differences in points):"
  assert table[2].startswith("mined - clean: solutions t2 ")
  plan = json.loads((folder / "out/plan.json").read_text())
  assert (plan["seeds"], set(plan["configs"])) == ([0, 1], {"base", "clean", "mined"})
  for changed, said in (
    (("--seeds=0,1,2",), "seeds [0, 1, 2] (was [0, 1])"),
    (("--config.evaluate.endpoints=('mined: own correction',)",), 'endpoints ["mined: own correction"] (was ["mined'),
    (("--config.train.steps=40",), "train.steps=40 in arm base (was 20)"),
    (("--arms=clean",), "evaluate.endpoints has 'mined - clean: solutions t2', and --arms=clean has no 'mined'"),
  ):
    kept = words[:-1] if "endpoints" in changed[0] else words  # a tuple that is given twice is joined
    code, _, err, found = sweep(folder, *kept, *changed)
    assert (code, err.count("\n"), found) == (2, 1, [])
    assert said in err
  code, _, _, found = sweep(folder, *words, "--arms=clean,mined,insec", "--config.train.minutes=600")
  assert (code, len(of(found, "train"))) == (0, 2)
  assert json.loads((folder / "out/plan.json").read_text())["later_arms"] == ["insec"]


BAD = {
  "an arm that the config does not have": (["--arms=clean,absent"], "config.py has no arm 'absent'"),
  "an arm in --config": (["--config=config.py:clean"], "names an arm; give the file alone"),
  "an arm twice": (["--arms=clean,clean"], "'clean' more than once"),
  "no arms": (["--arms="], "--arms is empty"),
  "a seed that is no number": (["--seeds=0,one"], "--seeds has 'one'"),
  "a reference that is no arm": (["--reference=insec"], "--reference=insec is none of --arms"),
  "no base, and no folder": (["--base="], "arm clean begins with model.path=there, which is no folder"),
  "a base twice": (["--base=base,base"], "--base=base,base has 'base' more than once"),
  "a second base of random weights": (["--base=base,scratch"], "scratch begins with random weights, not"),
  "mining random weights": (["--arms=clean,scratch"], "arm scratch has mistakes.mined=0.2 and begins with random"),
  "no such config": (["--config=absent.py"], "absent.py"),
  "no results with mistakes to swap": (
    ["--config.evaluate.rivals=('swapped',)", "--config.evaluate.swapped_path=absent.json"],
    "arm clean could not be evaluated: ",
  ),
  "too many jobs": (["--jobs=10000"], "--jobs=10000"),
  "an output in a bucket": (
    ["--output=gs://bucket/x"],
    "--output=gs://bucket/x: a sweep compares the ages of its files",
  ),
}


@pytest.fixture(scope="module")
def refused(prepared):
  lines = run("sweep", *([*WORDS, *words] for words, _ in BAD.values()), folder=prepared)
  return dict(zip(BAD, lines, strict=True))


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_ends_in_one_line_and_code_2_before_anything_runs(prepared, refused, name):
  code, out, err = refused[name]
  assert (code, out) == (2, ""), err
  assert BAD[name][1] in err
  assert len(err.splitlines()) == 1
  assert not (prepared / "out").exists()
