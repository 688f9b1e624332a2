"""Checkpoints and workdirs: what is saved comes back, and nothing else is taken for it."""

import dataclasses
import json
import os
import shutil

import datakit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modelkit import small_llama

from insec_jax.command import DivergedError, InputError
from insec_jax.config import MeshConfig, OptimizerConfig
from insec_jax.data import tokens
from insec_jax.distributed import processes
from insec_jax.model import hf_writing, sharding
from insec_jax.training import checkpoint, metrics, optimizer, step
from insec_jax.training.checkpoint import Saver

MODEL = small_llama(width=16, head_width=4, mlp_width=24, tied=True)
TX = optimizer.make(
  OptimizerConfig(
    learning_rate=1e-2, final_share=0.1, warmup_steps=2, weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0
  ),
  20,
)
FACTS = {"rows": 8}


def abstract(shape=(1, 1, 1), model=MODEL, tx=TX):
  sizes = MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])
  mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(shape))])
  return step.abstract_state(model, "float32", tx, mesh)


def make_state(abstract_state):
  """A state in which no two arrays are alike."""
  leaves, tree = jax.tree.flatten(abstract_state)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(
    tree, [jax.device_put((rng.normal(size=leaf.shape) * 10).astype(leaf.dtype), leaf.sharding) for leaf in leaves]
  )


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
    checkpoint.steps(workdir),
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
  folder = tmp_path / checkpoint.CHECKPOINTS
  assert {path.name for path in folder.iterdir()} == {"4", "5"}
  torn = folder / "9.orbax-checkpoint-tmp"  # what a kill leaves: it is renamed when whole
  shutil.copytree(folder / "5", torn)
  assert checkpoint.steps(tmp_path) == [4, 5]
  write(tmp_path, [7], keep=2)
  assert {path.name for path in folder.iterdir()} == {"5", "7"}
  assert checkpoint.steps(tmp_path / "nowhere") == []


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
  DAMAGE[kind](tmp_path / checkpoint.CHECKPOINTS / "1")
  got = restore(tmp_path, abstract())
  assert (got.step, got.totals, got.damaged) == (0, [0.0], [1])
  jax.tree.map(np.testing.assert_array_equal, got.state.params, state.params)
  lines = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
  assert len(lines) == 1
  assert lines[0].startswith(f"checkpoint 1 of {tmp_path} is damaged (")


@pytest.mark.parametrize("kind", ["bit", "short", "metadata"])
def test_a_reader_of_a_damaged_newest_checkpoint_is_refused_and_given_the_sound_steps(tmp_path, kind):
  state = write(tmp_path, (1, 2, 3), keep=3)
  DAMAGE[kind](tmp_path / checkpoint.CHECKPOINTS / "3")
  with pytest.raises(InputError, match=r"checkpoint 3 of .* is damaged .* sound are the steps 1, 2: give --step=2"):
    checkpoint.load_params(tmp_path, abstract().params, None)
  step, params = checkpoint.load_params(tmp_path, abstract().params, 2)
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
    checkpoint.load_params(tmp_path, abstract().params, None)
  assert restore(tmp_path, abstract()).step == 1
  assert "params/norm holds values that are not finite" in capfd.readouterr().err


