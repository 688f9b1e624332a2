"""Hugging Face folders, written: weights, config.json, tokenizer and model card; see hf.py."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from insec_jax.command import InputError
from insec_jax.files.reading import local_path
from insec_jax.files.writing import folder_written_whole, write_text
from insec_jax.model.hf import CONFIG, GENERATION, INDEX, SINGLE, Slot, check_finite, slots, to_hf
from insec_jax.model.hf_config import config_to_json, readable_by_all
from insec_jax.model.llama import LlamaConfig
from insec_jax.model.safetensors_io import CODES, Source, write_tensors

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 5 * 10**9  # of one file, the default of transformers


def save(
  folder: pathlib.Path | str,
  params,
  config: LlamaConfig,
  *,
  dtype=None,
  max_shard_bytes: int = SHARD_BYTES,
  tokenizer=None,
  generation: dict[str, Any] | None = None,
  card: str | None = None,
) -> None:
  """Write an HF folder, which appears only when it is complete.

  It holds the weights, an index if they need several files, config.json, generation_config.json (`generation`, or the
  config's token ids if None), and where given the tokenizer and the model card (README.md). With `params` from
  `hf.stored`, one HF tensor and its transpose are in memory at a time. Raises InputError when the folder is not empty.
  """
  with new_folder(folder) as partial:
    write_into(
      partial,
      params,
      config,
      dtype=dtype,
      max_shard_bytes=max_shard_bytes,
      tokenizer=tokenizer,
      generation=generation,
      card=card,
    )


@contextlib.contextmanager
def new_folder(folder: pathlib.Path | str) -> Iterator[pathlib.Path]:
  """Yield a folder that takes the name `folder` when the block ends without an error; InputError unless it is empty."""
  folder = local_path(folder, "--output")
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise InputError(f"{folder} cannot be made, a folder above it is a file; give another") from None
  with folder_written_whole(folder) as partial:
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
      raise InputError(f"{folder} is there already and not empty; give a new folder, nothing is written over")
    yield partial


def write_into(
  folder: pathlib.Path,
  params,
  config: LlamaConfig,
  *,
  dtype=None,
  max_shard_bytes: int = SHARD_BYTES,
  tokenizer=None,
  generation: dict[str, Any] | None = None,
  card: str | None = None,
) -> None:
  """Write the files that `save` writes into a folder that exists."""
  weights = flatten_dict(params, sep="/")
  target = np.dtype(dtype or weights["embed"].dtype)
  _write_weights(
    folder,
    [_source(slot, weights[slot.path], config, np.dtype(dtype or weights[slot.path].dtype)) for slot in slots(config)],
    max_shard_bytes,
  )
  fields = readable_by_all(config_to_json(dataclasses.replace(config, stored_dtype=target.name)), config)
  ids = {key: value for key, value in fields.items() if key in TOKEN_IDS and value is not None}
  write_json(folder / CONFIG, fields)
  write_json(folder / GENERATION, ids if generation is None else generation)
  if tokenizer is not None:
    tokenizer.save_pretrained(folder)
  if card is not None:
    write_text(folder / "README.md", card)


def write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
  """Write a JSON file with the indentation that transformers uses."""
  write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def _source(slot: Slot, weight, config: LlamaConfig, dtype: np.dtype) -> Source:
  if dtype not in CODES:
    raise InputError(f"weights cannot be written as {dtype}; choose one of {', '.join(kind.name for kind in CODES)}")

  def read():
    array = np.asarray(weight[...] if slot.layer is None else weight[slot.layer])
    with np.errstate(over="ignore"):  # overflow is an error below
      moved = np.ascontiguousarray(to_hf(slot.path, array, config)).astype(dtype, copy=False)
    check_finite(moved, f"{slot.name} as {dtype}")
    return moved

  return Source(slot.name, dtype, slot.shape, read)


def _write_weights(folder: pathlib.Path, sources: list[Source], max_shard_bytes: int) -> None:
  shards: list[list[Source]] = []
  room = 0
  for source in sources:
    if source.num_bytes > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(source)
    room -= source.num_bytes
  if len(shards) == 1:
    write_tensors(folder / SINGLE, shards[0])
    return
  places = {}
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    write_tensors(folder / file, shard)
    places |= dict.fromkeys((source.name for source in shard), file)
  write_json(
    folder / INDEX,
    {
      "metadata": {"total_size": sum(source.num_bytes for source in sources)},
      "weight_map": dict(sorted(places.items())),
    },
  )
