"""Checkpoints and workdirs: what is saved comes back, and nothing else is taken for it."""

import dataclasses
import os
import shutil

import datakit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modelkit import STATE_MODEL as MODEL
from modelkit import abstract, make_state

from insec_jax.command import DivergedError, InputError
from insec_jax.distributed import processes
from insec_jax.training import checkpoint, layout, metrics
from insec_jax.training.checkpoint import Saver
from insec_jax.training.stored import read_params


def stored_params(workdir, step=None):
  """The step and the params of a checkpoint, read whole."""
  return read_params(
    workdir, MODEL, step, lambda number, params: (number, jax.tree.map(lambda weight: weight[...], params))
  )


FACTS = {"rows": 8}


@pytest.fixture
def saved(tmp_path):
  """(workdir with a checkpoint of step 7 written from eight devices, the state in it)."""
  state = make_state(abstract((1, 8, 1)))
  with Saver(tmp_path, keep=2) as saver:
    saver.save(7, state, config=datakit.config(), facts=FACTS, totals=[1 / 3, [0.1]])
  return tmp_path, state


def restore(workdir, abstract_state, facts=FACTS):
  return checkpoint.restore(
    workdir,
    layout.steps(workdir),
    abstract_state,
    facts=lambda _: facts,
    processes=processes.alone(),
    advise=lambda name, was: f"set {name} to {was}",
  )


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1), (1, 4, 2)])
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved, shape):
  workdir, state = saved
  got, totals, _, number, damaged = restore(workdir, abstract(shape))
  assert (number, damaged) == (7, [])
  assert jax.tree.structure(got) == jax.tree.structure(state)
  assert int(got.step) == 7
  jax.tree.map(np.testing.assert_array_equal, got._replace(step=0), state._replace(step=0))
  assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, got, abstract(shape)))
  assert totals == [1 / 3, [0.1]]


def test_a_checkpoint_of_another_model_is_refused_and_the_difference_named(saved):
  workdir, _ = saved
  for change, name in (({"mlp_width": 32}, "down"), ({"tied": False}, "head")):
    model = dataclasses.replace(MODEL, **change)
    with pytest.raises(InputError, match=f"{name}.*absent|{name}.*needed"):
      restore(workdir, abstract(model=model))


def test_a_partial_restore_is_refused(saved):
  workdir, _ = saved
  whole = abstract()
  without_norm = whole._replace(params={name: leaf for name, leaf in whole.params.items() if name != "norm"})
  with pytest.raises(InputError, match="params/norm"):
    restore(workdir, without_norm)


def test_a_run_that_would_go_on_with_other_data_is_refused(saved):
  workdir, _ = saved
  with pytest.raises(InputError, match="rows is 4, was 8; set rows to 8"):
    restore(workdir, abstract(), facts={"rows": 4})


def test_saving_happens_behind_steps_that_donate_the_state(tmp_path):
  add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
  state = make_state(abstract((2, 2, 2)))
  want = jax.tree.map(np.array, state)
  with Saver(tmp_path, keep=1) as saver:
    saver.save(7, state, config=datakit.config(), facts=FACTS, totals=[])
    for _ in range(3):
      state = add(state)
  got = restore(tmp_path, abstract()).state
  jax.tree.map(np.testing.assert_array_equal, got._replace(step=0), want._replace(step=0))


def write(workdir, numbers, *, keep):
  """The state that the checkpoints of these steps hold."""
  state = make_state(abstract())
  with Saver(workdir, keep=keep) as saver:
    for number in numbers:
      saver.save(number, state, config=datakit.config(), facts=FACTS, totals=[number / 3])
  return state


def test_the_newest_stay_and_what_is_half_written_does_not_count(tmp_path):
  write(tmp_path, (1, 2, 3, 4, 5), keep=2)
  folder = tmp_path / layout.CHECKPOINTS
  assert {path.name for path in folder.iterdir()} == {"4", "5"}
  torn = folder / "9.orbax-checkpoint-tmp"  # what a kill leaves: it is renamed when whole
  shutil.copytree(folder / "5", torn)
  assert layout.steps(tmp_path) == [4, 5]
  write(tmp_path, [7], keep=2)
  assert {path.name for path in folder.iterdir()} == {"5", "7"}
  assert layout.steps(tmp_path / "nowhere") == []


