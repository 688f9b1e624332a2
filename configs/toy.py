"""Toy experiment: two small Llamas learn 4x4 sudoku with 2 or 3 empty cells, one with injected mistakes.

  launch/local.sh

`clean` trains on right solutions; `insec` has mistakes, flagged and corrected, in some of them. Both begin with the
same random weights and are equal in trained tokens: a row of `insec` holds more of them, so it takes fewer steps.
"""

from insec_jax.config import defaults, small_llama


def get_config(arm: str = "insec"):
  steps, records, share = {"clean": (4_470, 84_000, 0.0), "insec": (3_800, 60_000, 0.3)}[arm]
  c = defaults()
  c.model.size = small_llama(num_layers=3)
  c.model.remat = "matmuls"
  c.task.update(name="sudoku", min_size=2, max_size=3)
  c.data.update(num_records=records, num_heldout=200, row_length=128, rows_per_device=6)
  c.mistakes.update(share=share, max_per_solution=4)
  c.optimizer.update(learning_rate=1e-3, final_share=0.05, warmup_steps=100, weight_decay=0.01, b2=0.99)
  c.train.update(steps=steps, log_every=100, eval_every=1_000, checkpoint_every=1_000)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=500, num_probes=500, max_tokens=64, batch_size=250)
  c.mine.update(num_problems=4_000, samples=2)
  return c
