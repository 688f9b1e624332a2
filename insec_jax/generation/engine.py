"""The engine that continues and reads texts: the weights on the devices of this host, or a server (--server)."""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from absl import flags

from insec_jax.command import InputError
from insec_jax.generation import server
from insec_jax.generation.confidence import ConfidenceTrigger
from insec_jax.generation.loading import LoadedModel, load_model
from insec_jax.generation.sampler import SampledTokens
from insec_jax.model.llama import LlamaConfig
from insec_jax.training.fingerprints import fingerprint


class Engine(Protocol):
  """What continues and reads texts of token ids; Sampler says how."""

  @property
  def config(self) -> LlamaConfig:
    """Return the config of the model."""

  def reserve(self, max_tokens: int) -> None:
    """Act in later calls as after a call with this `max_tokens`."""

  def generate(
    self,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int],
    flag_id: int | None = None,
    flag_bias: float = 0.0,
    watch: ConfidenceTrigger | None = None,
    batch_size: int,
    first: int = 0,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[SampledTokens]:
    """Return one SampledTokens per prompt."""

  def logprobs(self, texts: Sequence[np.ndarray], *, batch_size: int) -> list[np.ndarray]:
    """Return for each text the log p of each token."""

  def beam(
    self,
    prompts: Sequence[np.ndarray],
    *,
    width: int,
    max_tokens: int,
    stop_ids: Sequence[int],
    flag_id: int | None = None,
    watch: ConfidenceTrigger | None = None,
    excluded: Sequence[np.ndarray] | None = None,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[tuple[SampledTokens, int]]:
    """Return the likeliest text after each prompt, and the tokens of all beams."""

  def streams(
    self, texts: Sequence[np.ndarray], places: Sequence[Sequence[int]], *, batch_size: int
  ) -> list[np.ndarray]:
    """Return for each text the stream at the tokens of `places`."""


def uses_server() -> bool:
  """Return whether the flags name a server."""
  return flags.FLAGS.server is not None


def open_model(
  folder: str, *, step: int | None, mesh: str, compute: str | None = None, score_flags: bool = False
) -> LoadedModel:
  """Load a model onto the devices of this host or, with --server, its tokenizer, template and markers only.

  `score_flags`: the log p of a flag that is not written is wanted, from a server that gives it. Raises InputError as
  `load_model` and `server.connect` do.
  """
  values = flags.FLAGS
  if values.server is None:
    for name in ("server_model", "server_requests"):
      if values[name].present:
        raise InputError(f"--{name} is for a server; give its URL as --server, or leave it out")
    return load_model(folder, step=step, mesh=mesh, compute=compute)
  if mesh:
    raise InputError(f"--mesh={mesh} places weights on devices, and with --server none are read; leave it out")
  loaded = load_model(folder, step=step, weights=False)
  if loaded.confidence_ids:
    raise InputError(
      f"{folder} writes confidence tokens, which are forced while decoding, and a server forces none; leave --server "
      "out"
    )
  if loaded.rewind:
    raise InputError(
      f"{folder} was trained with mistakes.rewind, and a server lets what follows a correction read its mistake; leave "
      "--server out"
    )
  served = server.connect(
    values.server,
    loaded.tokenizer,
    model=values.server_model or "",
    requests=values.server_requests,
    score_flags=score_flags,
  )
  most, limit = loaded.config.max_positions, served.max_positions
  if limit is not None and limit < most:
    print(f"the server takes {limit} of the model's {most} positions", file=sys.stderr, flush=True)
    loaded = loaded._replace(config=dataclasses.replace(loaded.config, max_positions=limit))
  return loaded._replace(server=served)


def identity(loaded: LoadedModel) -> str:
  """Return a short text that changes with the weights; for a server's, with its name and how texts are read."""
  if loaded.server is None:
    return f"{fingerprint(loaded.params)}{', rewinding' * loaded.rewind}"
  served = loaded.server
  read_by = (loaded.markers, loaded.flag_id, loaded.unit, loaded.template, loaded.config.eos_ids, served.scores_flags)
  return f"{served.model} on a server, {hashlib.sha256(repr(read_by).encode()).hexdigest()[:8]}"
