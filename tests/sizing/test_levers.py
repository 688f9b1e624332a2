"""The comparison of a step with itself with levers on memory."""

import dataclasses
import types

import datakit

from insec_jax.config_build import build
from insec_jax.sizing import levers
from insec_jax.sizing.compiled import Memory
from insec_jax.sizing.counts import count
from insec_jax.sizing.hlo import parse

# A state of 1,024 bytes comes from the host and goes back; in a loop of 3 trips a row of 256
# bytes comes, and goes back twice.
HLO = """HloModule step, is_scheduled=true

%body (in: (s32[], f32[3,64])) -> (s32[], f32[3,64]) {
  %in = (s32[], f32[3,64]{1,0:S(5)}) parameter(0)
  %number = s32[] get-tuple-element(%in), index=0
  %rows = f32[3,64]{1,0:S(5)} get-tuple-element(%in), index=1
  %one = s32[] constant(1)
  %row = f32[1,64]{1,0} constant({...})
  %zero = s32[] constant(0)
  %read = ((f32[3,64]{1,0:S(5)}, s32[], s32[]), f32[1,64]{1,0}, u32[]) dynamic-slice-start(%rows, %number, %zero)
  %there = f32[1,64]{1,0} dynamic-slice-done(%read)
  %again = ((f32[3,64]{1,0:S(5)}, f32[1,64]{1,0}), f32[3,64]{1,0:S(5)}) dynamic-update-slice-start(%rows, %there)
  %written = f32[3,64]{1,0:S(5)} dynamic-update-slice-done(%again)
  %put = f32[3,64]{1,0:S(5)} dynamic-update-slice(%written, %row, %number, %zero)
  %next = s32[] add(%number, %one)
  ROOT %out = (s32[], f32[3,64]{1,0:S(5)}) tuple(%next, %put)
}

%cond (state: (s32[], f32[3,64])) -> pred[] {
  %state = (s32[], f32[3,64]{1,0:S(5)}) parameter(0)
  %trip = s32[] get-tuple-element(%state), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%trip, %three), direction=LT
}

ENTRY %main (a: f32[256], b: f32[3,64]) -> (f32[256], f32[3,64]) {
  %a = f32[256]{0:S(5)} parameter(0)
  %b = f32[3,64]{1,0:S(5)} parameter(1)
  %start = (f32[256]{0}, f32[256]{0:S(5)}, u32[]) copy-start(%a)
  %there = f32[256]{0} copy-done(%start)
  %on_chip = f32[256]{0:S(1)} copy(%there)
  %back = f32[256]{0:S(5)} copy(%on_chip)
  %first = s32[] constant(0)
  %both = (s32[], f32[3,64]{1,0:S(5)}) tuple(%first, %b)
  %loop = (s32[], f32[3,64]{1,0:S(5)}) while(%both), condition=%cond, body=%body
  %rows_after = f32[3,64]{1,0:S(5)} get-tuple-element(%loop), index=1
  ROOT %result = (f32[256]{0:S(5)}, f32[3,64]{1,0:S(5)}) tuple(%back, %rows_after)
}
"""


def test_bytes_to_and_from_the_host_are_counted_with_their_loops():
  assert count(parse(HLO), {}).host_bytes == 2 * 1024 + 3 * 3 * 256


def test_every_lever_changes_one_value_and_none_changes_nothing():
  config = build(datakit.VALUES)
  variants = levers.variants(config)
  assert variants.pop("none") == config
  for name, changed in variants.items():
    section = name.split(".")[0]
    assert changed != config
    assert dataclasses.replace(changed, **{section: getattr(config, section)}) == config
  again = levers.variants(variants["optimizer.memory=host"])
  assert "optimizer.memory=host" not in again


def test_a_lever_that_the_compiler_refuses_has_its_memory_and_no_figures():
  fitting = types.SimpleNamespace(
    memory=Memory(held={}, peak=10.0, limit=16.0, refused=False),
    work=types.SimpleNamespace(flops=2e12, ici_bytes={"all-gather": 3e9}, host_bytes=4e9, seconds={}),
  )
  refused = types.SimpleNamespace(memory=Memory(held={}, peak=17.5, limit=16.0, refused=True), work=None)
  *_, first, second = levers.table({"none": fitting, "model.remat=matmuls": refused}).splitlines()
  assert first == "| `none` | 10 of 16 | 0.00 | 0 | 2 | 3 | 4 | - |"
  assert second == "| `model.remat=matmuls` | 17.5 of 16 | -7.50 | 0 | does not fit | - | - | - |"
