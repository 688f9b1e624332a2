"""A profile has the steps that were asked for and no others."""

import jax
import jax.numpy as jnp
import pytest

from insec_jax.training.ledger import Ledger
from insec_jax.training.profiling import Profile


def profiled(folder):
  """The numbers of the steps in the trace."""
  (file,) = folder.rglob("*.xplane.pb")
  events = [
    event
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    for line in plane.lines
    for event in line.events
  ]
  return [dict(event.stats)["step_num"] for event in events if event.name == "train"]


@pytest.mark.parametrize(
  ("steps", "run", "traced"),
  [((2, 3), range(1, 6), [2, 3]), ((2, 9), range(1, 5), [2, 3, 4]), ((2, 6), range(5, 8), [5, 6])],
  ids=["whole", "stopped", "resumed"],
)
def test_the_trace_has_the_steps_asked_for_that_were_run(tmp_path, steps, run, traced):
  step = jax.jit(lambda x: x @ x)
  x, said = jnp.eye(4), []
  profile = Profile(steps, tmp_path, Ledger())
  for number in run:
    with profile.step(number, x):
      x = step(x)
    said.append(profile.after(number, x))
  profile.close()
  assert profiled(tmp_path) == traced
  ended = [number for number, line in zip(run, said, strict=True) if line]
  assert ended == [number for number in run if number == steps[1]]


def test_without_steps_nothing_is_written_or_waited_for(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "block_until_ready", lambda _: pytest.fail("waited"))
  profile = Profile((), tmp_path, Ledger())
  for number in range(3):
    with profile.step(number, None):
      pass
    assert not profile.after(number, None)
  profile.close()
  assert not any(tmp_path.iterdir())
