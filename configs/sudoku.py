"""4x4 sudoku, trained from scratch on a CPU: injected against self-made mistakes, with and without confidence tokens.

  python -m insec_jax.sweep --config configs/sudoku.py --base base --arms clean,injected,mined --seeds 0,1,2 \
      --output runs/sudoku --jobs 2

`base` learns to fill grids from scratch; every arm starts from it.

  clean      more of the same
  injected   rule-generated mistakes in some of the solutions
  mined      the model's own mistakes, some of its right solutions, and solutions with and without generated mistakes
  sure       only the model's own mistakes and solutions, each step followed by its confidence token

Arms that separate the causes of a gain, each with another part of what is mined, beside clean solutions:

  own            as mined, without generated mistakes: the arm to compare the next four with
  dagger         the right step where the model erred, without mistake, flag and reason
  silent         mistake and right step, without flag and reason
  shuffled       reason and correction of another mistake
  erased         as own; what follows a correction does not read its mistake (rewind)
  rft            the model's own right solutions (mined by itself: it needs more of them)
  other          as mined, with the mistakes of the next seed's base (needs two seeds)
  clean_fresh    as clean, with as many more problems as mining has seen
  clean_compute  as clean, with more steps in place of mining: a token that mining reads or writes is a forward pass, a
                 third of a token of a row (2 of 6 FLOPs for each parameter); 3.0M are expected, `mine` prints how many

Two arms go on by policy gradient, with the checker as reward. They have not been run; each is a sweep of its own:

  policy         from `mined`: --base base,mined --arms policy
  policy_clean   from `clean`: --base base,clean --arms policy_clean

Distillation of corrections, from weights that read hints. Not run on this size. None begins with `clean`, since
its weights know neither flags nor hints:

  hinted         as mined, half of the records with a hint about the first mistake at the end of the prompt
  distill        from `hinted`, the teacher's too: --base base,hinted --arms distill
"""

from insec_jax.config import defaults, small_llama

# Named before the first run of a study with these arms; without the arms of one, it is printed as not measured.
ENDPOINTS = (
  "own - dagger: solutions t2",
  "mined - clean_compute: solutions t2",
  "mined - clean: solutions t2 - solutions, redraw 5 t2",
  "mined: solutions t2 - solutions, redraw 5 t2",
)
EDGES = (0.003, 0.03, 0.3, 1.0, 3.0)  # -log p of the least likely token of a step
VIEWS = {"dagger": "dagger", "silent": "silent", "shuffled": "shuffled", "rft": "right"}  # of mined records


def get_config(arm: str = "injected"):
  # Mistakes leave less prompt in a row: with these steps all arms but clean_compute have trained on as many tokens.
  # Those of own to rft are by receipts of simulated mistakes, as many a record as make mined equal to clean.
  steps, records, share, mined = {
    "base": (4_000, 100_000, 0.0, 0.0),
    "clean": (6_000, 60_000, 0.0, 0.0),
    "injected": (5_400, 60_000, 0.3, 0.0),
    "mined": (5_100, 60_000, 0.8, 0.6),
    "sure": (4_000, 40_000, 0.0, 1.0),
    "own": (5_300, 60_000, 0.0, 0.6),
    "erased": (5_300, 60_000, 0.0, 0.6),
    "dagger": (5_950, 60_000, 0.0, 0.6),
    "silent": (5_930, 60_000, 0.0, 0.6),
    "shuffled": (5_170, 60_000, 0.0, 0.6),
    "rft": (5_990, 60_000, 0.0, 0.6),
    "other": (5_100, 60_000, 0.8, 0.6),
    "clean_fresh": (6_000, 108_000, 0.0, 0.0),
    "clean_compute": (7_200, 60_000, 0.0, 0.0),
    "policy": (800, 1, 0.0, 0.0),
    "policy_clean": (800, 1, 0.0, 0.0),
    "hinted": (5_300, 60_000, 0.8, 0.6),
    "distill": (800, 1, 0.0, 0.0),
  }[arm]
  c = defaults()
  if arm == "base":
    c.model.size = small_llama(num_layers=4)
  else:
    start = {"policy": "mined", "policy_clean": "clean", "distill": "hinted"}.get(arm, "base")
    c.model.path = f"runs/sudoku/{start}_hf"
  c.model.remat = "matmuls"
  c.tokenizer.confidence = EDGES if arm == "sure" else ()
  c.task.update(name="sudoku", min_size=6, max_size=9)
  c.data.update(num_records=records, num_heldout=0 if arm == "sure" else 500, row_length=208, rows_per_device=4)
  c.mistakes.update(share=share, mined=mined, max_per_solution=4)
  if arm in VIEWS:
    c.mistakes.view = VIEWS[arm]
  if arm == "other":
    c.mistakes.mined_from = "next_seed"
  c.mistakes.rewind = arm == "erased"
  c.mistakes.hinted = 0.5 if arm == "hinted" else 0.0
  c.optimizer.update(learning_rate=1e-3, final_share=0.05, warmup_steps=200, weight_decay=0.01, b2=0.99)
  c.train.update(steps=steps, log_every=100, eval_every=1_000, checkpoint_every=1_000)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=2_500, num_probes=1_000, max_tokens=128, batch_size=250, max_size=12)
  c.evaluate.endpoints = ENDPOINTS
  c.evaluate.rivals = ("redraw", "trigger", "temperature", "beam", "state", "swapped", "linear_probe")
  c.mine.update(num_problems=48_000, samples=1, right=100.0 if arm == "rft" else 0.25)
  if arm in ("policy", "policy_clean", "distill"):
    # A round: 800 samples, and 20 steps of 4 rows, each of about four samples.
    c.rounds = 40
    c.policy.method = "distill" if arm == "distill" else "gradient"
    c.mine.update(num_problems=100, samples=8)
    c.optimizer.update(learning_rate=1e-4, final_share=0.5, warmup_steps=20, weight_decay=0.0)
    c.train.update(log_every=20, eval_every=200, checkpoint_every=200, curve_points=20)
  return c
