"""Weights, activations and losses that are not finite: refused by name, or exit code 3 with the state before saved."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from workdirs import Tries, copy, lay_out, lines, litter

pytestmark = pytest.mark.faults
# Writes a value into the state of step 6 right before it is saved: the checkpoint is whole, the weights are not.
POISON = """
import jax, jax.numpy as jnp
from insec_jax.training import checkpoint
save = checkpoint.Saver.save
checkpoint.not_finite = lambda tree: []
def poisoned(self, step, state, **more):
  if step == 6:
    leaves, tree = jax.tree.flatten(state.PART)
    leaves[INDEX] = leaves[INDEX].at[(0,) * leaves[INDEX].ndim].set(VALUE)
    state = state._replace(PART=jax.tree.unflatten(tree, leaves))
  return save(self, step, state, **more)
checkpoint.Saver.save = poisoned
"""
# Gives one batch weights that are not finite, so that the loss of its step is not; every other step is as it was.
BATCH = """
import numpy as np
from insec_jax.data import pipeline
batches = pipeline.batches
def poisoned(*arguments, start_step, **more):
  for number, batch in enumerate(batches(*arguments, start_step=start_step, **more), start_step + 1):
    yield {**batch, "weight_ABT": batch["weight_ABT"] * np.float32(VALUE)} if number == STEP else batch
pipeline.batches = poisoned
"""
# Makes the parameters so large after a step that the next one, or its held-out loss, overflows.
LARGE = """
import jax, jax.numpy as jnp
from insec_jax.training import checkpoint
save = checkpoint.Saver.save
def enlarged(self, step, state, **more):
  if step == 6:
    params = {**state.params, "NAME": state.params["NAME"] + jnp.float32(3e38)}
    state = state._replace(params=params)
  return save(self, step, state, **more)
checkpoint.Saver.save = enlarged
"""
VALUES = ("jnp.nan", "jnp.inf", "-jnp.inf")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finite")
  lay_out(folder)
  return folder


@pytest.fixture(scope="module")
def whole(home, programs):
  assert programs.train("whole").wait().code == 0
  return home / "whole"


def fill(text, **words):
  for name, word in words.items():
    text = text.replace(name, str(word))
  return text


def saved_as(workdir, step):
  """Return the fingerprints of every array of a checkpoint, and the totals of the run without what the clock says."""
  run = json.loads((workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]["run"]
  return run["fingerprints"], run["totals"][0][:2]


@pytest.mark.parametrize("part", ["params", "optimizer"])
def test_arrays_of_a_checkpoint_that_are_not_finite_are_refused_by_name(home, programs, whole, part):
  tries = Tries()
  for index in range(1, 11, 3) if part == "params" else (2, 7):
    value = VALUES[index % 3]
    name = f"{part}{index}"
    run = programs.start(
      "train", "--config=config.py", f"--workdir={name}", BEFORE=fill(POISON, PART=part, INDEX=index, VALUE=value)
    ).wait()
    assert run.code == 0, str(run)
    readers = [programs.export(name, "x"), programs.generate(name, "g"), programs.evaluate(name, "e")]
    for reader in readers if part == "params" else ():
      reader.wait()
      right = (reader.code, reader.is_one_line) == (2, True) and "not finite" in reader.err and "params/" in reader.err
      tries.add(f"{reader.words} {value}", None if right and "--step=4" in reader.err else str(reader))
    again = programs.train(name).wait()
    problem = None if again.code == 0 and "not finite" in again.err else str(again)
    if not problem and lines(home / name) != lines(whole):
      problem = f"other metrics: {again}"
    tries.add(f"train {name}", problem)
  tries.check()


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-float('inf')"])
@pytest.mark.parametrize("step", [1, 2, 5, 6])
@pytest.mark.usefixtures("whole")
def test_after_a_loss_that_is_not_finite_the_state_before_is_saved_and_the_code_is_3(home, programs, step, value):
  name = f"loss{step}{value.translate(str.maketrans('', '', chr(39) + 'float()'))}"
  words = ["--config=config.py", "--config.train.keep=9"]
  if not (home / "clean").exists():
    assert programs.run("train", *words, "--workdir=clean", "--config.train.checkpoint_every=1").code == 0
  run = programs.run(
    "train",
    *words,
    f"--workdir={name}",
    "--config.train.checkpoint_every=6",
    "--config.train.log_every=3",
    BEFORE=fill(BATCH, VALUE=value, STEP=step),
  )
  assert (run.code, run.is_one_line) == (3, True), str(run)
  assert f"in step {step}; " in run.err
  if step > 1:
    assert saved_as(home / name, step - 1) == saved_as(home / "clean", step - 1)
    kept = [line["step"] for line in lines(home / name)]
    assert max(kept) < step
  assert not litter(home / name)


@pytest.mark.parametrize("name", ["norm", "head"])  # a large embedding is divided by its norm
@pytest.mark.usefixtures("whole")
def test_activations_that_overflow_end_with_code_3_and_no_output(home, programs, name):
  run = programs.start("train", "--config=config.py", f"--workdir=large_{name}", BEFORE=fill(LARGE, NAME=name)).wait()
  assert run.code == 0, str(run)
  tries = Tries()
  for reader in (
    programs.generate(f"large_{name}", "lg"),
    programs.evaluate(f"large_{name}", "le"),
    programs.mine(f"large_{name}", "lm"),
  ):
    reader.wait()
    right = (reader.code, reader.is_one_line) == (3, True)
    tries.add(f"{reader.words}", None if right else str(reader))
  for output in ("lg", "le", "lm"):
    assert not (home / output).exists()
  tries.check()


@pytest.mark.usefixtures("whole")
def test_a_model_folder_with_weights_that_are_not_finite_is_refused(home, programs):
  assert programs.export("whole", "hf").wait().code == 0
  tries = Tries()
  for number, value in enumerate((np.nan, np.inf, -np.inf)):
    folder = copy(home / "hf", home / f"hf{number}")
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[number * 3]
    tensors[name] = tensors[name].copy()
    tensors[name].flat[number] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for reader in (
      programs.generate(folder.name, "hg"),
      programs.evaluate(folder.name, "he"),
      programs.mine(folder.name, "hm"),
      programs.export(folder.name, "hx"),
    ):
      reader.wait()
      right = reader.code in (2, 3) and reader.is_one_line
      tries.add(f"{reader.words} {name} {value}", None if right else str(reader))
  tries.check()
