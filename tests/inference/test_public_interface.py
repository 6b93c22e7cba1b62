"""What `import trainer` gives, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

import trainer


def test_every_public_name_is_there():
    assert set(trainer.__all__) <= set(dir(trainer))
    for name in trainer.__all__:
        found = getattr(trainer, name)
        assert found.__name__ == name
        assert found.__doc__


def test_importing_trainer_imports_neither_jax_nor_flax():
    code = (
        "import sys, trainer\n"
        "dir(trainer), trainer.UserError, trainer.Preempted\n"
        "assert not {'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
