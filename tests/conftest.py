"""Every test runs on CPU with eight pretended devices; silent broadcasting over ranks is an error."""

import importlib.metadata
import os
import signal

# XLA's threads on CPU. Pretended devices wait for each other in collectives, and with a thread for each device and no
# more two of them can wait for ever.
os.environ["NPROC"] = "32"
# Most of the time is compiling; the parity tests, which compute, are run with all optimizations by .ci/run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's newer emitters of fusions on CPU take five times as long to compile as those before them. A flag that a version
# does not know would end the process, so later versions go without.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jaxlib") < "0.13":
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# Programs that the tests start would keep what they compile in the user's cache; some tests give them one.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

import jax
from bucketkit import bucket, faulty  # noqa: F401  # fixtures

jax.config.update("jax_platforms", os.environ.get("INSEC_TEST_PLATFORM", "cpu"))  # another for -m device
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs that the tests start inherit ignored signals (nohup, a background job of a shell), and some tests send them.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
  if signal.getsignal(number) == signal.SIG_IGN:
    signal.signal(number, default)
