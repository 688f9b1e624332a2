"""The counter against programs whose FLOPs and bytes are known by hand, as the CPU's compiler and libtpu write them."""

import functools
import re

import jax
import jax.numpy as jnp
import programs
import pytest
from programs import BATCH, GOLDEN, HIDDEN, LAYERS, OUTER, TOKENS, WIDTH, D, L, M

from insec_jax.sizing import counts, hlo
from insec_jax.sizing.collectives import replica_groups
from insec_jax.sizing.counts import DCN, ICI
from insec_jax.sizing.hlo import HloError

PRODUCT = 2 * M * D * D
LAYER_PRODUCT = 2 * TOKENS * WIDTH * HIDDEN
WEIGHTS = LAYERS * 2 * WIDTH * HIDDEN * 2  # bytes of all weights in bfloat16


def count(text: str, **scopes: int) -> counts.Counts:
  """The counts of an HLO text, loops in named scopes as long as given."""
  return counts.count(hlo.parse(text), scopes)


def golden(name: str) -> str:
  """A stored HLO text of libtpu."""
  return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
  ("program", "products"),
  [
    (programs.scan, L),
    (programs.nested_scan, OUTER * L),
    (programs.triangle, L * (L + 1) // 2),
    (programs.batched, 2 * BATCH),
  ],
  ids=lambda value: getattr(value, "__name__", ""),
)
def test_flops_are_those_of_the_products_times_the_trips_of_their_loops(program, products):
  text = program(jax.devices())
  assert count(text).flops == products * PRODUCT
  # As libtpu leaves it: no trips written beside the loop.
  assert count(re.sub(r'"known_trip_count":\{"n":"\d+"\},?', "", text)).flops == products * PRODUCT


