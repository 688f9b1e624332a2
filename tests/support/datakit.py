"""What the tests of data/ and of preview share: a whole config, small tokenizers built on the spot, record files."""

import copy
import json

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from insec_jax.config import Config
from insec_jax.config_build import build

VALUES = {
  "seed": 0,
  "rounds": 0,
  "model": {"path": "", "size": {"vocab_size": 64}, "remat": "none"},
  "tokenizer": {"path": "", "flag": "<err>", "fix": "<fix>", "special": True, "confidence": (), "confidence_first": ()},
  "task": {"name": "records", "min_size": 0, "max_size": 0, "modulus": 0},
  "data": {
    "path": "records.jsonl",
    "fields": "",
    "heldout_path": "",
    "to_mine": 0.0,
    "cache": "",
    "num_records": 0,
    "num_heldout": 0,
    "template": "plain",
    "marker_text": "refuse",
    "row_length": 256,
    "rows_per_device": 2,
    "accumulation": 1,
    "too_long": "refuse",
  },
  "mistakes": {
    "source": "recorded",
    "share": 0.5,
    "max_per_solution": 1,
    "classes": (),
    "reason": "label",
    "unit": "line",
    "mined": 0.0,
    "mined_path": "",
    "rewind": False,
    "mined_from": "own",
    "view": "full",
    "hinted": 0.0,
  },
  "loss": {
    "prompt": 0.0,
    "text": 1.0,
    "mistake": 0.0,
    "flag": 1.0,
    "reason": 1.0,
    "correction": 1.0,
    "end": 0.5,
    "repeat": 0.0,
  },
  "optimizer": {
    "name": "adamw",
    "learning_rate": 1e-3,
    "final_share": 0.1,
    "warmup_steps": 1,
    "weight_decay": 0.0,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "clip_norm": 1.0,
  },
  "train": {
    "steps": 2,
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "keep": 1,
    "top_layers": 0,
    "marker_rows": True,
    "stream_cache": "",
    "vocabulary": "all",
  },
  "mesh": {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
  "precision": {"params": "float32", "compute": "float32"},
  "evaluate": {
    "num_problems": 1,
    "num_probes": 1,
    "max_tokens": 8,
    "batch_size": 1,
    "temperature": 1.0,
    "max_false_alarms": 0.01,
    "votes": 3,
    "redraws": 1,
    "max_size": 0,
  },
  "mine": {"num_problems": 2, "samples": 2, "right": 1.0, "flags": False},
}

# Made like Llama 3.1's: contents are trimmed, and a system turn with a date comes first.
LLAMA_TEMPLATE = (
  "{{- bos_token }}"
  "{%- if messages[0]['role'] == 'system' %}"
  "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
  "{%- else %}{%- set system = '' %}{%- endif %}"
  "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
  "{{- '<|head|>system<|/head|>\\n\\nToday: ' + date_string + '\\n\\n' + system + '<|eot|>' }}"
  "{%- for message in messages %}"
  "{{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}"
  "{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"
)
# Made like SmolLM2's: a newline after each turn, contents as they are.
IM_TEMPLATE = (
  "{% for message in messages %}"
  "{{ '<|head|>' + message['role'] + '\\n' + message['content'] + '<|eot|>' + '\\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|head|>assistant\\n' }}{% endif %}"
)

CORPUS = [
  "What is 12 + 30? He adds 12 and 30.\n12 + 30 = 43\nThe sum is wrong. 12 + 30 = 42\n#### 42\n",
  "user system assistant",
]
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|head|>", "<|/head|>", "<|eot|>", "<|spare_0|>", "<|spare_1|>")


def config(**changes) -> Config:
  """The config above with changes given as section__key=value, or key=value where a key has no section."""
  values = copy.deepcopy(VALUES)
  for name, value in changes.items():
    if name in ("seed", "rounds"):
      values[name] = value
      continue
    section, key = name.split("__")
    assert key in values[section], name
    values[section][key] = value
  return build(values)


def bpe_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
  """A byte-level BPE tokenizer like Llama 3's: bos in front, spare special tokens; trims its offsets like GPT-2's."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
    special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
  )
  backend.train_from_iterator(CORPUS, trainer)
  backend.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=True),
      processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", SPECIALS.index("<|bos|>"))]),
    ]
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", chat_template=template
  )


def write_lines(path, records) -> str:
  """The path, after writing the records there as JSON lines; text and bytes are written as they are."""
  with open(path, "wb") as file:
    for record in records:
      line = (
        record if isinstance(record, bytes) else (record if isinstance(record, str) else json.dumps(record)).encode()
      )
      file.write(line + b"\n")
  return str(path)


def question(number: int) -> dict:
  """A record as GSM8K publishes it: what is `number` + 1?"""
  return {
    "question": f"What is {number} + 1?",
    "answer": f"{number} + 1 = <<{number}+1={number + 1}>>{number + 1}\n#### {number + 1}",
  }


def pieces(*texts: tuple[str, str]) -> dict:
  """A record of pieces, each (role, text)."""
  return {"pieces": [{"role": role, "text": text} for role, text in texts]}


def gsm8k(folder, lines, **changes) -> Config:
  """The config above for the task gsm8k, with these records and injected mistakes."""
  path = write_lines(folder / "r.jsonl", lines)
  return config(**{"task__name": "gsm8k", "data__path": path, "mistakes__source": "injected", **changes})
