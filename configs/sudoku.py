"""4x4 sudoku from scratch on a CPU: injected mistakes against the model's own, with and without its confidence.

  python -m insec_jax.sweep --config configs/sudoku.py --base base --arms clean,injected,mined,sure --seeds 0,1,2 \
      --output runs/sudoku --jobs 2

`base` learns to fill grids from scratch; every arm goes on from it.

  clean      more of the same
  injected   a rule's mistakes in some of the solutions
  mined      the model's own mistakes, some of its own right solutions, and solutions with and without a rule's
  sure       only its own, with its confidence in each step behind it for the flag to read
"""

from ml_collections import ConfigDict

EDGES = (0.003, 0.03, 0.3, 1.0, 3.0)  # -log p of the least likely token of a step


def get_config(arm: str = "injected") -> ConfigDict:
  # Mistakes leave less prompt in a row: with these steps clean, injected and mined have trained on as many tokens.
  steps, share, mined, confidence = {
    "base": (4_000, 0.0, 0.0, ()),
    "clean": (6_000, 0.0, 0.0, ()),
    "injected": (5_400, 0.3, 0.0, ()),
    "mined": (5_100, 0.8, 0.6, ()),
    "sure": (4_000, 0.0, 1.0, EDGES),
  }[arm]
  path = "" if arm == "base" else "runs/sudoku/base_hf"
  size = dict(  # vocab_size None: the tokenizer's
    model_type="llama",
    hidden_act="silu",
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=None,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    initializer_range=0.05,
    tie_word_embeddings=False,
  )
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(path=path, size=None if path else size, remat="matmuls")
  c.tokenizer = dict(path="", flag="<|flag|>", fix="<|fix|>", special=True, confidence=confidence, confidence_first=())
  c.task = dict(name="sudoku", min_size=6, max_size=9, modulus=0, unneeded=0)
  c.data = dict(
    path="",
    num_records={"base": 100_000, "sure": 40_000}.get(arm, 60_000),
    num_heldout=0 if confidence else 500,
    template="plain",
    marker_text="refuse",
    row_length=208,
    rows_per_device=4,
    accumulation=1,
  )
  c.mistakes = dict(
    source="injected",
    share=share,
    max_per_solution=4,
    place="anywhere",
    classes=(),
    reason="recompute",
    unit="line",
    mined=mined,
    mined_path="",
  )
  c.loss = dict(prompt=0.0, text=1.0, mistake=0.0, flag=1.0, reason=1.0, correction=1.0, end=1.0, repeat=0.0)
  c.optimizer = dict(
    learning_rate=1e-3, final_share=0.05, warmup_steps=200, weight_decay=0.01, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0
  )
  c.train = dict(steps=steps, log_every=100, eval_every=1_000, checkpoint_every=1_000, keep=2, keep_every=0)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="float32")
  c.evaluate = dict(
    num_problems=2_500,
    num_probes=1_000,
    max_tokens=128,
    batch_size=250,
    within=2,
    temperature=1.0,
    max_false_alarms=0.01,
    votes=5,
    redraws=2,
    max_size=12,
  )
  c.mine = dict(num_problems=48_000, samples=1, temperature=1.0, right=0.25)
  return c
