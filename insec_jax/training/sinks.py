"""Places beside metrics.jsonl where a run can be watched (log.to): TensorBoard, Weights & Biases, Trackio.

metrics.jsonl has every number. A place shows its lines, the mask receipts, and what `publish` sends: the table of
evaluate, the page of report. DIR/log.json has the id of the run in each service, so that a resumed run continues its
own. The packages are imported where they are used: they are extras, and slow.
"""

import contextlib
import errno
import html
import importlib.util
import json
import os
import pathlib
import re
import sys
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from insec_jax.command import InputError, one_line
from insec_jax.config import Config, LogConfig
from insec_jax.config_build import from_json
from insec_jax.files import buckets
from insec_jax.files.reading import read_json, read_text
from insec_jax.files.writing import write_text

IDS = "log.json"  # of a workdir: {service: {"project", "id"}}
NONE_SENT = -1  # before step 0


class LostServiceError(OSError):
  """Error: a service does not answer; the message is one line."""

  def __init__(self, line: str):
    super().__init__(errno.EHOSTUNREACH, line)


class Sink(Protocol):
  """Place that shows a run; it already has the lines up to step `sent`."""

  sent: int

  def write(self, step: int, values: dict[str, float]) -> None:
    """Show the values of a line of metrics."""

  def text(self, name: str, text: str, step: int) -> None:
    """Show a text in a fixed-width font."""

  def flush(self) -> None:
    """Write what has been shown into the files of the workdir, if the place has some there."""

  def close(self) -> None:
    """Wait until everything is written or sent."""


class TensorBoard:
  """Event files of TensorBoard in a folder; later steps than `last`, of a run that was killed, are hidden."""

  def __init__(self, folder: pathlib.Path, last: int):
    import tensorboardX

    self.sent = NONE_SENT
    self._board = tensorboardX.SummaryWriter(str(folder), purge_step=last + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    for key, value in values.items():
      self._board.add_scalar(key, value, step)

  def text(self, name: str, text: str, step: int) -> None:
    self._board.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)  # as code in Markdown

  def flush(self) -> None:
    self._board.flush()

  def close(self) -> None:
    self._board.close()


class Wandb:
  """Run of Weights & Biases; its environment variables count (WANDB_MODE=offline, WANDB_ENTITY, WANDB_API_KEY)."""

  def __init__(self, workdir: pathlib.Path, project: str, run: str, config: dict[str, Any]):
    import wandb

    self.sent = NONE_SENT
    self._html = wandb.Html
    settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
    try:
      self._run = wandb.init(
        project=project, id=run, name=run, config=config, dir=workdir, resume="allow", settings=settings
      )
    except wandb.errors.UsageError as error:
      raise InputError(f"log.to has wandb: {_one_line(error)}; or set WANDB_MODE=offline") from None
    except wandb.errors.Error as error:
      raise LostServiceError(f"log.to has wandb: {_one_line(error)}; run the same command to go on") from None
    # A resumed run repeats steps, which wandb's own counter refuses.
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, values: dict[str, float]) -> None:
    self._run.log({**values, "step": step})

  def text(self, name: str, text: str, step: int) -> None:
    self.page(name, f"<pre>{html.escape(text)}</pre>", step)

  def page(self, name: str, page: str, step: int) -> None:
    """Show an HTML page."""
    self._run.log({name: self._html(page, inject=False), "step": step})

  def flush(self) -> None: ...

  def close(self) -> None:
    self._run.finish()


class Trackio:
  """Run of Trackio, in its folder (TRACKIO_DIR) or the server or Space that its environment variables name."""

  def __init__(self, workdir: pathlib.Path, project: str, run: str, config: dict[str, Any]):
    del workdir
    import trackio

    self.sent = NONE_SENT
    self._markdown, self._html, self._finish = trackio.Markdown, trackio.Html, trackio.finish
    with contextlib.redirect_stdout(sys.stderr):
      self._run = trackio.init(project=project, name=run, config=config, resume="allow", embed=False)

  def write(self, step: int, values: dict[str, float]) -> None:
    self._run.log(values, step=step)

  def text(self, name: str, text: str, step: int) -> None:
    self._run.log({name: self._markdown(f"```\n{text}\n```")}, step=step)

  def page(self, name: str, page: str, step: int) -> None:
    """Show an HTML page."""
    self._run.log({name: self._html(page, inject=False)}, step=step)

  def flush(self) -> None: ...

  def close(self) -> None:
    with contextlib.redirect_stdout(sys.stderr):
      self._finish()  # of trackio, not of the run: that one would be finished again at the end of the process


