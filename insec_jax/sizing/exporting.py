"""What export needs: memory of the host, which holds one tensor at a time, and the size of the folder.

Of a LoRA run the base is read tensor by tensor and merged. Its adapters and marker rows are held whole, in float32.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from insec_jax.model import hf, llama, parts
from insec_jax.model.hf_writing import SHARD_BYTES
from insec_jax.model.lora import Lora
from insec_jax.sizing.hardware import GIB

# Copies of the largest tensor in the host's memory, in its stored dtype: as read, transposed, and cast. The merge of a
# matrix with its adapter takes no more, in float32.
COPIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportEstimate:
  """Sizes of an export in bytes; no accelerator takes part."""

  stored: str  # dtype of the weights, frozen or trained
  written: str  # dtype of the folder
  largest: str  # name of the largest tensor
  largest_bytes: int  # in the dtype of the weights; in float32 where an adapter is merged
  adapter_bytes: int  # adapters and marker rows, 0 without LoRA
  read_bytes: int  # weights and adapters
  written_bytes: int  # of the merged model

  @property
  def host_bytes(self) -> int:
    """The most memory of the host that the tensors take."""
    return self.adapter_bytes + COPIES * self.largest_bytes


def estimate_export(
  model_config: llama.LlamaConfig, *, stored: str, written: str | None, part: parts.Part | None
) -> ExportEstimate:
  """Return the estimate for weights in the dtype `stored`; `written` None keeps it."""
  written = written or stored
  before, after = (np.dtype(dtype).itemsize for dtype in (stored, written))
  sizes, held = {}, {}
  for slot in hf.slots(model_config):
    is_adapted = isinstance(part, Lora) and slot.path.rpartition("/")[2] in part.matrices
    sizes[slot.name] = math.prod(slot.shape)
    held[slot.name] = sizes[slot.name] * (max(before, 4) if is_adapted else before)
  trained = () if part is None else jax.tree.leaves(parts.unboxed_shapes(model_config, part))
  adapter_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in trained)
  largest = max(held, key=held.__getitem__)
  return ExportEstimate(
    stored=stored,
    written=written,
    largest=largest,
    largest_bytes=held[largest],
    adapter_bytes=adapter_bytes,
    read_bytes=adapter_bytes + before * sum(sizes.values()),
    written_bytes=after * sum(sizes.values()),
  )


def details(estimated: ExportEstimate) -> str:
  """Return all figures as text, one line each."""
  adapted = estimated.adapter_bytes / GIB
  lines = [
    f"== export of {estimated.stored} as {estimated.written}, on the host alone",
    f"   largest tensor  {estimated.largest}, {estimated.largest_bytes / GIB:.3g} GiB",
    f"   host memory     at most {COPIES} x the largest tensor{', and the adapters' if adapted else ''}, "
    f"{estimated.host_bytes / GIB:.3g} GiB: one at a time",
    f"   reads           {estimated.read_bytes / GIB:.4g} GiB of the {'base and the ' if adapted else ''}checkpoint",
    f"   writes          {estimated.written_bytes / GIB:.4g} GiB in files of at most {SHARD_BYTES / 1e9:g} GB",
  ]
  if adapted:
    lines.append(
      f"   adapters        {adapted:.3g} GiB with the marker rows; --format=peft reads and writes these alone"
    )
  return "\n".join(lines)


def as_json(estimated: ExportEstimate) -> dict[str, Any]:
  """Return all figures, with units in the names."""
  return {"program": "export", **dataclasses.asdict(estimated), "host_bytes": estimated.host_bytes}
