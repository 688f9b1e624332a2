"""Transfer of rows to the devices; each process reads only the rows that its devices hold."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from insec_jax.config import Config
from insec_jax.data import pipeline
from insec_jax.model import llama, sharding
from insec_jax.training import metrics
from insec_jax.training import step as step_lib
from insec_jax.training.run import Run


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
  """Return the indices, ascending, of the rows of a micro-batch that the devices of this process hold.

  Where `tensor` or `sequence` spans hosts, several processes read the same rows.
  """
  shape = (1, rows, sharding.num_parts(mesh))
  held = step_lib.batch_sharding(mesh).addressable_devices_indices_map(shape).values()
  return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in held]))


def on_devices(batch: dict[str, np.ndarray], mesh: Mesh, rows: int, share: np.ndarray) -> dict[str, jax.Array]:
  """Return the batch as global arrays; `share` holds the indices of this process's rows."""

  def to_global(local):
    def read(index):
      start, stop, _ = index[1].indices(rows)  # of the other axes, a stream has its width whole
      first = np.searchsorted(share, start)
      return local[:, first : first + stop - start, index[2]]

    shape = (local.shape[0], rows, *local.shape[2:])
    return jax.make_array_from_callback(shape, step_lib.batch_sharding(mesh), read)

  return {name: to_global(array) for name, array in batch.items()}


def heldout_measure(config: Config, run: Run, model: llama.Llama, mesh: Mesh, rows: int, share: np.ndarray) -> Callable:
  """Return a function from the trained parameters to the eval/ values over all held-out rows."""
  heldout_sums = step_lib.make_heldout_sums(model, mesh, run.shardings, run.frozen and run.frozen.shardings)
  frozen = () if run.frozen is None else (run.frozen.params,)

  def measure(params) -> dict[str, float]:
    totals = metrics.Totals.zero()
    for batch in pipeline.in_order(run.data.heldout, rows_per_step=rows, share=share, negatives=config.loss.negatives):
      totals = totals.plus(jax.device_get(heldout_sums(params, on_devices(batch, mesh, rows, share), *frozen)), 0, 0.0)
    return metrics.heldout_line(totals.sums, config.loss.weight_R)

  return measure
