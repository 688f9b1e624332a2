"""Learning curves of arms over seeds, from the lines of metrics."""

import pytest

from insec_jax.evaluation import statistics
from insec_jax.pages import learning
from insec_jax.pages.runs import Arm, Run


def run(seed, *rates):
  """A run with a point at every tenth step."""
  lines = [{"step": 5, "loss": 1.0}]
  for number, rate in enumerate(rates, 1):
    point = {"curve/accuracy": rate, "curve/accuracy_banned": rate / 2, "curve/problems": 20}
    lines.append({"step": 10 * number, "trained_tokens": (1000 + 20 * seed) * number, **point})
  return Run(f"seed{seed}", None, {"seed": seed}, {}, lines, {}, (), {})


def test_a_point_is_the_mean_over_seeds_at_their_mean_tokens_with_its_interval():
  runs = [run(0, 0.5, 0.8), run(1, 0.6, 0.9), run(2, 0.4)]
  first, second = learning.points(runs, "curve/accuracy")
  assert (first["step"], first["trained_tokens"], first["seeds"]) == (10, 1020, [0.5, 0.6, 0.4])
  assert first["rate"] == pytest.approx(0.5)
  assert (first["low"], first["high"]) == pytest.approx(statistics.t_interval([0.5, 0.6, 0.4]))
  assert (second["trained_tokens"], second["seeds"], second["n"]) == (2020, [0.8, 0.9, None], 40)


def test_the_file_of_a_study_has_the_arms_with_points_only():
  found = learning.as_json({"clean": [run(0, 0.5)], "base": [run(0)]})
  assert list(found) == ["clean"]
  assert [point["rate"] for point in found["clean"]["curve/accuracy_banned"]] == [0.25]


def test_the_page_has_a_chart_for_each_decoding_with_a_bar_for_each_interval():
  arms = [Arm("clean", (run(0, 0.5, 0.8), run(1, 0.6, 0.9))), Arm("base", (run(0),)), Arm("mined", (run(0, 0.2, 0.3),))]
  parts = learning.curves(arms)
  charts = [svg for part in parts for svg in part.iter("svg") if svg.get("aria-label")]
  assert [svg.get("aria-label").rpartition("greedy, ")[2] for svg in charts] == ["flags unconstrained", "flags banned"]
  for svg in charts:
    bars = [line for line in svg.iter("line") if line.get("stroke-opacity")]
    assert len(bars) == 4
    assert all(float(line.get("y1")) > float(line.get("y2")) for line in bars)  # y of an SVG grows downwards
  assert "on 20 held-out problems" in parts[1].text
  assert learning.curves([arms[1]]) == []
