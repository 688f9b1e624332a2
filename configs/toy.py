"""Toy experiment: a small Llama learns sums over shuffled definitions, then to correct injected mistakes, on a CPU.

  launch/local.sh

`base` trains from scratch on right solutions. Two arms start from it: `clean` with more of the same, `insec` with
mistakes in some of the solutions. The arms are equal in trained tokens: a row of `insec` holds fewer, so it takes more
steps.
"""

from insec_jax.config import defaults, small_llama


def get_config(arm: str = "insec"):
  steps, share = {"base": (4_500, 0.0), "clean": (2_540, 0.0), "insec": (2_600, 0.3)}[arm]
  c = defaults()
  if arm == "base":
    c.model.size = small_llama(num_layers=3)
  else:
    c.model.path = "runs/toy/base_hf"
  c.model.remat = "matmuls"
  c.task.update(name="graph", min_size=1, max_size=3, modulus=10)
  c.data.update(num_records=50_000 if arm == "base" else 32_000, num_heldout=500, row_length=176, rows_per_device=4)
  c.mistakes.update(share=share, classes=("early", "repeat"))
  c.optimizer.update(learning_rate=1e-3, final_share=0.05, warmup_steps=100, weight_decay=0.01, b2=0.99)
  c.train.update(steps=steps, log_every=50, eval_every=500, checkpoint_every=500)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=1_000, num_probes=1_000, max_tokens=96, batch_size=250)
  c.mine.update(num_problems=4_000, samples=2)
  return c
