"""Rows on their way to the devices: each process brings those that its devices hold."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from insec_jax.config import Config
from insec_jax.data import pipeline
from insec_jax.model import llama
from insec_jax.training import metrics
from insec_jax.training import step as step_lib
from insec_jax.training.run import Run


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
  """Which rows of a micro-batch the devices of this process hold, in ascending order.

  Where `tensor` crosses hosts, several processes read the same rows.
  """
  held = step_lib.batch_sharding(mesh).addressable_devices_indices_map((1, rows, 1)).values()
  return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in held]))


def on_devices(batch: dict[str, np.ndarray], mesh: Mesh, rows: int, share: np.ndarray) -> dict[str, jax.Array]:
  """The batch as global arrays, of which this process brings its share of the rows."""

  def place(mine):
    def read(index):
      start, stop, _ = index[1].indices(rows)
      first = np.searchsorted(share, start)
      return mine[:, first : first + stop - start]

    return jax.make_array_from_callback((mine.shape[0], rows, mine.shape[2]), step_lib.batch_sharding(mesh), read)

  return {name: place(array) for name, array in batch.items()}


def heldout_measure(config: Config, run: Run, model: llama.Llama, mesh: Mesh, rows: int, share: np.ndarray) -> Callable:
  """A function from parameters to the eval/ values over all held-out rows."""
  sums_of = step_lib.make_heldout_sums(model, mesh, run.shardings)

  def measure(params) -> dict[str, float]:
    totals = metrics.Totals.zero()
    for batch in pipeline.in_order(run.data.heldout, rows_per_step=rows, share=share, negatives=config.loss.negatives):
      totals = totals.plus(jax.device_get(sums_of(params, on_devices(batch, mesh, rows, share))), 0, 0.0)
    return metrics.heldout_line(totals.sums, config.loss.weight_R)

  return measure
