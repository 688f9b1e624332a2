"""A config file and a record that every program accepts, for tests that then damage something."""

CONFIG = """
from ml_collections import ConfigDict

def get_config():
  c = ConfigDict()
  c.seed = 0
  c.rounds = 0
  c.model = dict(path="hf", size=None, remat="none")
  c.tokenizer = dict(path="", flag="<|flag|>", fix="<|fix|>", special=True, confidence=(), confidence_first=())
  c.task = dict(name="records", min_size=0, max_size=0, modulus=0)
  c.data = dict(path="good.jsonl", num_records=0, num_heldout=0, template="plain", marker_text="refuse", row_length=48,
                rows_per_device=2, accumulation=1)
  c.mistakes = dict(source="recorded", share=0.5, max_per_solution=1, classes=(), reason="label",
                    unit="line", mined=0.0, mined_path="")
  c.loss = dict(prompt=0.0, text=1.0, mistake=0.0, flag=1.0, reason=1.0, correction=1.0, end=1.0, repeat=0.0)
  c.optimizer = dict(learning_rate=1e-3, final_share=0.1, warmup_steps=1, weight_decay=0.0, b1=0.9, b2=0.99, eps=1e-8,
                     clip_norm=1.0)
  c.train = dict(steps=2, log_every=1, eval_every=1, checkpoint_every=1, keep=1)
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.precision = dict(params="float32", compute="float32")
  c.evaluate = dict(num_problems=1, num_probes=1, max_tokens=8, batch_size=1, temperature=1.0,
                    max_false_alarms=0.01, votes=3, redraws=1, max_size=0)
  c.mine = dict(num_problems=2, samples=2, right=1.0)
  return c
"""
GOOD = {"pieces": [{"role": "prompt", "text": "1+2?"}, {"role": "text", "text": "3"}]}
