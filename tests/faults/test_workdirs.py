"""Every file of a workdir damaged in many ways: each program refuses it in one line, or gives the right outcome."""

import json
import os
import pathlib
import random
import re
import shutil

import pytest
from workdirs import HUNG, Tries, contents, copy, lay_out, lines, litter

pytestmark = pytest.mark.faults
GROUPS = 6  # of tries, each a test


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("workdirs")
  lay_out(folder)
  return folder


@pytest.fixture(scope="module")
def whole(home, programs):
  """A workdir whose training is done."""
  assert programs.train("whole").wait().code == 0
  return home / "whole"


@pytest.fixture(scope="module")
def half(home, whole, programs):
  """A workdir whose newest checkpoint is that of step 4, as after a kill in step 6; `out` holds its right export."""
  workdir = copy(whole, home / "half")
  shutil.rmtree(workdir / "checkpoints" / "6")
  assert programs.export("half", "right").wait().code == 0
  assert programs.generate("half", "right.jsonl").wait().code == 0
  return workdir


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def flip_first(path):
  content = bytearray(path.read_bytes())
  content[0] ^= 128
  path.write_bytes(content)


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
  path.unlink()


def empty(path):
  path.write_bytes(b"")


def make_folder(path):
  path.unlink()
  path.mkdir()


def make_fifo(path):
  path.unlink()
  os.mkfifo(path)


def loop_link(path):
  path.unlink()
  path.symlink_to(path.name)


def append_nul(path):
  path.write_bytes(path.read_bytes() + b"\0" * 20)


KINDS = (flip, flip_first, truncate, delete, empty, make_folder, make_fifo, loop_link, append_nul)
BESIDE = (
  "config.json",
  "model.json",
  "environment.json",
  "receipt.txt",
  "metrics.jsonl",
  "tokenizer/tokenizer.json",
  "tokenizer/tokenizer_config.json",
)
IN_CHECKPOINT = (
  "_CHECKPOINT_METADATA",
  "params/_METADATA",
  "params/_sharding",
  "params/manifest.ocdbt",
  "params/d/*",
  "params/ocdbt.process_0/manifest.ocdbt",
  "params/ocdbt.process_0/d/*",
  "params/array_metadatas/process_0",
  "optimizer/_METADATA",
  "optimizer/manifest.ocdbt",
  "optimizer/d/*",
  "optimizer/ocdbt.process_0/d/*",
  "optimizer/_sharding",
  "optimizer/array_metadatas/process_0",
)


def edit_json(name, change):
  def edit(workdir):
    fields = json.loads((workdir / name).read_text())
    change(fields)
    (workdir / name).write_text(json.dumps(fields))

  return edit


def edit_text(name, before, after):
  """Orbax writes JSON with spaces or without, by its version: `before` stands for both."""
  spaced = re.compile(re.escape(before).replace(":", ": ?"))

  def edit(workdir):
    text = (workdir / name).read_text()
    assert spaced.search(text)
    (workdir / name).write_text(spaced.sub(after.replace("\\", r"\\"), text, count=1))

  return edit


def swap(one, other):
  def edit(workdir):
    (workdir / one).rename(workdir / "held")
    (workdir / other).rename(workdir / one)
    (workdir / "held").rename(workdir / other)

  return edit


def swap_ids(workdir):
  path = workdir / "tokenizer" / "tokenizer.json"
  fields = json.loads(path.read_text())
  vocab = fields["model"]["vocab"]
  one, other = sorted(vocab)[3:5]
  vocab[one], vocab[other] = vocab[other], vocab[one]
  path.write_text(json.dumps(fields))


def edit_line(number, change):
  def edit(workdir):
    path = workdir / "metrics.jsonl"
    rows = path.read_bytes().split(b"\n")
    rows[number] = change(rows[number])
    path.write_bytes(b"\n".join(rows))

  return edit


def make(path, what):
  def edit(workdir):
    (workdir / path).parent.mkdir(parents=True, exist_ok=True)
    what(workdir / path)

  return edit


def set_mode(name, mode):
  return lambda workdir: (workdir / name).chmod(mode)


def replace(name, what):
  def edit(workdir):
    shutil.rmtree(workdir / name)
    what(workdir / name)

  return edit


