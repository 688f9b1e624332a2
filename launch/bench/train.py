"""Speed of a training step beside torch: the same model, rows, weights of tokens and optimizer, float32.

  launch/bench.sh train [--model=FOLDER] [--rows=2] [--row_length=640] [--trained=0.5] [--remat=matmuls]
  launch/bench.sh train --device=gpu --shape=1b --compute=bfloat16 --rows=4 --row_length=4096 --remat=full

torch: LlamaForCausalLM of transformers with its attention (sdpa), gradient clipping and the fused AdamW. It computes
the logits of all tokens; insec_jax those of the trained ones. Both run the same steps from the same weights, so the
losses, which are compared, agree. A round is two steps.

With --device=gpu both sides run on the first GPU: never run. --shape takes random weights of Llama 3.1 8B or 3.2 1B in
place of a folder, so that the losses differ; --compute=bfloat16 is autocast in torch, over float32 weights, and
--remat=full is gradient checkpointing. Full training of 8B takes 120 GiB of weights, gradients and moments.
"""

import argparse
from collections.abc import Callable

import numpy as np
import race
import real_model
from race import Work

STEPS = 2  # of a round
SHAPES = {  # of Llama 3.1 8B and 3.2 1B; scaling of positions does not matter here
  "8b": ({"width": 4096, "mlp_width": 14_336, "num_layers": 32, "num_heads": 32}, {}),
  "1b": ({"width": 2048, "mlp_width": 8_192, "num_layers": 16, "num_heads": 32}, {"tie_word_embeddings": True}),
}
LEARNING_RATE, BETAS, EPS, CLIP_NORM = 1e-5, (0.9, 0.95), 1e-8, 1.0


def batch(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  """Return (token_BT, is_trained_BT): random tokens in one segment a row, runs of 32 trained or not."""
  random = np.random.default_rng(0)
  shape = (arguments.rows, arguments.row_length)
  runs = random.random((arguments.rows, -(-arguments.row_length // 32))) < arguments.trained
  return random.integers(1_000, 40_000, shape).astype(np.int32), np.repeat(runs, 32, 1)[:, : arguments.row_length]


def fields(shape: str | None) -> dict | None:
  """Return the fields of config.json of a shape; None without one."""
  from insec_jax.config import llama31

  if shape is None:
    return None
  sizes, others = SHAPES[shape]
  return {**llama31(**sizes), **others}


def ours(arguments: argparse.Namespace) -> Callable[[], Work]:
  """The compiled step of `insec_jax.train`."""
  import pathlib

  import jax

  from insec_jax.config import MeshConfig, OptimizerConfig
  from insec_jax.model import attention, build, hf, llama, sharding
  from insec_jax.training import optimizer
  from insec_jax.training import step as step_lib

  size = fields(arguments.shape)
  config = build.model_of_size(size, None) if size else hf.read_config(pathlib.Path(arguments.model))
  settings = OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0, b1=BETAS[0], b2=BETAS[1], eps=EPS)
  device = jax.devices(arguments.device)[0]
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), [device])
  tx = optimizer.make(settings, 1_000_000)
  abstract = step_lib.abstract_state(config, "float32", tx, mesh)
  shardings = step_lib.shardings_of(abstract)
  if size:
    params = build.init(config, jax.random.key(0), "float32", shardings=shardings.params)
  else:
    params = hf.load(pathlib.Path(arguments.model), config, dtype="float32", shardings=shardings.params)
  attend, _ = attention.choose(
    device.platform,
    device_kind=device.device_kind,
    head_width=config.head_width,
    row_length=arguments.row_length,
    compute=arguments.compute,
  )
  model = llama.Llama(config, arguments.compute, arguments.remat, attend)
  train_step = step_lib.make_train_step(model, settings, 1_000_000, mesh, shardings, repeat=0.0, seed=0)
  token_BT, is_trained_BT = batch(arguments)
  arrays = {
    "token": token_BT,
    "segment": np.ones_like(token_BT),
    "position": np.broadcast_to(np.arange(token_BT.shape[1], dtype=np.int32), token_BT.shape),
    "role": np.where(is_trained_BT, 1, 0).astype(np.int8),
    "weight": is_trained_BT.astype(np.float32),
  }
  rows = {f"{name}_ABT": jax.device_put(array[None], step_lib.batch_sharding(mesh)) for name, array in arrays.items()}
  kept = [jax.jit(lambda params: step_lib.new_state(params, tx), out_shardings=shardings, donate_argnums=0)(params)]

  def work(steps: int = STEPS) -> Work:
    for _ in range(steps):
      kept[0], metrics = train_step(kept[0], rows)
    loss = float(metrics.sums.loss / metrics.sums.weight)  # waits for the step
    return Work(steps * token_BT.size, [f"{loss:.4f}"])

  work(1)
  return work


def torch(arguments: argparse.Namespace) -> Callable[[], Work]:
  """transformers' model and torch's fused AdamW."""
  import torch
  from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

  device = "cuda" if arguments.device == "gpu" else "cpu"
  if size := fields(arguments.shape):
    with torch.device(device):
      network = LlamaForCausalLM(LlamaConfig(**size)).train()
  else:
    network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).to(device).train()
  if arguments.remat == "full":
    network.gradient_checkpointing_enable()
  updates = torch.optim.AdamW(
    network.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True
  )
  token_BT, is_trained_BT = batch(arguments)
  given = torch.tensor(token_BT, dtype=torch.long, device=device)
  labels = torch.where(torch.tensor(is_trained_BT, device=device), given, -100)
  lower = torch.autocast(device, torch.bfloat16, enabled=arguments.compute == "bfloat16")

  def work(steps: int = STEPS) -> Work:
    for _ in range(steps):
      with lower:
        loss = network(input_ids=given, labels=labels, use_cache=False).loss
      loss.backward()
      torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
      updates.step()
      updates.zero_grad(set_to_none=True)
    return Work(steps * token_BT.size, [f"{loss.item():.4f}"])

  work(1)
  return work


def main() -> None:
  """Run the race."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  real_model.add_flag(parser)
  parser.add_argument("--rows", type=int, default=2)
  parser.add_argument("--row_length", type=int, default=640)
  parser.add_argument("--trained", type=float, default=0.5, help="share of the tokens that are trained")
  parser.add_argument("--remat", choices=("none", "matmuls", "full"), default="matmuls")
  parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
  parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape in place of --model")
  race.main({"insec_jax": ours, "torch": torch}, parser, unit="tokens", prepare=real_model.build)


if __name__ == "__main__":
  main()
