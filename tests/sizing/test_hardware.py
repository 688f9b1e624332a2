"""Names of topologies, and what is said of chips."""

import importlib.util

import pytest

from insec_jax.command import InputError
from insec_jax.sizing import hardware
from insec_jax.sizing.hardware import CHIPS, Request


def test_a_list_of_topologies_is_read():
  assert hardware.parse("v5p:2x2x4, 2xv5e:8x8,h100:8") == [
    Request("v5p:2x2x4", "v5p", (2, 2, 4), 1),
    Request("2xv5e:8x8", "v5e", (8, 8), 2),
    Request("h100:8", "h100", (8,), 1),
  ]
  assert hardware.parse("local") == [Request("local", None, (), 1)]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v9:2x2", "'v9:2x2' is not known; give local, or v4, v5e, v5p, v6e, tpu7x, h100, h200"),
    ("v5p-32", "'v5p-32' is not known"),
    ("v5p:2x2", "v5p has 3 sides, such as v5p:2x2x4"),
    ("v5e:2x2x4", "v5e has 2 sides, such as v5e:2x2"),
    ("v5e:0x2", "v5e has 2 sides"),
    ("", "'' is not known"),
    ("0xv5e:2x2", "v5e has 2 sides"),
    ("h100:16", "1 to 8 cards of one host"),
    ("2xh100:8", "1 to 8 cards of one host"),
    ("local,v5e:2x2", "give it alone"),
  ],
)
def test_a_topology_that_nobody_has_is_refused(text, message):
  with pytest.raises(InputError, match=message):
    hardware.parse(text)


@pytest.mark.parametrize(
  ("chip", "shape", "links"),
  [
    ("v5e", (16, 16), 4),
    ("v5e", (8, 16), 3),
    ("v5e", (4, 4), 2),
    ("v5e", (1, 1), 0),
    ("v5p", (4, 4, 4), 6),
    ("v5p", (2, 2, 4), 3),
    ("v5p", (2, 2, 1), 2),
    ("h100", (8,), 1),
  ],
)
def test_a_chip_receives_over_two_links_of_a_closed_side_and_one_of_an_open_one(chip, shape, links):
  assert hardware.links(chip, shape) == links


@pytest.mark.parametrize(
  ("name", "host", "hosts"),
  [
    ("v5e:1x1", "v5e:1x1", 1),
    ("v6e:2x4", "v6e:2x4", 1),
    ("v5e:4x4", "v5e:2x2", 4),
    ("v5p:2x2x1", "v5p:2x2x1", 1),
    ("v4:2x2x4", "v4:2x2x1", 4),
    ("2xv5e:8x8", "v5e:2x2", 32),
    ("h100:8", "h100:8", 1),
    ("local", "local", 1),
  ],
)
def test_a_slice_is_divided_into_hosts_as_it_is_rented(name, host, hosts):
  part, num = hardware.host_of(hardware.parse(name)[0])
  assert (part.name, part.slices, num) == (host, 1, hosts)
  assert part == hardware.parse(host)[0]


@pytest.mark.parametrize(
  ("module", "name", "extra"), [("libtpu", "v5e:2x2", "tpu"), ("jax_cuda12_plugin", "h100:8", "cuda")]
)
def test_a_missing_compiler_is_named_with_what_installs_it(monkeypatch, module, name, extra):
  found = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda one: None if one.startswith(module[:8]) else found(one))
  with pytest.raises(InputError, match=rf"needs the .*compiler.*pip install 'insec_jax\[{extra}\]'"):
    hardware.describe(hardware.parse(name)[0])


def test_the_devices_here_are_described_without_a_chip_that_is_not_known():
  topology = hardware.describe(hardware.parse("local")[0])
  assert (topology.platform, topology.chip, topology.chips) == ("cpu", None, 8)


def test_a_chip_never_promises_more_memory_than_it_has():
  assert all(chip.usable_gib < chip.hbm_gib for chip in CHIPS.values())


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
  ("name", "chips", "devices", "slices"),
  [
    ("v4:2x2x1", 4, 4, 1),
    ("v5e:8x8", 64, 64, 1),
    ("v5p:2x2x4", 16, 16, 1),
    ("v6e:4x4", 16, 16, 1),
    ("tpu7x:2x2x1", 4, 8, 1),
    ("2xv5e:4x4", 32, 32, 2),
  ],
)
def test_every_kind_of_slice_is_described_without_having_it(name, chips, devices, slices):
  pytest.importorskip("libtpu")
  requests = hardware.parse(name)
  hardware.prepare(requests)
  topology = hardware.describe(requests[0])
  assert (topology.platform, topology.chips, len(topology.devices), topology.slices) == ("tpu", chips, devices, slices)
  assert topology.devices[0].device_kind in topology.chip.kinds
  with pytest.raises(InputError, match="the TPU compiler refuses 'v5e:3x5'"):
    hardware.describe(hardware.parse("v5e:3x5")[0])
