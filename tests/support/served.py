"""A server of OpenAI's completions on loopback, as vLLM answers them, from any model that is a function of tokens.

It misbehaves on demand: `faults` is called with the number of the request and its body (None for the list of models),
and returns the name of a fault, or None for an answer.
"""

import contextlib
import http.server
import json
import threading
import time

import numpy as np

STATUS = {"401": 401, "404": 404, "400": 400, "302": 302, "429": 429, "500": 500}


class Served(http.server.ThreadingHTTPServer):
  """`logprobs_after(token_T)` are the log p [T, V] of every next token; texts are encoded by `tokenizer`."""

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, logprobs_after, tokenizer=None, *, names=("toy",), max_len=256, faults=lambda *_: None):
    super().__init__(("127.0.0.1", 0), Handler)
    self.logprobs_after, self.tokenizer, self.names, self.max_len = logprobs_after, tokenizer, names, max_len
    self.faults, self.retry_after = faults, None
    self.gives_ids = self.scores = self.biases = self.raw = self.unchanged = True
    self.bodies, self.keys, self.num_requests, self.in_flight, self.most_in_flight = [], [], 0, 0, 0
    self.lock = threading.Lock()

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, *_) -> None:
    """Say nothing of connections that the client closes."""

  def complete(self, body: dict) -> dict:
    """The answer to a request."""
    given = body["prompt"]
    prompt = self.tokenizer(given, add_special_tokens=False)["input_ids"] if isinstance(given, str) else list(given)
    if not self.unchanged and not isinstance(given, str):
      prompt.insert(0, self.tokenizer.eos_token_id)
    rng = np.random.default_rng(body.get("seed"))
    tokens, own, others = [], [], []
    finish = "length"
    while len(tokens) < body["max_tokens"] and finish == "length":
      raw_V = np.array(self.logprobs_after(np.array([*prompt, *tokens]))[-1], np.float64)
      biased_V = raw_V.copy()
      for token, bias in (body.get("logit_bias") or {}).items() if self.biases else ():
        biased_V[int(token)] += bias
      tokens.append(draw(biased_V, body["temperature"], body["top_p"], rng))
      said_V = raw_V if self.raw else biased_V - np.logaddexp.reduce(biased_V)
      own.append(said_V[tokens[-1]])
      named = body.get("logprob_token_ids") if self.scores else None
      shown = {*(np.argsort(-said_V)[: body["logprobs"]].tolist() if named is None else named), tokens[-1]}
      others.append({f"token_id:{token}": said_V[token] for token in shown})
      if tokens[-1] in body.get("stop_token_ids", ()):
        finish = "stop"
    choice = {
      "index": 0,
      "text": "",
      "finish_reason": finish,
      "logprobs": {"token_logprobs": own, "top_logprobs": others, "tokens": []},
    }
    if self.gives_ids:
      choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
    if (num := body.get("prompt_logprobs")) is not None and self.scores:
      logprob_TV = np.array(self.logprobs_after(np.array(prompt)), np.float64)
      choice["prompt_logprobs"] = [None] + [
        {
          str(token): {"logprob": logprob_V[token], "rank": 1, "decoded_token": ""}
          for token in {*np.argsort(-logprob_V)[:num].tolist(), after}
        }
        for logprob_V, after in zip(logprob_TV, prompt[1:], strict=False)
      ]
    return {"object": "text_completion", "model": body["model"], "choices": [choice]}


def draw(logprob_V, temperature, top_p, rng) -> int:
  """A token of the distribution at a temperature, cut to the likeliest that hold top_p of it."""
  if temperature == 0:
    return int(np.argmax(logprob_V))
  p_V = np.exp((logprob_V - logprob_V.max()) / temperature)
  p_V /= p_V.sum()
  order_V = np.argsort(-p_V)
  kept_V = np.cumsum(p_V[order_V]) - p_V[order_V] < top_p
  return int(rng.choice(order_V[kept_V], p=p_V[order_V[kept_V]] / p_V[order_V[kept_V]].sum()))


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True

  def log_message(self, *_) -> None:
    pass

  def do_GET(self) -> None:
    models = [{"id": name, "object": "model", "max_model_len": self.server.max_len} for name in self.server.names]
    self.answer(None, lambda: {"object": "list", "data": models})

  def do_POST(self) -> None:
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.bodies.append(body)
    self.answer(body, lambda: self.server.complete(body))

  def answer(self, body, make) -> None:
    server = self.server
    with server.lock:
      number, server.num_requests = server.num_requests, server.num_requests + 1
      server.in_flight += 1
      server.most_in_flight = max(server.most_in_flight, server.in_flight)
      server.keys.append(self.headers.get("Authorization"))
    try:
      fault = server.faults(number, body)
      if fault == "lost":
        self.close_connection = True
        return
      if fault == "slow":
        time.sleep(1.0)
      if fault in STATUS:
        said = f"no, said to {self.headers.get('Authorization')}"
        return self.send(STATUS[fault], json.dumps({"error": {"message": said}}).encode())
      text = json.dumps(make() if fault != "fewer" else {"choices": []}).encode()
      if fault == "no json":
        text = text[: len(text) // 2]
      self.send(200, text, cut=fault == "cut")
    finally:
      with server.lock:
        server.in_flight -= 1

  def send(self, status: int, text: bytes, *, cut: bool = False) -> None:
    with contextlib.suppress(OSError):  # the client may have gone
      self.send_response(status)
      self.send_header("Content-Length", str(len(text)))
      if self.server.retry_after is not None:
        self.send_header("Retry-After", self.server.retry_after)
      self.end_headers()
      self.wfile.write(text[: len(text) // 2] if cut else text)
    if cut:
      self.close_connection = True


@contextlib.contextmanager
def serving(*arguments, **options):
  """A `Served` that answers inside the block."""
  server = Served(*arguments, **options)
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def first(num: int, *faults: str):
  """Faults of the first `num` requests, one after another in turn."""
  return lambda number, _: faults[number % len(faults)] if number < num else None


def table_of(vocab_size: int, *, stop: int):
  """A model whose next token depends on the last one and on how many there are; a text ends after a while."""
  logit_VV = np.random.default_rng(5).normal(size=(vocab_size, vocab_size)) * 2

  def logprobs_after(token_T):
    logit_TV = logit_VV[token_T].copy()
    logit_TV[np.arange(len(token_T)) > 24, stop] += 4.0
    return logit_TV - np.logaddexp.reduce(logit_TV, -1, keepdims=True)

  return logprobs_after
