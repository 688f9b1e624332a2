"""Log p of the tokens of rows, by the forward pass of a train step: what the ratio of a policy gradient begins with."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from insec_jax.config import Config, PolicyConfig
from insec_jax.data import pipeline
from insec_jax.data.packing import Rows
from insec_jax.model import llama
from insec_jax.training import passes, variables
from insec_jax.training.feeding import on_devices
from insec_jax.training.loss import target_logps
from insec_jax.training.run import Run
from insec_jax.training.step import TrainState, batch_sharding


def make_logps(
  model: llama.Llama, mesh: Mesh, shardings: TrainState, policy: PolicyConfig, frozen_shardings=None
) -> Callable[..., jax.Array]:
  """Return the jitted `logps(params, batch)`: the log p of the next token at each position, [A, B, T] on every device.

  It is the forward pass of a train step with `policy`. A token of weight 0 has log p 0. With `frozen_shardings` it
  takes the frozen weights as its third argument.
  """

  def local(params, batch, frozen=None):
    def of_micro(_, micro):
      weights = variables.cast(model, params, frozen, gradient="float32")
      head = variables.head_of(model, weights)
      return None, target_logps(
        head.weight_VD,
        passes.stream(model, weights, micro, mesh, policy),
        *(micro[f"{name}_BT"] for name in ("token", "segment", "role", "weight")),
        mesh=mesh,
        rows_MD=head.rows_MD,
        markers=head.markers,
      )

    return jax.lax.scan(of_micro, None, passes.micro_batches(batch))[1]

  in_shardings = passes.with_frozen((shardings.params, batch_sharding(mesh)), frozen_shardings)
  logps = passes.on_each_device(local, mesh, passes.specs(in_shardings), batch_sharding(mesh).spec)
  return jax.jit(logps, in_shardings=in_shardings, out_shardings=NamedSharding(mesh, jax.P()))


def measure_of(
  config: Config, run: Run, model: llama.Llama, mesh: Mesh, rows: int, share: np.ndarray
) -> Callable[[Rows, object], np.ndarray]:
  """Return a function of rows and trained parameters to the log p of each token, float32 [row, T], on every process.

  A token of weight 0 has log p 0. All processes of the run call it together. `rows` are those of a micro-batch, and
  `share` the indices of those of this process.
  """
  logps = make_logps(model, mesh, run.shardings, config.policy, run.frozen and run.frozen.shardings)
  frozen = () if run.frozen is None else (run.frozen.params,)

  def measure(packed: Rows, params) -> np.ndarray:
    logp_BT = np.zeros(packed.token_BT.shape, np.float32)
    batches = pipeline.in_order(packed, rows_per_step=rows, share=share, negatives=False)
    for start, batch in zip(range(0, len(packed), rows), batches, strict=True):
      # The step predicts the next token at each position.
      next_BT = np.asarray(logps(params, on_devices(batch, mesh, rows, share), *frozen).addressable_data(0))[0]
      logp_BT[start : start + rows, 1:] = next_BT[: len(packed) - start, :-1]
    return logp_BT

  return measure
