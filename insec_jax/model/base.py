"""Frozen weights of a LoRA run, left in their files or not yet drawn until they are indexed."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from insec_jax.config import Config
from insec_jax.model import build, hf
from insec_jax.model.llama import LlamaConfig

ROWS_AT_ONCE = 4_096  # of a table, read for the mean


@dataclasses.dataclass(frozen=True)
class GrownTable:
  """Table with rows added, each the mean of its own in float64, so that it does not depend on the devices."""

  table: Any
  num_rows: int
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, int]:
    return self.num_rows, self.table.shape[1]

  def __getitem__(self, index) -> np.ndarray:
    """Return `self[index]`; `index` is one slice for each axis."""
    rows, width = (range(size)[piece] for size, piece in zip(self.shape, index, strict=True))
    out = np.empty((len(rows), len(width)), self.dtype)
    old = self.table.shape[0]
    num_old = max(0, min(rows.stop, old) - rows.start)
    if num_old:
      out[:num_old] = self.table[slice(rows.start, rows.start + num_old), index[1]]
    if num_old < len(rows):
      out[num_old:] = self.mean_D[index[1]]
    return out

  @functools.cached_property
  def mean_D(self) -> np.ndarray:
    """The mean of the table's own rows."""
    old, width = self.table.shape
    total_D = np.zeros(width)
    for start in range(0, old, ROWS_AT_ONCE):
      total_D += self.table[slice(start, min(old, start + ROWS_AT_ONCE)), slice(None)].astype(np.float64).sum(0)
    return (total_D / old).astype(self.dtype)


def weights(config: Config, folder: pathlib.Path | None, model_config: LlamaConfig) -> dict:
  """Return the frozen weights of a run, each read or drawn when it is indexed, in the dtype precision.params.

  `folder` is that of model.path, None where model.size draws them by the seed. `model_config` is the trained model's:
  its vocabulary may be larger than the folder's.
  """
  dtype = config.precision.params
  if folder is None:
    return build.random_weights(model_config, jax.random.key(config.seed), dtype)
  before = hf.read_config(folder)
  stored = hf.stored(folder, before, dtype=dtype)
  if model_config.vocab_size == before.vocab_size:
    return stored
  return stored | {
    name: GrownTable(stored[name], model_config.vocab_size, np.dtype(dtype))
    for name in ("embed", "head")
    if name in stored
  }
