"""What was probed, as the numbers and transcripts of results.json and as a table to read."""

import collections
import math
from collections.abc import Iterator, Sequence

import numpy as np

from insec_jax.decoding.probing import Probed, Solved
from insec_jax.method import roles, scoring
from insec_jax.method.scoring import Outcome, Rate
from insec_jax.method.transcript import Transcript

FORCED = ("correction", "parroting", "recovery")  # also measured with the flag forced
COMPARED = ("detection", "detection_within", "correction", "correction, forced", "corrected", "parroting", "recovery")
MOST_SHOWN = 6  # transcripts of each kind


def results(injected: Probed, solved: dict[str, Solved], *, within: int) -> dict:
  """The measured part of results.json, as evaluate.py describes it.

  The keys of `solved` stand behind "own" and "solutions": "" for greedy, " sampled" for drawn ones.
  """
  sources = {"injected": injected, **{"own" + how: one.own for how, one in solved.items()}}
  rates = {}
  for source, probed in sources.items():
    rates |= source_rates(source, probed, within)
  for how, one in solved.items():
    rates["solutions" + how] = scoring.solution_rates(one.scores)
  return {
    "counts": counts(solved, sources),
    "rates": {source: {name: rate.to_json() if isinstance(rate, Rate) else rate for name, rate in some.items()}
              for source, some in rates.items()},
    "gap": gaps(rates, ["own" + how for how in solved]),
    "tokens_per_problem": {"solutions" + how: mean(one.num_tokens) for how, one in solved.items()},
    "solved": {"solutions" + how: {"t1": [int(score.right_first) for score in one.scores],
                                   "t2": [int(score.right) for score in one.scores]} for how, one in solved.items()},
    "transcripts": [*(shown for source, probed in sources.items() for shown in shown_probes(source, probed)),
                    *(shown for how, one in solved.items() for shown in shown_alarms(how, one))],
  }


def source_rates(source: str, probed: Probed, within: int) -> Iterator[tuple[str, dict]]:
  """(source, its rates), then ("source: CLASS", those of that class)."""
  yield source, _rates(probed.outcomes, probed.forced, probed, "", within)
  for error, outcomes in scoring.by_class(probed.outcomes).items():
    forced = [outcome for outcome in probed.forced if outcome.error == error]
    yield f"{source}: {error}", _rates(outcomes, forced, probed, error, within)


def _rates(outcomes: Sequence[Outcome], forced: Sequence[Outcome], probed: Probed, error: str, within: int) -> dict:
  of_forced = scoring.probe_rates(forced, within=within)
  rates = {**scoring.probe_rates(outcomes, within=within), **{f"{name}, forced": of_forced[name] for name in FORCED}}
  if probed.flag_scores is not None:
    rates["auroc"] = auroc([score for of, score in probed.flag_scores.wrong if error in ("", of)],
                           probed.flag_scores.right)
  return rates


def auroc(wrong: Sequence[float], right: Sequence[float]) -> dict[str, float | int | None]:
  """The share of pairs in which the wrong step has the higher score, as a rate is written."""
  n = len(wrong) * len(right)
  share = scoring.auroc(wrong, right)
  low, high = scoring.auroc_interval(wrong, right)
  return {"rate": share if n else None, "k": share * n if n else 0, "n": n, "low": low, "high": high}


def gaps(rates: dict[str, dict], sources: Sequence[str]) -> dict:
  """Injected minus each of `sources`, overall and for each class that both have; rates with n 0 have no gap."""
  found = {}
  for own in sources:
    for source in rates:
      name, colon, error = source.partition(": ")
      if name != own:
        continue
      injected = "injected" + colon + error
      if injected in rates:
        found[source] = {metric: newcombe(rates[injected][metric], rates[source][metric]) for metric in COMPARED
                         if rates[injected][metric].n and rates[source][metric].n}
  return found


def newcombe(first: Rate, second: Rate) -> dict[str, float]:
  """first - second and its 95 % interval (Newcombe 1998, method 10: from the two Wilson intervals)."""
  difference = first.share - second.share
  return {"difference": difference,
          "low": difference - math.hypot(first.share - first.low, second.high - second.share),
          "high": difference + math.hypot(first.high - first.share, second.share - second.low)}


