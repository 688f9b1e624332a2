"""Hugging Face folders in a bucket: the weights of one on a disk, read and written in parts."""

import jax
import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict

from insec_jax.command import InputError
from insec_jax.config import MeshConfig
from insec_jax.files import buckets
from insec_jax.model import hf, hf_writing, llama, sharding
from insec_jax.model.hf_config import config_from_json

CONFIG = config_from_json(reference.FIELDS, "reference")
TENSORS = reference.random_tensors(reference.FIELDS)


@pytest.fixture
def folder(bucket, tmp_path):
  """(name of a model in a bucket, its folder on the disk)."""
  local = reference.write_folder(tmp_path / "hf", reference.FIELDS, TENSORS, files=2)
  bucket.upload(local, "hf")
  return f"{bucket.url}/hf", local


def test_weights_of_a_bucket_are_laid_out_as_those_of_a_disk(folder):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  shardings = sharding.params_shardings(llama.shapes(CONFIG), mesh)
  params = [hf.load(name, hf.read_config(name), shardings=shardings) for name in folder]
  jax.tree.map(np.testing.assert_array_equal, *params)
  assert jax.tree.all(jax.tree.map(lambda one, other: one.sharding == other.sharding, *params))


def test_a_part_of_a_weight_reads_only_the_rows_that_hold_it(folder, monkeypatch):
  read = []
  original = buckets.read_range
  monkeypatch.setattr(buckets, "read_range", lambda *given: read.append(given[2] - given[1]) or original(*given))
  remote, mapped = (flatten_dict(hf.stored(place, CONFIG), sep="/") for place in folder)
  for path, weight in mapped.items():
    assert remote[path].shape == weight.shape
    halves = tuple(slice(size // 2) for size in weight.shape)
    read.clear()
    np.testing.assert_array_equal(remote[path][halves], weight[halves])
    outer = hf.NAMES[path][1][0]
    rows = next(
      half.stop for half, letter in zip(halves[weight.stacked :], hf.LETTERS[path], strict=True) if letter == outer
    )
    assert sum(read) == weight.dtype.itemsize * np.prod(weight.shape[weight.stacked :]) // CONFIG.size(outer) * rows * (
      weight.shape[0] // 2 if weight.stacked else 1
    )
    if weight.stacked:
      np.testing.assert_array_equal(remote[path][1], weight[1])


def test_a_model_written_to_a_bucket_has_the_files_of_one_written_to_a_disk(folder, bucket, tmp_path):
  name, _ = folder
  for place in (f"{bucket.url}/out", tmp_path / "out"):
    hf_writing.save(place, hf.stored(name, CONFIG), CONFIG, max_shard_bytes=200_000)
  there = bucket.download("out", tmp_path / "copy")
  names = sorted(path.name for path in there.iterdir())
  assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
  assert len(names) > 4
  assert all((there / file).read_bytes() == (tmp_path / "out" / file).read_bytes() for file in names)


def test_a_file_of_weights_that_is_gone_or_cut_short_is_one_line(folder, bucket):
  name, _ = folder
  file = next(file for file in bucket.names("hf/") if file.endswith(".safetensors"))
  content = bucket.read(file)
  bucket.write(file, content[:-5])
  with pytest.raises(InputError, match=rf"^{bucket.url}/{file} has .* bytes, its header promises"):
    hf.stored(name, CONFIG)
  bucket.remove(file)
  with pytest.raises(InputError, match=r"names .* which is not there; fetch it"):
    hf.stored(name, CONFIG)
  bucket.write(file, content)
  weights = hf.stored(name, CONFIG)
  bucket.remove(file)
  with pytest.raises(FileNotFoundError, match="No such file"):
    jax.tree.map(lambda weight: weight[0] if weight.stacked else weight[...], weights)
