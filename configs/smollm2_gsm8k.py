"""SmolLM2-135M-Instruct learns to correct injected arithmetic mistakes in GSM8K solutions, and its own.

  launch/local.sh configs/smollm2_gsm8k.py --config.model.path=SMOLLM2_FOLDER --config.data.path=GSM8K/train.jsonl
  python -m insec_jax.sweep --config configs/smollm2_gsm8k.py --base base --arms clean,injected,mined --seeds 0,1,2 \
      --output runs/gsm8k --config.model.path=SMOLLM2_FOLDER --config.data.path=GSM8K/train.jsonl

SMOLLM2_FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct, GSM8K/train.jsonl the published train
split ({"question", "answer"} a line). `local`, the default, is short: 40 steps on a CPU. The others are for one GPU or
TPU chip and have not been run: `base` learns the solutions as they are, every arm goes on from it.

  clean      more of the same
  injected   a rule's mistakes in some of the solutions
  mined      the model's own mistakes, some of its own right solutions, and solutions with and without a rule's
"""

from ml_collections import ConfigDict


def get_config(arm: str = "local") -> ConfigDict:
  local = arm == "local"
  # A row of injected has 0.953 times the trained tokens of one of clean (by its receipt); that of mined is a guess.
  steps, share, mined = {
    "local": (40, 0.8, 0.0),
    "base": (600, 0.0, 0.0),
    "clean": (600, 0.0, 0.0),
    "injected": (630, 0.5, 0.0),
    "mined": (640, 0.5, 0.5),
  }[arm]
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(
    path="HuggingFaceTB/SmolLM2-135M-Instruct" if local or arm == "base" else "runs/gsm8k/base_hf",
    size=None,
    remat="matmuls" if local else "full",
  )
  # The tokenizer has no such tokens: they are added, and the vocabulary grows to a multiple of 128.
  c.tokenizer = dict(path="", flag="<|flag|>", fix="<|fix|>", special=True, confidence=(), confidence_first=())
  c.task = dict(name="gsm8k", min_size=0, max_size=0, modulus=0, unneeded=0)
  c.data = dict(
    path="train.jsonl",
    num_records=1_000 if local else 0,
    num_heldout=32 if local else 1_000,
    template="plain",
    marker_text="refuse",
    row_length=640 if local else 1024,
    rows_per_device=1 if local else 16,
    accumulation=1,
  )
  c.mistakes = dict(
    source="injected",
    share=share,
    max_per_solution=2,
    place="anywhere",
    classes=(),
    reason="recompute",
    unit="line",
    mined=mined,
    mined_path="",
  )
  c.loss = dict(
    prompt=0.0, text=1.0, mistake=0.0, flag=1.0, reason=1.0, correction=1.0, end=1.0, repeat=0.0 if local else 1.0
  )
  c.optimizer = dict(
    learning_rate=3e-4 if local else 1e-4,
    final_share=0.1,
    warmup_steps=5 if local else 50,
    weight_decay=0.01,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    clip_norm=1.0,
  )
  c.train = dict(
    steps=steps,
    log_every=1 if local else 10,
    eval_every=40 if local else 100,
    checkpoint_every=20 if local else 100,
    keep=2,
    keep_every=0,
  )
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="float32" if local else "bfloat16")
  c.evaluate = dict(
    num_problems=8 if local else 1_000,
    num_probes=8 if local else 1_000,
    max_tokens=192 if local else 384,
    batch_size=16 if local else 128,
    within=2,
    temperature=1.0,
    max_false_alarms=0.01,
    votes=5,
    redraws=2,
    max_size=0,
  )
  c.mine = dict(num_problems=32 if local else 4_000, samples=2 if local else 4, temperature=1.0, right=1.0)
  return c
