"""Transcripts: a text as pieces that each have one role; rendered, parsed back, and read clean."""

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from insec_jax.command import InputError
from insec_jax.method.roles import CORRECTION, FLAG, MISTAKE, REASON, TEXT

ABBREVIATIONS = ("Mr", "Mrs", "Ms", "Dr", "St", "Sr", "Jr", "vs", "No", "e.g", "i.e", "etc")
_NOT_ABBREVIATED = "".join(rf"(?<!\b{re.escape(word)})" for word in ABBREVIATIONS)
_BREAK = {
  # Only "\n" ends a line: str.splitlines would also cut at form feeds and at U+2028.
  "line": re.compile(r"\n+"),
  # From the first mark of a run, and possessive: a run of marks is read once, not once from each of them.
  "sentence": re.compile(rf"\n\s*|(?<![.!?])(?:{_NOT_ABBREVIATED}\.|\.(?=[.!?])|[!?])[.!?]*+[\"'”’)\]]*+(?:\s+|\Z)"),
  "paragraph": re.compile(r"\n[ \t]*\n\s*"),
}


@dataclass(frozen=True, slots=True)
class Piece:
  """A stretch of text and its role; `weight`, if given, is the weight of each token and overrides the role's."""

  role: int
  text: str
  weight: float | None = None


Transcript = tuple[Piece, ...]


@dataclass(frozen=True)
class Markers:
  """Texts of the two markers: `flag` marks the step before it as wrong, `fix` opens the correction."""

  flag: str
  fix: str


def render(transcript: Transcript) -> str:
  """Return the whole text, as the model reads it."""
  return "".join(piece.text for piece in transcript)


def clean(transcript: Transcript) -> str:
  """Return the text for the end user: without its mistakes, flags and reasons."""
  return "".join(piece.text for piece in transcript if piece.role not in (MISTAKE, FLAG, REASON))


def mistake_pieces(markers: Markers, *, wrong: str, reason: str, right: str) -> Transcript:
  """Return a mistake with its correction.

  text   c=5\\n    <flag> calc c  <fix>  c=7\\n
  role   mistake  flag   reason  flag   correction      no reason piece when `reason` is empty
  """
  reasons = (Piece(REASON, reason),) if reason else ()
  return (
    Piece(MISTAKE, wrong),
    Piece(FLAG, markers.flag),
    *reasons,
    Piece(FLAG, markers.fix),
    Piece(CORRECTION, right),
  )


def check_marks(transcript: Transcript, markers: Markers) -> None:
  """Raise InputError unless each mistake is flagged, and each flag has a correction that differs from the mistake.

      text   c=5\n    <flag> calc c  <fix>  c=6\n    <flag> <fix>  c=7\n      a correction that is wrong as well is
      role   mistake  flag   reason  flag   mistake  flag   flag   correction   a mistake; a reason may be left out

  A failed correction may repeat a mistake. Neighbouring pieces of one role, other than flags, count as one. White space
  at the end is not compared.
  """
  runs = []
  for role, run in itertools.groupby(transcript, key=lambda piece: piece.role):
    texts = [piece.text for piece in run]
    runs += [(role, text.strip()) for text in texts] if role == FLAG else [(role, "".join(texts).rstrip())]
  # A flag piece that is no marker is "?"; tokenisation raises for it by name.
  flags = {(FLAG, markers.flag): "F", (FLAG, markers.fix): "X"}
  letters = "".join(flags[run] if run in flags else "ptm?rc"[run[0]] for run in runs)
  for pattern, seen, needed in (
    ("m(?![F?])", "the mistake {!r:.60} is not flagged", f"put a flag piece {markers.flag!r} right after it"),
    ("F(?!r?[X?])", "the flag {!r} is not closed", f"put a flag piece {markers.fix!r} after it, or after its reason"),
    (
      r"(?<!F)(?<!Fr)(?<!\?)(?<!\?r)X",
      "the fix {!r} closes no flag",
      f"put a flag piece {markers.flag!r} before it, or before its reason",
    ),
    ("X(?![mc?])", "after the fix {!r} there is no correction", "put a piece of role correction right after it"),
  ):
    if match := re.search(pattern, letters):
      raise InputError(f"{seen.format(runs[match.start()][1])}; {needed}")
  for match in re.finditer("m(?:Fr?X[mc])+", letters):
    steps = [text for (_, text), kind in zip(runs[match.start() : match.end()], match[0], strict=True) if kind in "mc"]
    if match[0].endswith("c") and steps[-1] in steps[:-1]:
      raise InputError(f"the correction {steps[-1]!r:.60} is the mistake again; correct it, or take the mistake out")


