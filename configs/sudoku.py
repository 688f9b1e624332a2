"""4x4 sudoku, trained from scratch on a CPU: injected against self-made mistakes, with and without confidence tokens.

  python -m insec_jax.sweep --config configs/sudoku.py --base base --arms clean,injected,mined --seeds 0,1,2 \
      --output runs/sudoku --jobs 2

`base` learns to fill grids from scratch; every arm starts from it.

  clean      more of the same
  injected   rule-generated mistakes in some of the solutions
  mined      the model's own mistakes, some of its right solutions, and solutions with and without generated mistakes
  sure       only the model's own mistakes and solutions, each step followed by its confidence token
"""

from insec_jax.config import defaults, small_llama

EDGES = (0.003, 0.03, 0.3, 1.0, 3.0)  # -log p of the least likely token of a step


def get_config(arm: str = "injected"):
  # Mistakes leave less prompt in a row: with these steps clean, injected and mined have trained on as many tokens.
  steps, records, share, mined = {
    "base": (4_000, 100_000, 0.0, 0.0),
    "clean": (6_000, 60_000, 0.0, 0.0),
    "injected": (5_400, 60_000, 0.3, 0.0),
    "mined": (5_100, 60_000, 0.8, 0.6),
    "sure": (4_000, 40_000, 0.0, 1.0),
  }[arm]
  c = defaults()
  if arm == "base":
    c.model.size = small_llama(num_layers=4)
  else:
    c.model.path = "runs/sudoku/base_hf"
  c.model.remat = "matmuls"
  c.tokenizer.confidence = EDGES if arm == "sure" else ()
  c.task.update(name="sudoku", min_size=6, max_size=9)
  c.data.update(num_records=records, num_heldout=0 if arm == "sure" else 500, row_length=208, rows_per_device=4)
  c.mistakes.update(share=share, mined=mined, max_per_solution=4)
  c.optimizer.update(learning_rate=1e-3, final_share=0.05, warmup_steps=200, weight_decay=0.01, b2=0.99)
  c.train.update(steps=steps, log_every=100, eval_every=1_000, checkpoint_every=1_000)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=2_500, num_probes=1_000, max_tokens=128, batch_size=250, max_size=12)
  c.evaluate.rivals = ("redraw", "trigger", "temperature", "beam", "state", "swapped", "linear_probe")
  c.mine.update(num_problems=48_000, samples=1, right=0.25)
  return c
