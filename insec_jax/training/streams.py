"""Cache of the output of frozen layers (train.stream_cache): computed once for each training row, then mapped.

  FOLDER/streams-KEY/stream.npy    [row, position, width], in precision.compute; bfloat16 as the bits in uint16
  FOLDER/streams-KEY/stream.json   size, time and SHA-256 of that file

KEY is a digest of the fingerprints of the frozen weights, the fields of the model, the number of frozen layers, the
rows, precision.compute, the attention, the devices and the versions. A folder is whole or not there, as in
data/cache.py. Until it is whole it is streams-KEY.partial, with the number of rows that are done in rows.json: a run
that is killed goes on from there. Nothing else is deleted here; FOLDER can be at any time.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import time

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from insec_jax.command import InputError
from insec_jax.config import Config
from insec_jax.data import cache, pipeline
from insec_jax.data.packing import BLOCK
from insec_jax.files.reading import read_json
from insec_jax.files.writing import write_text
from insec_jax.model import llama
from insec_jax.progress import Progress
from insec_jax.training import layout
from insec_jax.training import step as step_lib
from insec_jax.training.feeding import on_devices
from insec_jax.training.run import Run, choose_attention, rows_of

FORMAT = 1  # of the files
NAME = "train.stream_cache"
ARRAY, META, DONE = "stream.npy", "stream.json", "rows.json"
SAVE_SECONDS = 10.0  # between two notes of the rows that are done
READ = ("token_BT", "segment_BT", "position_BT", "until_BT")  # fields of rows that the layers read
SHOWN_ONLY = ("max_positions", "bos_id", "eos_ids", "pad_id", "stored_dtype", "source", "init_std")  # of LlamaConfig
GIB = 1 << 30


def of_run(config: Config, run: Run, model: llama.Llama, mesh: Mesh, *, say) -> np.ndarray | None:
  """Return the output of the frozen layers for each training row, mapped; None without train.stream_cache.

  What is not there is computed; `say` is told the size before. `check_room` has been called.
  """
  if not config.train.stream_cache or run.frozen is None:
    return None
  rows, path = run.data.train, _path(config, run, mesh)
  shape, dtype = _shape(config, run), config.precision.compute
  size = _size(config, run)
  epochs = config.train.steps * rows_of(config, mesh) * config.data.accumulation / max(len(rows), 1)
  what = f"output of {run.config.num_layers - model.num_top} frozen layers for {len(rows):,} rows"
  if path.is_dir():
    say(f"{NAME}: {what}, read from {path}")
  else:
    say(f"{NAME}: {what}, {size / GIB:.3g} GiB in {dtype}, is computed once into {path}; {epochs:.3g} epochs read it")

  def write() -> None:
    partial = _partial(path)
    with cache.room_needed(path.parent, NAME):
      partial.mkdir(exist_ok=True)
      _compute(partial, config, run, model, mesh, shape)
      write_text(partial / META, json.dumps(cache.written(partial / ARRAY)))
      (partial / DONE).unlink()
      partial.rename(path)

  cache.make_once(path, NAME, write)
  return _read(path, shape, dtype)


def check(config: Config, num_processes: int) -> None:
  """Raise InputError where several processes would have to share the cache."""
  if config.train.stream_cache and num_processes > 1:
    raise InputError(
      f"{NAME}={config.train.stream_cache} works in one process, and this run has {num_processes}; leave it out"
    )


def check_room(config: Config, run: Run, mesh: Mesh) -> None:
  """Make the folder of the cache; raise InputError where it cannot be made, OSError where it has no room for the rows.

  Called before the first file of the workdir is written.
  """
  if not config.train.stream_cache or run.frozen is None:
    return
  folder = pathlib.Path(config.train.stream_cache)
  cache.make_folder(folder, NAME)
  path, size, free = _path(config, run, mesh), _size(config, run), shutil.disk_usage(folder).free
  if size > free and not path.is_dir() and not (_partial(path) / DONE).exists():
    said = f"{size / GIB:.3g} GiB are needed for {NAME}, {free / GIB:.3g} GiB are free"
    raise OSError(errno.ENOSPC, said, str(folder))


def _path(config: Config, run: Run, mesh: Mesh) -> pathlib.Path:
  attention = choose_attention(config, run.config, mesh.devices.flat[0])[1]
  return pathlib.Path(config.train.stream_cache) / f"streams-{key(config, run, mesh, attention)}"


def _partial(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.partial")


def _shape(config: Config, run: Run) -> tuple[int, int, int]:
  return len(run.data.train), config.data.row_length, run.config.width


def _size(config: Config, run: Run) -> int:
  return math.prod(_shape(config, run)) * np.dtype(_numpy(config.precision.compute)).itemsize


def key(config: Config, run: Run, mesh: Mesh, attention: str) -> str:
  """Return a digest of all that the output of the frozen layers depends on."""
  if run.frozen is None:
    raise ValueError("a run without frozen weights has no output of frozen layers")
  digest = hashlib.sha256()
  for array_BT in (getattr(run.data.train, name) for name in READ):
    for start in range(0, 0 if array_BT is None else len(array_BT), BLOCK):
      digest.update(array_BT[start : start + BLOCK].tobytes())
  model = {name: value for name, value in dataclasses.asdict(run.config).items() if name not in SHOWN_ONLY}
  weights = [run.frozen.origin["fingerprints"], layout_of(run.frozen.params)]
  # Sums of floats are added in another order on other devices, in other batches and by other versions.
  order = [str(mesh.shape), mesh.devices.flat[0].device_kind, rows_of(config, mesh), layout.versions()]
  facts = [FORMAT, weights, model, config.precision.compute, attention, order, digest.hexdigest()]
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def layout_of(params) -> list[str]:
  """Return dtype and shape of each of the weights."""
  return [f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(params)]


def _numpy(dtype: str):
  return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def _compute(partial: pathlib.Path, config: Config, run: Run, model: llama.Llama, mesh: Mesh, shape) -> None:
  """Write the output of the frozen layers for each row that is not done to a file in NumPy's format."""
  stored = np.uint16 if config.precision.compute == "bfloat16" else np.dtype(config.precision.compute)
  num, done = rows_of(config, mesh), 0
  if (partial / DONE).exists():
    done = read_json(partial / DONE, NAME)["rows"]
    mapped = np.load(partial / ARRAY, mmap_mode="r+")
  else:
    mapped = _new_array(partial / ARRAY, stored, shape)
  streams = step_lib.make_streams(model, mesh, run.frozen and run.frozen.shardings)
  share, progress = np.arange(num), Progress("frozen layers", len(mapped), unit="row", done=done)
  batches = pipeline.in_order(run.data.train, rows_per_step=num, share=share, negatives=False)
  noted = time.monotonic()
  for batch in itertools.islice(batches, done // num, None):
    stream_BTD = np.asarray(streams(run.frozen and run.frozen.params, on_devices(batch, mesh, num, share)))[0]
    rows = min(num, len(mapped) - done)
    mapped[done : done + rows] = stream_BTD[:rows].view(stored)
    done += rows
    progress.update(done)
    if done == len(mapped) or time.monotonic() - noted > SAVE_SECONDS:
      mapped.flush()  # before the note: what it counts is on the disk
      write_text(partial / DONE, json.dumps({"rows": done}))
      noted = time.monotonic()
  progress.close()


def _new_array(path: pathlib.Path, dtype, shape) -> np.ndarray:
  """Return a new array that is mapped from a file whose whole room is taken."""
  mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
  if hasattr(os, "posix_fallocate"):  # a full disk would end the process by a signal
    with path.open("r+b") as file:
      os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
  return mapped


def _read(path: pathlib.Path, shape, dtype: str) -> np.ndarray:
  try:
    cache.check_file(path / ARRAY, read_json(path / META, NAME))
    array = np.load(path / ARRAY, mmap_mode="r")
    if array.shape != shape:
      raise InputError(f"{ARRAY} has the shape {array.shape}, {shape} was written")
  except (InputError, KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as error:
    raise cache.damaged(path, error, NAME) from None
  return np.asarray(array).view(_numpy(dtype))
