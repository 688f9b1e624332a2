"""Policy gradient, sampling: texts of the current weights, rewarded by the task's checker, and their advantages.

A round samples mine.samples texts of each of mine.num_problems problems, with flags as the model writes them. The
samples of a problem are a group. A group whose rewards are all equal says nothing and is left out, as in DAPO
(arXiv 2503.14476).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from insec_jax.command import InputError
from insec_jax.config import Config, PolicyConfig
from insec_jax.data.problems import problems_to_mine
from insec_jax.evaluation.scoring import score_solution
from insec_jax.evaluation.tables import aligned
from insec_jax.files.writing import written_whole
from insec_jax.generation.generator import Completion, TextGenerator
from insec_jax.method.tasks import Problem, Task
from insec_jax.method.transcript import Markers, clean_text, split_steps
from insec_jax.mining import miner
from insec_jax.training.layout import MINING, flat, is_free


def advantages(reward_G: Sequence[float], *, scaled: bool) -> np.ndarray:
  """Return reward minus mean of a group, divided by its standard deviation if `scaled`; zeros for equal rewards.

  This is equation 3 of arXiv 2402.03300 with outcome rewards; `scaled` False is that of Dr. GRPO, arXiv 2503.20783.
  """
  reward_G = np.asarray(reward_G, np.float64)
  if np.ptp(reward_G) == 0:  # the mean of equal numbers may differ from them in the last bit
    return np.zeros_like(reward_G)
  centred_G = reward_G - reward_G.mean()
  return centred_G / reward_G.std() if scaled else centred_G


def reward_of(
  problem: Problem, written: Completion, task: Task, markers: Markers, unit: str, policy: PolicyConfig
) -> tuple[float, bool, int]:
  """Return the reward of a text, whether its answer is right, and how many flags it has.

  A text that the model did not end has no right answer.
  """
  text, num_flags = written.text, written.text.count(markers.flag)
  score = score_solution(problem, text, finished=written.finished, task=task, markers=markers, unit=unit)
  is_right = written.finished and score.right
  earned = float(is_right)
  if policy.reward == "steps" and written.finished and not is_right:
    steps = split_steps(clean_text(text, markers, unit), unit)
    earned = min(_num_right(problem, steps, task) / len(problem.steps), 1.0)
  return earned - policy.flag_price * num_flags, is_right, num_flags


def _num_right(problem: Problem, steps: tuple[str, ...], task: Task) -> int:
  """Return the number of right steps before the first wrong one."""
  num = 0
  for place, step in enumerate(steps):
    kind = task.check(problem, steps[:place], step).kind
    if kind == "wrong":
      break
    num += kind == "right"
  return num


class Sampling:
  """Texts of a model for the problems of a round, chunk by chunk; `header` is all that they depend on.

  `weights` is the model's `fingerprint`. Raises InputError where a text may not fit in a row.
  """

  def __init__(self, writer: TextGenerator, task: Task, config: Config, *, seed: int, weights: str):
    self._writer, self._config, self._seed = writer, config, seed
    self.problems = problems_to_mine(task, config, seed=seed)
    self.prompts = [writer.encode(problem.prompt) for problem in self.problems]
    longest = max(map(len, self.prompts)) + config.evaluate.max_tokens
    if longest > config.data.row_length:
      raise InputError(
        f"a prompt and evaluate.max_tokens={config.evaluate.max_tokens} sampled tokens are {longest} tokens, and "
        f"data.row_length={config.data.row_length}; raise it, or lower evaluate.max_tokens"
      )
    batch = config.evaluate.batch_size
    self._per_chunk = max(1, math.ceil(miner.SAMPLES_PER_CHUNK / batch) * batch // config.mine.samples)
    self.num_chunks = math.ceil(len(self.problems) / self._per_chunk)
    prompts = "\0".join(problem.prompt for problem in self.problems)
    self.header = {
      "the weights": weights,
      "the problems": hashlib.sha256(prompts.encode()).hexdigest()[:16],
      "the seed of this sampling": seed,
      "problems a chunk": self._per_chunk,
      **{key: value for key, value in flat(config).items() if not is_free(key, MINING)},
    }

  def write(self, number: int, *, flag_bias: float = 0.0) -> tuple[range, list[Completion]]:
    """Return the problems of a chunk, by number, and the texts: mine.samples of the first, then of the next."""
    first, config = number * self._per_chunk, self._config
    chosen = range(first, min(first + self._per_chunk, len(self.problems)))
    return chosen, self._writer.write(
      [self.prompts[index] for index in chosen for _ in range(config.mine.samples)],
      label=f"sampling, {number + 1} of {self.num_chunks}",
      max_tokens=config.evaluate.max_tokens,
      batch_size=config.evaluate.batch_size,
      temperature=config.policy.temperature,
      seed=miner.derive_seed(self._seed, number),
      flag_bias=flag_bias,
    )


class PolicySampler:
  """A model, a task and problems; samples and rewards chunk by chunk. `weights` is the model's `fingerprint`."""

  def __init__(self, writer: TextGenerator, task: Task, config: Config, *, seed: int, weights: str):
    self._task, self._config = task, config
    self._markers = Markers(config.tokenizer.flag, config.tokenizer.fix)
    self._sampling = Sampling(writer, task, config, seed=seed, weights=weights)
    self.num_chunks, self.header = self._sampling.num_chunks, self._sampling.header

  def chunk(self, number: int) -> dict[str, Any]:
    """Return the result of one chunk, as JSON: its counts, and the samples of groups whose rewards differ."""
    config, num, problems = self._config, self._config.mine.samples, self._sampling.problems
    chosen, written = self._sampling.write(number)
    counts = dict.fromkeys((field.name for field in dataclasses.fields(PolicySummary)), 0) | {"reward": 0.0}
    samples = []
    for place, index in enumerate(chosen):
      group = written[place * num : (place + 1) * num]
      scored = [self._reward(problems[index], text) for text in group]
      rewards = [reward for reward, _, _ in scored]
      counts["problems"] += 1
      counts["samples"] += num
      counts["tokens"] += sum(len(text.generation.tokens) for text in group)
      counts["unfinished"] += sum(not text.finished for text in group)
      counts["right"] += sum(is_right for _, is_right, _ in scored)
      counts["flags"] += sum(flags for _, _, flags in scored)
      counts["reward"] += math.fsum(rewards)
      advantage_G = advantages(rewards, scaled=config.policy.scaled)
      counts["groups"] += bool(advantage_G.any())
      samples += [
        {
          "problem": index,
          "reward": reward,
          "flags": flags,
          "advantage": float(advantage),
          "prompt": problems[index].prompt,
          "text": text.text,
          "start": len(self._sampling.prompts[index]),
          "tokens": [*map(int, self._sampling.prompts[index]), *map(int, text.generation.tokens)],
        }
        for text, (reward, _, flags), advantage in zip(group, scored, advantage_G, strict=True)
        if advantage != 0
      ]
    return {"counts": counts, "samples": samples}

  def _reward(self, problem: Problem, written: Completion) -> tuple[float, bool, int]:
    return reward_of(problem, written, self._task, self._markers, self._config.mistakes.unit, self._config.policy)


