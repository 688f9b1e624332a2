"""SmolLM2-135M-Instruct answers questions about a text of made-up facts; sized for two CPU cores.

  python -m insec_jax.sweep --config configs/smollm2_grounded.py --base base --seeds 0,1,2 \
      --arms clean,injected,mined,dagger --output runs/grounded --config.model.path=SMOLLM2_FOLDER

SMOLLM2_FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct. Prompts go through its chat template.
`base` learns the layout of an answer, and every arm starts from it:

  clean      more of the same
  injected   rule-generated mistakes in half of the answers
  mined      the same, and the base's own mistakes
  dagger     as mined, with the right step in place of an own mistake, without flag and reason

_smollm2.py says what is trained. The output of the frozen layers is kept in runs/grounded/streams.
No arm has been trained to its end.
"""

from _smollm2 import ENDPOINTS, on_two_cores


def get_config(arm: str = "injected"):
  # With these steps clean and injected train on as many tokens, by their receipts; mined and dagger are guesses.
  steps, share, mined, problems = {
    "base": (150, 0.0, 0.0, 1_200),
    "clean": (400, 0.0, 0.0, 3_200),
    "injected": (340, 0.5, 0.0, 2_550),
    "mined": (335, 0.5, 0.3, 1_800),
    "dagger": (360, 0.5, 0.3, 1_800),
  }[arm]
  c = on_two_cores("grounded", arm, steps=steps, share=share, mined=mined, problems=problems)
  c.task.update(name="grounded", min_size=1, max_size=3)
  c.data.template = "chat"
  c.evaluate.endpoints = ENDPOINTS
  return c
