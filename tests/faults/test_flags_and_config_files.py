"""Flags of every program and config files, wrong in many ways: each ends in one line and exit code 2, or is right."""

import os

import pytest
from forks import lay_out, report, run

pytestmark = pytest.mark.faults
CONFIGURED = "from ml_collections import ConfigDict, FieldReference, config_dict\nimport config as good\n"


def returns(value: str, before: str = "") -> str:
  return (f"import sys; sys.path.insert(0, '.')\n{CONFIGURED}def get_config():\n  c = good.get_config()\n  {before}\n"
          f"  return {value}\n")


# What a config file holds. `None`: no get_config is reached.
FILES = {
  "empty": "", "syntax": "def get_config(:\n", "indent": "def get_config():\nreturn 1\n", "nul": "a = 1\0\n",
  "nested": "a = " + "(" * 5_000 + ")" * 5_000 + "\n", "deep": "a = " + "-" * 100_000 + "1\n",
  "long": "# " + "x" * (1 << 21) + "\n", "tabs": "def get_config():\n\tif 1:\n        return 1\n",
  "coding": "# coding: klingon\n", "no_get_config": "x = 1\n", "no_function": "get_config = 5\n",
  "import_error": "import nothing_of_that_name\n", "divides": "1 / 0\n", "exits": "import sys; sys.exit(0)\n",
  "exits_1": "raise SystemExit(1)\n", "interrupts": "raise KeyboardInterrupt\n", "generator": "raise GeneratorExit\n",
  "asserts": "assert False\n", "stops": "raise StopIteration\n", "base": "raise BaseException('x')\n",
  "memory": "raise MemoryError\n", "os_error": "open('absent')\n", "os_error_in": returns("c", "open('absent')"),
  "unicode_error": "b'\\xff'.decode()\n", "key_error": "{}['a']\n", "lines": "raise ValueError('a\\nb\\nc')\n",
  "no_text": "class E(Exception):\n  def __str__(self): 1 / 0\nraise E\n",
  "escapes": "raise ValueError('\\x1b[2J')\n",
  "surrogate": "raise ValueError('\\ud800')\n", "recursion": "def get_config(): return get_config()\n",
  "takes_two": "def get_config(a, b): pass\n", "takes_arm": "def get_config(arm): return {'a': 1}[arm]\n",
  "returns_none": "def get_config(): pass\n", "returns_5": "def get_config(): return 5\n",
  "returns_class": "class get_config: pass\n", "returns_generator": "def get_config(): yield 1\n",
  "returns_dict": returns("c.to_dict()"), "returns_list": returns("[c]"), "returns_frozen": returns(
    "config_dict.FrozenConfigDict(c)"), "returns_empty": returns("ConfigDict()"),
  "reference": returns("c", "c.seed = FieldReference(3)"), "placeholder": returns(
    "c", "del c.seed; c.seed = config_dict.placeholder(int)"), "required": returns(
    "c", "del c.seed; c.seed = config_dict.required_placeholder(int)"),
  "cycle": returns("c", "c.loss.again = c"), "cyclic_reference": returns("c", "c.model.size = {'a': c}"),
  "section_5": returns("c", "del c.loss; c.loss = 5"), "section_none": returns("c", "del c.loss; c.loss = None"),
  "section_list": returns("c", "del c.loss; c.loss = [1]"), "numbered": returns("c", "c.model.size = {1: 2}"),
  "stray": returns("c", "c.learning_rate = 1"), "stray_in": returns("c", "c.loss.hint = 1.0"),
  "missing": returns("c", "del c.loss.flag"), "missing_section": returns("c", "del c.loss"),
  "function": returns("c", "c.model.size = {'a': len}"), "count": returns("c",
  "del c.train.steps; c.train.steps = 1.5"),
  "text": returns("c", "c.train.steps = 'two'"), "locked": returns("c.lock()"), "too_long": returns(
    "c", "c.data.too_long = 'sometimes'"), "digits": returns("c", "c.train.steps = 10 ** 5000"),
  "numpy": returns("c", "import numpy; del c.train.steps; c.train.steps = numpy.int64(2)"),
  "tuple": returns("c", "c.mistakes.classes = ['a', 1]"), "dotted": returns("c", "c['loss.flag'] = 1.0"),
  "model_is_path": returns("c", "del c.model; c.model = 'hf'"),
}
OVERRIDES = [
  "--config.model.size.hidden_size=64", "--config.model.size={}", "--config.model.size=5", "--config.seed=1.5",
  "--config.seed=",
  "--config.seed=-1", "--config.seed=4294967296", "--config.seed=nan", "--config.seed=1e3", "--config.seed=[1]",
  "--config.seed=" + "9" * 5_000, "--config.seed=None", "--config.seed", "--config.seed.x=1", "--config.data=5",
  "--config.data={}", "--config.data={'path': 'x'}", "--config.data=", "--config.data", "--config.data.path.x=1",
  "--config.mistakes.classes=(1", "--config.mistakes.classes=1,", "--config.mistakes.classes={}",
  "--config.tokenizer.confidence=x", "--config.tokenizer.confidence=nan", "--config.tokenizer.confidence=(2,1)",
  "--config.tokenizer.confidence=" + "(" * 500, "--config.optimizer.learning_rat=1", "--config.optimiser.b1=0.5",
  "--config.a b=1", "--config.=1", "--config..=1", "--config.loss.=1", "--config.loss['text']=1",
  "--config.loss[0]=1",
  "--config.loss.text=nan", "--config.loss.text=inf", "--config.loss.text=1e999", "--config.loss.text=one",
  "--config.tokenizer.special=no", "--config.tokenizer.special=2", "--noconfig.tokenizer.special", "--noconfig.seed",
  "--config.tokenizer.flag=", "--config.tokenizer.flag=a\nb", "--config.keys=1", "--config.data.lock=1",
  "--config.__class__=1", "--config.data.__init__=1", "--config.data.path=gs://b/x", "--config.data.path=s3://b/x",
  "--config.data.path=https://b/x", "--config.data.path=~nobody_of_that_name/x", "--config.data.path=/dev/zero",
  "--config.data.path=fifo", "--config.data.path=/", "--config.model.path=fifo", "--config.tokenizer.path=fifo",
  "--config.rounds=1e3", "--config.data.too_long=perhaps", "--config.data.too_long=drop", "-config.seed=1",
  "---config.seed=1", "--config:seed=1", "--config.train.steps=0x10", "--config.train.steps=1_0",
  "--config.train.steps=٣",
  "--config.import os=1", "--config.lambda=1", "--config.loss.text.real=1", "--config.mesh.data=0",
  "--config.mesh.data=-2",
]
ANY = ["--flagfile=x", "--flagfile=fifo", "--flagfile=/dev/zero", "--flagfile", "--undefok=nu", "--nu=1", "x", "--",
       "-", "--=",
       "--=1", "=", "--num", "--\udcff=1", "--workdir=", "--output=", "--model=", "--config=", "---", "--config",
       "--no", "--help="]
