"""launch/Dockerfile and launch/gke.yaml: linted, checked against the schema of Kubernetes, and their steps run here."""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys

import launchkit
import pytest
from launchkit import ROOT

from insec_jax import command
from insec_jax.distributed import coordinator
from insec_jax.sizing import hardware

DOCKERFILE, MANIFEST = ROOT / "launch" / "Dockerfile", ROOT / "launch" / "gke.yaml"


def instructions():
  """[(instruction, arguments)] of the Dockerfile."""
  text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE))
  return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_has_no_findings_of_hadolint():
  words = [os.path.join(os.path.dirname(sys.executable), "hadolint"), DOCKERFILE]
  done = subprocess.run(words, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (0, "")


def test_what_may_hold_a_secret_is_not_copied_into_the_image():
  lines = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
  assert {".git/config", ".git/logs", ".git/hooks", ".git/FETCH_HEAD", "**/.env*"} <= set(lines)


@pytest.mark.processes
def test_the_steps_of_the_dockerfile_make_the_command_insec(tmp_path):
  """COPY and RUN in an empty folder. INSEC_IMAGE_PYTHON=python3.12 installs everything from the index, which takes
  minutes; without it pip finds all requirements installed, in the environment of the tests.
  """
  source, image, tools = launchkit.clone(tmp_path / "clone"), tmp_path / "image", tmp_path / "bin"
  image.mkdir()
  launchkit.script(tools / "apt-get", 'echo "$@" >> "$HOME/apt"')
  python, venv = os.environ.get("INSEC_IMAGE_PYTHON"), tmp_path / "venv"
  subprocess.run([python or sys.executable, "-m", "venv", *([] if python else ["--without-pip"]), venv], check=True)
  environment = {**launchkit.ENVIRONMENT, "HOME": str(tmp_path), "PATH": f"{tools}:{venv}/bin:{os.environ['PATH']}"}
  environment["EXTRAS"] = os.environ.get("INSEC_IMAGE_EXTRAS", "gcs,data")
  environment.pop("PYTHONPATH", None)
  if not python:
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
  minor = f"py{sys.version_info.major}{sys.version_info.minor}" if not python else "py312"
  for name, arguments in instructions():
    if name == "COPY":
      given, target = shlex.split(arguments)
      if given == ".":
        shutil.copytree(source, image, dirs_exist_ok=True)
      else:
        (image / target).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / given.replace("py312", minor), image / target)
    elif name == "RUN":
      step = arguments.replace("py312", minor).replace("/opt/insec_jax", str(image))
      step = step.replace("rm -rf /var/lib/apt/lists/*", "true")
      done = subprocess.run(
        ["bash", "-c", step], cwd=image, env=environment, capture_output=True, text=True, check=False
      )
      assert done.returncode == 0, done.stdout + done.stderr
  assert "install --yes --no-install-recommends git" in (tmp_path / "apt").read_text()
  assert dict(instructions())["ENTRYPOINT"] == '["insec"]'
  said = subprocess.run(
    [venv / "bin" / "insec", "fit", "--config=toy:clean", "--program=export"],
    cwd=tmp_path,
    env=environment | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert (said.returncode, "GB" in said.stdout) == (0, True), said.stderr
  # The image knows its commit, and nothing counts as changed.
  assert subprocess.run(["git", "-C", image, "status", "--porcelain"], capture_output=True, check=True).stdout == b""


def manifest():
  yaml = pytest.importorskip("yaml")
  return yaml.safe_load(MANIFEST.read_text())


def job_of(jobset):
  """The Job that JobSet makes of its only template."""
  (replicated,) = jobset["spec"]["replicatedJobs"]
  return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}, **replicated["template"]}


def test_the_job_of_the_manifest_is_one_for_the_schema_of_kubernetes():
  validate = pytest.importorskip("kubernetes_validate")
  job = job_of(manifest())
  validate.validate(job, "1.34", strict=True)
  wrong = copy.deepcopy(job)
  wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
  with pytest.raises(validate.ValidationError):
    validate.validate(wrong, "1.34", strict=True)


def test_the_jobset_of_the_manifest_has_fields_of_jobset_only():
  jobset = manifest()
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert set(jobset["spec"]) <= {"failurePolicy", "successPolicy", "network", "replicatedJobs", "startupPolicy"}
  assert set(jobset["spec"]["failurePolicy"]) <= {"maxRestarts", "rules", "restartStrategy"}
  for rule in jobset["spec"]["failurePolicy"]["rules"]:
    assert set(rule) <= {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert set(rule["onJobFailureReasons"]) <= {"PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded"}
  assert all(set(one) <= {"name", "replicas", "template"} for one in jobset["spec"]["replicatedJobs"])


def test_the_manifest_agrees_with_the_programs_and_with_itself():
  jobset = manifest()
  job = job_of(jobset)["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  (rule,) = job["podFailurePolicy"]["rules"]
  # What another try cannot change ends the set; everything else, 42 above all, is tried again.
  assert set(rule["onExitCodes"]["values"]) == {command.WRONG_INPUT, command.DIVERGED}
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
  (request,) = hardware.parse(f"v6e:{pod['nodeSelector']['cloud.google.com/gke-tpu-topology']}")
  chips = int(container["resources"]["limits"]["google.com/tpu"])
  assert job["parallelism"] * chips == job["completions"] * chips == 4 * 4
  assert list(request.shape) == [4, 4]
  assert coordinator.PORT in [port["containerPort"] for port in container["ports"]]
  words = [word.partition("=")[0] for word in container["args"]]
  assert words == ["train", "--config", "--workdir", "--config.model.path", "--config.data.path"]
  # Secrets come from a Secret, never from the file.
  assert not any(re.search("TOKEN|KEY|SECRET", one["name"]) for one in container["env"])
  assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
