"""On-policy distillation of corrections, on sudokus of 2 to 4 empty cells: two CPU cores, 10 minutes.

  python -m insec_jax.train --config toy_distill:start --workdir runs/distill/start
  python -m insec_jax.export --model runs/distill/start --output runs/distill/start_hf
  python -m insec_jax.train --config toy_distill:distill --workdir runs/distill/reverse
  python -m insec_jax.train --config toy_distill:distill --workdir runs/distill/mixed --config.policy.forward=0.5
  python -m insec_jax.train --config toy_distill:distill --workdir runs/distill/self --config.policy.teacher=current
  python -m insec_jax.evaluate --model runs/distill/reverse --config toy_distill --output runs/distill/reverse.json

`start` learns from injected mistakes, and half of these transcripts have a hint about the first one in the prompt: its
teacher can read them. `distill` goes on from there, in ten rounds of 400 samples (LOG.md has what came of it).
"""

from insec_jax.config import defaults, small_llama


def get_config(arm: str = "start"):
  c = defaults()
  c.model.remat = "matmuls"
  c.task.update(name="sudoku", min_size=2, max_size=4)
  c.data.update(num_records=40_000, num_heldout=200, row_length=160, rows_per_device=6)
  c.mistakes.update(share=0.5, max_per_solution=2)
  c.optimizer.update(learning_rate=1.5e-3, final_share=0.05, warmup_steps=100, weight_decay=0.01, b2=0.99)
  c.train.update(steps=2_000, log_every=100, eval_every=500, checkpoint_every=500)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=400, num_probes=200, max_tokens=48, batch_size=400, votes=3, redraws=1)
  if arm == "start":
    c.model.size = small_llama(num_layers=3)
    c.mistakes.hinted = 0.5
  else:
    c.model.path = "runs/distill/start_hf"
    c.data.num_records = 1
    c.rounds = 10
    c.policy.method = "distill"
    c.mine.update(num_problems=100, samples=4)
    c.optimizer.update(learning_rate=2e-4, final_share=0.5, warmup_steps=10, weight_decay=0.0)
    c.train.update(steps=150, log_every=15, eval_every=1_000, checkpoint_every=75)
  return c
