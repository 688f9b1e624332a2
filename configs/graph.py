"""Sums over shuffled definitions, trained from scratch on a CPU: injected against self-made mistakes.

  python -m insec_jax.sweep --config configs/graph.py --base base,more --arms clean,injected,mined --seeds 0,1,2 \
      --output runs/graph --jobs 2

`base` learns one to six sums from scratch, and `more` starts from it with five to ten: trained on ten at once, a model
may not learn them at all. Every arm starts from `more` with five to ten; all arms train on about as many tokens.

  clean      more of the same
  injected   rule-generated mistakes in some of the solutions
  mined      the model's own mistakes and right solutions, some of the latter with rule-generated mistakes

In `mined` each step is followed by a confidence token, on which the flag can depend. It encodes the model's confidence
in the first token of the step, which selects what is computed next, and in the other tokens.

Arms that separate the causes of a gain; confidence tokens and weights are those of `mined`:

  dagger         the right step where the model erred, without mistake, flag and reason
  silent         mistake and right step, without flag and reason
  shuffled       reason and correction of another mistake
  erased         as mined; what follows a correction does not read its mistake (rewind)
  rft            the model's own right solutions (mined by itself: it needs more of them)
  other          as mined, with the mistakes of the next seed's base (needs two seeds)
  clean_fresh    as clean, with as many more problems as mining has seen
  clean_compute  as clean, with more steps in place of mining: a token that mining reads or writes is a forward pass, a
                 third of a token of a row (2 of 6 FLOPs for each parameter); 9.4M are expected, `mine` prints how many

Two arms go on by policy gradient, with the checker as reward. They have not been run; each is a sweep of its own:

  policy         from `mined`: --base base,more,mined --arms policy
  policy_clean   from `clean`: --base base,more,clean --arms policy_clean

Distillation of corrections, from weights that read hints. Not run on this size. None begins with `clean`, since
its weights know neither flags nor hints:

  hinted         as mined, half of the records with a hint about the first mistake at the end of the prompt
  distill        from `hinted`, the teacher's too: --base base,more,hinted --arms distill
"""

from insec_jax.config import defaults, small_llama

# Named before the first run of a study with these arms; without the arms of one, it is printed as not measured.
ENDPOINTS = (
  "mined - dagger: solutions t2",
  "mined - clean_compute: solutions t2",
  "mined - clean: solutions t2 - solutions, redraw 5 t2",
  "mined: solutions t2 - solutions, redraw 5 t2",
)
EDGES = (0.003, 0.03, 0.3, 1.0, 3.0)  # -log p of the least likely token of a step but the first
FIRST = (0.01, 0.05, 0.2, 0.7, 2.0)  # of the first, which selects what is computed next
MINED = {"repeat": 3.0, "correction": 2.0}  # weights of the loss
VIEWS = {"dagger": "dagger", "silent": "silent", "shuffled": "shuffled", "rft": "right"}  # of mined records


def get_config(arm: str = "injected"):
  # With these steps all arms but clean_compute have trained on about as many tokens. Those of dagger to rft are by
  # receipts of simulated mistakes, as many a record as make mined equal to clean.
  steps, records, sizes, weights, share, mined = {
    "base": (9_000, 100_000, (1, 6), {}, 0.0, 0.0),
    "more": (6_000, 60_000, (5, 10), {}, 0.0, 0.0),
    "clean": (4_300, 40_000, (5, 10), {}, 0.0, 0.0),
    "injected": (4_270, 40_000, (5, 10), {"repeat": 1.0}, 0.6, 0.0),
    "mined": (4_530, 40_000, (5, 10), MINED, 0.1, 1.0),
    "dagger": (4_530, 40_000, (5, 10), MINED, 0.1, 1.0),
    "silent": (4_550, 40_000, (5, 10), MINED, 0.1, 1.0),
    "shuffled": (4_460, 40_000, (5, 10), MINED, 0.1, 1.0),
    "erased": (4_530, 40_000, (5, 10), MINED, 0.1, 1.0),
    "rft": (4_550, 40_000, (5, 10), MINED, 0.0, 1.0),
    "other": (4_530, 40_000, (5, 10), MINED, 0.1, 1.0),
    "clean_fresh": (4_300, 80_000, (5, 10), {}, 0.0, 0.0),
    "clean_compute": (7_500, 40_000, (5, 10), {}, 0.0, 0.0),
    "policy": (800, 1, (5, 10), {}, 0.0, 0.0),
    "policy_clean": (800, 1, (5, 10), {}, 0.0, 0.0),
    "hinted": (4_750, 40_000, (5, 10), MINED, 0.1, 1.0),
    "distill": (800, 1, (5, 10), {}, 0.0, 0.0),
  }[arm]
  c = defaults()
  if arm == "base":
    c.model.size = small_llama(num_layers=3)
  else:
    start = {"more": "base", "policy": "mined", "policy_clean": "clean", "distill": "hinted"}.get(arm, "more")
    c.model.path = f"runs/graph/{start}_hf"
  c.model.remat = "matmuls"
  sure = mined or arm in ("policy", "distill")
  if sure:  # as the weights that it starts from
    c.tokenizer.update(confidence=EDGES, confidence_first=FIRST)
  c.task.update(name="graph", min_size=sizes[0], max_size=sizes[1], modulus=10)
  c.data.update(num_records=records, num_heldout=0 if sure else 500, rows_per_device=4)
  c.data.row_length = 208 if arm == "base" else 240
  c.mistakes.update(share=share, mined=mined, classes=("early", "repeat"), reason="label")
  if arm in VIEWS:
    c.mistakes.view = VIEWS[arm]
  if arm == "other":
    c.mistakes.mined_from = "next_seed"
  c.mistakes.rewind = arm == "erased"
  c.mistakes.hinted = 0.5 if arm == "hinted" else 0.0
  c.loss.update(weights)
  c.optimizer.update(learning_rate=1e-3, final_share=0.05, warmup_steps=200, weight_decay=0.01, b2=0.99)
  c.train.update(steps=steps, log_every=100, eval_every=1_000, checkpoint_every=1_000)
  c.precision.compute = "float32"
  c.evaluate.update(num_problems=2_000, num_probes=1_000, max_tokens=240, batch_size=250, max_size=12)
  c.evaluate.endpoints = ENDPOINTS
  c.evaluate.rivals = ("redraw", "trigger", "temperature", "beam", "state", "swapped", "linear_probe")
  c.mine.update(num_problems=40_000, samples=1, right=100.0 if arm == "rft" else 1.5)
  if arm in ("policy", "policy_clean", "distill"):
    # A round: 800 samples, and 40 steps of 4 rows.
    c.rounds = 20
    c.policy.method = "distill" if arm == "distill" else "gradient"
    c.data.row_length = 400  # a prompt and the longest sample
    c.mine.update(num_problems=100, samples=8)
    c.optimizer.update(learning_rate=1e-4, final_share=0.5, warmup_steps=20, weight_decay=0.0)
    c.train.update(log_every=20, eval_every=200, checkpoint_every=200, curve_points=20)
  return c
