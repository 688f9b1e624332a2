"""The cost of a study, from estimates that are made up."""

import pathlib
from types import SimpleNamespace

import pytest

from insec_jax.command import InputError
from insec_jax.sizing import costs
from insec_jax.sizing.compiled import Memory
from insec_jax.sizing.hardware import CHIPS, Topology
from insec_jax.study import Study

CONFIG = """
from insec_jax.config import defaults, small_llama

def get_config(arm="clean"):
  c = defaults()
  if arm in ("base", "scratch"):
    c.model.size = small_llama(num_layers=3 if arm == "base" else 2)
  else:
    c.model.path = "elsewhere"
  c.task.update(name="sudoku", min_size=2, max_size=4)
  c.data.update(num_records=100, num_heldout=10, row_length=128)
  c.optimizer.warmup_steps = 2
  c.train.update(steps=10, log_every=5, eval_every=5, checkpoint_every=5)
  c.mistakes.update(share=0.5, mined=0.4 if arm == "mined" else 0.2 if arm == "rounds" else 0.0)
  c.rounds = 2 if arm == "rounds" else 0
  c.evaluate.update(num_problems=20, num_probes=10, max_tokens=32, votes=3)
  c.mine.update(num_problems=50, samples=4)
  return c
"""
CHIPS_HERE, HOSTS = 16, 4
STEP, TEXT = 36.0, 3.6  # seconds


def slice_of(chip="v5e") -> Topology:
  device = SimpleNamespace(device_kind="a chip")
  return Topology("v5e:4x4", "tpu", CHIPS.get(chip), (device,) * CHIPS_HERE, CHIPS_HERE, 1, 2)


def sized(folder: pathlib.Path, *, arms, bases=("base",), peak=1.0, topology=None, tokens=None, overrides=()):
  """(the costs of the stages, what was compiled: the program and the layers of its model)."""
  (folder / "config.py").write_text(CONFIG)
  compiled = []
  memory = Memory(held={}, peak=peak, limit=2.0, refused=False)

  def train(_, model):
    compiled.append(("train", model.num_layers))
    return SimpleNamespace(memory=memory, work=SimpleNamespace(step_seconds=STEP))

  def decode(_, model):
    compiled.append(("decode", model.num_layers))
    return SimpleNamespace(memory=memory, text_seconds=lambda tokens: TEXT * tokens / 32)

  stages = Study(folder, str(folder / "config.py"), dict(overrides), list(arms), [0, 1], list(bases)).stages()
  sizer = costs.Sizer(topology or slice_of(), HOSTS, train, decode, tokens)
  return sizer.costs(stages), compiled


def test_a_study_costs_its_steps_its_mining_and_its_evaluations(tmp_path):
  found, compiled = sized(tmp_path, arms=("clean", "mined", "rounds"))
  lines = {(line.arm, line.program): line for line in costs.lines_of(found)}
  texts = 2 * (3 * 10 + 6 * 20) + 3 * 20
  samples = 50 * 4 * TEXT / HOSTS
  assert {name: line.seconds for name, line in lines.items()} == {
    ("base", "train"): 2 * 10 * STEP,
    ("clean", "train"): 2 * 10 * STEP,
    ("clean", "evaluate"): pytest.approx(2 * texts * TEXT),
    ("mined", "mine"): pytest.approx(2 * samples),
    ("mined", "train"): 2 * 10 * STEP,
    ("mined", "evaluate"): pytest.approx(2 * texts * TEXT),
    ("rounds", "train"): pytest.approx(2 * (10 * STEP + 2 * samples)),
    ("rounds", "evaluate"): pytest.approx(2 * texts * TEXT),
  }
  assert all(line.runs == 2 for line in lines.values())
  assert compiled == [("train", 3), ("decode", 3)]  # the arms have the model of the base, and equal programs
  hours = sum(line.seconds for line in lines.values()) / 3600
  plain = costs.as_json(slice_of(), found, efficiency=1.0, price=None)
  assert (plain["hours"], plain["chip_hours"], plain["dollars"]) == (hours, CHIPS_HERE * hours, None)
  halved = costs.as_json(slice_of(), found, efficiency=0.5, price=1.2)
  assert halved["dollars"] == pytest.approx(2 * 1.2 * CHIPS_HERE * hours)


def test_the_points_of_a_learning_curve_cost_their_texts(tmp_path):
  plain, _ = sized(tmp_path, arms=("scratch",), bases=())
  found, _ = sized(tmp_path, arms=("scratch",), bases=(), overrides={"train.curve_points": 5})
  texts = 5 * 2 * 20
  assert found[0].seconds - plain[0].seconds == pytest.approx(texts * TEXT / HOSTS)
  assert found[0].note.endswith(", 200 texts of the learning curve")


def test_the_table_of_a_study_says_that_it_is_a_lower_bound_and_ends_in_the_sum(tmp_path):
  found, compiled = sized(tmp_path, arms=("scratch",), bases=(), tokens=16)
  assert compiled == [("train", 2), ("decode", 2)]
  bound = costs.table(slice_of(), found, efficiency=1.0, price=None)
  assert bound.startswith("v5e:4x4, 16 chips, at the roofline, a lower bound\n")
  text = costs.table(slice_of(), found, efficiency=0.5, price=2.0)
  assert text.startswith("v5e:4x4, 16 chips, at 50% of the roofline\n")
  assert "| scratch | train | 2 | 10 steps of 36 s | 0.4 | 6.4 | 12.80 |" in text
  evaluated = 2 * 360 * TEXT / 2 / 0.5 / 3600  # half of the tokens
  total = 0.4 + evaluated
  assert text.endswith(f"| all |  | 4 |  | {total:.3g} | {16 * total:.3g} | {32 * total:,.2f} |")


def test_a_study_that_cannot_run_on_the_slice_is_refused_in_one_line(tmp_path):
  with pytest.raises(InputError, match=r"^seed 0, base: train does not fit on v5e:4x4, by 1\.50 GiB a chip"):
    sized(tmp_path, arms=("clean",), peak=3.5)
  with pytest.raises(InputError, match="the speed of 'a chip' is not known"):
    sized(tmp_path, arms=("clean",), topology=slice_of(chip=None))