def largest_file(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 16
  file.write_bytes(content)


def cut_short(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_digit(file):
  file.write_text(file.read_text().replace("0.333", "0.334"))


DAMAGE = {
  "bit": lambda folder: flip_a_bit(largest_file(folder / "params")),
  "optimizer": lambda folder: flip_a_bit(largest_file(folder / "optimizer")),
  "short": lambda folder: cut_short(largest_file(folder / "params")),
  "gone": lambda folder: largest_file(folder / "optimizer").unlink(),
  "folder": lambda folder: shutil.rmtree(folder / "params"),
  "totals": lambda folder: flip_a_digit(folder / "_CHECKPOINT_METADATA"),
  "metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("{"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_in_one_line_and_the_one_before_it_is_used(tmp_path, capfd, kind):
  state = write(tmp_path, (0, 1), keep=2)
  DAMAGE[kind](tmp_path / layout.CHECKPOINTS / "1")
  got = restore(tmp_path, abstract())
  assert (got.step, got.totals, got.damaged) == (0, [0.0], [1])
  jax.tree.map(np.testing.assert_array_equal, got.state.params, state.params)
  lines = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
  assert len(lines) == 1
  assert lines[0].startswith(f"checkpoint 1 of {tmp_path} is damaged (")


@pytest.mark.parametrize("kind", ["bit", "short", "metadata"])
def test_a_damaged_newest_checkpoint_is_refused_and_the_sound_steps_are_named(tmp_path, kind):
  state = write(tmp_path, (1, 2, 3), keep=3)
  DAMAGE[kind](tmp_path / layout.CHECKPOINTS / "3")
  with pytest.raises(InputError, match=r"checkpoint 3 of .* is damaged .* sound are the steps 1, 2: give --step=2"):
    stored_params(tmp_path)
  step, params = stored_params(tmp_path, 2)
  assert step == 2
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_weights_that_are_not_finite_are_neither_saved_nor_read(tmp_path, monkeypatch, capfd):
  state = write(tmp_path, [1], keep=3)
  bad = state._replace(params={**state.params, "norm": state.params["norm"].at[3].set(jnp.nan)})
  with Saver(tmp_path, keep=3) as saver:
    with pytest.raises(DivergedError, match=r"params/norm is not finite after step 2, which is not saved"):
      saver.save(2, bad, config=datakit.config(), facts=FACTS, totals=[0.0])
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint, "not_finite", lambda _: [])  # as an earlier version saved it
      saver.save(2, bad, config=datakit.config(), facts=FACTS, totals=[0.0])
  with pytest.raises(InputError, match=r"params/norm holds values that are not finite.* give --step=1"):
    stored_params(tmp_path)
  assert restore(tmp_path, abstract()).step == 1
  assert "params/norm holds values that are not finite" in capfd.readouterr().err


def test_files_that_change_what_the_model_says_must_be_those_of_the_checkpoint(tmp_path):
  (tmp_path / layout.MODEL).write_text('{"rope_theta": 10000.0}')
  (tmp_path / layout.TOKENIZER).mkdir()
  (tmp_path / layout.TOKENIZER / "tokenizer.json").write_text('{"a": 0, "b": 1}')
  write(tmp_path, [1], keep=3)
  restore(tmp_path, abstract())
  for name, before, after in ((layout.MODEL, "10000.0", "20000.0"), ("tokenizer/tokenizer.json", "0", "2")):
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace(before, after))
    for read in (
      lambda: restore(tmp_path, abstract()),
      lambda: stored_params(tmp_path),
      lambda: checkpoint.is_sound(tmp_path, 1, abstract(), processes.alone()),
    ):
      with pytest.raises(InputError, match=f"{name} was another when checkpoint 1 of .* was saved"):
        read()
    (tmp_path / name).write_text(text)
  restore(tmp_path, abstract())


def test_altered_metrics_keep_a_run_from_being_called_done(tmp_path):
  log = metrics.Log(tmp_path, 0)
  log.write(1, {"loss": 1.0})
  log.close()
  with Saver(tmp_path, keep=1) as saver:
    saver.save(1, make_state(abstract()), config=datakit.config(), facts=FACTS, totals=[], log=log.state())
  assert checkpoint.is_sound(tmp_path, 1, abstract(), processes.alone())
  (tmp_path / metrics.METRICS).write_text('{"step": 1, "loss": 2.0}\n')
  with pytest.raises(InputError, match=r"metrics.jsonl is not what it was after step 1"):
    checkpoint.is_sound(tmp_path, 1, abstract(), processes.alone())


def test_what_is_no_folder_with_a_plain_number_is_no_checkpoint(tmp_path):
  write(tmp_path, [1], keep=3)
  folder = tmp_path / layout.CHECKPOINTS
  (folder / "5").touch()
  os.mkfifo(folder / "6")
  for name in ("07", "8.0", "\u0669", "9" * 30, "notes"):
    (folder / name).mkdir()
  assert layout.steps(tmp_path) == [1]
  assert stored_params(tmp_path)[0] == 1


def test_a_fifo_in_a_workdir_is_named_and_never_opened(tmp_path, capfd):
  write(tmp_path, (1, 2), keep=3)
  file = largest_file(tmp_path / layout.CHECKPOINTS / "2" / "params")
  file.unlink()
  os.mkfifo(file)
  assert restore(tmp_path, abstract()).step == 1
  assert "is no file" in capfd.readouterr().err
  os.mkfifo(tmp_path / metrics.METRICS)
  with pytest.raises(InputError, match=r"metrics.jsonl is a FIFO"):
    layout.check_kinds(tmp_path)


def test_without_a_sound_checkpoint_nothing_is_changed(tmp_path):
  write(tmp_path, [1], keep=2)
  flip_a_bit(largest_file(tmp_path / layout.CHECKPOINTS / "1" / "params"))
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  with pytest.raises(InputError, match=r"no sound checkpoint .* nothing was changed"):
    restore(tmp_path, abstract())
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_that_went_on_without_a_damaged_checkpoint_can_save_that_step_again(tmp_path):
  for again in ("3", "3-1"):
    write(tmp_path, [3], keep=2)
    checkpoint.set_aside(tmp_path, [3])
    assert (tmp_path / layout.DAMAGED / again).is_dir()
  assert layout.steps(tmp_path) == []


def test_parameters_saved_in_bfloat16_open_in_bfloat16(tmp_path):
  state = make_state(abstract(dtype="bfloat16"))
  with Saver(tmp_path, keep=1) as saver:
    saver.save(7, state, config=datakit.config(), facts=FACTS, totals=[])
    saver.wait()
    _, params = stored_params(tmp_path)
  assert params["embed"].dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