EDITS = {
  "rope_theta": edit_json("model.json", lambda fields: fields.update(rope_theta=20_000.0)),
  "number of heads": edit_json("model.json", lambda fields: fields.update(num_attention_heads=8)),
  "10^9 layers": edit_json("model.json", lambda fields: fields.update(num_hidden_layers=10**9)),
  "norm eps": edit_json("model.json", lambda fields: fields.update(rms_norm_eps=1e-6)),
  "end ids": edit_json("model.json", lambda fields: fields.update(eos_token_id=3)),
  "token ids swapped": swap_ids,
  "config seed": edit_json("config.json", lambda fields: fields.update(seed=1)),
  "config learning rate": edit_json("config.json", lambda fields: fields["optimizer"].update(learning_rate=1.0)),
  "config unit": edit_json("config.json", lambda fields: fields["mistakes"].update(unit="sentence")),
  "config flag": edit_json("config.json", lambda fields: fields["tokenizer"].update(flag="<fix>", fix="<err>")),
  "config wrong type": edit_json("config.json", lambda fields: fields["train"].update(steps="many")),
  "config unknown key": edit_json("config.json", lambda fields: fields.update(more=1)),
  "config without section": edit_json("config.json", lambda fields: fields.pop("train")),
  "config a list": lambda workdir: (workdir / "config.json").write_text("[]"),
  "config of 1e999": edit_text("config.json", '"seed": 0', '"seed": 1e999'),
  "config nested": lambda workdir: (workdir / "config.json").write_text("[" * 100_000),
  "environment a list": lambda workdir: (workdir / "environment.json").write_text("[]"),
  "environment empty object": lambda workdir: (workdir / "environment.json").write_text("{}"),
  "environment resumed a number": edit_json("environment.json", lambda fields: fields.update(resumed=3)),
  "totals": edit_text("checkpoints/4/_CHECKPOINT_METADATA", '"totals":[[[', '"totals":[[[1'),
  "step in metadata": edit_text("checkpoints/4/_CHECKPOINT_METADATA", '"step":4', '"step":2'),
  "fingerprints gone": edit_text("checkpoints/4/_CHECKPOINT_METADATA", '"fingerprints"', '"fingerprint"'),
  "metadata a list": lambda workdir: (workdir / "checkpoints/4/_CHECKPOINT_METADATA").write_text("[]"),
  "metadata without ours": edit_text("checkpoints/4/_CHECKPOINT_METADATA", '"run"', '"ran"'),
  "params of another step": swap("checkpoints/2/params", "checkpoints/4/params"),
  "optimizer of another step": swap("checkpoints/2/optimizer", "checkpoints/4/optimizer"),
  "metadata of another step": swap("checkpoints/2/_CHECKPOINT_METADATA", "checkpoints/4/_CHECKPOINT_METADATA"),
  "step folders swapped": swap("checkpoints/2", "checkpoints/4"),
  "step renamed": lambda workdir: (workdir / "checkpoints/4").rename(workdir / "checkpoints/5"),
  "step renamed past the end": lambda workdir: (workdir / "checkpoints/4").rename(workdir / "checkpoints/900"),
  "step renamed to the last": lambda workdir: (workdir / "checkpoints/4").rename(workdir / "checkpoints/6"),
  "step with a zero": lambda workdir: (workdir / "checkpoints/4").rename(workdir / "checkpoints/04"),
  "step in other digits": lambda workdir: (workdir / "checkpoints/4").rename(workdir / "checkpoints/\u0664"),
  "a step twice": lambda workdir: shutil.copytree(workdir / "checkpoints/2", workdir / "checkpoints/04"),
  "a step that is a file": make("checkpoints/5", pathlib.Path.touch),
  "a step that is a FIFO": make("checkpoints/5", os.mkfifo),
  "a step that is empty": make("checkpoints/5", pathlib.Path.mkdir),
  "a step that links in a ring": make("checkpoints/5", lambda path: path.symlink_to("5")),
  "a huge step": make("checkpoints/" + "9" * 200, pathlib.Path.mkdir),
  "a stranger among the steps": make("checkpoints/notes.txt", pathlib.Path.touch),
  "an unfinished step": lambda workdir: shutil.copytree(
    workdir / "checkpoints/4", workdir / "checkpoints/6.orbax-checkpoint-tmp-1"
  ),
  "params emptied": replace("checkpoints/4/params", pathlib.Path.mkdir),
  "params a file": replace("checkpoints/4/params", pathlib.Path.touch),
  "params a FIFO": replace("checkpoints/4/params", os.mkfifo),
  "a stranger in a step": make("checkpoints/4/more", pathlib.Path.touch),
  "a FIFO in params": make("checkpoints/4/params/more", os.mkfifo),
  "every step gone": replace("checkpoints", pathlib.Path.mkdir),
  "no folder of steps": lambda workdir: shutil.rmtree(workdir / "checkpoints"),
  "steps a file": replace("checkpoints", pathlib.Path.touch),
  "steps a FIFO": replace("checkpoints", os.mkfifo),
  "a stranger in the tokenizer": make("tokenizer/added_tokens.json", lambda path: path.write_text("{}")),
  "a FIFO in the tokenizer": make("tokenizer/special_tokens_map.json", os.mkfifo),
  "tokenizer a file": replace("tokenizer", pathlib.Path.touch),
  "tokenizer gone": lambda workdir: shutil.rmtree(workdir / "tokenizer"),
  "a generation config": make("generation_config.json", lambda path: path.write_text('{"eos_token_id": 3}')),
  "a folder as generation config": make("generation_config.json", pathlib.Path.mkdir),
  "a FIFO as generation config": make("generation_config.json", os.mkfifo),
  "tb a file": replace("tb", pathlib.Path.touch),
  "tb a FIFO": replace("tb", os.mkfifo),
  "tb gone": lambda workdir: shutil.rmtree(workdir / "tb"),
  "a FIFO in tb": make("tb/events.out.tfevents.1", os.mkfifo),
  "damaged a file": make("damaged", pathlib.Path.touch),
  "mined a file": make("mined", pathlib.Path.touch),
  "a lock that is a folder": make(".lock", pathlib.Path.mkdir),
  "a lock that is a FIFO": make(".lock", os.mkfifo),
  "a lock of nobody": make(".lock", lambda path: path.write_text("x" * 1000)),
  "a partial of the past": make(".metrics.jsonl.1-00000000.partial", pathlib.Path.touch),
  "metrics: first line altered": edit_line(0, lambda line: line.replace(b"5.", b"6.", 1)),
  "metrics: a middle line altered": edit_line(2, lambda line: line.replace(b"loss", b"lass", 1)),
  "metrics: a middle line gone": edit_line(2, lambda _: b""),
  "metrics: a line of before cut": edit_line(3, lambda line: line[:10]),
  "metrics: two lines swapped": edit_line(1, lambda _: b""),
  "metrics: the last line cut": edit_line(6, lambda line: line[:10]),
  "metrics: the last line nonsense": edit_line(6, lambda _: b"\xff\xfe{"),
  "metrics: a line twice": edit_line(1, lambda line: line + b"\n" + line),
  "metrics: carriage returns": lambda workdir: (workdir / "metrics.jsonl").write_bytes(
    (workdir / "metrics.jsonl").read_bytes().replace(b"\n", b"\r\n")
  ),
  "modes: unreadable config": set_mode("config.json", 0),
  "modes: unreadable steps": set_mode("checkpoints", 0),
  "modes: read-only workdir": set_mode(".", 0o555),
}
# What says nothing of the model: an export differs at most in its README.
ABOUT = ("environment.json", "environment")


