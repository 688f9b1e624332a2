"""SmolLM2-135M-Instruct on sums told in English, sized for two CPU cores: only its top layers are trained.

  python -m insec_jax.sweep --config configs/smollm2_english.py --base base --seeds 0,1,2 \
      --arms clean,injected,mined,dagger --output runs/english --config.model.path=SMOLLM2_FOLDER

SMOLLM2_FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct. `base` learns the layout of a
solution, and every arm starts from it:

  clean      more of the same
  injected   rule-generated mistakes in half of the solutions
  mined      the same, and the base's own mistakes
  dagger     as mined, with the right step in place of an own mistake, without flag and reason

_smollm2.py says what is trained. The output of the frozen layers is kept in runs/english/streams, about 1 GB for each
arm and seed. No arm has been trained to its end.
"""

from _smollm2 import on_two_cores


def get_config(arm: str = "injected"):
  # Rows of injected have more tokens than those of clean, for the same problems; so steps are about equal in tokens.
  steps, share, mined, problems = {
    "base": (150, 0.0, 0.0, 1_200),
    "clean": (400, 0.0, 0.0, 3_200),
    "injected": (400, 0.5, 0.0, 2_600),
    "mined": (400, 0.5, 0.3, 1_800),
    "dagger": (400, 0.5, 0.3, 1_800),
  }[arm]
  c = on_two_cores("english", arm, steps=steps, share=share, mined=mined, problems=problems)
  c.task.update(name="english", min_size=2, max_size=4)
  return c