@pytest.mark.parametrize(
  ("name", "flops"),
  [
    ("v5e_nested_scan", OUTER * L * PRODUCT),
    ("v5e_batched", 2 * BATCH * PRODUCT),
    ("v5e_splash", programs.HEADS * 2 * 2 * programs.ROW * 128 * 128 // 2),
  ],
)
def test_products_that_a_tpu_writes_as_convolutions_are_counted_without_padding(name, flops):
  assert count(golden(name)).flops == flops


def test_trips_that_depend_on_data_come_from_the_scope_of_the_loop_or_are_an_error():
  text = programs.as_the_data_says(jax.devices())
  assert count(text, trained_chunks=3).flops == 3 * PRODUCT
  with pytest.raises(HloError, match=r"while.*runs as often as the data says.*given: none"):
    count(text)
  with pytest.raises(HloError, match="given: chunks, trained_chunk"):
    count(text, chunks=3, trained_chunk=3)


def test_a_scope_gives_its_trips_to_its_own_loop_and_not_to_one_inside_it():
  outer = hlo.Instruction("while.1", "()", "while", (), "", ', metadata={op_name="jit(f)/jvp(trained_chunks)/while"}')
  inner = outer._replace(attributes=', metadata={op_name="jit(f)/trained_chunks/while/body/top_k/while"}')
  assert hlo.given_trips(outer, {"trained_chunks": 3}) == 3
  assert hlo.given_trips(inner, {"trained_chunks": 3}) is None


def hold_fsdp(text: str, *, chips: int, products: int) -> None:
  """Weights gathered for the forward and again for the backward pass, their gradient scattered."""
  found = count(text)
  assert found.flops == LAYERS * products * LAYER_PRODUCT
  assert found.rematerialised == LAYERS * (products - 6) * LAYER_PRODUCT
  received = found.bytes_over(ICI)
  share = (chips - 1) / chips
  assert received["all-gather"] == pytest.approx(2 * share * WEIGHTS, rel=1e-12)
  # libtpu pads what it scatters, and sends the padding's part with a permute.
  assert received["reduce-scatter"] + received["all-reduce"] == pytest.approx(share * WEIGHTS, rel=0.02)
  assert sum(received.values()) == pytest.approx(3 * share * WEIGHTS, rel=0.02)


@pytest.mark.parametrize(("name", "chips"), [("v5e_fsdp", 16), ("tpu7x_fsdp", 8)])
def test_overlapped_fused_and_offloaded_collectives_are_counted_once(name, chips):
  # The last product of a block is not needed again.
  hold_fsdp(golden(name), chips=chips, products=7)


def test_collectives_of_pretended_devices_are_counted_as_on_a_ring():
  # float32: a CPU may gather and reduce bfloat16 so anyway.
  found = count(programs.fsdp(jax.devices(), x=2, y=4, compute=jnp.float32))
  assert found.flops == LAYERS * 7 * LAYER_PRODUCT
  assert found.rematerialised == LAYERS * LAYER_PRODUCT
  received = found.bytes_over(ICI)
  assert received["all-gather"] == 2 * 7 / 8 * 2 * WEIGHTS
  assert received["reduce-scatter"] == 7 / 8 * 2 * WEIGHTS


def test_bytes_between_slices_stand_apart():
  found = count(golden("v5e_two_slices"))
  matrix = WIDTH * WIDTH * 2
  inside = found.bytes_over(ICI)
  assert inside["all-gather"] == 3 / 4 * matrix
  assert sum(inside.values()) == pytest.approx(2 * 3 / 4 * matrix, rel=0.05)  # with padding
  assert found.bytes_over(DCN) == {**dict.fromkeys(inside, 0), "all-reduce": matrix / 4}


def test_a_product_that_lost_its_origin_is_recomputed_if_what_reads_it_is():
  body = """  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %z = f32[8,8]{1,0} ORIGIN
  ROOT %s = f32[8,16]{1,0} add(%x, %x), metadata={op_name="jit(f)/add"}"""
  named = 'tanh(%y), metadata={op_name="jit(f)/checkpoint/rematted_computation/tanh"}'
  assert count(MODULE.format(body=body.replace("ORIGIN", named))).rematerialised == 2 * 8 * 8 * 16
  named = 'tanh(%y), metadata={op_name="jit(f)/checkpoint/tanh"}'
  assert count(MODULE.format(body=body.replace("ORIGIN", named))).rematerialised == 0


def test_kernels_are_named_although_their_metadata_breaks_lines():
  text = golden("v5e_splash")
  assert re.search(r"\n\}\}, metadata", text)
  assert found_kernels(text) == {
    "splash_mha_fwd_residuals": 1,
    "splash_mha_dq_no_residuals": 1,
    "splash_mha_dkv_no_residuals": 1,
  }


def found_kernels(text: str) -> dict[str, int]:
  """The kernels of an HLO text."""
  return dict(count(text).kernels)


MODULE = """HloModule hand_made, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {{
  %x = f32[8,16]{{1,0}} parameter(0)
{body}
}}
"""
UNCLOSED = """HloModule hand_made

ENTRY %main (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0), metadata={op_name="x}
}
"""
GROUPS = "replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
  ("body", "kind", "received"),
  [
    (f"  ROOT %y = f32[32,16]{{1,0}} all-gather(%x), {GROUPS}, dimensions={{0}}", "all-gather", 3 * 512),
    (
      f"  ROOT %y = f32[2,16]{{1,0}} reduce-scatter(%x), {GROUPS}, dimensions={{0}}, to_apply=%add",
      "reduce-scatter",
      3 / 4 * 512,
    ),
    (f"  ROOT %y = f32[8,16]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add", "all-reduce", 2 * 3 / 4 * 512),
    (f"  ROOT %y = f32[8,16]{{1,0}} all-to-all(%x), {GROUPS}, dimensions={{0}}", "all-to-all", 3 / 4 * 512),
    ("  ROOT %y = f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 512),
    ("  ROOT %y = f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}", "collective-permute", 0),
    ("  ROOT %y = f32[8,16]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 2 * 3 / 4 * 512),
    ("  ROOT %y = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%add", "all-reduce", 0),
    (
      f"  %s = (f32[8,16]{{1,0}}, f32[32,16]{{1,0}}) all-gather-start(%x), {GROUPS}, dimensions={{0}}\n"
      "  ROOT %y = f32[32,16]{1,0} all-gather-done(%s)",
      "all-gather",
      3 * 512,
    ),
    (
      f"  ROOT %y = (f32[8,16]{{1,0}}, f32[8,16]{{1,0}}) all-reduce(%x, %x), {GROUPS}, to_apply=%add",
      "all-reduce",
      2 * 2 * 3 / 4 * 512,
    ),
  ],
)
def test_a_collective_counts_what_a_device_of_a_ring_receives(body, kind, received):
  found = count(MODULE.format(body=body)).bytes_over(ICI)
  assert found.pop(kind) == received
  assert not any(found.values())


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
    ("[2,2]<=[4]", ((0, 1), (2, 3))),
    ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("mesh[a=2,b=2] {a,b}", ((0, 1, 2, 3),)),
    ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
    ("{}", ((0, 1, 2, 3),)),
    (None, ((0, 1, 2, 3),)),
  ],
)
def test_groups_of_devices_are_read_however_they_are_written(text, groups):
  assert replica_groups(text, 4) == groups


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("  ROOT %y = f32[8,16]{1,0} all-reduce(%x), replica_groups=some_new_way, to_apply=%add", "not understood"),
    ("  ROOT %y = f32[8,16]{1,0} collective-broadcast(%x), replica_groups={{0,1}}", "is not counted"),
  ],
)
def test_what_is_not_understood_is_an_error(body, message):
  with pytest.raises(HloError, match=message):
    count(MODULE.format(body=body))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (UNCLOSED, "brackets do not close"),
    ("module @jit_f {}", "begins with 'HloModule'"),
    ("HloModule cut\n\nENTRY %main () -> f32[] {\n", "ends before the ENTRY"),
  ],
)
def test_a_text_that_is_cut_or_of_another_kind_is_an_error(text, message):
  with pytest.raises(HloError, match=message):
    hlo.parse(text)


