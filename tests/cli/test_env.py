"""`podlift env`: what a bug report needs, and nothing that it must not tell."""

from __future__ import annotations

import pytest

from launcher.cli.shown_variables import relevant
from trainer.workdir.environment import redact


def test_env_for_a_bug_report(launch):
    hidden = {
        "SLURM_JWT": "hush-1",
        "PODLIFT_API_TOKEN": "hush-2",
        "NCCL_PROXY_PWD": "hush-3",
        "JAX_HUB_PAT": "hush-4",
        "KUBERNETES_CLIENT_CERT": "hush-5",
        "CLUSTER_SPEC": '{"job": "hush-6"}',
    }
    shown = {"SLURM_JOB_ID": "1", "https_proxy": "http://me:hush-7@proxy:3128"}
    code, out, _ = launch("env", environ={**hidden, **shown})
    assert code == 0
    for text in (
        "python ",
        "jax ",
        "devices      1 cpu cpu",
        "cluster      none",
        "SLURM_JOB_ID=1",
        "https_proxy=http://***@proxy:3128",
        " other variables, not shown",
    ):
        assert text in out, out
    assert "hush" not in out


def test_only_named_variables_are_shown():
    environ = {"NCCL_DEBUG": "INFO", "HOME": "x", "JAX_SECRET": "y", "VC_WORKER_HOSTS": "a,b"}
    assert relevant(environ) == ({"NCCL_DEBUG": "INFO", "VC_WORKER_HOSTS": "a,b"}, 2)
    # By prefixes these would be shown.
    for prefix in ("SLURM", "JAX", "TPU", "XLA", "NCCL", "OMPI_MCA", "PODLIFT", "CUDA", "PMI"):
        for end in ("JWT", "PWD", "PAT", "CERT", "PASSPHRASE", "DSN", "SIGNATURE", "LOGIN", "X"):
            assert relevant({f"{prefix}_{end}": "hush"}) == ({}, 1)
    assert relevant({"TF_CONFIG": "{}"}) == ({"TF_CONFIG": "(2 characters)"}, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("--xla_dump_to=/tmp/x --xla_y=3", "--xla_dump_to=/tmp/x --xla_y=3"),
        ("http://me:pass@proxy:3128", "http://***@proxy:3128"),
        ("http://me:pa/ss@proxy/x", "http://***@proxy/x"),
        ("http://token@host", "http://***@host"),
        ("me:pass@proxy:3128", "***@proxy:3128"),
        ("s3://bucket/x?sig=abc&y=1 /tmp", "s3://bucket/x?*** /tmp"),
        ("prterun-n1-4711@1", "prterun-n1-4711@1"),
        ("10.0.0.4\n10.0.0.5\x1b[2J", "10.0.0.4\\n10.0.0.5\\x1b[2J"),
    ],
)
def test_passwords_and_control_characters_are_left_out(value, expected):
    assert redact(value) == expected
