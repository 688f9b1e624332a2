"""What the tests of programs share: a small random model as an HF folder, and programs run as a user runs them."""

import json
import pathlib

import forking
import jax
import numpy as np

from insec_jax.config import MeshConfig, OptimizerConfig
from insec_jax.model import build, hf_writing, sharding
from insec_jax.model.hf_config import config_from_json
from insec_jax.model.llama import LlamaConfig
from insec_jax.training import optimizer, step

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 1,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "max_position_embeddings": 256,
  "tie_word_embeddings": False,
  "initializer_range": 0.3,
  "hidden_act": "silu",
  "torch_dtype": "float32",
}


def small_llama(**changes) -> LlamaConfig:
  """Return the config of a model of two layers, with these fields changed."""
  fields = dict(
    vocab_size=64,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    mlp_width=48,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    tied=False,
    init_std=0.3,
    max_positions=64,
    bos_id=None,
    eos_ids=(1,),
    pad_id=None,
    stored_dtype=None,
    source="",
  )
  return LlamaConfig(**(fields | changes))


# Programs define flags when imported, so they run in a process of their own; one process runs many lines.
RUNS = """
import contextlib, io, json, sys, traceback
from absl import flags
from insec_jax import command
from insec_jax.{program} import main
for arguments in json.load(sys.stdin):
  sys.argv = [{program!r}, *arguments]
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      command.run(main)
    except SystemExit as end:
      code = end.code
    except BaseException:
      code = 1
      traceback.print_exc()
  print(json.dumps([code, out.getvalue(), err.getvalue()]))
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
"""


MESHES = ("data:8", "data:4,tensor:2", "data:2,tensor:4", "tensor:8")


def save_model(folder: pathlib.Path, tokenizer, **changes) -> pathlib.Path:
  """The folder, with a random model that fits the tokenizer, with these fields changed."""
  fields = FIELDS | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | changes
  config = config_from_json(fields, "config.json")
  hf_writing.save(folder, build.init(config, jax.random.key(0), "float32"), config, tokenizer=tokenizer)
  return folder


def save_eight(folder: pathlib.Path, tokenizer) -> pathlib.Path:
  """The folder, with a random model that divides over eight devices and has no room for markers."""
  tokenizer.add_tokens([f"<unused {number}>" for number in range(-len(tokenizer) % 8)])
  return save_model(folder, tokenizer, num_attention_heads=8, num_key_value_heads=8)


def run(
  program: str, *lines: list[str], folder: pathlib.Path, num_devices: int = 1, before: str = "", **variables: str
) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of `program` for each line of arguments, run in the folder, after the code `before`."""
  code, given = before + RUNS.format(program=program), json.dumps(lines)
  if variables:  # which libraries read when they are imported
    done = forking.start(code, folder=folder, given=given, JAX_NUM_CPU_DEVICES=str(num_devices), **variables)
  else:
    done = forking.run(program, folder=folder, code=code, given=given, JAX_NUM_CPU_DEVICES=str(num_devices))
  assert done.returncode == 0, done.stderr
  return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


STATE_MODEL = small_llama(width=16, head_width=4, mlp_width=24, tied=True)
TX = optimizer.make(
  OptimizerConfig(
    learning_rate=1e-2, final_share=0.1, warmup_steps=2, weight_decay=0.1, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0
  ),
  20,
)


def mesh_of(shape):
  """Return the mesh of a shape, (data, fsdp, tensor) or (data, fsdp, tensor, sequence)."""
  sizes = MeshConfig(**dict(zip(("data", "fsdp", "tensor", "sequence"), shape, strict=False)))
  return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(shape))])


def abstract(shape=(1, 1, 1), model=STATE_MODEL, tx=TX, dtype="float32"):
  """Return the abstract state of a model on a mesh of this shape."""
  return step.abstract_state(model, dtype, tx, mesh_of(shape))


def make_state(abstract_state):
  """Return a state in which no two arrays are alike."""
  leaves, tree = jax.tree.flatten(abstract_state)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(
    tree, [jax.device_put((rng.normal(size=leaf.shape) * 10).astype(leaf.dtype), leaf.sharding) for leaf in leaves]
  )
