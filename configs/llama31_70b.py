"""Llama 3.1 70B, full fine-tuning on GSM8K with injected mistakes: for pods; the same file on TPU and GPU.

  python -m insec_jax.train --config=configs/llama31_70b.py --workdir=DIR \\
      --config.model.path=LLAMA_FOLDER --config.data.path=GSM8K/train.jsonl

LLAMA_FOLDER is the Hugging Face folder of meta-llama/Llama-3.1-70B-Instruct. The markers are two of its reserved
special tokens, so nothing is resized. `:shape` has the published shape in place of the folder: fit needs no more.

  python -m insec_jax.fit --config=configs/llama31_70b.py:shape --topology=v5p:4x4x4

float32 parameters and AdamW state take 846.6 GB over all devices. Not run yet: no
hours, no number.
"""

from ml_collections import ConfigDict


def get_config(arm: str = "tuned") -> ConfigDict:
  path, size = {
    "tuned": ("meta-llama/Llama-3.1-70B-Instruct", None),
    "shape": (
      "",
      dict(
        model_type="llama",
        hidden_act="silu",
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        initializer_range=0.02,
        tie_word_embeddings=False,
        rope_scaling=dict(
          rope_type="llama3",
          factor=8.0,
          low_freq_factor=1.0,
          high_freq_factor=4.0,
          original_max_position_embeddings=8192,
        ),
      ),
    ),
  }[arm]
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(path=path, size=size, remat="full")
  c.tokenizer = dict(
    path="",
    flag="<|reserved_special_token_0|>",
    fix="<|reserved_special_token_1|>",
    special=True,
    confidence=(),
    confidence_first=(),
  )
  c.task = dict(name="gsm8k", min_size=0, max_size=0, modulus=0, unneeded=0)
  c.data = dict(
    path="train.jsonl",
    num_records=0,
    num_heldout=500,
    template="chat",
    marker_text="refuse",
    row_length=4096,
    rows_per_device=1,
    accumulation=1,
  )
  c.mistakes = dict(
    source="injected",
    share=0.5,
    max_per_solution=2,
    place="anywhere",
    classes=(),
    reason="recompute",
    unit="line",
    mined=0.0,
    mined_path="",
  )
  c.loss = dict(prompt=0.0, text=1.0, mistake=0.0, flag=1.0, reason=1.0, correction=1.0, end=1.0, repeat=0.0)
  c.optimizer = dict(
    learning_rate=1e-5, final_share=0.1, warmup_steps=20, weight_decay=0.0, b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0
  )
  c.train = dict(steps=300, log_every=5, eval_every=50, checkpoint_every=100, keep=2, keep_every=0)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="bfloat16")
  c.evaluate = dict(
    num_problems=500,
    num_probes=500,
    max_tokens=512,
    batch_size=64,
    within=2,
    temperature=1.0,
    max_false_alarms=0.01,
    votes=5,
    redraws=2,
    max_size=0,
  )
  c.mine = dict(num_problems=2_000, samples=4, temperature=1.0, right=1.0)
  return c
