"""Internalized self-correction for Llama 3: data, training, measurement."""

import os
import sys

# transformers prints at import that PyTorch is missing; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if sys.argv[:1] == ["-m"]:  # python -m insec_jax.PROGRAM: the imports that follow take seconds
  from insec_jax import refusals, stop_signal

  stop_signal.start_early()
  refusals.hook_uncaught()
  refusals.check_limits()
