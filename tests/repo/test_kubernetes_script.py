"""scripts/k8s/render.sh: manifests that Kubernetes accepts."""

from __future__ import annotations

import re

import kubernetes_validate as validate
import pytest
import yaml
from script_runs import HOSTILE, MLP, RENDERED


def rendered(run_script, *arguments, **options):
    done = run_script(*RENDERED, *arguments, **options)
    assert done.returncode == 0, done
    return yaml.safe_load(done.stdout)


def container_of(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    return job["spec"]["template"]["spec"]["containers"][0]


def env_of(jobset):
    return {entry["name"]: entry.get("value") for entry in container_of(jobset)["env"]}


KINDS = {
    "tpu": [],
    "multislice": ["--slices=2", "--topology=2x2x4", "--accelerator=tpu-v5p-slice"],
    "as root": ["--user=0"],
    "gpu": ["--kind=gpu"],
    "gpu, everything": [
        *["--kind=gpu", "--hosts=3", "--gpus=4", "--accelerator=nvidia-h100-80gb"],
        *["--claim=disk", "--workdir=/runs/x", "--account=trainer", "--slices=2", "--queue=team-a"],
    ],
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_kubernetes_accepts_the_job(run_script, arguments):
    job = rendered(run_script, *arguments)["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    validate.validate(job, validate.latest_version(), strict=True)
    job["spec"]["backofLimit"] = 0
    with pytest.raises(validate.ValidationError):
        validate.validate(job, validate.latest_version(), strict=True)


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_the_jobset_says_what_podlift_reads(run_script, arguments):
    jobset = rendered(run_script, *arguments)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    pod, container, env = job["template"]["spec"], container_of(jobset), env_of(jobset)
    # launcher.clusters.kubernetes reads these.
    assert env["PODLIFT_NUM_PROCESSES"] == str(job["completions"] * replicated["replicas"])
    assert env["PODLIFT_PODS_PER_JOB"] == str(job["completions"])
    assert env["PODLIFT_JOB_NAME"] == jobset["metadata"]["name"]
    subdomain = jobset["spec"]["network"]["subdomain"]
    assert env["PODLIFT_COORDINATOR_ADDRESS"] == f"mlp-train-0-0.{subdomain}:8476"
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in container["env"]
        if "valueFrom" in entry
    }
    assert fields["PODLIFT_JOB_INDEX"] == "metadata.labels['jobset.sigs.k8s.io/job-index']"
    assert fields["PODLIFT_RESTART_ATTEMPT"].endswith("'jobset.sigs.k8s.io/restart-attempt']")
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    user = pod["securityContext"]["runAsUser"]
    assert pod["securityContext"]["runAsNonRoot"] is (user != 0)
    assert ("add" in container["securityContext"]["capabilities"]) is (user == 0)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_values_for_tpus_and_gpus(run_script):
    tpu = rendered(run_script)
    assert container_of(tpu)["resources"]["limits"] == {"google.com/tpu": "4"}
    pod = tpu["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert "MEGASCALE_NUM_SLICES" not in env_of(tpu)
    slices = rendered(run_script, *KINDS["multislice"])
    assert env_of(slices)["MEGASCALE_NUM_SLICES"] == "2"
    assert env_of(slices)["MEGASCALE_COORDINATOR_ADDRESS"] == "mlp-train-0-0.mlp"
    gpu = rendered(run_script, *KINDS["gpu, everything"])
    assert container_of(gpu)["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert "annotations" not in gpu["metadata"]
    assert "MEGASCALE_NUM_SLICES" not in env_of(gpu)
    pod = gpu["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["serviceAccountName"] == "trainer"
    assert {"name": "runs", "mountPath": "/runs"} in container_of(gpu)["volumeMounts"]
    # https://kueue.sigs.k8s.io/docs/tasks/run/jobsets/
    assert gpu["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team-a"}
    assert "labels" not in tpu["metadata"]
    pod = rendered(run_script, "--kind=gpu")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "nodeSelector" not in pod["template"]["spec"]


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (1, "FailJobSet"),
        (2, "FailJobSet"),
        (42, "RestartJobSet"),
        (137, "RestartJobSet"),
        (139, "FailJobSet"),
    ],
)
def test_a_jobset_restarts_what_can_resume(run_script, code, action):
    """Evaluates the rules of the Job controller and of JobSet in their order."""
    spec = rendered(run_script)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    reason = "BackoffLimitExceeded"
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container_of({"spec": spec})["name"]
    assert rule["onExitCodes"]["operator"] == "In"
    if code in rule["onExitCodes"]["values"]:
        reason = "PodFailurePolicy"
    rules = spec["failurePolicy"]["rules"]
    first = next(
        rule
        for rule in rules
        if "onJobFailureReasons" not in rule or reason in rule["onJobFailureReasons"]
    )
    assert first["action"] == action
    assert spec["failurePolicy"]["maxRestarts"] == 100
    for rule in rules:
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_a_value_cannot_change_the_structure_of_a_manifest(run_script):
    jobset = rendered(run_script, "--workdir=gs://b/@IMAGE@", "--", HOSTILE, "a: b", "- c", "")
    plain = rendered(run_script)
    arguments = container_of(jobset)["args"]
    # Kubernetes reads $$ as $, and expands nothing behind it.
    assert [argument.replace("$$", "$") for argument in arguments] == [
        *[MLP, "--workdir=gs://b/@IMAGE@", HOSTILE, "a: b", "- c", ""],
    ]
    assert "$" not in "".join(arguments).replace("$$", "")
    container_of(jobset)["args"] = container_of(plain)["args"]
    assert jobset == plain
