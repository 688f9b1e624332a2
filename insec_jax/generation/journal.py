"""Journal of an engine's calls: they are shared by processes, and not computed again after a kill.

A program that makes the same calls each time it is run, as long as it gets the same results, goes on after a kill and
runs in several processes. All processes make all calls. A call is cut into chunks of consecutive prompts:

      results.json.parts/0.jsonl    header   call 1, chunk 0 of 2   call 2, chunk 0 of 2
      results.json.parts/1.jsonl    header   call 1, chunk 1 of 2   call 2, chu             killed while writing

A process computes its chunks and reads those of the others: the folder must be in a bucket or on a drive that all of
them share. The number of processes stays the same; their devices may differ.
"""

import base64
import dataclasses
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.files.bucket_paths import BucketPath
from insec_jax.files.chunks import ChunkStore
from insec_jax.generation.engine import Engine
from insec_jax.generation.sampler import SampledTokens

FORMAT = 1  # of the chunks; another one is not read
PROMPTS_PER_CHUNK = 2_048  # at most: what a kill loses
POLL_SECONDS, BUCKET_POLL_SECONDS = 0.2, 1.0  # each look into a bucket is a request that is paid for
PATIENCE_SECONDS = 60.0  # to wait for another process before it is named

Progress = Callable[[int, int], None]


class Journal:
  """An engine that keeps the results of another one in a ChunkStore; `journaled` makes it.

  `seconds_before` is the time that this process spent on chunks before a kill.
  """

  def __init__(self, engine: Engine, store: ChunkStore, *, process: int, num_processes: int):
    self._engine, self._store, self._process, self._num_processes = engine, store, process, num_processes
    self._follow = store.follow()
    self._finished = self._follow()  # chunks that no call has asked for yet
    self._num_chunks = self._num_calls = 0  # of the calls so far
    own = [value for value in self._finished.values() if value["process"] == process]
    self.seconds_before = sum(value["seconds"] for value in own)
    if own:
      print(f"{len(own)} chunks were made before", file=sys.stderr, flush=True)

  @property
  def config(self) -> Any:
    """Return the config of the model."""
    return self._engine.config

  def reserve(self, max_tokens: int) -> None:
    """Pass it on to the engine."""
    self._engine.reserve(max_tokens)

  def generate(
    self, prompts: Sequence[np.ndarray], *, first: int = 0, progress: Progress | None = None, **options: Any
  ) -> list[SampledTokens]:
    """Return what the engine returns; `progress` counts the tokens of this process only."""
    done = written = 0

    def make(part: slice) -> dict[str, Any]:
      nonlocal done, written

      def advance(num_prompts: int, num_tokens: int) -> None:
        if progress is not None and num_prompts + done < len(prompts):
          progress(done + num_prompts, written + num_tokens)

      sampled = self._engine.generate(prompts[part], first=first + part.start, progress=advance, **options)
      done += len(sampled)
      written += sum(len(one.tokens) for one in sampled)
      return _packed_samples(sampled)

    self._engine.reserve(options["max_tokens"])  # also where others made the chunks: later ones have the same bits
    values = self._chunks("generate", prompts, {"first": first, **options}, make)
    results = list(itertools.chain.from_iterable(map(_unpacked_samples, values)))
    if progress is not None and done:
      progress(len(prompts), written)
    return results

  def logprobs(self, texts: Sequence[np.ndarray], *, batch_size: int) -> list[np.ndarray]:
    """Return what the engine returns."""

    def make(part: slice) -> dict[str, Any]:
      return _packed(self._engine.logprobs(texts[part], batch_size=batch_size))

    values = self._chunks("logprobs", texts, {"batch_size": batch_size}, make)
    return list(itertools.chain.from_iterable(map(_unpacked, values)))

  def beam(
    self,
    prompts: Sequence[np.ndarray],
    *,
    excluded: Sequence[np.ndarray] | None = None,
    progress: Progress | None = None,
    **options: Any,
  ) -> list[tuple[SampledTokens, int]]:
    """Return what the engine returns; `progress` is called when the part of this process is done."""

    def make(part: slice) -> dict[str, Any]:
      left = None if excluded is None else excluded[part]
      found, nums = zip(*self._engine.beam(prompts[part], excluded=left, **options), strict=True)
      return {"found": _packed_samples(found), "tokens": list(nums)}

    named = {**options, "excluded": None if excluded is None else [text.tolist() for text in excluded]}
    values = self._chunks("beam", prompts, named, make)
    results = [
      pair for value in values for pair in zip(_unpacked_samples(value["found"]), value["tokens"], strict=True)
    ]
    if progress is not None and prompts:
      progress(len(prompts), sum(num for _, num in results))
    return results

  def streams(
    self, texts: Sequence[np.ndarray], places: Sequence[Sequence[int]], *, batch_size: int
  ) -> list[np.ndarray]:
    """Return what the engine returns."""

    def make(part: slice) -> dict[str, Any]:
      streams = self._engine.streams(texts[part], places[part], batch_size=batch_size)
      return _packed([stream_JD.reshape(-1) for stream_JD in streams])

    named = {"batch_size": batch_size, "places": [list(wanted) for wanted in places]}
    values = self._chunks("streams", texts, named, make)
    flat = itertools.chain.from_iterable(map(_unpacked, values))
    return [array.reshape(len(wanted), -1) for array, wanted in zip(flat, places, strict=True)]

  def join(self, write: Callable[[], None]) -> bool:
    """Call `write` once every process has come here, in the last one, and remove the chunks; return whether it did."""
    mark = self._num_chunks + self._process
    if mark not in self._finished:
      self._append(mark, {"request": "the end"})
    return self._store.join(self._num_chunks + self._num_processes, lambda _: write() or True) is not None

  def _chunks(
    self, name: str, prompts: Sequence[np.ndarray], options: dict[str, Any], make: Callable[[slice], dict[str, Any]]
  ) -> Iterator[dict[str, Any]]:
    """Yield the results of each chunk of a call in order, after making those of this process that are not there."""
    self._num_calls += 1
    request = _digest(name, prompts, options)
    parts = _cut(len(prompts), self._num_processes)
    begin, self._num_chunks = self._num_chunks, self._num_chunks + len(parts)
    for number in range(self._process, len(parts), self._num_processes):
      if begin + number not in self._finished:
        start = time.monotonic()
        results = make(parts[number])
        seconds = round(time.monotonic() - start, 3)
        self._append(begin + number, {"request": request, "seconds": seconds, "results": results})
    self._wait({begin + number: number % self._num_processes for number in range(len(parts))})
    for number in range(len(parts)):
      value = self._finished.pop(begin + number)
      if value["request"] != request:
        raise InputError(
          f"{self._store.folder}: call {self._num_calls} of process {value['process']} was of other prompts or options "
          "than here; the files that are read differ between runs or hosts: bring them back, or remove the folder, "
          "and it is done again"
        )
      yield value["results"]

  def _append(self, chunk: int, value: dict[str, Any]) -> None:
    value = {"process": self._process, "seconds": 0.0, **value}
    self._store.append(chunk, value, process=self._process)
    self._finished[chunk] = value

  def _wait(self, process_of: dict[int, int]) -> None:
    """Wait until the chunks, given with their processes, are there."""
    start, said = time.monotonic(), False
    while True:
      missing = sorted({process for chunk, process in process_of.items() if chunk not in self._finished})
      if not missing:
        return
      if not said and time.monotonic() - start > PATIENCE_SECONDS:
        said = True
        print(
          f"call {self._num_calls} waits for process {', '.join(map(str, missing))} of {self._num_processes}; if it "
          "does not run, start it again: the same command with its --process_id",
          file=sys.stderr,
          flush=True,
        )
      if not (found := self._follow()):
        time.sleep(BUCKET_POLL_SECONDS if isinstance(self._store.folder, BucketPath) else POLL_SECONDS)
      # Those of this process are known; they come again.
      self._finished |= {chunk: value for chunk, value in found.items() if value["process"] != self._process}


