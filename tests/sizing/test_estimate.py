"""What is read from a compiler and what is computed from it."""

import json
import pathlib
from types import SimpleNamespace

import jax
import pytest

from insec_jax.command import InputError
from insec_jax.config_types import MATRICES
from insec_jax.model.hf_config import config_from_json
from insec_jax.model.lora import Lora
from insec_jax.sizing.compiled import Memory, optimised_hlo, read_refusal
from insec_jax.sizing.estimate import flops_per_token
from insec_jax.sizing.tables import remedies

CONFIGS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "llama_configs.json").read_text())


@pytest.mark.parametrize(
  ("message", "expected"),
  [
    (
      "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
      "temporaries (24.00G) exceeds available HBM (15.75G). HLO module: jit_step.",
      (24, 15.75),
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded hbm capacity by "
      "1.50G.\n\nTotal hbm usage >= 17.25G:",
      (17.25, 15.75),
    ),
    ("Ran out of memory in memory space hbm. Used 512.00M of 0.25G hbm.", (0.5, 0.25)),
    ("Ran out of memory in memory space vmem. Used 17.25M of 16.00M vmem.", None),
    ("INTERNAL: something else", None),
  ],
)
def test_a_refusal_for_lack_of_memory_says_how_much_is_missing(message, expected):
  assert read_refusal(message) == expected


def test_a_compiler_of_another_time_than_jax_is_named():
  class Compiled:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: 3 operands")

  with pytest.raises(InputError, match=f"jax {jax.__version__} cannot read .*RET_CHECK.* pip install 'jax"):
    optimised_hlo(Compiled())


def test_memory_fits_up_to_the_limit_and_says_what_is_missing():
  memory = dict(held={"weights": 1.0, "optimizer": 2.0})
  fitting = Memory(**memory, peak=4.0, limit=4.0, refused=False)
  assert fitting.fits
  assert fitting.temporary == 1.0
  over = Memory(**memory, peak=4.5, limit=4.0, refused=False)
  assert over.fits is False
  assert over.missing == 0.5
  # The compiler's word counts: what it needs may round to what there is.
  assert Memory(**memory, peak=4.0, limit=4.0, refused=True).fits is False
  unknown = Memory(**memory, peak=4.5, limit=None, refused=False)
  assert unknown.fits is None
  assert unknown.missing == 0


def test_a_row_that_does_not_fit_alone_is_offered_more_chips_that_share_it():
  memory = Memory(held={"weights": 1.0}, peak=9.0, limit=4.0, refused=False)
  estimated = SimpleNamespace(memory=memory, remat="full", rows_per_device=1, mesh={"sequence": 2})
  assert remedies(estimated)[-1].startswith("a larger mesh.sequence (now 2)")
  estimated.rows_per_device = 2
  assert [remedy.split()[0] for remedy in remedies(estimated)] == ["fewer"]


@pytest.mark.parametrize(("length", "gflops"), [(2048, 46.6), (4096, 48.3), (8192, 51.5)])
def test_flops_of_a_token_are_the_published_ones_with_causal_attention(length, gflops):
  model = config_from_json(CONFIGS["Llama-3.1-8B"]["config"], "8B")
  assert flops_per_token(model, length, 1.0) / 1e9 == pytest.approx(gflops, abs=0.06)
  head = 6 * model.vocab_size * model.width
  assert flops_per_token(model, length, 1.0) - flops_per_token(model, length, 0.5) == pytest.approx(head / 2)


def test_a_frozen_weight_takes_two_thirds_of_the_flops_and_its_adapter_little():
  model = config_from_json(CONFIGS["Llama-3.1-8B"]["config"], "8B")
  full, causal = flops_per_token(model, 4096, 1.0), 6 * model.num_layers * 4096 * model.num_heads * model.head_width
  lora = Lora(rank=16, scale=1.0, matrices=MATRICES, markers=(1, 2))
  adapters = 41_943_040  # 16 x (inputs + outputs) of the seven matrices of 32 layers
  expected = (full - causal) * 4 / 6 + causal + 6 * adapters
  assert flops_per_token(model, 4096, 1.0, lora) == pytest.approx(expected, rel=1e-9)
