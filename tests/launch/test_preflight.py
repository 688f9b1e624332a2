"""launch/preflight.py: what a host answers before a run, and the table over all hosts."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import datakit
import forking
import hubkit
import pytest
from modelkit import ROOT, save_model
from training_runs import write_home

FILE = ROOT / "launch" / "preflight.py"
PATH = f"sys.path.insert(0, {str(FILE.parent)!r})"  # as Python does for a script
CODE = f"import runpy, sys; {PATH}; runpy.run_path({str(FILE)!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def preflight():
  sys.path.insert(0, str(FILE.parent))  # as Python does for a script
  spec = importlib.util.spec_from_file_location("preflight", FILE)
  made = importlib.util.module_from_spec(spec)
  sys.modules["preflight"] = made  # dataclasses look up their module
  spec.loader.exec_module(made)
  return made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("home")
  write_home(folder)
  return folder


def found(home, *command, **variables):
  """{check: (result, value)} of the command on this host."""
  done = forking.run("preflight", "check", "--host=a", "--", *command, code=CODE, folder=home, **variables)
  assert done.returncode == 0, done.stderr
  answers = map(json.loads, done.stdout.splitlines())
  return {answer["check"]: (answer["result"], answer["value"]) for answer in answers}


def train(*words, model=""):
  return ("python", "-m", "insec_jax.train", "--config", f"config.py:{model}", *words)


def line(host, check, result="ok", value="v", same=False):
  return json.dumps({"host": host, "check": check, "result": result, "value": value, "same": same})


def test_hosts_with_one_answer_share_a_row_and_other_lines_are_left_out(preflight):
  lines = ["Warning: ssh says something", line("a", "disk"), '{"host": "a"}', "[1]", line("b", "disk")]
  shown, num_bad = preflight.table(lines, ["a", "b"])
  assert [row.split() for row in shown.splitlines()] == [
    ["check", "hosts", "result", "found"],
    ["disk", "all", "2", "ok", "v"],
  ]
  assert num_bad == 0


@pytest.mark.parametrize(
  ("lines", "row"),
  [
    ([line("a", "disk"), line("b", "disk", "MISSING", "1 GB free")], ["disk", "b", "MISSING", "1", "GB", "free"]),
    ([line("a", "disk")], ["answer", "b", "MISSING", "no", "line"]),
    ([line("a", "versions", same=True), line("b", "versions", value="w", same=True)], ["versions", "b", "MISSING"]),
  ],
)
def test_a_host_that_lacks_something_differs_or_is_silent_has_its_own_row(preflight, lines, row):
  shown, num_bad = preflight.table(lines, ["a", "b"])
  assert num_bad >= 1
  assert row in [words.split()[: len(row)] for words in shown.splitlines()]


def test_the_table_ends_with_exit_code_2_and_one_line_when_something_is_missing(home):
  code = CODE.replace("import runpy, sys;", "import runpy, sys; sys.argv[1:] = ['table', '--hosts', 'a,b'];")
  ready = forking.run("preflight", code=code, folder=home, given="\n".join([line("a", "disk"), line("b", "disk")]))
  assert (ready.returncode, ready.stderr) == (0, "")
  silent = forking.run("preflight", code=code, folder=home, given=line("a", "disk"))
  assert (silent.returncode, silent.stderr.count("\n")) == (2, 1)
  assert silent.stderr.startswith("error: the run would not start: 1 of the rows above")


@pytest.mark.parametrize(
  ("words", "program"),
  [
    (["python", "-m", "insec_jax.mine"], "mine"),
    ([".venv/bin/insec", "train"], "train"),
    (["python3", "-m", "insec_jax", "export"], "export"),
    (["python", "-m", "insec_jax.files"], ""),
    (["bash", "-c", "train"], ""),
  ],
)
def test_the_program_of_a_command_is_known_by_its_words(preflight, words, program):
  assert preflight.program_of(words) == program


def test_the_words_of_the_config_are_found_in_either_spelling(preflight):
  words = ["x", "--config", "a.py", "--workdir=w", "--config.a.b=c", "--noconfig.d", "--model", "m", "--config.e", "f"]
  assert preflight.config_words(words) == ["--config", "a.py", "--config.a.b=c", "--noconfig.d", "--config.e", "f"]
  assert [preflight.flag(words, name) for name in ("workdir", "model", "output")] == ["w", "m", None]


def test_a_run_that_can_start_has_nothing_missing_and_leaves_no_file(home):
  before = sorted(home.rglob("*"))
  answers = found(home, *train("--workdir=new/run"))
  assert {check: result for check, (result, _) in answers.items()} == dict.fromkeys(
    ("versions", "devices", "config", "command", "data.path", "log.to", "workdir", "disk"), "ok"
  )
  assert "1 file, the first record of each was read" in answers["data.path"][1]
  assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
  ("words", "check", "said"),
  [
    (["--workdir="], "command", "train needs --workdir=..."),
    (["--workdir=a", "--workdirr=b"], "command", "train has no flag --workdirr"),
    (["--config.log.to=('wandb',)"], "log.to", "log.to has wandb"),
    (["--config.train.steps=-1"], "config", "train.steps=-1"),
    (["--config.train.stepps=1"], "config", "stepps"),
    (["--config.data.path=no.jsonl"], "data.path", "no.jsonl"),
    (["--workdir=/proc/run"], "workdir", "/proc"),
    (["--workdir=s3://b/run"], "workdir", "s3:// is not supported"),
  ],
)
def test_what_a_run_lacks_is_said_in_one_line(home, words, check, said):
  result, value = found(home, *train("--workdir=run", *words))[check]
  assert (result, value.count("\n")) == ("MISSING", 0)
  assert said in value


def test_a_folder_without_weights_is_no_model(home):
  result, value = found(home, *train("--workdir=run", model="tokenizer"))["model.path"]
  assert (result, value) == (
    "MISSING",
    "model.path=tokenizer holds neither *.safetensors nor checkpoints; give a model's folder",
  )


def test_a_gpu_that_is_asked_for_and_is_not_there_is_missing(preflight, monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert preflight.devices("") == "no GPU and no TPU"
  with pytest.raises(preflight.NotReadyError, match=r"JAX_PLATFORMS=cuda, but no such device is here"):
    preflight.devices("cuda")


@pytest.mark.parametrize(
  ("fits", "code", "said"),
  [
    (True, 0, "v6e:4x4: GiB a chip peak 1 of 31"),
    (False, 0, "v6e:4x4: GiB a chip peak 1 of 31: does not fit; insec fit --topology=v6e:4x4 says what would help"),
    (True, 2, "fit ended with exit code 2: model.path is wrong"),
  ],
)
def test_a_step_that_does_not_fit_or_cannot_be_compiled_is_missing(preflight, monkeypatch, fits, code, said):
  def run(words, **_):
    (output,) = (word.removeprefix("--output=") for word in words if word.startswith("--output="))
    pathlib.Path(output).write_text(json.dumps([{"fits": fits}]))
    assert words[-2:] == ["--program=train", "--config=toy"]
    text = "== v6e:4x4\n   GiB a chip     peak 1 of 31\n"
    return subprocess.CompletedProcess(words, code, text, "error: model.path is wrong\n")

  monkeypatch.setattr(preflight.subprocess, "run", run)
  answer = preflight.attempt("fit", lambda: preflight.fits(["x", "--config=toy"], "train", "v6e:4x4"))
  assert (answer.result, answer.value) == ("ok" if (fits, code) == (True, 0) else "MISSING", said)


@pytest.mark.processes
def test_the_step_of_a_run_is_compiled_where_a_topology_is_given(home):
  words = json.dumps(["preflight", "check", "--fit=local", "--", *train("--workdir=run")])
  done = forking.start(f"import sys; sys.argv = {words}; {CODE}", folder=home, given="")
  answers = {answer["check"]: answer for answer in map(json.loads, done.stdout.splitlines())}
  assert answers["fit"]["result"] == "ok", done.stderr
  assert answers["fit"]["value"].startswith("local: GiB a chip weights ")


def test_a_full_disk_is_named_with_what_is_needed(preflight, tmp_path, monkeypatch):
  monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: preflight.shutil._ntuple_diskusage(9e9, 6e9, 3e9))
  assert preflight.room({str(tmp_path / "new"): 0.5}).endswith("new needs 2.5 GB")
  with pytest.raises(preflight.NotReadyError, match=r"3.0 GB are free, 4.0 GB are needed; free some, or set HF_HOME"):
    preflight.room({str(tmp_path): 1.5, str(tmp_path / "b"): 0.5})


def test_a_bucket_is_written_to_and_left_as_it_was(home, bucket):
  answers = found(home, *train(f"--workdir={bucket.url}/run"), **bucket.variables)
  assert answers["workdir"] == ("ok", f"{bucket.url}/run: an object was written and removed")
  assert bucket.names() == []
  result, value = found(home, *train("--workdir=gs://no-such-bucket/run"), **bucket.variables)["workdir"]
  assert (result, "there is no bucket no-such-bucket" in value) == ("MISSING", True)


@pytest.mark.processes
def test_a_model_of_the_hub_is_reached_without_its_weights_and_needs_room_for_them(tmp_path):
  write_home(tmp_path)
  with hubkit.running() as hub:
    files = hubkit.files_of(save_model(tmp_path / "hf", datakit.bpe_tokenizer()))
    hub.add("models/org/name", files, "v1")
    hub.add("models/org/gated", files, "v1", gated=True)
    for name, result, said in (
      ("org/name@v1", "ok", "org/name@v1 of the Hub, weights 0.00 GB"),
      ("org/none", "MISSING", "the Hub has no model of this name"),
      ("org/gated@v1", "MISSING", "the model is gated"),
    ):
      words = json.dumps(["preflight", "check", "--", *train(model=name)])
      code = f"import sys; sys.argv = {words}; {CODE}"
      done = forking.start(code, folder=tmp_path, given="", **hub.variables(tmp_path / "cache"))
      answers = {answer["check"]: answer for answer in map(json.loads, done.stdout.splitlines())}
      assert answers["model.path"]["result"] == result, done.stderr
      assert said in answers["model.path"]["value"]
    assert [get for get in hub.gets if "safetensors" in get] == []
