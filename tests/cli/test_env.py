"""`podlift env`: what a bug report needs."""

from __future__ import annotations

from launcher.cli.env import relevant


def test_env_for_a_bug_report(launch):
    code, out, _ = launch("env", environ={"SLURM_JOB_ID": "1", "PODLIFT_API_TOKEN": "hush"})
    assert code == 0
    for text in (
        "python ",
        "jax ",
        "devices      1 cpu cpu",
        "cluster      none",
        "SLURM_JOB_ID=1",
    ):
        assert text in out, out
    assert "hush" not in out
    assert relevant({"NCCL_DEBUG": "INFO", "HOME": "x", "JAX_SECRET": "y"}) == {
        "NCCL_DEBUG": "INFO"
    }
