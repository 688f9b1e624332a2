"""Flags that the programs that decode share; a light module, because --help needs no other."""

from absl import flags

REQUESTS = 64  # to a server, in flight
MESH_HELP = (
  "Devices of this host for decoding, as data:2,tensor:4: rows over data, heads and vocabulary over tensor (default: "
  "the least tensor at which the model fits, the other devices for data)."
)

flags.disclaim_key_flags()  # those of `define_server_flags` are the program's: its --help has them


def define_server_flags() -> None:
  """Define the flags of a server, for a program that decodes."""
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
