"""Flags that several programs share; a light module, because --help needs no other."""

from absl import flags

from insec_jax import flags_help
from insec_jax.distributed import shares

REQUESTS = 64  # to a server, in flight

flags.disclaim_key_flags()  # those defined here are the program's: its --help has them


def define_model_flags() -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """Define --model and --step of a program that reads a model, and return them."""
  model = flags.DEFINE_string("model", None, "Workdir of train, Hugging Face folder, or hub id (org/name[@revision]).")
  step = flags.DEFINE_integer("step", None, "Step of the workdir's checkpoint to use (default: newest).", lower_bound=0)
  return model, step


def define_mesh_flag() -> flags.FlagHolder:
  """Define --mesh and return it."""
  return flags.DEFINE_string(
    "mesh",
    "",
    "Devices of this host for decoding, as data:2,tensor:4: rows over data, heads and vocabulary over tensor (default: "
    "the least tensor at which the model fits, the other devices for data).",
  )


def define_decoding_flags() -> flags.FlagHolder:
  """Define in two groups where a program decodes: devices and processes, or a server; return --mesh.

  shares.share_of_work and engine.open_model read the others.
  """
  with flags_help.group("Devices and processes"):
    mesh = define_mesh_flag()
    shares.define_flags()
  with flags_help.group("A server that has the weights"):
    flags.DEFINE_string(
      "server",
      None,
      "URL of a server of OpenAI's completions, such as vLLM, that has the weights; --model then gives the tokenizer, "
      "the template and the markers. An API key is read from the environment variable OPENAI_API_KEY.",
    )
    flags.DEFINE_string("server_model", None, "Name of the model on the server (default: its only one).")
    flags.DEFINE_integer(
      "server_requests", REQUESTS, "Requests to the server in flight.", lower_bound=1, upper_bound=4_096
    )
  return mesh
