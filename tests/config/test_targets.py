"""How a config names code, and what a person reads when it does not."""

from __future__ import annotations

import pytest

from trainer.config.targets import bind, build, resolve
from trainer.errors import UserError


def outer(inner, size=1, num_steps=None):
    return inner, size, num_steps


def test_nested_blocks_are_built_and_offered_arguments_fill_unset_ones():
    block = {
        "target": f"{__name__}:outer",
        "inner": {"target": "builtins:dict", "a": 1},
    }
    assert build(block, "config.x", num_steps=7, other=1) == ({"a": 1}, 1, 7)
    assert build({**block, "num_steps": 3}, "config.x", num_steps=7)[2] == 3
    assert bind({"target": f"{__name__}:outer", "size": 5}, "config.x")(2) == (2, 5, None)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (3, "does not name code"),
        ("trainer.losses", "does not name code"),
        ("trainer.loses:x", "did you mean 'trainer.losses'?"),
        ("trainer.losses:squared_eror", "did you mean 'squared_error'?"),
        ("os:path.jion", "did you mean 'join'?"),
    ],
)
def test_a_wrong_path_suggests_a_similar_one(target, expected):
    with pytest.raises(UserError, match=r"config\.loss") as error:
        resolve(target, "config.loss")
    assert expected in str(error.value)


def test_a_missing_dependency_is_not_taken_for_a_typo(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="needs the module 'not_installed_at_all'"):
        resolve("needs_more:x", "config.loss")


def test_a_wrong_keyword_suggests_a_similar_one():
    with pytest.raises(UserError) as error:
        build({"target": f"{__name__}:outer", "inner": 1, "sise": 2}, "config.x")
    assert "config.x.sise" in str(error.value)
    assert "did you mean 'size'?" in str(error.value)


def test_an_explicit_none_is_passed_on():
    block = {"target": f"{__name__}:outer", "inner": 1, "size": None, "num_steps": None}
    assert build(block, "config.x", num_steps=4) == (1, None, 4)


def test_a_missing_argument_is_named():
    with pytest.raises(UserError, match="missing a required argument: 'inner'"):
        build({"target": f"{__name__}:outer"}, "config.x")