@dataclasses.dataclass(frozen=True)
class PolicySummary:
  """The outcome of a round of sampling; `groups` are the problems whose rewards differ, `reward` is the sum."""

  problems: int
  samples: int
  groups: int
  right: int
  flags: int
  unfinished: int
  tokens: int  # sampled
  reward: float

  def values(self) -> dict[str, float]:
    """Return the values that metrics.jsonl has in every line of the round."""
    return {
      "policy/reward": self.reward / self.samples,
      "policy/right": self.right / self.samples,
      "policy/flags": self.flags / self.samples,
      "policy/groups": self.groups / self.problems,
      "policy/tokens": self.tokens / self.samples,
    }

  def __str__(self) -> str:
    num = self.samples
    return aligned(
      [
        (f"{num:,} samples of {self.problems:,} problems", "", ""),
        ("mean reward", f"{self.reward / num:.3f}", ""),
        ("right answers", f"{self.right:,}", f"{self.right / num:.1%}"),
        ("flags", f"{self.flags:,}", f"{self.flags / num:.3f} a sample"),
        ("not ended", f"{self.unfinished:,}", f"{self.unfinished / num:.1%}"),
        ("problems whose rewards differ", f"{self.groups:,}", f"{self.groups / self.problems:.1%}"),
        ("tokens sampled", f"{self.tokens:,}", f"{self.tokens / num:.1f} a sample"),
      ]
    )


def join(chunks: Sequence[dict[str, Any]], output: str) -> PolicySummary:
  """Write the samples of all chunks to `output`, a JSON object a line, and return the summary."""
  with written_whole(output) as file:
    for chunk in chunks:
      for sample in chunk["samples"]:
        file.write(json.dumps(sample, ensure_ascii=False) + "\n")
  counts = [chunk["counts"] for chunk in chunks]
  return PolicySummary(**{name: sum(count[name] for count in counts) for name in counts[0]})
