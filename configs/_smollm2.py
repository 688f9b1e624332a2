"""What the studies of SmolLM2-135M-Instruct on two CPU cores share."""

from insec_jax.config import defaults

# Named before the first run of a study with these arms: what injected mistakes do not teach, whether own ones teach it,
# and whether the corrections are worth more than the right steps alone, and than a second draw.
ENDPOINTS = (
  "injected: injected detection - own detection",
  "mined - injected: own detection",
  "mined - dagger: solutions t2",
  "mined - clean: solutions t2 - solutions sampled, redraw t2",
)


def on_two_cores(name, arm, *, steps, share, mined, problems):
  """Return the config of an arm of the study whose runs are in runs/NAME; the arm `base` starts from SmolLM2.

  The last 6 of 30 layers and the last norm are trained; the output of the others is kept in runs/NAME/streams. The
  markers are two special tokens that the model has, since their rows stay frozen: those two that are far from each
  other and from <|im_end|>; most others are nearly equal. The softmax of training is over the tokens of the data.
  """
  c = defaults()
  c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct" if arm == "base" else f"runs/{name}/base_hf"
  c.model.remat = "none"
  c.tokenizer.update(flag="<filename>", fix="<repo_name>")
  c.data.update(num_records=problems, num_heldout=64, row_length=320, rows_per_device=4)
  c.mistakes.update(share=share, mined=mined, view="dagger" if arm == "dagger" else "full")
  c.optimizer.update(learning_rate=3e-4, warmup_steps=20, weight_decay=0.01, b2=0.99)
  c.train.update(steps=steps, log_every=10, eval_every=100, checkpoint_every=50)
  c.train.update(top_layers=6, marker_rows=False, stream_cache=f"runs/{name}/streams", vocabulary="used")
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=150, num_probes=150, max_tokens=160, batch_size=16)
  c.mine.update(num_problems=500, samples=2)
  return c