def mean(values: Sequence[float]) -> dict[str, float | int | None]:
  """The mean, its 95 % interval (1.96 standard errors; None for fewer than two values) and n."""
  middle, n = float(np.mean(values)), len(values)
  half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
  low, high = (None, None) if half is None else (middle - half, middle + half)
  return {"mean": middle, "low": low, "high": high, "n": n}


def counts(solved: dict[str, Solved], sources: dict[str, Probed]) -> dict:
  """How many solutions and probes there were; a forced probe is missing where it left no room to go on."""
  return {"solutions": {"solutions" + how: len(one.scores) for how, one in solved.items()},
          "probes": {source: len(probed.outcomes) for source, probed in sources.items()},
          "forced": {source: len(probed.forced) for source, probed in sources.items()}}


def shown_probes(source: str, probed: Probed) -> Iterator[dict]:
  """Up to MOST_SHOWN probes that were corrected at once, then as many that were not, taking turns among the classes."""
  seen = collections.Counter()
  turns = []
  for index, outcome in enumerate(probed.outcomes):
    turns.append((seen[outcome.error], index))
    seen[outcome.error] += 1
  for corrected in (True, False):
    of_kind = [index for _, index in sorted(turns)
               if (probed.outcomes[index].flagged and probed.outcomes[index].fix_kind == "right") == corrected]
    for index in of_kind[:MOST_SHOWN]:
      outcome = probed.outcomes[index]
      yield shown(f"{source} mistake: {outcome.error}", in_words(outcome), probed.transcripts[index])


def shown_alarms(how: str, solved: Solved) -> Iterator[dict]:
  """Up to MOST_SHOWN solutions in which a right step was flagged."""
  alarms = [index for index, score in enumerate(solved.scores) if score.false_alarms]
  for index in alarms[:MOST_SHOWN]:
    score = solved.scores[index]
    what = "a right step flagged" + (" and changed to wrong" if score.harmful_edits else "")
    yield shown(f"solution{how}", f"{what}, answer {'right' if score.right else 'wrong'}", solved.transcripts[index])


def shown(title: str, outcome: str, transcript: Transcript) -> dict:
  return {"title": title, "outcome": outcome,
          "pieces": [{"role": roles.NAMES[piece.role], "text": piece.text} for piece in transcript]}


def in_words(outcome: Outcome) -> str:
  """What became of a probe, to be read above its transcript."""
  if outcome.delay is None:
    said = "not flagged"
  elif outcome.delay:
    said = f"flagged {outcome.delay} step{'s' if outcome.delay > 1 else ''} later"
  else:
    fix = {"right": "corrected", "lucky": "replaced by a step that is not wrong", "none": "not replaced",
           "wrong": "replaced by another wrong step"}[outcome.fix_kind]
    said = "flagged, " + ("the mistake repeated" if outcome.parroted else fix)
  return f"{said}, answer {'right' if outcome.recovered else 'wrong' if outcome.answered else 'missing'}"


def table(rates: dict[str, dict]) -> str:
  """The rates as text: a block for each kind of source, then one line for each class."""
  blocks = []
  for sources in (["injected", "own", "own sampled"], ["solutions", "solutions sampled"]):
    names = list(dict.fromkeys(name for source in sources for name in rates[source]))
    rows = [("", *sources)] + [(name, *(cell(rates[source][name]) for source in sources)) for name in names]
    blocks.append(aligned(rows))
  by_class = [source for source in rates if ": " in source]
  shown = ("detection", "correction", "correction, forced", "recovery")
  rows = [(source, *(cell(rates[source][name]) for name in shown)) for source in by_class]
  blocks.append(aligned([("", *shown), *rows]))
  return "\n\n".join(blocks)


def cell(rate: dict) -> str:
  if not rate["n"]:
    return "-"
  return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] n={rate['n']}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
  return "\n".join(line.rstrip() for line in lines)
