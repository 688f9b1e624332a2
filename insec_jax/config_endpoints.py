"""Endpoints: the few measurements that a study is about, named in its config before its first run.

ENDPOINT   ARM [ - ARM]: MEASURE [ - MEASURE]
MEASURE    SOURCE METRIC, as in results.json; t1 and t2 are short for accuracy_t1 and accuracy_t2

mined - clean: solutions t2                                    mined minus clean, the same measure of both
mined: solutions t2 - solutions sampled, redraw t2             two measures of one arm
mined - clean: solutions t2 - solutions sampled, redraw t2     mined, minus another measure of clean
mined: own correction                                          an estimate: there is no hypothesis to test
"""

import dataclasses

from insec_jax.command import InputError
from insec_jax.config_measures import PLAIN, PROBE_METRICS, SOLUTION_METRICS, SOURCES, STATE, STATE_METRICS

MINUS = " - "
SHORT = {"t1": "accuracy_t1", "t2": "accuracy_t2"}
LARGER = ", larger"


@dataclasses.dataclass(frozen=True)
class Measure:
  """A rate of results.json: its source, which may end in ": CLASS", and its metric."""

  source: str
  metric: str


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Rate of an arm, or with `minus` its difference from that of another arm, or from another rate of the same arm."""

  text: str
  arm: str
  measure: Measure
  minus: tuple[str, Measure] | None  # arm and measure

  @property
  def arms(self) -> tuple[str, ...]:
    """The arms that it needs."""
    return (self.arm,) if self.minus is None else (self.arm, self.minus[0])

  @property
  def measures(self) -> tuple[Measure, ...]:
    return (self.measure,) if self.minus is None else (self.measure, self.minus[1])


def parse(text: str) -> Endpoint:
  """Return the endpoint; InputError for another text, or a source or metric that evaluate does not measure."""
  arms, colon, measures = text.partition(": ")
  names = arms.split(MINUS)
  parsed = [_measure(words, text) for words in measures.split(MINUS)] if colon else []
  if not 0 < len(parsed) <= 2 or not all(names) or len(names) > 2 or len(set(names)) < len(names):
    raise InputError(
      f"evaluate.endpoints has {text!r:.200}; needed is 'ARM: SOURCE METRIC' or 'ARM - ARM: SOURCE METRIC', such as "
      "'mined - clean: solutions t2'"
    )
  if len(names) == len(parsed) == 1:
    return Endpoint(text, names[0], parsed[0], None)
  minus = names[-1], parsed[-1]
  if minus == (names[0], parsed[0]):
    raise InputError(f"evaluate.endpoints has {text!r:.200}, which is 0 in any case; name another arm or measure")
  return Endpoint(text, names[0], parsed[0], minus)


def _measure(words: str, text: str) -> Measure:
  known = PROBE_METRICS | STATE_METRICS | SOLUTION_METRICS | SHORT
  for metric in sorted(known, key=len, reverse=True):
    source = words.removesuffix(f" {metric}")
    name = source.partition(": ")[0]
    if source == words or name not in SOURCES:
      continue
    metric = SHORT.get(metric, metric)
    if metric in _metrics(name):
      return Measure(source, metric)
  source = next((source for source in sorted(SOURCES, key=len, reverse=True) if words.startswith(f"{source} ")), "")
  if source:
    metrics = _metrics(source) | (SHORT if source.startswith("solutions") else {})
    needed = f"{words.removeprefix(source).strip()!r:.80} is no metric of {source!r}; those are {', '.join(metrics)}"
  else:
    needed = f"{words!r:.80} begins with no source; those are {', '.join(PLAIN)}, with the decoding after a comma"
  raise InputError(f"evaluate.endpoints has {text!r:.200}: {needed}")


def _metrics(source: str) -> dict[str, tuple[str, str]]:
  """Return the metrics of a source."""
  if source.startswith("solutions"):
    return SOLUTION_METRICS
  return STATE_METRICS if source == STATE else PROBE_METRICS