PROGRAMS = {
  "preview": (["--config=config.py"], ["--num=-1", "--num=1.5", "--num=", "--num=1000000000000", "--num=nan",
    "--html=",
                                       "--html=/", "--html=absent/x", "--html=gs://b/x", "--html=fifo",
                                       "--html=\udcff"]),
  "train": (["--config=config.py", "--workdir=w"], [
    "--join_seconds=0", "--join_seconds=-1", "--join_seconds=1e9", "--num_processes=0", "--num_processes=-1",
    "--num_processes=1000000000000", "--process_id=-1", "--process_id=x", "--workdir=gs://b/x"]),
  "generate": (["--model=hf", "--prompts=prompts.jsonl", "--output=o"], [
    "--max_tokens=0", "--max_tokens=-1", "--max_tokens=1000000000000", "--max_tokens=1.5", "--max_tokens=",
    "--temperature=nan", "--temperature=inf", "--temperature=-1", "--temperature=1e-300", "--temperature=x",
    "--top_p=nan",
    "--top_p=2", "--top_p=-1", "--seed=-1", "--seed=4294967296", "--seed=1.5", "--flag_bias=nan", "--flag_bias=inf",
    "--flag_bias=x", "--flag_above=nan", "--flag_above=x", "--prompts=", "--prompts=fifo", "--prompts=/dev/zero",
    "--output=/", "--output=absent/o", "--model=absent", "--model=fifo", "--logprobs=perhaps", "--clean=2"]),
  "evaluate": (["--model=hf", "--config=config.py", "--output=o"], ["--output=/", "--model=absent",
    "--output=gs://b/x"]),
  "mine": (["--model=hf", "--config=config.py", "--output=o"], [
    "--num_processes=0", "--num_processes=-1", "--num_processes=1000000000000", "--process_id=-1", "--process_id=1",
    "--process_id=x", "--output=/", "--output=absent/o"]),
  "export": (["--model=hf", "--output=e"], ["--dtype=float64", "--dtype=", "--model=absent", "--model=fifo",
    "--output=/"]),
  "fit": (["--config=config.py", "--topology=local"], [
    "--topology=0x4", "--topology=", "--topology=,", "--topology=local,local", "--topology=v5p:-1x2x2",
    "--topology=v5p:0x2x2", "--topology=v5p:1000x1000x1000", "--topology=1000000000xv5e:1x1", "--topology=v5p:2x2",
    "--topology=v5p:" + "9" * 5_000, "--topology=v5p:٢x2x2", "--topology=V5P:2x2x2", "--topology=h100:9",
    "--topology=h100:0", "--topology=a\nb", "--topology=" + "x" * 10_000, "--topology=v5p:" + "x".join("2" * 500),
    "--trained_share=nan", "--trained_share=inf", "--trained_share=0", "--trained_share=-1", "--trained_share=2",
    "--search=perhaps", "--output=/", "--hlo=", "--hlo=absent/x", "--hlo=config.py"]),
  "report": (["--workdirs=w", "--output=r.html"], [
    "--workdirs=", "--workdirs=,", "--workdirs=w,,w", "--workdirs=hf", "--workdirs=fifo", "--workdirs=/dev/zero",
    "--workdirs=gs://b/w", "--workdirs=" + "x" * 10_000, "--output=/", "--reference=", "--reference=absent"]),
  "sweep": (["--config=config.py", "--arms=a", "--seeds=0", "--output=s"], [
    "--seeds=", "--seeds=1,01", "--seeds=1,+1", "--seeds=1, 1", "--seeds=-1", "--seeds=1.5", "--seeds=٣",
    "--seeds=4294967296", "--seeds=" + "9" * 5_000, "--seeds=nan", "--seeds=1,,2", "--jobs=0", "--jobs=-1",
    "--jobs=1000000000000", "--jobs=x", "--arms=", "--arms=a,a", "--arms=..", "--arms=a/b", "--arms=" + "x" * 300,
    "--arms=-x", "--arms=a:b", "--base=a,a", "--base=..", "--reference=b", "--config=config.py:a"]),
}
CONFIGS = ["nope.py", "", "/", ".", "fifo", "/dev/zero", "/dev/null", "binary", "latin", "gs://b/c.py", "~/absent.py",
           "config", "config.py:", "config.py:a", "config.py:" + "a" * 10_000, ":", ":a", "a" * 300, "a/" * 3_000,
           "loop",
           "unreadable/x.py", "config.py/x", "of_takes_arm.py", "of_takes_arm.py:a", "of_takes_arm.py:b",
           "hf/tokenizer.json"]