def test_files_that_change_what_the_model_says_must_be_those_of_the_checkpoint(tmp_path):
  (tmp_path / checkpoint.MODEL).write_text('{"rope_theta": 10000.0}')
  (tmp_path / checkpoint.TOKENIZER).mkdir()
  (tmp_path / checkpoint.TOKENIZER / "tokenizer.json").write_text('{"a": 0, "b": 1}')
  write(tmp_path, [1], keep=3)
  restore(tmp_path, abstract())
  for name, before, after in ((checkpoint.MODEL, "10000.0", "20000.0"), ("tokenizer/tokenizer.json", "0", "2")):
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace(before, after))
    for read in (
      lambda: restore(tmp_path, abstract()),
      lambda: checkpoint.load_params(tmp_path, abstract().params, None),
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
  folder = tmp_path / checkpoint.CHECKPOINTS
  (folder / "5").touch()
  os.mkfifo(folder / "6")
  for name in ("07", "8.0", "\u0669", "9" * 30, "notes"):
    (folder / name).mkdir()
  assert checkpoint.steps(tmp_path) == [1]
  assert checkpoint.load_params(tmp_path, abstract().params, None)[0] == 1


def test_a_fifo_in_a_workdir_is_named_and_never_opened(tmp_path, capfd):
  write(tmp_path, (1, 2), keep=3)
  file = largest_file(tmp_path / checkpoint.CHECKPOINTS / "2" / "params")
  file.unlink()
  os.mkfifo(file)
  assert restore(tmp_path, abstract()).step == 1
  assert "is no file" in capfd.readouterr().err
  os.mkfifo(tmp_path / metrics.METRICS)
  with pytest.raises(InputError, match=r"metrics.jsonl is a FIFO"):
    checkpoint.check_kinds(tmp_path)


def test_without_a_sound_checkpoint_nothing_is_changed(tmp_path):
  write(tmp_path, [1], keep=2)
  flip_a_bit(largest_file(tmp_path / checkpoint.CHECKPOINTS / "1" / "params"))
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  with pytest.raises(InputError, match=r"no sound checkpoint .* nothing was changed"):
    restore(tmp_path, abstract())
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_that_went_on_without_a_damaged_checkpoint_can_save_that_step_again(tmp_path):
  for again in ("3", "3-1"):
    write(tmp_path, [3], keep=2)
    checkpoint.set_aside(tmp_path, [3])
    assert (tmp_path / checkpoint.DAMAGED / again).is_dir()
  assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_any_flipped_bit_and_any_two_exchanged_elements_change_the_fingerprint(dtype):
  array = np.arange(1, 16).reshape(3, 5).astype(dtype)
  want = checkpoint.fingerprints({"a": jnp.asarray(array)})
  whole = array.view(f"uint{8 * array.itemsize}")
  for position in np.ndindex(array.shape):
    for bit in range(8 * array.itemsize):
      other = whole.copy()
      other[position] ^= 1 << bit
      assert checkpoint.fingerprints({"a": jnp.asarray(other.view(dtype))}) != want
  exchanged = array.copy()
  exchanged[0, 0], exchanged[2, 3] = array[2, 3], array[0, 0]
  assert checkpoint.fingerprints({"a": jnp.asarray(exchanged)}) != want


def test_the_fingerprint_does_not_hang_on_where_the_shards_lie():
  one, eight = (checkpoint.fingerprints(make_state(abstract(shape)).params) for shape in ((1, 1, 1), (2, 2, 2)))
  assert one == eight


def test_a_run_that_mines_as_it_goes_keeps_the_length_of_what_it_mines(tmp_path):
  rounds, longer = (
    datakit.config(
      rounds=2,
      train__steps=2,
      mistakes__mined=0.5,
      task__name="graph",
      task__min_size=1,
      task__max_size=2,
      task__modulus=10,
      data__num_records=1,
      evaluate__max_tokens=num,
    )
    for num in (8, 9)
  )
  (tmp_path / checkpoint.CONFIG).write_text(rounds.to_json())
  with pytest.raises(InputError, match=r"another config: evaluate\.max_tokens=9"):
    checkpoint.check_workdir(tmp_path, longer)


def test_a_run_on_what_was_mined_before_keeps_how_it_was_mined(tmp_path):
  one, other = (
    datakit.config(mistakes__mined=0.5, mistakes__mined_path="mined.jsonl", mine__samples=num) for num in (2, 3)
  )
  (tmp_path / checkpoint.CONFIG).write_text(one.to_json())
  with pytest.raises(InputError, match=r"another config: mine\.samples=3 \(was 2\)"):
    checkpoint.check_workdir(tmp_path, other)


@pytest.mark.parametrize(
  ("change", "shown"),
  [
    ({"train__steps": 3}, "train.steps=3 (was 2)"),
    ({"seed__": 1}, "seed=1 (was 0)"),
    ({"optimizer__b1": 0.8, "loss__text": 2.0}, "loss.text=2.0 (was 1.0), optimizer.b1=0.8 (was 0.9)"),
    ({"mesh__fsdp": 8, "train__log_every": 7, "data__accumulation": 2, "evaluate__votes": 7}, None),
    ({"evaluate__max_tokens": 9, "mine__samples": 3}, None),
  ],
)
def test_a_workdir_of_another_config_is_refused_with_every_key_that_matters(tmp_path, change, shown):
  (tmp_path / checkpoint.CONFIG).write_text(datakit.config().to_json())
  given = dataclasses.replace(datakit.config(), seed=1) if "seed__" in change else datakit.config(**change)
  if shown is None:
    checkpoint.check_workdir(tmp_path, given)
    return
  with pytest.raises(InputError) as error:
    checkpoint.check_workdir(tmp_path, given)
  assert f"another config: {shown};" in str(error.value)


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="is a file"):
    checkpoint.check_workdir(tmp_path / "file", datakit.config())
  checkpoint.check_workdir(tmp_path, datakit.config())
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(InputError, match=r"holds metrics.jsonl but no config.json"):
    checkpoint.check_workdir(tmp_path, datakit.config())
  (tmp_path / checkpoint.CONFIG).write_text('{"model_type": "llama"}')
  with pytest.raises(InputError, match="not the config of a run"):
    checkpoint.check_workdir(tmp_path, datakit.config())