SERVICES = {"wandb": Wandb, "trackio": Trackio}  # each is an extra of this package with the same name


def _import(name: str) -> None:
  importlib.import_module(name)


def check(log: LogConfig) -> None:
  """Raise InputError unless each service of log.to is installed and can be used; call it before a file is written."""
  for name in services(log):
    if importlib.util.find_spec(name) is None:
      raise InputError(f"log.to has {name}, which is not installed; pip install 'insec_jax[{name}]', or leave it out")
    try:
      _import(name)
    except Exception as error:  # a damaged or unfit installation raises anything
      raise InputError(
        f"log.to has {name}, which cannot be imported ({one_line(error):.200}); install it again, or leave it out"
      ) from None
  if "wandb" in log.to and os.environ.get("WANDB_MODE", "online") == "online":
    import wandb

    if not wandb.api.api_key:
      raise InputError(
        "log.to has wandb, and it has no API key; run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, or leave "
        "it out"
      )


def services(log: LogConfig) -> list[str]:
  """Return the names in log.to that are services: their runs have an id."""
  return [name for name in log.to if name in SERVICES]


def open_sinks(config: Config, workdir: pathlib.Path, *, last: int, sent: int) -> Iterator[Sink]:
  """Yield the places of a run that continues after step `last` (NONE_SENT: a new run) with its lines up to there.

  `sent` is the step of the last line that an earlier process wrote. The receipt is shown where the run is new.
  """
  for name in config.log.to:
    if name in SERVICES:
      yield _open_service(name, config, workdir, sent=sent)
    else:
      board = TensorBoard(workdir / "tb", last)
      if last == NONE_SENT:
        board.text("receipt", read_text(workdir / "receipt.txt", "the receipt of a run"), 0)
      yield board


def publish(workdir: pathlib.Path, name: str, *, text: str = "", page: str = "") -> None:
  """Show a text or an HTML page in the services of a run, as its config says; nothing for TensorBoard.

  A service that cannot be used here is named on stderr: the run may be of another machine. Raises LostServiceError.
  """
  config = from_json(read_text(workdir / "config.json", "the config of a run"))
  try:
    check(config.log)
  except InputError as error:
    print(f"{name} of {workdir} is not sent: {error}", file=sys.stderr, flush=True)
    return
  for service in services(config.log):
    lines = list(_lines(workdir))
    sent = lines[-1]["step"] if lines else NONE_SENT
    sink = _open_service(service, config, workdir, sent=sent)
    with contextlib.closing(sink):
      if text:
        sink.text(name, text, max(sent, 0))
      if page:
        sink.page(name, page, max(sent, 0))
    print(f"{name} of {workdir} is in {service}", file=sys.stderr, flush=True)


def _open_service(name: str, config: Config, workdir: pathlib.Path, *, sent: int) -> Wandb | Trackio:
  """Return the run of this workdir in a service; a new one gets the lines of metrics and the receipt."""
  path = workdir / IDS
  ids = read_json(path, "the ids of a run in services") if path.exists() else {}
  is_new = name not in ids
  if is_new:
    run = f"{re.sub('[^A-Za-z0-9_.-]', '_', workdir.resolve().name)[:60]}-{uuid.uuid4().hex[:8]}"
    ids[name] = {"project": config.log.project, "id": run}
  sink = SERVICES[name](workdir, ids[name]["project"], ids[name]["id"], json.loads(config.to_json()))
  sink.sent = sent
  if is_new:
    write_text(path, json.dumps(ids, indent=2) + "\n")
    buckets.publish(path)
    sink.text("receipt", read_text(workdir / "receipt.txt", "the receipt of a run"), 0)
    for line in _lines(workdir):
      sink.write(line.pop("step"), line)
    sink.sent = NONE_SENT
  return sink


def _lines(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
  path = workdir / "metrics.jsonl"
  if path.exists():
    yield from map(json.loads, read_text(path, "the metrics of a run").split("\n")[:-1])


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]
