"""Levers on the memory of a train step: the same step with one other value of the config, compiled beside it."""

import dataclasses

from insec_jax.config import Config
from insec_jax.sizing.estimate import Estimate
from insec_jax.sizing.tables import markdown

# Section, key and value of each.
LEVERS = (
  ("optimizer", "memory", "host"),
  ("optimizer", "moments", "bfloat16"),
  ("optimizer", "name", "adafactor"),
  ("model", "remat", "offload"),
  ("model", "remat", "attention"),
  ("model", "remat", "matmuls"),
  ("data", "accumulation", 4),
)
HEADER = (
  "lever",
  "peak GiB",
  "GiB saved",
  "GiB on the host",
  "TFLOP",
  "GB ICI",
  "GB to and from the host",
  "step s >=",
)


def variants(config: Config) -> dict[str, Config]:
  """Return the config as it is, under the name "none", and with each lever that changes it."""
  found = {"none": config}
  for section, key, value in LEVERS:
    values = getattr(config, section)
    if getattr(values, key) != value:
      found[f"{section}.{key}={value}"] = dataclasses.replace(
        config, **{section: dataclasses.replace(values, **{key: value})}
      )
  return found


def table(estimates: dict[str, Estimate]) -> str:
  """Return a Markdown table with one row for each lever; the first estimate is the one that it is compared with."""
  before = next(iter(estimates.values())).memory.peak
  return markdown(HEADER, (_row(lever, estimated, before) for lever, estimated in estimates.items()))


def _row(lever: str, estimated: Estimate, before: float) -> tuple[str, ...]:
  memory, work = estimated.memory, estimated.work
  sizes = (
    f"`{lever}`",
    f"{memory.peak:.3g}" + (f" of {memory.limit:.3g}" if memory.limit else ""),
    f"{before - memory.peak:.2f}",
    f"{memory.host:.3g}",
  )
  if work is None:
    return (*sizes, "does not fit", *"---")
  return (
    *sizes,
    f"{work.flops / 1e12:.4g}",
    f"{sum(work.ici_bytes.values()) / 1e9:.3g}",
    f"{work.host_bytes / 1e9:.3g}",
    f"{work.step_seconds:.3g} ({work.bound})" if work.seconds else "-",
  )
