"""What export needs: memory of the host, which holds one tensor at a time, and the size of the folder."""

import dataclasses
import math
from typing import Any

import numpy as np

from insec_jax.model import hf, llama
from insec_jax.model.hf_writing import SHARD_BYTES
from insec_jax.sizing.hardware import GIB

# Copies of the largest tensor in the host's memory, in its stored dtype: as read, transposed, and cast.
COPIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportEstimate:
  """Sizes of an export in bytes; no accelerator takes part."""

  stored: str  # dtype of the checkpoint
  written: str  # dtype of the folder
  largest: str  # name of the largest tensor
  largest_bytes: int  # in the dtype of the checkpoint
  read_bytes: int  # the params of the checkpoint
  written_bytes: int

  @property
  def host_bytes(self) -> int:
    """The most memory of the host that the tensors take."""
    return COPIES * self.largest_bytes


def estimate_export(model_config: llama.LlamaConfig, *, stored: str, written: str | None) -> ExportEstimate:
  """Return the estimate for a checkpoint in the dtype `stored`; `written` None keeps it."""
  sizes = {slot.name: math.prod(slot.shape) for slot in hf.slots(model_config)}
  largest = max(sizes, key=sizes.__getitem__)
  written = written or stored
  before, after = (np.dtype(dtype).itemsize for dtype in (stored, written))
  return ExportEstimate(
    stored=stored,
    written=written,
    largest=largest,
    largest_bytes=before * sizes[largest],
    read_bytes=before * sum(sizes.values()),
    written_bytes=after * sum(sizes.values()),
  )


def details(estimated: ExportEstimate) -> str:
  """Return all figures as text, one line each."""
  return "\n".join(
    (
      f"== export of {estimated.stored} as {estimated.written}, on the host alone",
      f"   largest tensor  {estimated.largest}, {estimated.largest_bytes / GIB:.3g} GiB",
      f"   host memory     at most {COPIES} x the largest tensor, {estimated.host_bytes / GIB:.3g} GiB: one at a time",
      f"   reads           {estimated.read_bytes / GIB:.4g} GiB of the checkpoint",
      f"   writes          {estimated.written_bytes / GIB:.4g} GiB in files of at most {SHARD_BYTES / 1e9:g} GB",
    )
  )


def as_json(estimated: ExportEstimate) -> dict[str, Any]:
  """Return all figures, with units in the names."""
  return {"program": "export", **dataclasses.asdict(estimated), "host_bytes": estimated.host_bytes}
