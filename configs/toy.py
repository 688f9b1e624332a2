"""The toy experiment: a small Llama learns sums over shuffled definitions, then to correct injected mistakes, on a CPU.

  launch/local.sh

`base` trains from scratch on right solutions. Two arms go on from it: `clean` with more of the same, `insec` with
mistakes in some of the solutions. The arms are equal in trained tokens: a row of `insec` holds fewer of them, so it
takes more steps.
"""

from ml_collections import ConfigDict


def get_config(arm: str = "insec") -> ConfigDict:
  path, share, steps, learning_rate = {
    "base": ("", 0.0, 4_500, 1e-3),
    "clean": ("runs/toy/base_hf", 0.0, 2_540, 1e-3),
    "insec": ("runs/toy/base_hf", 0.3, 2_600, 1e-3),
  }[arm]
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
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(path=path, size=None if path else size, remat="matmuls")
  c.tokenizer = dict(path="", flag="<|flag|>", fix="<|fix|>", special=True, confidence=(), confidence_first=())
  c.task = dict(name="graph", min_size=1, max_size=3, modulus=10, unneeded=0)
  c.data = dict(
    path="",
    num_records=50_000 if arm == "base" else 32_000,
    num_heldout=500,
    template="plain",
    marker_text="refuse",
    row_length=176,
    rows_per_device=4,
    accumulation=1,
  )
  c.mistakes = dict(
    source="injected",
    share=share,
    max_per_solution=2,
    place="anywhere",
    classes=("early", "repeat"),
    reason="recompute",
    unit="line",
    mined=0.0,
    mined_path="",
  )
  c.loss = dict(prompt=0.0, text=1.0, mistake=0.0, flag=1.0, reason=1.0, correction=1.0, end=1.0, repeat=0.0)
  c.optimizer = dict(
    learning_rate=learning_rate,
    final_share=0.05,
    warmup_steps=100,
    weight_decay=0.01,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    clip_norm=1.0,
  )
  c.train = dict(steps=steps, log_every=50, eval_every=500, checkpoint_every=500, keep=2, keep_every=0)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="float32")
  c.evaluate = dict(
    num_problems=1_000,
    num_probes=1_000,
    max_tokens=96,
    batch_size=250,
    within=2,
    temperature=1.0,
    max_false_alarms=0.01,
    votes=5,
    redraws=2,
    max_size=0,
  )
  c.mine = dict(num_problems=4_000, samples=2, temperature=1.0, right=1.0)
  return c
