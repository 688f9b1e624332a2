"""How devices share the vocabulary projection of training/loss.py; its letters."""

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from insec_jax.config import PolicyConfig
from insec_jax.model import lora
from insec_jax.model.sharding import FSDP, TENSOR


class Plan(NamedTuple):
  """How the devices share the work, and what is added to the loss for negatives.

  The vocabulary is split over tensor and, within that, over `token_axes`, along which devices concatenate their chunks.
  `markers` are the tokens whose rows of the output matrix are trained (LoRA); None: the whole matrix is. With `policy`
  the loss is that of policy_loss.py, and the weight of a token is its advantage, or that of distill_loss.py.
  """

  mesh: Mesh | None
  token_axes: tuple[str, ...]  # of fsdp, along which trained tokens are exchanged
  head_axes: tuple[str, ...]  # of fsdp, along which the head is gathered
  chunk: int
  repeat: float
  markers: tuple[int, ...] | None = None
  policy: PolicyConfig | None = None

  @property
  def forward(self) -> float:
    """Weight of the forward KL in a distillation."""
    return self.policy.forward if self.policy else 0.0

  @property
  def axes(self) -> tuple[str, ...]:
    """Axes of the mesh over which the vocabulary is split."""
    return self.token_axes if self.mesh is None or self.mesh.shape[TENSOR] == 1 else (TENSOR, *self.token_axes)

  def marker_places(self, num: int):
    """Return the place of each marker in the device's part of the vocabulary, of `num` tokens, [M]; else `num`."""
    first = jax.lax.axis_index(self.axes) * num if self.axes else 0
    return lora.places(self.markers or (), first, num)

  def reduce(self, operation, x):
    """Return `x` reduced over the parts of the vocabulary."""
    return operation(x, self.axes) if self.axes else x

  def gather(self, x_C):
    """Return the chunks of the devices that share a vocabulary, [W]."""
    return jax.lax.all_gather(x_C, self.token_axes, tiled=True) if self.token_axes else x_C

  def own(self, x_W):
    """Return the device's own chunk of the gathered ones, [C]."""
    if not self.token_axes:
      return x_W
    return jax.lax.dynamic_slice(x_W, (jax.lax.axis_index(self.token_axes) * self.chunk,), (self.chunk,))


def split_fsdp(mesh, *, num_tokens: int, num_rows: int, itemsize: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Return (axes of fsdp along which tokens are exchanged, axes along which the head is gathered) with fewest bytes.

  Per device, at most `num_tokens` are sent and returned, and `num_rows` rows of the head, whose gradient is float32.
  """
  axes = [name for name in FSDP if mesh.shape[name] > 1]

  def cost(first):
    devices, others = (math.prod(mesh.shape[name] for name in part) for part in (axes[first:], axes[:first]))
    if num_rows % devices:
      return math.inf
    return 2 * itemsize * num_tokens * (devices - 1) + (itemsize + 4) * num_rows / devices * (1 - 1 / others)

  # Tokens along the inner axes: a device's part of the width is then contiguous.
  first = min(range(len(axes), -1, -1), key=cost)
  return tuple(axes[first:]), tuple(axes[:first])
