"""What is wrong with a config file is one line with file and line; --config and the arms of a sweep read it alike."""

import os

import ml_collections
import pytest

from insec_jax import config, config_file
from insec_jax.command import InputError

GOOD = "from insec_jax.config import defaults\n\ndef get_config():\n  return defaults()\n"
WRONG = {
  "def get_config(:\n": r"c\.py:1: ",
  "x = 1\n1 / 0\n": r"c\.py:2: ZeroDivisionError: division by zero",
  "import sys\n\nsys.exit(0)\n": r"c\.py:3: SystemExit: 0",
  "raise KeyboardInterrupt\n": r"c\.py:1: KeyboardInterrupt",
  "open('absent')\n": r"c\.py:1: FileNotFoundError",
  "raise ValueError('a\\nb')\n": r"c\.py:1: ValueError: a b;",
  "def get_config(): return get_config()\n": r"c\.py:1: RecursionError",
  "a = 1\n": r"has no function get_config",
  "def get_config(a): pass\n": r"get_config\(\) cannot be called \(TypeError",
  "def get_config(): pass\n": r"get_config returned None; must return a ConfigDict",
  "def get_config(): return {}\n": r"get_config returned \{\}; must return a ConfigDict",
  "a = " + "(" * 5_000 + "1" + ")" * 5_000: r"c\.py",
  "a = " + "-" * 100_000 + "1": r"c\.py is no Python file",
  "#" * (1 << 20) + "\n\n": r"has more than 1 MiB",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_config_file_is_one_line(tmp_path, text, message):
  (tmp_path / "c.py").write_text(text)
  with pytest.raises(InputError, match=message) as caught:
    config_file.load(str(tmp_path / "c.py"))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a = '\xe4'\n", b"a = 1\x00\n"])
def test_a_file_that_is_no_text_is_no_config(tmp_path, content):
  (tmp_path / "c.py").write_bytes(content)
  with pytest.raises(InputError, match=r"c\.py"):
    config_file.load(str(tmp_path / "c.py"))


def test_what_is_no_regular_file_is_not_opened(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  for path in (str(tmp_path / "fifo"), "/dev/zero", str(tmp_path), str(tmp_path / "absent.py"), "s3://bucket/c.py", ""):
    with pytest.raises(InputError, match="--config"):
      config_file.load(path)


def test_a_name_without_a_file_is_a_config_of_the_package(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "toy").mkdir()  # a folder of runs, say
  assert config_file.find("toy").name == "toy.py"
  assert config_file.load(config_file.find("toy"), "clean").train.steps == 4_470
  (tmp_path / "mine").write_text(GOOD)
  for path in ("mine", "toy.py", "./toy", "", "/dev/zero"):
    assert config_file.find(path) == path
  with pytest.raises(
    InputError, match=r"tyo is neither a file nor a config of this package; .* graph, .*, sudoku, toy"
  ):
    config_file.find("tyo")


def test_a_file_with_the_name_of_a_config_of_the_package_is_not_it_and_is_named(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "toy").write_text(GOOD)
  assert config_file._Parser().parse("toy:clean").train.steps == 4_470
  said = f"--config=toy:clean is {config_file.shipped()['toy']}; the file here is --config=./toy:clean\n"
  assert capsys.readouterr().err == said
  assert config_file._Parser().parse("./toy").train.steps == config.defaults().train.steps
  assert capsys.readouterr().err == ""
  assert "a file toy of your own is ./toy" in config_file.CONFIG_HELP


ARMS = {
  "toy": "clean, insec",
  "llama31_8b": "tuned, shape",
  "llama31_70b": "tuned, shape",  # by the file that it builds on
  "sudoku": "injected, base, clean, ",
}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_that_a_config_of_the_package_lacks_is_answered_with_those_it_has(name):
  with pytest.raises(InputError, match=r"has no arm 'nosuch' \(line \d+ looked it up\); give one of .*") as error:
    config_file.load(config_file.find(name), "nosuch")
  given = str(error.value).partition("give one of ")[2].split(", ")
  assert set(filter(None, ARMS[name].split(", "))) <= set(given)
  for arm in given:
    config_file.load(config_file.find(name), arm)


def test_an_arm_that_the_file_lacks_is_named(tmp_path):
  (tmp_path / "c.py").write_text("def get_config(arm):\n  return {'a': 1}[arm]\n")
  with pytest.raises(InputError, match=r"c\.py has no arm 'b' \(line 2 looked it up\)"):
    config_file.load(str(tmp_path / "c.py"), "b")


def test_a_newer_key_is_there_to_be_set_on_the_command_line(tmp_path):
  (tmp_path / "c.py").write_text(
    "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({'data': {'path': 'x'}})\n"
  )
  values = config_file.load(str(tmp_path / "c.py"))
  log = {"to": ("tensorboard",), "project": "insec_jax"}  # a section that older files lack, as are lora and policy
  others = {name: config.defaults().to_dict()[name] for name in ("lora", "policy")}
  data = {"path": "x", "too_long": "refuse", "fields": "", "heldout_path": "", "to_mine": 0.0, "cache": ""}
  assert values.to_dict() == {"data": data, "log": log, **others}
  assert values.is_locked


def test_a_removed_key_of_an_older_file_is_passed_over_or_refused_by_its_file(tmp_path):
  for number, opens in ((0, True), (100, False)):
    path = tmp_path / f"c{number}.py"
    path.write_text(GOOD.replace("return defaults()", f"c = defaults()\n  c.train.keep_every = {number}\n  return c"))
    if opens:
      assert config_file.load(str(path)).to_dict() == config.defaults().to_dict()
    else:
      with pytest.raises(InputError, match=r"c100\.py: config has train\.keep_every=100, a key that version"):
        config_file.load(str(path))


def test_a_config_file_may_begin_with_the_defaults(tmp_path):
  (tmp_path / "c.py").write_text(GOOD)
  values = config_file.load(str(tmp_path / "c.py"))
  assert isinstance(values, ml_collections.ConfigDict)
  assert values.to_dict() == config.defaults().to_dict()


def test_a_config_file_is_read_from_a_disk_only():
  with pytest.raises(InputError, match=r"^--config=gs://b/c.py:a: a config file is a program"):
    config_file._Parser().parse("gs://b/c.py:a")


def test_a_list_of_a_config_file_is_a_tuple_as_the_default_is(tmp_path):
  body = "c = defaults()\n  del c.evaluate['endpoints']\n  c.evaluate.endpoints = ['x']\n  return c"
  (tmp_path / "c.py").write_text(GOOD.replace("return defaults()", body))
  values = config_file.load(str(tmp_path / "c.py"))
  assert values.evaluate.endpoints == ("x",)
  assert values.mistakes.classes == ()
