"""Checkpoints of a workdir in a bucket: what is saved comes back; partial ones do not count, damaged are set aside."""

import datakit
import jax
import numpy as np
import pytest
from modelkit import STATE_MODEL as MODEL
from modelkit import abstract, make_state

from insec_jax.command import InputError
from insec_jax.distributed import processes
from insec_jax.files.reading import local_path
from insec_jax.training import checkpoint, layout
from insec_jax.training.stored import read_params


def save(workdir, *steps, keep=2):
  state = make_state(abstract((1, 8, 1)))
  with checkpoint.Saver(workdir, keep=keep) as saver:
    for step in steps:
      saver.save(step, state, config=datakit.config(), facts={}, totals=[float(step)])
  return state


def restore(workdir):
  return checkpoint.restore(
    workdir,
    layout.steps(workdir),
    abstract((2, 2, 2)),
    facts=lambda _: {},
    processes=processes.alone(),
    advise=lambda *_: "",
  )


@pytest.mark.slow
def test_the_newest_checkpoints_stay_and_come_back_on_any_mesh(bucket):
  workdir = local_path(f"{bucket.url}/run", "--workdir")
  state = save(workdir, 1, 2, 3)
  assert layout.steps(workdir) == [2, 3]
  assert {name.split("/")[2] for name in bucket.names("run/checkpoints/")} == {"2", "3"}
  got = restore(workdir)
  assert (got.step, got.totals, got.damaged) == (3, [3.0], [])
  jax.tree.map(np.testing.assert_array_equal, got.state._replace(step=0), state._replace(step=0))
  params = read_params(workdir, MODEL, 2, lambda _, params: jax.tree.map(lambda weight: weight[...], params))
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_a_partial_checkpoint_does_not_count_and_the_next_save_removes_it(bucket):
  workdir = local_path(f"{bucket.url}/run", "--workdir")
  save(workdir, 1, 2)
  for name in bucket.names("run/checkpoints/2/"):
    if name.endswith("/2/commit_success.txt"):
      bucket.remove(name)
  assert layout.steps(workdir) == [1]
  assert restore(workdir).step == 1
  save(workdir, 3)
  assert layout.steps(workdir) == [1, 3]
  assert not bucket.names("run/checkpoints/2/")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_set_aside(bucket, capfd):
  workdir = local_path(f"{bucket.url}/run", "--workdir")
  save(workdir, 1, 2)
  largest = max(bucket.names("run/checkpoints/2/params/"), key=lambda name: len(bucket.read(name)))
  bucket.write(largest, bucket.read(largest)[:100])
  with pytest.raises(InputError, match=f"checkpoint 2 of {bucket.url}/run is damaged .* sound are the steps 1"):
    read_params(workdir, MODEL, None, lambda _, params: jax.tree.map(lambda weight: weight[...], params))
  got = restore(workdir)
  assert (got.step, got.damaged) == (1, [2])
  assert f"checkpoint 2 of {bucket.url}/run is damaged (" in capfd.readouterr().err
  checkpoint.set_aside(workdir, got.damaged)
  assert layout.steps(workdir) == [1]
  assert bucket.names("run/damaged/2/params/")
