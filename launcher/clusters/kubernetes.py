"""Kubernetes: one process for each pod of an Indexed Job, alone or in a JobSet.

The Job controller sets JOB_COMPLETION_INDEX
(https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode) and the kubelet
KUBERNETES_SERVICE_HOST. A pod could learn the rest only from the API server, with rights that a job
should not have, so the manifest sets it; scripts/k8s/render.sh writes one:

    PODLIFT_NUM_PROCESSES        number of pods
    PODLIFT_COORDINATOR_ADDRESS  HOST or HOST:PORT of the pod of rank 0, by its stable name
    PODLIFT_JOB_NAME             name of the Job or JobSet
    PODLIFT_JOB_INDEX            in a JobSet of several jobs: label jobset.sigs.k8s.io/job-index
    PODLIFT_PODS_PER_JOB         in a JobSet of several jobs: number of pods in each
    PODLIFT_RESTART_ATTEMPT      label jobset.sigs.k8s.io/restart-attempt

The labels come through the downward API
(https://jobset.sigs.k8s.io/docs/concepts/, https://kubernetes.io/docs/concepts/workloads/pods/downward-api/).
"""

from __future__ import annotations

from collections.abc import Mapping

from launcher.clusters import read
from trainer.errors import UserError

_MANIFEST = (("PODLIFT_NUM_PROCESSES",), (read.COORDINATOR,))


class Kubernetes:
    """A pod of an Indexed Job, with GPUs or CPUs; pods with TPUs are `tpu_gke`."""

    name = "kubernetes"
    required = (("KUBERNETES_SERVICE_HOST",), ("JOB_COMPLETION_INDEX",), *_MANIFEST)
    variables = (
        "JOB_COMPLETION_INDEX",
        "PODLIFT_NUM_PROCESSES",
        "PODLIFT_JOB_INDEX",
        "PODLIFT_PODS_PER_JOB",
        "PODLIFT_JOB_NAME",
        "PODLIFT_RESTART_ATTEMPT",
    )
    hint = "scripts/k8s/render.sh writes a manifest with them; --cluster=none to use this pod only"

    @staticmethod
    def detect(env: Mapping[str, str]) -> bool:
        """Whether this is a pod of an Indexed Job whose manifest sets what the pod cannot know."""
        return not read.missing(env, Kubernetes.required)

    @staticmethod
    def refuse_manifest(env: Mapping[str, str]) -> None:
        """Refuses to train alone in a pod of an Indexed Job.

        Raises:
            UserError: this is one, and its manifest does not set what the pod cannot know.
        """
        if env.get("KUBERNETES_SERVICE_HOST") and env.get("JOB_COMPLETION_INDEX"):
            lack = read.missing(env, _MANIFEST)
            if lack:
                raise UserError(
                    f"a pod of an Indexed Job, but {' and '.join(lack)} is not set",
                    Kubernetes.hint,
                )

    @staticmethod
    def address(env: Mapping[str, str]) -> tuple[str, int]:
        """The pod of rank 0."""
        return read.parse_address(env[read.COORDINATOR], read.COORDINATOR, read.DEFAULT_PORT)

    @staticmethod
    def size(env: Mapping[str, str]) -> int:
        """The number of pods."""
        return read.integer(env, "PODLIFT_NUM_PROCESSES")

    @staticmethod
    def rank(env: Mapping[str, str]) -> int:
        """Counts the pods of the first job first."""
        job = read.integer(env, "PODLIFT_JOB_INDEX", default=0, minimum=0)
        size = Kubernetes.size(env)
        pods = read.integer(env, "PODLIFT_PODS_PER_JOB", default=size, minimum=1)
        return job * pods + read.index(env, "JOB_COMPLETION_INDEX", pods, "pods in a job")

    @staticmethod
    def local_device_ids(env: Mapping[str, str]) -> None:
        """None: a pod sees only its own accelerators."""

    @staticmethod
    def attempt(env: Mapping[str, str]) -> int:
        """How often the JobSet was restarted."""
        return read.integer(env, "PODLIFT_RESTART_ATTEMPT", default=0, minimum=0)

    @staticmethod
    def job(env: Mapping[str, str]) -> str:
        """`kubernetes NAME`."""
        return f"kubernetes {env.get('PODLIFT_JOB_NAME') or env[read.COORDINATOR]}"
