"""Parameters of a checkpoint that stay in its files until they are indexed, to be laid out or exported in parts."""

import contextlib
import ctypes
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from insec_jax.command import InputError, is_refusal
from insec_jax.config import Config
from insec_jax.config_build import build
from insec_jax.files import buckets
from insec_jax.files.locks import LOCK, is_held
from insec_jax.files.reading import read_json
from insec_jax.model import base, llama, parts
from insec_jax.model.hf import check_finite
from insec_jax.training import frozen
from insec_jax.training.checkpoint import DamageError, open_checkpoint
from insec_jax.training.fingerprints import array_types, bit_sum
from insec_jax.training.layout import CHECKPOINTS, CONFIG, check_files, describe_checkpoint, steps

VANISH_SECONDS = 10  # time limit for a run to remove a checkpoint
READ_ELEMENTS = 1 << 22  # read at once, in whole rows

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MIB = 1 << 20

Result = TypeVar("Result")


class Tally:
  """Fingerprint of an array that is read in parts, each element once."""

  def __init__(self, shape: tuple[int, ...], fingerprint: int):
    self._shape, self._fingerprint = shape, fingerprint
    self._num = self._sum = 0

  def add(self, part: np.ndarray, start: list[int]) -> None:
    """Add a part that begins at `start`."""
    self._sum = (self._sum + bit_sum(part, start, self._shape)) % (1 << 32)
    self._num += part.size

  def differs(self) -> bool:
    """Return whether all elements have been read and are not those of the fingerprint."""
    return self._num == math.prod(self._shape) and self._sum != self._fingerprint


