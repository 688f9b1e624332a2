"""SmolLM2-135M on multiplication of numbers of up to four digits: injected against self-made mistakes, on one GPU.

  python -m insec_jax.sweep --config configs/smollm2_multiplication.py --base base --arms clean,injected,mined \
      --seeds 0,1,2 --output runs/multiplication --config.model.path=SMOLLM2_FOLDER

SMOLLM2_FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct. `base` learns the format of the
partial products; every arm starts from it. Not run yet: the numbers of steps below have not been tuned.

  clean      more of the same
  injected   rule-generated mistakes in some of the solutions
  mined      the model's own mistakes, some of its right solutions, and solutions with and without generated mistakes
"""

from insec_jax.config import defaults


def get_config(arm: str = "injected"):
  # A row of injected has 0.936 times the trained tokens of one of clean (by its receipt); that of mined is a guess.
  steps, share, mined = {
    "base": (400, 0.0, 0.0),
    "clean": (600, 0.0, 0.0),
    "injected": (640, 0.3, 0.0),
    "mined": (700, 0.8, 0.6),
  }[arm]
  c = defaults()
  # Its tokenizer has no markers: they are added, and the vocabulary grows to a multiple of 128.
  c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct" if arm == "base" else "runs/multiplication/base_hf"
  c.task.update(name="multiplication", min_size=2, max_size=4)
  c.data.update(num_records=60_000, num_heldout=500, row_length=512, rows_per_device=32)
  c.mistakes.update(share=share, mined=mined, reason="label")
  c.loss.repeat = 1.0
  c.optimizer.update(learning_rate=3e-4, warmup_steps=50, weight_decay=0.01, b2=0.99)
  c.train.steps = steps
  c.evaluate.update(num_problems=1_000, num_probes=1_000, max_tokens=384, batch_size=250, max_size=5)
  c.mine.update(num_problems=16_000, samples=1, right=0.5)
  return c