def journaled(
  engine: Engine,
  output: str,
  header: dict[str, Any],
  *,
  process: int,
  num_processes: int,
  is_free: Callable[[str], bool] = lambda _: False,
) -> Journal:
  """Return the engine with its calls kept beside the file `output`; `header` is all that the first call depends on.

  Headers of earlier versions may also have names for which `is_free` is True.

  The caller is inside `chunks.one_process`. Raises InputError when the chunks there are of other work.
  """
  store = ChunkStore(output, {**header, "format": FORMAT, "number of processes": num_processes}, is_free=is_free)
  return Journal(engine, store, process=process, num_processes=num_processes)


def _cut(num: int, num_processes: int) -> list[slice]:
  """Return chunks of `num` prompts: equally many for each process, of nearly the same size, none empty."""
  num_chunks = min(num, num_processes * math.ceil(num / (num_processes * PROMPTS_PER_CHUNK)))
  bounds = [num * chunk // num_chunks for chunk in range(num_chunks + 1)] if num else []
  return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _digest(name: str, prompts: Sequence[np.ndarray], options: dict[str, Any]) -> str:
  """Return a checksum of a call."""
  lengths = [len(prompt) for prompt in prompts]
  digest = hashlib.sha256(repr((name, sorted(options.items()), lengths)).encode())
  for prompt in prompts:
    digest.update(np.asarray(prompt, "<i8").tobytes())
  return digest.hexdigest()[:32]


def _packed_samples(samples: Sequence[SampledTokens]) -> dict[str, Any]:
  """Return the samples as JSON; `_unpacked_samples` returns them to the bit."""
  packed = {}
  for field in dataclasses.fields(SampledTokens):
    values = [getattr(sampled, field.name) for sampled in samples]
    packed[field.name] = _packed(values) if isinstance(values[0], np.ndarray) else values
  return packed


def _unpacked_samples(packed: dict[str, Any]) -> list[SampledTokens]:
  columns = {name: _unpacked(values) if isinstance(values, dict) else values for name, values in packed.items()}
  return [SampledTokens(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _packed(arrays: Sequence[np.ndarray]) -> dict[str, Any]:
  """Return arrays of one dtype as JSON: their bytes one after another."""
  together = np.concatenate(arrays)
  return {
    "dtype": together.dtype.str,
    "lengths": [len(array) for array in arrays],
    "bytes": base64.b64encode(together.tobytes()).decode(),
  }


def _unpacked(packed: dict[str, Any]) -> list[np.ndarray]:
  together = np.frombuffer(bytearray(base64.b64decode(packed["bytes"])), packed["dtype"])
  return np.split(together, np.cumsum(packed["lengths"])[:-1])
