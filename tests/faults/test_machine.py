"""What the machine refuses (disk, quota, read only, descriptors, memory): one line, exit code 1, nothing lost."""

import contextlib
import os
import resource
import shutil
import subprocess

import pytest
import tries
from tries import check_goes_on, copy_trained, forked, left_over

pytestmark = pytest.mark.faults
WRITERS = [name for name in tries.PROGRAMS if name not in ("train", "fit")]
# As the shell's ulimit names them: resource, bytes in a unit.
LIMITS = {
  "n": ("RLIMIT_NOFILE", 1),
  "f": ("RLIMIT_FSIZE", 1024),
  "v": ("RLIMIT_AS", 1024),
  "u": ("RLIMIT_NPROC", 1),
  "s": ("RLIMIT_STACK", 1024),
}
SIZES = ("4k", "12k", "40k", "100k", "200k", "300k", "450k", "600k", "800k", "1m", "1200k")


def limits(text):
  """The limit that `ulimit TEXT` sets; -S the soft one alone."""
  *soft, letter, value = text.replace("-", "").split()
  name, unit = LIMITS[letter]
  return ((name, int(value) * unit, resource.getrlimit(getattr(resource, name))[1] if soft else int(value) * unit),)


@pytest.mark.parametrize("size", SIZES)
def test_train_on_a_disk_too_small_says_so_and_goes_on_with_room(home, small_disk, size):
  disk = small_disk(f"size={size}")
  ending = forked(home, "train", disk)
  ending.check(0, 1)
  assert ending.code == 0 or "No space left on device" in ending.err.splitlines()[-1]
  assert not left_over(disk)
  subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
  check_goes_on(home, disk)


@pytest.mark.parametrize("inodes", [2, 4, 8, 16, 24, 32, 48, 64, 90])
def test_train_on_a_disk_without_inodes_says_so_and_goes_on(home, small_disk, inodes):
  disk = small_disk(f"size=20m,nr_inodes={inodes}")
  forked(home, "train", disk).check(0, 1)
  assert not left_over(disk)
  subprocess.run(["mount", "-o", "remount,nr_inodes=9999", str(disk)], check=True)
  check_goes_on(home, disk)


@pytest.mark.parametrize("free", [0, 8, 60, 150])
def test_resuming_on_a_full_disk_keeps_what_is_saved(home, small_disk, free):
  disk = small_disk("size=20m")
  workdir = copy_trained(home, disk, 2)
  blocks = os.statvfs(disk)
  (disk / "ballast").write_bytes(b"x" * max(0, blocks.f_bavail * blocks.f_bsize - (free << 10)))
  forked(home, "train", disk).check(0, 1)
  assert (workdir / "checkpoints" / "2").is_dir()
  (disk / "ballast").unlink()
  check_goes_on(home, disk)


@pytest.mark.parametrize("program", WRITERS)
@pytest.mark.parametrize("options", ["size=4k", "size=20m,nr_inodes=2"])
def test_every_program_names_a_full_disk(home, small_disk, program, options):
  disk = small_disk(options)
  (disk / "ballast").write_bytes(b"")
  with open(disk / "ballast", "wb") as file, contextlib.suppress(OSError):
    file.write(b"x" * (1 << 20) if "4k" in options else b"")
  ending = forked(home, program, disk)
  ending.check(1)
  assert "No space left on device" in ending.err.splitlines()[-1]
  assert not left_over(disk)
  assert [path.name for path in disk.iterdir() if path.name != "ballast"] in ([], ["m.jsonl.parts"])


@pytest.mark.parametrize("program", ["train", *WRITERS])
def test_every_program_names_a_disk_that_is_read_only(home, small_disk, program):
  disk = small_disk("size=20m")
  subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
  ending = forked(home, program, disk)
  ending.check(1)
  assert "Read-only file system" in ending.err.splitlines()[-1]


@pytest.mark.parametrize(
  "limit",
  [
    "-n 8",
    "-n 16",
    "-n 32",
    "-n 63",
    "-n 64",
    "-n 80",
    "-S -n 16",
    "-S -n 40",
    "-f 0",
    "-f 1",
    "-f 8",
    "-f 100",
    "-v 900000",
    "-v 1900000",
    "-v 2100000",
    "-v 3900000",
    "-u 20",
    "-s 64",
  ],
)
def test_train_under_a_limit_ends_in_one_line_and_goes_on_without(home, tmp_path, limit):
  forked(home, "train", tmp_path, limits(limit)).check(0, 1)
  assert not left_over(tmp_path)
  if limit in ("-n 64", "-f 8", "-f 100", "-v 2100000"):
    check_goes_on(home, tmp_path)


@pytest.mark.parametrize("limit", ["-n 32", "-n 64", "-f 0", "-v 2050000"])
@pytest.mark.parametrize("program", ["generate", "evaluate", "export", "report"])
def test_other_programs_under_a_limit_end_in_one_line(home, tmp_path, program, limit):
  forked(home, program, tmp_path, limits(limit)).check(0, 1)
  assert not left_over(tmp_path)


@pytest.mark.parametrize("program", ["generate", "evaluate", "report"])
def test_an_output_to_dev_full_names_the_disk(home, tmp_path, program):
  line = tuple("--output=/dev/full" if word.startswith("--output") else word for word in tries.PROGRAMS[program])
  forked(home, line, tmp_path).check(1)


def test_a_cache_of_programs_on_a_full_disk_does_not_end_a_run(home, tmp_path, small_disk):
  disk = small_disk("size=4k")
  (disk / "ballast").write_bytes(b"x" * 4096)
  forked(home, "train", tmp_path, JAX_COMPILATION_CACHE_DIR=str(disk)).check(0)


def test_a_folder_that_is_removed_under_a_run_is_no_traceback(home, tmp_path):
  process = tries.start(home, "train", tmp_path)
  seen = b""
  while b"step 1/6" not in seen and (piece := os.read(process.stderr.fileno(), 4096)):
    seen += piece
  shutil.rmtree(tmp_path / "w", ignore_errors=True)
  tries.finish(process).check(0, 1)
