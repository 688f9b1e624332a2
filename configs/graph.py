"""Sums over shuffled definitions from scratch on a CPU: injected mistakes against the model's own.

  python -m insec_jax.sweep --config configs/graph.py --base base,more --arms clean,injected,mined --seeds 0,1,2 \
      --output runs/graph --jobs 2

`base` learns one to six sums from scratch, `more` goes on from it with five to ten: asked for ten at once a model may
not learn them at all. Every arm goes on from `more` with five to ten, until all have trained on as many tokens.

  clean      more of the same
  injected   a rule's mistakes in some of the solutions
  mined      the model's own mistakes and right solutions, some of these with a rule's

In `mined` a token of confidence stands behind each step and tells how sure the model was, for the flag to read: how
sure of what it computes next (the first token of the step), and how sure of the rest.
"""

from ml_collections import ConfigDict

EDGES = (0.003, 0.03, 0.3, 1.0, 3.0)  # -log p of the least likely token of a step but the first
FIRST = (0.01, 0.05, 0.2, 0.7, 2.0)  # of the first, which says what is computed next


def get_config(arm: str = "injected") -> ConfigDict:
  steps, share, mined = {
    "base": (9_000, 0.0, 0.0),
    "more": (6_000, 0.0, 0.0),
    "clean": (4_300, 0.0, 0.0),
    "injected": (4_270, 0.6, 0.0),
    "mined": (4_530, 0.1, 1.0),
  }[arm]
  path = {"base": "", "more": "runs/graph/base_hf"}.get(arm, "runs/graph/more_hf")
  size = dict(  # vocab_size None: the tokenizer's
    model_type="llama",
    hidden_act="silu",
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=None,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    initializer_range=0.05,
    tie_word_embeddings=False,
  )
  smallest, largest = (1, 6) if arm == "base" else (5, 10)
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(path=path, size=None if path else size, remat="matmuls")
  sure, first = (EDGES, FIRST) if arm == "mined" else ((), ())
  c.tokenizer = dict(path="", flag="<|flag|>", fix="<|fix|>", special=True, confidence=sure, confidence_first=first)
  c.task = dict(name="graph", min_size=smallest, max_size=largest, modulus=10, unneeded=0)
  c.data = dict(
    path="",
    num_records={"base": 100_000, "more": 60_000}.get(arm, 40_000),
    num_heldout=0 if mined else 500,
    template="plain",
    marker_text="refuse",
    row_length=208 if arm == "base" else 240,
    rows_per_device=4,
    accumulation=1,
  )
  c.mistakes = dict(
    source="injected",
    share=share,
    max_per_solution=2,
    place="anywhere",
    classes=("early", "repeat"),
    reason="label",
    unit="line",
    mined=mined,
    mined_path="",
  )
  c.loss = dict(
    prompt=0.0,
    text=1.0,
    mistake=0.0,
    flag=1.0,
    reason=1.0,
    correction=2.0 if mined else 1.0,
    end=1.0,
    repeat=3.0 if mined else float(share > 0),
  )
  c.optimizer = dict(
    learning_rate=1e-3, final_share=0.05, warmup_steps=200, weight_decay=0.01, b1=0.9, b2=0.99, eps=1e-8, clip_norm=1.0
  )
  c.train = dict(steps=steps, log_every=100, eval_every=1_000, checkpoint_every=1_000, keep=2, keep_every=0)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="float32")
  c.evaluate = dict(
    num_problems=2_000,
    num_probes=1_000,
    max_tokens=240,
    batch_size=250,
    within=2,
    temperature=1.0,
    max_false_alarms=0.01,
    votes=5,
    redraws=2,
    max_size=12,
  )
  c.mine = dict(num_problems=40_000, samples=1, temperature=1.0, right=1.5)
  return c