def damages():
  found = {}
  for name in BESIDE:
    for kind in KINDS:
      found[f"{name}: {kind.__name__}"] = lambda workdir, name=name, kind=kind: kind(workdir / name)
  for name in IN_CHECKPOINT:
    for kind in KINDS[:-1]:

      def damage(workdir, name=name, kind=kind):
        kind(next(iter(sorted((workdir / "checkpoints" / "4").glob(name)))))

      found[f"checkpoint, {name}: {kind.__name__}"] = damage
  return found | EDITS


DAMAGES = damages()
TRAINED = [
  name for number, name in enumerate(DAMAGES) if not name.startswith("checkpoint") or number % 3 == 0 or "fifo" in name
]
READ = list(DAMAGES)


def problem_of(run):
  if run.code == HUNG:
    return f"hangs: {run}"
  if "Traceback" in run.err:
    return f"traceback: {run} {run.err[max(run.err.index('Traceback') - 300, 0) :][:3000]}"
  if run.code and not run.is_one_line:
    return f"not one line: {run}"
  return None


def without_card(files):
  return {name: content for name, content in files.items() if name != "README.md"}


@pytest.mark.parametrize("group", range(GROUPS))
def test_an_export_of_a_damaged_workdir_is_refused_or_the_same(home, programs, half, group):
  tries = Tries()
  for number, name in enumerate(READ[group::GROUPS]):
    workdir = copy(half, home / f"r{group}_{number}")
    DAMAGES[name](workdir)
    out = home / f"x{group}_{number}"
    run = programs.export(workdir.name, out.name).wait(60)
    problem = problem_of(run)
    if run.code == 0:
      got, right = contents(out), contents(home / "right")
      if name.startswith(ABOUT):
        got, right = without_card(got), without_card(right)
      if got != right:
        problem = f"silently wrong: {sorted(key for key in right if got.get(key) != right[key])}"
    elif out.exists():
      problem = f"left {out}"
    tries.add(f"export, {name}", problem)
    workdir.chmod(0o755)
    shutil.rmtree(workdir)
  tries.check()


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_damaged_run_goes_on_to_the_same_metrics_or_is_refused(home, programs, whole, half, group):
  tries = Tries()
  for number, name in enumerate(TRAINED[group::GROUPS]):
    workdir = copy(half, home / f"t{group}_{number}")
    DAMAGES[name](workdir)
    run = programs.train(workdir.name).wait(90)
    problem = problem_of(run)
    if run.code == 0 and not problem:
      if "are lost" not in run.err and lines(workdir) != lines(whole):
        problem = f"silently wrong: {run}"
      elif left := litter(workdir):
        problem = f"left {left}"
    tries.add(f"train, {name}", problem)
    shutil.rmtree(workdir)
  tries.check()


