"""State of the optimizer and activations in the memory of the host, which the CPU backend has too."""

import dataclasses
import functools
import types

import datakit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import MODEL, make_mesh, make_params

from insec_jax.command import InputError
from insec_jax.config import OptimizerConfig
from insec_jax.config_build import build
from insec_jax.distributed import processes
from insec_jax.model import llama, memory
from insec_jax.training import checkpoint, leafwise, optimizer, step

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
STEPS, ROWS, T = 4, 2, 16


def abstract(*, on_host):
  return step.abstract_state(MODEL, "float32", optimizer.make(OPTIMIZER, STEPS), make_mesh((1, 2, 1)), on_host=on_host)


def batch():
  shape = (1, ROWS, T)
  return {
    "token_ABT": np.random.default_rng(1).integers(0, MODEL.vocab_size, shape).astype(np.int32),
    "segment_ABT": np.ones(shape, np.int32),
    "position_ABT": np.broadcast_to(np.arange(T, dtype=np.int32), shape),
    "role_ABT": np.ones(shape, np.int8),
    "weight_ABT": np.ones(shape, np.float32),
  }


def trained(*, on_host):
  """(state after two steps, the step as text)."""
  shardings, tx = step.shardings_of(abstract(on_host=on_host)), optimizer.make(OPTIMIZER, STEPS)
  state = jax.jit(lambda params: step.new_state(params, tx), out_shardings=shardings)(make_params())
  model = llama.Llama(MODEL, "float32", "offload" if on_host else "full")
  train_step = step.make_train_step(model, OPTIMIZER, STEPS, make_mesh((1, 2, 1)), shardings, repeat=0.0, seed=0)
  text = str(train_step.trace(state, batch()).jaxpr)
  for _ in range(2):
    state, _ = train_step(state, batch())
  return state, text


def test_a_state_on_the_host_trains_alike_and_continues_on_the_devices(tmp_path):
  (want, _), (got, text) = trained(on_host=False), trained(on_host=True)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, want)
  kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(got.optimizer) if leaf.ndim}
  assert kinds == {memory.HOST}
  assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(got.params)} == {"device"}
  assert f"f32<host>[{MODEL.num_layers},1,{T},{MODEL.width}]" in text  # the stream before each layer, of a device's row
  with checkpoint.Saver(tmp_path, keep=1) as saver:
    saver.save(2, got, config=datakit.config(), facts={}, totals=[])
  for on_host in (False, True):
    again = checkpoint.restore(
      tmp_path,
      [2],
      abstract(on_host=on_host),
      facts=lambda _: {},
      processes=processes.alone(),
      advise=lambda *_: "",
    ).state
    jax.tree.map(np.testing.assert_array_equal, again[1:], got[1:])
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(again.optimizer) if leaf.ndim}
    assert kinds == {memory.HOST if on_host else "device"}


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"moments": "bfloat16"},
    {"name": "adafactor"},
    {"name": "lion"},
    {"name": "muon"},
    {"name": "schedule_free", "final_share": 1.0},
    {"ema": 0.9},
  ],
  ids=str,
)
def test_every_optimizer_updates_one_parameter_after_the_other_as_all_at_once(changes):
  config = dataclasses.replace(OPTIMIZER, weight_decay=0.1, clip_norm=0.5, **changes)
  params, key = jax.tree.map(jnp.asarray, make_params()), jax.random.key(3)
  tx, unclipped = (optimizer.make(config, STEPS, clips=clips) for clips in (True, False))
  state = jax.jit(tx.init)(params)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))

  def update(tx, gradient, held, params):
    update, changed = tx.update(gradient, held, params, key=key)
    return optimizer.apply(config, params, update, key), changed

  def in_turn(gradient, held, params):
    norm = optax.tree.norm(gradient)
    return leafwise.one_by_one(
      lambda part, *others: update(unclipped, optimizer.clip(config, part, norm), *others),
      gradient,
      held,
      params,
      shardings,
      by_layer=not optimizer.draws(config),
    )

  whole, in_turn = jax.jit(functools.partial(update, tx)), jax.jit(in_turn)
  for number in range(2):
    gradient = jax.tree.map(lambda leaf: jnp.cos((number + 3) * leaf), params)  # noqa: B023, mapped at once
    (want_params, want), (got_params, got) = whole(gradient, state, params), in_turn(gradient, state, params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-3 if config.moments == "bfloat16" else 2e-5, atol=1e-6)
    jax.tree.map(near, as_float32((got_params, got)), as_float32((want_params, want)))
    params, state = want_params, want


def as_float32(tree):
  return jax.tree.map(lambda array: np.asarray(array, np.float32), tree)


@pytest.mark.parametrize(("section", "key", "value"), [("optimizer", "memory", "host"), ("model", "remat", "offload")])
def test_devices_without_memory_on_the_host_are_refused_in_one_line(section, key, value):
  config = build(datakit.VALUES)
  changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
  only = [types.SimpleNamespace(kind="device")]
  device = types.SimpleNamespace(device_kind="abacus", addressable_memories=lambda: only)
  memory.check_devices(config, [device])
  with pytest.raises(InputError, match=f"^{section}.{key}='{value}' keeps arrays in pinned_host memory.*'abacus'"):
    memory.check_devices(changed, [device])
  memory.check_devices(changed, jax.devices())