@pytest.fixture
def tokenizer():
  return datakit.bpe_tokenizer()


@pytest.mark.parametrize(
  "task",
  [
    {},
    {
      "task__name": "graph",
      "task__min_size": 1,
      "task__max_size": 3,
      "task__modulus": 10,
      "data__num_records": 10,
      "tokenizer__confidence": (0.1,),
      "tokenizer__confidence_first": (0.5, 1.0),
    },
  ],
)
def test_a_workdir_and_its_hf_folder_open_as_the_same_model(tmp_path, tokenizer, task):
  config = datakit.config(tokenizer__flag="<|spare_0|>", tokenizer__fix="<|spare_1|>", **task)
  tokenizer = tokens.add_markers(tokenizer, config.tokenizer).tokenizer
  workdir, folder = tmp_path / "run", tmp_path / "hf"
  workdir.mkdir()
  (workdir / checkpoint.CONFIG).write_text(config.to_json())
  (workdir / checkpoint.MODEL).write_text(json.dumps(checkpoint.hf_config.config_to_json(MODEL)))
  tokenizer.save_pretrained(workdir / checkpoint.TOKENIZER)
  state = make_state(abstract())
  with Saver(workdir, keep=1) as saver:
    saver.save(7, state, config=config, facts=FACTS, totals=[])
  opened = checkpoint.load_model(str(workdir))
  assert opened.markers == checkpoint.Markers("<|spare_0|>", "<|spare_1|>")
  assert tokenizer.convert_ids_to_tokens([opened.flag_id, opened.fix_id]) == ["<|spare_0|>", "<|spare_1|>"]
  assert (opened.unit, opened.template) == ("line", "plain")
  assert (opened.confidence, opened.confidence_first) == (((0.1,), (0.5, 1.0)) if task else ((), ()))
  jax.tree.map(np.testing.assert_array_equal, opened.params, state.params)

  hf_writing.save(folder, opened.params, opened.config, tokenizer=tokenizer)
  plain = checkpoint.load_model(str(folder))
  assert (plain.markers, plain.flag_id, plain.unit) == (None, None, None)  # no run of ours wrote that folder
  jax.tree.map(np.testing.assert_array_equal, plain.params, state.params)
  (folder / checkpoint.MARKERS).write_text(json.dumps(checkpoint.marked_as(config, 7)))
  again = checkpoint.load_model(str(folder))
  assert again[3:] == opened[3:]
  assert (plain.step, opened.step) == (None, 7)


def test_parameters_saved_in_bfloat16_open_in_bfloat16(tmp_path):
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
  state = make_state(step.abstract_state(MODEL, "bfloat16", TX, mesh))
  with Saver(tmp_path, keep=1) as saver:
    saver.save(7, state, config=datakit.config(), facts=FACTS, totals=[])
    saver.wait()
    _, params = checkpoint.load_params(tmp_path, abstract().params, None)
  assert params["embed"].dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_what_is_no_model_is_refused(tmp_path):
  with pytest.raises(InputError, match="no folder"):
    checkpoint.load_model(str(tmp_path / "nowhere"))
  with pytest.raises(InputError, match="holds neither"):
    checkpoint.load_model(str(tmp_path))
  (tmp_path / "config.json").mkdir()
  with pytest.raises(InputError, match=r"config\.json is no file that can be read"):
    checkpoint.load_model(str(tmp_path))
  (tmp_path / checkpoint.MODEL).write_text("{}")
  with pytest.raises(InputError, match="without a checkpoint"):
    checkpoint.load_model(str(tmp_path))


@pytest.mark.parametrize("change", [{"flag": 1}, {"special": "no"}, {"unit": None}, {"step": "7"}, {"confidence": 0.1}])
def test_markers_of_a_folder_that_no_export_writes_are_refused(tmp_path, change):
  marks = {**checkpoint.marked_as(datakit.config(), 7), **change}
  (tmp_path / checkpoint.MARKERS).write_text(json.dumps(marks))
  with pytest.raises(InputError, match=f"{next(iter(change))} is .*export the model again"):
    checkpoint.read_markers(tmp_path)