@pytest.mark.parametrize(
  "name",
  [
    "metrics.jsonl: flip",
    "metrics.jsonl: truncate",
    "metrics: the last line cut",
    "model.json: flip",
    "tokenizer/tokenizer.json: flip",
    "rope_theta",
    "token ids swapped",
    "config unit",
    "metrics.jsonl: make_fifo",
  ],
)
def test_a_damaged_workdir_is_not_called_done(home, programs, whole, name):
  workdir = copy(whole, home / "done")
  try:
    DAMAGES[name](workdir)
    run = programs.train(workdir.name).wait(60)
    assert (run.code, run.is_one_line) == (2, True), str(run)
  finally:
    shutil.rmtree(workdir)


@pytest.mark.parametrize("group", range(3))
def test_generate_and_evaluate_refuse_a_damaged_workdir_or_say_the_same(home, programs, half, group):
  tries, rng = Tries(), random.Random(group)
  for number, name in enumerate(rng.sample(sorted(EDITS), 12)):
    workdir = copy(half, home / f"g{group}_{number}")
    DAMAGES[name](workdir)
    run = programs.generate(workdir.name, "g.jsonl").wait(60)
    problem = problem_of(run)
    if run.code == 0 and (home / "g.jsonl").read_bytes() != (home / "right.jsonl").read_bytes():
      problem = f"silently wrong: {run}"
    (home / "g.jsonl").unlink(missing_ok=True)
    tries.add(f"generate, {name}", problem)
    workdir.chmod(0o755)
    shutil.rmtree(workdir)
  tries.check()


@pytest.mark.parametrize("group", range(2))
def test_a_report_of_damaged_workdirs_is_one_line_or_a_page(home, programs, half, group):
  tries = Tries()
  names = [name for name in DAMAGES if name.startswith(("config", "metrics", "environment", "results"))]
  for number, name in enumerate(names[group::2]):
    workdir = copy(half, home / f"p{group}_{number}")
    DAMAGES[name](workdir)
    run = programs.run("report", f"--workdirs={workdir.name}", "--output=page.html", seconds=60)
    tries.add(f"report, {name}", problem_of(run))
    workdir.chmod(0o755)
    shutil.rmtree(workdir)
  tries.check()
