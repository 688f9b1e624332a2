"""SmolLM2-135M-Instruct on sums told in English, sized for two CPU cores: only its top layers are trained.

  python -m insec_jax.sweep --config configs/smollm2_english.py --base base --seeds 0,1,2 \
      --arms clean,injected,mined,dagger --output runs/english --config.model.path=SMOLLM2_FOLDER

SMOLLM2_FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct. `base` learns the layout of a
solution, and every arm starts from it:

  clean      more of the same
  injected   rule-generated mistakes in half of the solutions
  mined      the same, and the base's own mistakes
  dagger     as mined, with the right step in place of an own mistake, without flag and reason

The last 6 of 30 layers and the last norm are trained; the output of the others is kept in runs/english/streams, about
1 GB for each arm and seed. The markers are two special tokens that the model has, since their rows stay frozen: those
two that are far from each other and from <|im_end|>; most others are nearly equal. The softmax of training is over the
tokens of the data. No arm has been trained to its end.
"""

from insec_jax.config import defaults


def get_config(arm: str = "injected"):
  # Rows of injected have more tokens than those of clean, for the same problems; so steps are about equal in tokens.
  steps, share, mined, problems = {
    "base": (150, 0.0, 0.0, 1_200),
    "clean": (400, 0.0, 0.0, 3_200),
    "injected": (400, 0.5, 0.0, 2_600),
    "mined": (400, 0.5, 0.3, 1_800),
    "dagger": (400, 0.5, 0.3, 1_800),
  }[arm]
  c = defaults()
  c.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct" if arm == "base" else "runs/english/base_hf"
  c.model.remat = "none"
  c.tokenizer.update(flag="<filename>", fix="<repo_name>")
  c.task.update(name="english", min_size=2, max_size=4)
  c.data.update(num_records=problems, num_heldout=64, row_length=320, rows_per_device=4)
  c.mistakes.update(share=share, mined=mined, view="dagger" if arm == "dagger" else "full")
  c.optimizer.update(learning_rate=3e-4, warmup_steps=20, weight_decay=0.01, b2=0.99)
  c.train.update(steps=steps, log_every=10, eval_every=100, checkpoint_every=50)
  c.train.update(top_layers=6, marker_rows=False, stream_cache="runs/english/streams", vocabulary="used")
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=150, num_probes=150, max_tokens=160, batch_size=16)
  c.mine.update(num_problems=500, samples=2)
  return c
