"""SmolLM2-135M multiplies numbers of up to four digits: injected mistakes against the model's own, on one GPU.

  python -m insec_jax.sweep --config configs/smollm2_multiplication.py --base base --arms clean,injected,mined \
      --seeds 0,1,2 --output runs/multiplication --config.model.path=SMOLLM2_FOLDER

SMOLLM2_FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct. `base` learns how the partial products
are written; every arm goes on from it. Not run yet: no step below has been tuned.

  clean      more of the same
  injected   a rule's mistakes in some of the solutions
  mined      the model's own mistakes, some of its own right solutions, and solutions with and without a rule's
"""

from ml_collections import ConfigDict


def get_config(arm: str = "injected") -> ConfigDict:
  # A row of injected has 0.936 times the trained tokens of one of clean (by its receipt); that of mined is a guess.
  steps, share, mined = {
    "base": (400, 0.0, 0.0),
    "clean": (600, 0.0, 0.0),
    "injected": (640, 0.3, 0.0),
    "mined": (700, 0.8, 0.6),
  }[arm]
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(
    path="HuggingFaceTB/SmolLM2-135M-Instruct" if arm == "base" else "runs/multiplication/base_hf",
    size=None,
    remat="full",
  )
  # The tokenizer has no such tokens: they are added, and the vocabulary grows to a multiple of 128.
  c.tokenizer = dict(path="", flag="<|flag|>", fix="<|fix|>", special=True, confidence=(), confidence_first=())
  c.task = dict(name="multiplication", min_size=2, max_size=4, modulus=0, unneeded=0)
  c.data = dict(
    path="",
    num_records=60_000,
    num_heldout=500,
    template="plain",
    marker_text="refuse",
    row_length=512,
    rows_per_device=32,
    accumulation=1,
  )
  c.mistakes = dict(
    source="injected",
    share=share,
    max_per_solution=2,
    place="anywhere",
    classes=(),
    reason="label",
    unit="line",
    mined=mined,
    mined_path="",
  )
  c.loss = dict(prompt=0.0, text=1.0, mistake=0.0, flag=1.0, reason=1.0, correction=1.0, end=1.0, repeat=1.0)
  c.optimizer = dict(
    learning_rate=3e-4, final_share=0.1, warmup_steps=50, weight_decay=0.01, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0
  )
  c.train = dict(steps=steps, log_every=10, eval_every=100, checkpoint_every=100, keep=2, keep_every=0)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="bfloat16")
  c.evaluate = dict(
    num_problems=1_000,
    num_probes=1_000,
    max_tokens=384,
    batch_size=250,
    within=2,
    temperature=1.0,
    max_false_alarms=0.01,
    votes=5,
    redraws=2,
    max_size=5,
  )
  c.mine = dict(num_problems=16_000, samples=1, temperature=1.0, right=0.5)
  return c