def split_steps(text: str, unit: str) -> tuple[str, ...]:
  """Return the steps of `text`, each with the white space that follows it; their concatenation is `text`.

  line        He has 5. She has 7.\\n | Both have 12.\\n
  sentence    He has 5. | She has 7.\\n | Both have 12.\\n    a line ends one too, "Mr. Lee" and "0.5" do not
  paragraph   ends at a blank line
  """
  if unit not in _BREAK:
    raise InputError(f"unit {unit!r} of a step; must be one of {', '.join(_BREAK)}")
  ends, seen = [0], 0  # from the last end to `seen` there is only white space
  for match in _BREAK[unit].finditer(text):
    # White space at the very beginning is no step of its own.
    if text[seen : match.end()].strip():
      ends.append(match.end())
    seen = match.end()
  if ends[-1] < len(text):
    if text[ends[-1] :].strip() or len(ends) == 1:
      ends.append(len(text))
    else:
      ends[-1] = len(text)
  return tuple(text[start:end] for start, end in itertools.pairwise(ends))


def with_confidence(pieces: Transcript, names: Iterable[str]) -> Transcript:
  """Return the pieces with a confidence token after each line, in order, mistakes included.

      text   a=4\n  <|sure_0|>  b=9\n    <|sure_2|>  <flag>  reason  <fix>  b=7\n       <|sure_0|>
      role   text   flag        mistake  flag        flag    reason  flag   correction  flag

  A piece without an end of line gets none, as in generation.
  """
  names = iter(names)
  with_names = []
  for piece in pieces:
    if piece.role in (TEXT, MISTAKE, CORRECTION):
      for step in split_steps(piece.text, "line"):
        with_names.append(Piece(piece.role, step, piece.weight))
        if step.endswith("\n"):
          with_names.append(Piece(FLAG, next(names), 0.0))
    else:
      with_names.append(piece)
  return tuple(with_names)


@functools.lru_cache(maxsize=16)
def _marker_pattern(markers: Markers) -> re.Pattern:
  return re.compile(f"({re.escape(markers.flag)}|{re.escape(markers.fix)})")


def parse(text: str, markers: Markers, unit: str) -> Transcript:
  """Return the pieces of a generated `text` (no prompt in it); `render` inverts it exactly.

      text   a=4\\n b=9\\n    <flag> calc b  <fix>  b=7\\n      c=1\\n
      role   text  mistake  flag   reason  flag   correction text

  The step right before a flag is the mistake, even when it was itself a correction; the step right after a fix is the
  correction. Text after a flag that no fix closes is taken as a reason. A flag with no step before it,
  or a fix without a flag, stays a flag piece; `clean_text` shows all of these.
  """
  parts = _marker_pattern(markers).split(text)
  pieces = []
  for k in range(0, len(parts), 2):
    opened = parts[k - 1] if k else ""
    closing = parts[k + 1] if k + 1 < len(parts) else ""
    if opened == markers.flag and closing != markers.flag:
      pieces.append(Piece(REASON, parts[k]))
    else:
      steps = split_steps(parts[k], unit)
      roles = [REASON if opened == markers.flag else TEXT] * len(steps)
      if steps and opened == markers.fix:
        roles[0] = CORRECTION
      if steps and closing == markers.flag:
        roles[-1] = MISTAKE
      pieces += map(Piece, roles, steps)
    pieces.append(Piece(FLAG, closing))
  return _join_pieces(pieces)


def _join_pieces(pieces: list[Piece]) -> Transcript:
  """Return the pieces without empty ones; neighbouring text pieces become one."""
  joined: list[Piece] = []
  for is_text, run in itertools.groupby(filter(lambda piece: piece.text, pieces), key=lambda piece: piece.role == TEXT):
    same = tuple(run)
    joined += [Piece(TEXT, "".join(piece.text for piece in same))] if is_text else same
  return tuple(joined)


def clean_text(text: str, markers: Markers, unit: str) -> str:
  """Return a generated `text` as shown to the end user.

  Only a mistake with a complete correction (flag, optional reason, fix, a step) is removed. An unfinished or malformed
  correction stays as generated, markers included: dropping it would hide that the model failed.
  """
  pieces = parse(text, markers, unit)
  letter = {markers.flag: "F", markers.fix: "X"}
  letters = "".join(letter[piece.text] if piece.role == FLAG else "ptmfrc"[piece.role] for piece in pieces)
  dropped = {k for match in re.finditer("(?:mFr?X)+(?=c)", letters) for k in range(*match.span())}
  return "".join(piece.text for k, piece in enumerate(pieces) if k not in dropped)
