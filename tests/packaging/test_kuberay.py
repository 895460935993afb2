r"""The manifests for KubeRay fit one another, the tested versions and, if it is at hand, the CRD.

The CRD is a megabyte of somebody else's file. To validate against it:

    for KIND in rayclusters rayjobs rayservices; do curl --fail --remote-name \
      https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/ray.io_$KIND.yaml
    done
    ESPER_KUBERAY_CRDS=. python -m pytest tests/packaging/test_kuberay.py
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.version import Version
from ray.serve.schema import ServeDeploySchema

from esper.cli.job import parse
from esper.config.base import validate
from esper_experiments.jobs import ENVIRONMENT
from esper_experiments.ray_variables import VARIABLES
from esper_serve.launch import ENVIRONMENT as LAUNCH_ENVIRONMENT
from esper_serve.settings import ServiceSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "kuberay"
FILES = ("raycluster.yaml", "rayjob.yaml")
ALL = (*FILES, "rayservice.yaml")
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)
CRDS = os.environ.get("ESPER_KUBERAY_CRDS")
SHA256 = {
    "rayclusters": "c44704442eef0c6721ad40c1d66782c8bd3fdab9d3344306a5820910a679baa1",
    "rayjobs": "01a5cf3b17c1769fda44af7e82debcd98722f0c27b9ab84d084681c6649121f5",
    "rayservices": "0a8fc325e6e22b9231c1f282b309555e2ecf94227ca20a03df3d1d9a403907ab",
}


def manifest(file: str) -> dict:
    return yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))


def cluster_of(file: str) -> dict:
    return cluster_of_manifest(manifest(file))


def cluster_of_manifest(content: dict) -> dict:
    spec = content["spec"]
    return spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec))


def pods_of(file: str) -> list[dict]:
    cluster = cluster_of(file)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def containers_of(file: str) -> list[dict]:
    return [container for pod in pods_of(file) for container in pod["containers"]]


# --- against KubeRay's own schema


def closed(schema: dict) -> dict:
    """The schema as `kubectl apply --validate=strict` takes it: unknown keys are refused."""
    result = {k: v for k, v in schema.items() if k not in ("properties", "items")}
    if "properties" in schema:
        result["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    if "items" in schema:
        result["items"] = closed(schema["items"])
    return result


def schema_of(kind: str) -> dict:
    content = (Path(CRDS or "") / f"ray.io_{kind}.yaml").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[kind], f"not that of v1.7.0: {kind}"
    crd = yaml.load(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    # what every object of Kubernetes has is not spelled out in a CRD
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.skipif(CRDS is None, reason="ESPER_KUBERAY_CRDS=FOLDER; this file's head says how")
@pytest.mark.parametrize(
    ("file", "kind"),
    [("raycluster.yaml", "rayclusters"), ("rayjob.yaml", "rayjobs"),
     ("rayservice.yaml", "rayservices")],
)  # fmt: skip
def test_kuberay_accepts_it_and_would_refuse_a_wrong_key_or_value(file, kind):
    schema, good = schema_of(kind), manifest(file)
    jsonschema.validate(good, schema)
    for change, message in [
        (lambda m: m["spec"].update(replcas=1), "replcas"),
        (lambda m: cluster_of_manifest(m)["authOptions"].update(mode="tokens"), "tokens"),
        (lambda m: first_container(m)["resources"].update(limit={}), "limit"),
        (lambda m: first_container(m)["readinessProbe"]["httpGet"].pop("port"), "port"),
        (lambda m: cluster_of_manifest(m)["headGroupSpec"].pop("template"), "template"),
    ]:
        wrong = manifest(file)
        change(wrong)
        with pytest.raises(jsonschema.ValidationError, match=message):
            jsonschema.validate(wrong, schema)


def first_container(content: dict) -> dict:
    head = cluster_of_manifest(content)["headGroupSpec"]
    return head["template"]["spec"]["containers"][0]


# --- offline


@pytest.mark.parametrize("file", ALL)
def test_it_wants_a_token_from_a_secret(file):
    assert cluster_of(file)["authOptions"] == {"mode": "token", "secretName": "esper-token"}
    # KubeRay reads the token from this key of the secret
    header = (FOLDER / "raycluster.yaml").read_text().partition("apiVersion")[0]
    assert "create secret generic esper-token --from-literal=auth_token=" in header
    assert cluster_of(file)["headGroupSpec"]["serviceType"] == "ClusterIP"
    for container in containers_of(file):
        names = {variable["name"] for variable in container["env"]}
        # KubeRay leaves alone what a container says itself
        assert not names & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


@pytest.mark.parametrize("file", ALL)
def test_ray_and_image_are_the_tested_versions(file):
    assert cluster_of(file)["rayVersion"] == PINS["ray"]
    assert Version(PINS["ray"]) >= Version("2.53"), "the probes' path is new in 2.53"
    source = (ROOT / "platform" / "esper" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"', source, re.MULTILINE)
    images = {container["image"] for container in containers_of(file)}
    assert version is not None
    assert images == {f"REGISTRY/esper:{version[1]}"}
    assert f"-t REGISTRY/esper:{version[1]} ." in (FOLDER / "Dockerfile").read_text()


@pytest.mark.parametrize("file", FILES)
def test_nothing_reports_to_its_makers_as_in_cluster_yaml(file):
    launcher = (ROOT / "cluster.yaml").read_text()
    for container in containers_of(file):
        for variable in container["env"]:
            assert f"{variable['name']}={variable['value']}" in launcher


@pytest.mark.parametrize("file", FILES)
def test_every_container_has_limits_and_probes_and_every_mount_a_volume(file):
    for container in containers_of(file):
        have = container["resources"]
        assert have["requests"] == have["limits"], "what is promised is what may be used"
        assert {"cpu", "memory"} <= set(have["limits"])
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    for pod in pods_of(file):
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounts = {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]}
        assert mounts == volumes


@pytest.mark.parametrize("file", FILES)
def test_workers_have_gpus_and_the_head_runs_no_trials(file):
    head, worker = pods_of(file)
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster_of(file)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_both_describe_the_same_cluster():
    """One is the other with a sweep mounted: a value changed in one alone is an oversight."""
    alone, inside = cluster_of("raycluster.yaml"), cluster_of("rayjob.yaml")
    groups = [inside["headGroupSpec"], *inside["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        for items in (pod["volumes"], pod["containers"][0]["volumeMounts"]):
            items[:] = [item for item in items if item["name"] != "sweep"]
    assert inside == alone


def test_the_service_is_that_of_configs_serve_but_for_where_it_is():
    spec = manifest("rayservice.yaml")["spec"]
    theirs = yaml.safe_load(spec["serveConfigV2"])
    ours = yaml.safe_load((ROOT / "configs/serve/tamiyo.yaml").read_text())
    (app,), (expected,) = theirs["applications"], ours["applications"]
    ServeDeploySchema.model_validate(theirs)
    assert {k: v for k, v in app["args"].items() if k not in ("home", "database")} == {
        k: v for k, v in expected["args"].items() if k != "home"
    }
    validate(ServiceSettings, app["args"], source="rayservice.yaml")
    mounts = {m["mountPath"] for c in containers_of("rayservice.yaml") for m in c["volumeMounts"]}
    assert app["args"]["home"] in mounts
    for container in containers_of("rayservice.yaml"):
        given = {variable["name"]: variable["value"] for variable in container["env"]}
        assert given.items() >= LAUNCH_ENVIRONMENT.items()
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_entry_point_is_a_command_of_the_job_module_and_its_files_are_mounted():
    spec = manifest("rayjob.yaml")["spec"]
    python, flag, module, *arguments = shlex.split(spec["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "esper.cli.job")
    given = parse(arguments)
    assert (given.kind, given.rest) == ("ab", [])
    head = pods_of("rayjob.yaml")[0]
    mounts = {m["mountPath"] for m in head["containers"][0]["volumeMounts"]}
    assert {given.results, str(given.config.parent)} <= mounts
    text = (FOLDER / "rayjob.yaml").read_text()
    source = re.search(rf"--from-file={given.config.name}=(\S+)", text)
    assert source is not None
    assert (ROOT / source[1]).is_file()


def test_a_job_gets_the_variables_that_esper_submit_gives():
    content = yaml.safe_load(manifest("rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert content == {"env_vars": {**VARIABLES, **ENVIRONMENT}}


def test_the_image_takes_what_the_build_needs():
    text = (FOLDER / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()}
    assert {"pyproject.toml", "constraints.txt", "LICENSE", "README.md"} <= copied
    assert {"kernels", "platform", "experiments", "serve_apps"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    steps = re.findall(r"^RUN ((?:.|\\\n)+)$", text, re.MULTILINE)
    for step in steps:
        done = subprocess.run(["bash", "-n", "-c", step], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert any("pip install" in step and "-c constraints.txt" in step for step in steps)


@pytest.mark.slow
def test_the_image_s_package_can_be_built_from_what_it_copies(tmp_path):
    text = (FOLDER / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *names, target = line.split()
        for name in names:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tmp_path / target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path / "w"]
    subprocess.run([*command, tmp_path], check=True)
    assert list((tmp_path / "w").glob("esper_morphogenetic-*.whl"))


@pytest.mark.parametrize("file", FILES)
def test_its_comments_name_commands_that_are_there(file):
    text = (FOLDER / file).read_text()
    for name in re.findall(r"configs/\S+?\.yaml|docs/\S+?\.md|configs/kuberay/Dockerfile", text):
        assert (ROOT / name).is_file(), name