def cases() -> list[tuple[str, list[str]]]:
  found = [("preview", [f"--config={file}"]) for file in (*CONFIGS, *(f"of_{name}.py" for name in FILES))]
  found += [("preview", ["--config=config.py", override]) for override in OVERRIDES]
  found += [("preview", [f"--config=of_{name}.py", "--config.seed=1"]) for name in FILES]
  found += [("mine", ["--model=hf", f"--config=of_{name}.py", "--output=o"])
            for name in ("section_5", "returns_5", "model_is_path")]
  found += [("sweep", [f"--config=of_{name}.py", "--arms=a", "--seeds=0", "--output=s"]) for name in FILES]
  found += [(program, [*good, flag]) for program, (good, flags) in PROGRAMS.items() for flag in flags]
  found += [(program, [*good, word]) for program, (good, _) in PROGRAMS.items() for word in ANY]
  found += [(program, good[:number] + good[number + 1:]) for program, (good, _) in PROGRAMS.items()
            for number in range(len(good))]
  return [*found, ("preview", ["--config.seed=1", "--config=config.py"])]


def test_wrong_flags_and_config_files_end_in_one_line(tmp_path):
  home = tmp_path / "home"
  home.mkdir()
  lay_out(home)
  for name, text in FILES.items():
    (home / f"of_{name}.py").write_text(text, encoding="utf-8")
  (home / "binary").write_bytes(bytes(range(256)) * 100)
  (home / "latin").write_bytes("# ä\n".encode("latin-1"))
  (home / "prompts.jsonl").write_text('{"prompt": "1+2?"}\n', encoding="utf-8")
  (home / "loop").symlink_to("loop")
  os.mkfifo(home / "fifo")
  assert len(cases()) >= 200
  runs = run(cases(), home, tmp_path / "out", seconds=60)
  assert ", wrong 0" in report(runs)
