"""Vocabulary cut to the tokens in use, for the loss of training (train.vocabulary="used").

The softmax is over the kept tokens: those of the training rows, their negatives, the special tokens of the tokenizer,
markers among them, and those that end a text. Its loss is smaller than that over all tokens. Held-out losses, decoding
and exports have the whole vocabulary.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data.packing import BLOCK, Rows
from insec_jax.model.sharding import TENSOR
from insec_jax.training.variables import Head


class Kept(NamedTuple):
  """Tokens over which the softmax is: their ids, ascending, and the place among them of each token, 0 for others."""

  id_K: np.ndarray
  place_V: np.ndarray

  def head(self, head: Head) -> Head:
    """Return the rows of the kept tokens; markers, which are kept, by their places."""
    markers = None if head.markers is None else tuple(int(self.place_V[marker]) for marker in head.markers)
    return Head(jnp.take(head.weight_VD, self.id_K, axis=0), head.rows_MD, markers)

  def places(self, token_BT):
    """Return the places of the tokens; of one that is negative, which means none, itself."""
    return jnp.where(token_BT < 0, token_BT, jnp.take(self.place_V, jnp.maximum(token_BT, 0), axis=0))


def kept_of(rows: Rows, others: tuple[int, ...], vocab_size: int) -> Kept:
  """Return the tokens of the rows and the `others`, of a vocabulary of this size."""
  is_kept_V = np.zeros(vocab_size, bool)
  is_kept_V[list(others)] = True
  for start in range(0, len(rows), BLOCK):
    block = slice(start, start + BLOCK)
    is_kept_V[rows.token_BT[block][rows.segment_BT[block] > 0]] = True
    negative_BT = rows.negative_BT[block]
    is_kept_V[negative_BT[negative_BT >= 0]] = True
  id_K = np.flatnonzero(is_kept_V).astype(np.int32)
  place_V = np.zeros(vocab_size, np.int32)
  place_V[id_K] = np.arange(len(id_K))
  return Kept(id_K, place_V)


def check(config: Config, mesh: Mesh, *, trains_head: bool) -> None:
  """Raise InputError where a device has a part of the vocabulary, or an update would change rows that are not kept."""
  if config.train.vocabulary == "all":
    return
  if mesh.shape[TENSOR] > 1:
    raise InputError(
      f"train.vocabulary='used' with mesh.tensor={mesh.shape[TENSOR]}, over which the vocabulary is split; set "
      "mesh.tensor=1, or train.vocabulary='all'"
    )
  if trains_head and config.optimizer.weight_decay:
    raise InputError(
      f"train.vocabulary='used' with optimizer.weight_decay={config.optimizer.weight_decay:g}, which would shrink the "
      "rows of the output matrix that are not in use; set optimizer.weight_decay=0, or train.vocabulary='all'"
    )