def test_a_product_that_nothing_calls_is_an_error():
  lost = MODULE.format(body="  ROOT %y = f32[8,16]{1,0} add(%x, %x)").replace(
    "ROOT %sum = f32[] add(%a, %b)", "ROOT %sum = f32[] dot(%a, %b)"
  )
  with pytest.raises(HloError, match="nothing that is understood calls"):
    count(lost)


def test_bytes_of_hbm_are_those_read_and_written_and_of_a_slice_only_the_slice():
  array = 8 * 16 * 4
  assert count(MODULE.format(body="  ROOT %y = f32[8,16]{1,0} add(%x, %x)")).hbm_bytes == 3 * array
  on_chip = "  %c = f32[8,16]{1,0:S(1)} copy(%x)\n  ROOT %y = f32[8,16]{1,0} add(%c, %c)"
  assert count(MODULE.format(body=on_chip)).hbm_bytes == 2 * array
  sliced = "  %zero = s32[] constant(0)\n  ROOT %y = f32[1,16]{1,0} dynamic-slice(%x, %zero, %zero)"
  assert count(MODULE.format(body=sliced)).hbm_bytes == 2 * 16 * 4


FUSION = """HloModule hand_made

%fused (whole: f32[64,16], other: f32[1,16], number: s32[]) -> f32[64,16] {
  %whole = f32[64,16]{1,0} parameter(0)
  %other = f32[1,16]{1,0} parameter(1)
  %number = s32[] parameter(2)
  %slice = f32[1,16]{1,0} dynamic-slice(%whole, %number, %number), dynamic_slice_sizes={1,16}
  %sum = f32[1,16]{1,0} add(%slice, %other)
  ROOT %new = f32[64,16]{1,0} dynamic-update-slice(%whole, %sum, %number, %number)
}

ENTRY %main (whole: f32[64,16], other: f32[1,16], number: s32[]) -> f32[64,16] {
  %whole = f32[64,16]{1,0} parameter(0)
  %other = f32[1,16]{1,0} parameter(1)
  %number = s32[] parameter(2)
  ROOT %y = f32[64,16]{1,0} fusion(%whole, %other, %number), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_that_changes_a_slice_in_place_moves_the_slice():
  assert count(FUSION).hbm_bytes == 3 * 16 * 4 + 4  # slice and other read, the slice written, and the number
  assert count(FUSION.replace("add(%slice, %other)", "reduce(%whole, %other)")).hbm_bytes == (64 + 1 + 1) * 64 + 4


PREFETCH = """HloModule hand_made

ENTRY %main (x: s8[64]) -> s8[16] {
  %x = s8[64]{0} parameter(0)
  %start = ((s8[64]{0}), s8[16]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16]}
  ROOT %done = s8[16]{0:S(1)} slice-done(%start)
}
"""


def test_a_slice_that_is_brought_to_the_chip_moves_its_own_bytes():
  assert count(PREFETCH).hbm_bytes == 16
  assert count(PREFETCH.replace("s8[16]{0:S(1)}", "s8[16]{0}")).hbm_bytes == 2 * 16


RENAMED = """HloModule hand_made

%same (part: f32[64,16]) -> f32[1024] {
  %part = f32[64,16]{1,0} parameter(0)
  ROOT %flat = f32[1024]{0} bitcast(%part)
}

%fused (whole: f32[64,16]) -> f32[] {
  %whole = f32[64,16]{1,0} parameter(0)
  %flat = f32[1024]{0} fusion(%whole), kind=kLoop, calls=%same
  ROOT %sum = f32[] negate(%flat)
}

ENTRY %main (whole: f32[64,16]) -> f32[] {
  %whole = f32[64,16]{1,0} parameter(0)
  ROOT %y = f32[] fusion(%whole), kind=kLoop, calls=%fused
}
"""


def test_an_operand_that_an_inner_fusion_only_renames_is_read():
  assert count(RENAMED).hbm_bytes == 64 * 16 * 4 + 4


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(("name", "chips"), [("v5e:4x4", (4, 4)), ("v5p:2x2x4", (4, 4)), ("v6e:2x4", (2, 4))])
def test_what_libtpu_writes_today_is_counted_within_2_per_cent(name, chips):
  x, y = chips
  devices = programs.tpu(name).devices
  hold_fsdp(programs.fsdp(devices, x=x, y=y), chips=x * y, products=7)
  assert count(programs.nested_scan(devices)).flops == OUTER * L * PRODUCT
  assert count(programs.as_the_data_says(devices), trained_chunks=3).flops == 3 * PRODUCT
  assert count(programs.batched(devices)).flops == 2 * BATCH * PRODUCT


@pytest.mark.tpu_compiler
def test_a_scatter_over_one_axis_of_16_chips_is_seen_to_become_an_all_reduce():
  devices = programs.tpu("v5e:4x4").devices
  received = count(programs.fsdp(devices, x=1, y=16)).bytes_over(ICI)
  assert received["all-reduce"] >= 15 / 16 * WEIGHTS
  assert functools.reduce(max, received.values()) == pytest.approx(2 * 15 / 16 * WEIGHTS)
