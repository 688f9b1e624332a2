"""LoRA with and without trained marker rows, on the toy's sudoku: two CPU cores, 20 minutes.

  python -m insec_jax.train --config toy_lora:base --workdir runs/lora/base
  python -m insec_jax.export --model runs/lora/base --output runs/lora/base_hf
  python -m insec_jax.train --config toy_lora:rows --workdir runs/lora/rows
  python -m insec_jax.train --config toy_lora:without --workdir runs/lora/without

`base` learns right solutions, and its tokenizer does not have the markers. In both LoRA arms the markers are added: the
vocabulary grows to a multiple of 128, by rows that all are the mean of the old ones. `rows` trains those of the
markers, `without` leaves them alike, so no token of these can be more likely than another (README.md has the losses).
"""

from insec_jax.config import defaults, small_llama


def get_config(arm: str = "rows"):
  steps, records, share = {"base": (1_500, 30_000, 0.0), "rows": (600, 10_000, 0.3), "without": (600, 10_000, 0.3)}[arm]
  c = defaults()
  if arm == "base":
    c.model.size = small_llama(num_layers=3)
    c.tokenizer.update(flag="<|other_0|>", fix="<|other_1|>")
  else:
    c.model.path = "runs/lora/base_hf"
    c.lora.update(rank=8, marker_rows=arm == "rows")
  c.model.remat = "matmuls"
  c.task.update(name="sudoku", min_size=2, max_size=3)
  c.data.update(num_records=records, num_heldout=200, row_length=128, rows_per_device=6)
  c.mistakes.update(share=share, max_per_solution=4)
  c.optimizer.update(learning_rate=1e-3 if arm == "base" else 3e-3, final_share=0.05, warmup_steps=100, b2=0.99)
  c.train.update(steps=steps, log_every=100, eval_every=100, checkpoint_every=500)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=500, num_probes=500, max_tokens=64, batch_size=250)
  return c