class StoredWeight:
  """Parameter of a checkpoint: indexing reads only the bytes of the result, cast to `dtype`.

  Once every element has been read, each once, the fingerprint is compared with that of the saved array. Reading raises
  DamageError for another fingerprint, a value that is not finite, or files that cannot be read.
  """

  def __init__(self, folder: pathlib.Path, name: str, *, fingerprint: int, dtype: Any = None):
    self._name = f"params/{name}"
    path = name.replace("/", ".") + "/"
    store = {"driver": "ocdbt", "base": buckets.store_url(folder), "path": path}
    self._array = self._checked(lambda: tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True).result())
    self.shape = tuple(self._array.shape)
    self.dtype = np.dtype(self._array.dtype.numpy_dtype if dtype is None else dtype)
    self._tally = Tally(self.shape, fingerprint)

  def __getitem__(self, index) -> np.ndarray:
    """Return `self[index]`; `index` is a whole number for a layer, `...`, or one slice for each axis."""
    if index is ...:
      index = (slice(None),) * len(self.shape)
    elif isinstance(index, int):
      return self[(slice(index, index + 1), *(slice(None),) * (len(self.shape) - 1))][0]
    bounds = [piece.indices(size)[:2] for piece, size in zip(index, self.shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], self.dtype)
    (first, last), *others = bounds
    rows = max(1, READ_ELEMENTS // max(1, math.prod(out.shape[1:])))
    for start in range(first, last, rows):  # so that little is held in the dtype saved
      stop = min(start + rows, last)
      self._read([(start, stop), *others], out[start - first : stop - first])
    if self._tally.differs():
      raise DamageError(f"{self._name} is not what was saved")
    return out

  def _read(self, bounds: list[tuple[int, int]], out: np.ndarray) -> None:
    """Read a part into `out`, and add it to the fingerprint."""
    part = self._checked(lambda: self._array[tuple(slice(*bound) for bound in bounds)].read().result())
    try:
      check_finite(part, self._name)
    except InputError:
      raise DamageError(f"{self._name} holds values that are not finite") from None
    self._tally.add(part, [start for start, _ in bounds])
    with np.errstate(over="ignore"):  # overflow is an error below
      out[...] = part
    if self.dtype != part.dtype and not np.isfinite(out.astype(np.float32)).all():
      raise InputError(f"{self._name} holds values that {self.dtype} cannot hold; use float32")

  def verify(self) -> None:
    """Read the whole array, a layer at a time."""
    for row in range(self.shape[0] if len(self.shape) > 1 else 0):
      self[row]
    if len(self.shape) == 1:
      self[...]

  def _checked(self, read: Callable[[], Result]) -> Result:
    try:
      return read()
    except (PermissionError, MemoryError):
      raise
    except Exception as error:  # tensorstore raises errors of any type for damaged files
      if is_refusal(error):
        raise
      raise DamageError(f"its files cannot be read: {type(error).__name__}") from None


class PartCheckpoint(NamedTuple):
  """A checkpoint beside frozen weights: the trained tree as NumPy arrays, and the base, which is read when indexed."""

  trained: dict
  part: parts.Part
  config: Config
  read_base: Callable[[], dict]
  dtype: Any  # to read the weights in


def merged(checkpoint: PartCheckpoint) -> dict:
  """Return the base with the trained tree, as `parts.merged`."""
  return parts.merged(checkpoint.read_base(), checkpoint.trained, checkpoint.part, checkpoint.dtype)


def find_step(workdir: pathlib.Path, step: int | None) -> int:
  """Return the step of the newest checkpoint, or `step`; InputError when there is no such checkpoint."""
  saved_steps = steps(workdir)
  if not saved_steps:
    raise InputError(f"{workdir} has no checkpoint any more; bring one back, or train again")
  if step is not None and step not in saved_steps:
    raise InputError(f"{workdir} has no checkpoint of --step={step}; it has {', '.join(map(str, saved_steps))}")
  return saved_steps[-1] if step is None else step


def read_params(
  workdir: pathlib.Path,
  config: llama.LlamaConfig,
  step: int | None,
  use: Callable[[int, Any], Result],
  *,
  dtype: Any = None,
  of_part: Callable[[PartCheckpoint], Any] = merged,
) -> Result:
  """Return use(step, params) for the newest checkpoint, or the one of this step; each of the params a `StoredWeight`.

  `use` reads every element once, in `dtype` (None: as saved). Beside frozen weights it gets what `of_part` returns
  (None: precision.params). Raises InputError, which lists the sound steps, when the checkpoint is damaged. Also
  raises it when there is no such checkpoint, when other files of the workdir have changed since, or when the frozen
  weights have.
  """

  def attempt(number: int, use: Callable[[int, Any], Result]) -> Result:
    with _buffers_returned():
      return use(number, _stored(workdir, number, config, dtype, of_part))

  deadline = time.monotonic() + VANISH_SECONDS
  while True:
    saved_steps, chosen = steps(workdir), find_step(workdir, step)
    try:
      return attempt(chosen, use)
    except DamageError as error:
      problem = error
    # A running training removes old checkpoints, possibly this one.
    while _has_checkpoint(workdir, chosen) and time.monotonic() < deadline and is_held(workdir / LOCK):
      time.sleep(0.2)
    if _has_checkpoint(workdir, chosen):
      break
  sound = [number for number in saved_steps if number != chosen and _is_sound(attempt, number)]
  remedy = (
    f"sound are the steps {', '.join(map(str, sound))}: give --step={sound[-1]}, or let train go on from there"
    if sound
    else "no other one is sound: bring one back"
  )
  raise InputError(f"{describe_checkpoint(workdir, chosen)} is damaged ({problem}); {remedy}")


@contextlib.contextmanager
def _buffers_returned() -> Iterator[None]:
  """Inside the block, freed buffers of at least a MiB are returned to the system; nothing changes without glibc.

  Otherwise glibc comes to keep freed buffers of up to 32 MiB, tensorstore's among them, in the heap of each thread.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:
    yield
    return
  mallopt(M_MMAP_THRESHOLD, MIB)
  try:
    yield
  finally:  # the most to which glibc raises its thresholds by itself
    mallopt(M_MMAP_THRESHOLD, 32 * MIB)
    mallopt(M_TRIM_THRESHOLD, 64 * MIB)


def _is_sound(attempt: Callable, step: int) -> bool:
  def verify(_, params: dict) -> None:
    for weight in jax.tree.leaves(params):
      if isinstance(weight, StoredWeight):  # what is merged has been read already
        weight.verify()

  try:
    attempt(step, verify)
  except DamageError:
    return False
  return True


def _stored(workdir: pathlib.Path, step: int, config: llama.LlamaConfig, dtype, of_part: Callable):
  """Return the params of a checkpoint, or what `of_part` makes of it; DamageError when they are not all there."""
  folder = (workdir / CHECKPOINTS / str(step)).absolute()
  made, part = None, None
  if (workdir / CONFIG).exists():
    made = build(read_json(workdir / CONFIG, "the config of a run"))
    part = frozen.part_of_workdir(made, workdir)
  shapes = llama.unboxed_shapes(config) if part is None else parts.unboxed_shapes(config, part)

  def expected(run: dict) -> dict:
    saved = run["arrays"]["params/embed"].split("[")[0] if part is None else "float32"
    return array_types({"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, saved), shapes)})

  run = open_checkpoint(folder, step, lambda run: check_files(workdir, run), expected)
  kind = dtype if part is None else None
  weights = {}
  for name in flatten_dict(shapes, sep="/"):
    fingerprint = run["fingerprints"][f"params/{name}"]
    weights[name] = StoredWeight(folder / "params", name, fingerprint=fingerprint, dtype=kind)
  params = unflatten_dict(weights, sep="/")
  if part is None or made is None:
    return params
  trained = jax.tree.map(lambda weight: weight[...], params)

  def read_base() -> dict:
    return _base(made, workdir, config, part, run["base"])

  return of_part(PartCheckpoint(trained, part, made, read_base, dtype or made.precision.params))


def _base(made: Config, workdir: pathlib.Path, config: llama.LlamaConfig, part: parts.Part, origin: dict) -> dict:
  """Return the frozen weights of a run, each a `BaseWeight`."""
  every = base.weights(made, frozen.base_folder(made, workdir), config)
  weights = parts.frozen_weights(every, config, part, made.precision.params)
  where = f"model.path={made.model.path}" if made.model.path else "model.size, drawn by the seed,"
  return unflatten_dict(
    {
      name: BaseWeight(weight, f"{name} of {where}", origin["fingerprints"][name])
      for name, weight in flatten_dict(weights, sep="/").items()
    },
    sep="/",
  )


class BaseWeight:
  """Frozen weight; once every element has been read, each once, InputError unless it is the one of the training."""

  def __init__(self, weight, name: str, fingerprint: int):
    self._weight, self._name = weight, name
    self.shape = tuple(weight.shape)
    self._tally = Tally(self.shape, fingerprint)

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Return `self[index]`; `index` is one slice for each axis."""
    part = self._weight[index]
    self._tally.add(part, [piece.indices(size)[0] for piece, size in zip(index, self.shape, strict=True)])
    if self._tally.differs():
      raise InputError(
        f"{self._name} is not the frozen weight beside which this run was trained; bring that one back, or give the "
        "folder that has it to train, with the same --workdir and --config.model.path=FOLDER"
      )
    return part


def _has_checkpoint(workdir: pathlib.Path, step: int) -> bool:
  return step in steps(workdir)
