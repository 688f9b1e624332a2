"""SmolLM2-135M-Instruct fine-tuned to correct injected arithmetic mistakes in GSM8K solutions.

  launch/local.sh configs/smollm2_gsm8k.py --config.model.path=SMOLLM2_FOLDER --config.data.path=GSM8K/train.jsonl
  python -m insec_jax.sweep --config configs/smollm2_gsm8k.py --base base --arms clean,injected,mined --seeds 0,1,2 \
      --output runs/gsm8k --config.model.path=SMOLLM2_FOLDER --config.data.path=GSM8K/train.jsonl

SMOLLM2_FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct, GSM8K/train.jsonl the published train
split (one {"question", "answer"} per line). `local`, the default, takes 40 steps on a CPU. The other arms are for one
GPU or TPU chip and have not been run: `base` learns the unmodified solutions, and every arm starts from it.

  clean      more of the same
  injected   rule-generated mistakes in some of the solutions
  mined      the model's own mistakes, some of its right solutions, and solutions with and without generated mistakes

None of them trains on the problems to mine, a share of the file, but through what `mined` has made of them.
"""

from insec_jax.config import defaults


def get_config(arm: str = "local"):
  # A row of injected has 0.953 times the trained tokens of one of clean (by its receipt); that of mined is a guess.
  steps, share, mined = {
    "local": (40, 0.8, 0.0),
    "base": (600, 0.0, 0.0),
    "clean": (600, 0.0, 0.0),
    "injected": (630, 0.5, 0.0),
    "mined": (640, 0.5, 0.5),
  }[arm]
  c = defaults()
  # Its tokenizer has no markers: they are added, and the vocabulary grows to a multiple of 128.
  c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct" if arm in ("local", "base") else "runs/gsm8k/base_hf"
  c.task.name = "gsm8k"
  c.mistakes.update(share=share, mined=mined)
  c.optimizer.update(weight_decay=0.01, b2=0.99)
  c.train.steps = steps
  (on_a_cpu if arm == "local" else on_one_chip)(c)
  return c


def on_one_chip(c):
  c.data.update(path="train.jsonl", num_heldout=1_000, to_mine=0.3, row_length=1024, rows_per_device=16)
  c.loss.repeat = 1.0
  c.optimizer.update(learning_rate=1e-4, warmup_steps=50)
  c.evaluate.update(num_problems=1_000, num_probes=1_000, max_tokens=384, batch_size=128)
  c.mine.num_problems = 2_000


def on_a_cpu(c):
  c.model.remat = "matmuls"
  c.data.update(path="train.jsonl", num_records=1_000, num_heldout=32, row_length=640)
  c.optimizer.update(learning_rate=3e-4, warmup_steps=5)
  c.train.update(log_every=1, eval_every=40, checkpoint_every=20)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=8, num_probes=8, max_tokens=192, batch_size=16)
  c.mine.update(num_problems=32, samples=2)
