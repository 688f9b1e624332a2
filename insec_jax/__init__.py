"""Internalized self-correction for Llama 3: data, training, measurement."""

import os
import sys

__version__ = "0.5.0"

# transformers prints at import that PyTorch is missing; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

# python -m insec_jax.PROGRAM, or insec PROGRAM: the imports that follow take seconds.
if sys.argv[:1] == ["-m"] or os.path.basename("".join(sys.argv[:1])) == "insec":
  import _signal  # is built in; what `signal` imports takes milliseconds, in which a signal would be a traceback

  _mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGHUP, _signal.SIGINT, _signal.SIGTERM))
  from insec_jax import refusals, stop_signal

  stop_signal.start_early()
  _signal.pthread_sigmask(_signal.SIG_SETMASK, _mask)  # what came meanwhile is handled here
  refusals.hook_uncaught()
  refusals.check_limits()
