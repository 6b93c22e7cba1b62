"""Overrides of single items, against ml_collections itself, and flags from files."""

from __future__ import annotations

import pytest
from absl import flags as absl_flags
from ml_collections import config_flags

from launcher.command_line import flags
from launcher.command_line.config_file import load_config
from launcher.command_line.parse import expand_flagfiles
from trainer.config.config_json import config_from_json, config_to_json
from trainer.errors import UserError
from trainer.workdir.workdir import Workdir

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "num_steps": 1, "global_batch_size": 8,
        "model": {
            "target": "trainer.models.mlp:MLP",
            "sizes": [1, 2, 3], "rates": [0.5], "names": ["a"], "flags": [True, False],
            "nested": [[1, 2], [3]], "pair": (1, 2), "empty": [],
            "layers": [ConfigDict({"n": 1, "f": 1.5}), ConfigDict({"n": 2, "f": 2.5})],
            "blocks": (ConfigDict({"n": 1}),), "dicts": [{"n": 1}],
        },
        "loss": {"target": "a:b"}, "data": {"target": "a:b"}, "optimizer": {"target": "a:b"},
    })
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path}/config.py"


def model_of(config, *arguments):
    """What podlift makes of the arguments, and what ml_collections alone does."""
    ours = flags.parse(["launcher", config, *arguments]).config
    _, theirs = load_config(config.removeprefix("--config="))
    values, argv = absl_flags.FlagValues(), ["launcher", *arguments]
    config_flags.DEFINE_config_dict("config", theirs, flag_values=values, sys_argv=argv)
    values(argv)
    return config_to_json(ours), config_to_json(theirs), ours.model


@pytest.mark.parametrize(
    ("arguments", "value", "expected"),
    [
        (["--config.model.sizes[0]=9"], "sizes", [9, 2, 3]),
        (["--config.model.sizes[-1]", "9"], "sizes", [1, 2, 9]),
        (["--config.model.sizes[0]=9", "--config.model.sizes[0]=8"], "sizes", [8, 2, 3]),
        (["--config.model.rates[0]=2"], "rates", [2.0]),
        (["--config.model.names[0]=None"], "names", ["None"]),
        (["--noconfig.model.flags[0]"], "flags", [False, False]),
        (["--config.model.nested[0][1]=7"], "nested", [[1, 7], [3]]),
        (["--config.model['sizes'][1]=7"], "sizes", [1, 7, 3]),
        (["--config.model.layers[0].n=5", "--config.model.layers[1].f=5"], "layers", None),
        (["--config.model.blocks[0].n=5", "--config.model.dicts[0].n=6"], "blocks", None),
    ],
)
def test_indices_mean_what_they_mean_to_ml_collections(
    config, tmp_path, arguments, value, expected
):
    ours, theirs, model = model_of(config, *arguments)
    assert ours == theirs
    if expected is not None:
        assert model[value] == expected
        assert [type(item) for item in model[value]] == [type(item) for item in expected]
    else:
        kept = config_from_json(ours).model
        assert (model.layers[0].n, model.blocks[0].n) in ((5, 1), (1, 5))
        assert kept.layers[0] == {"n": model.layers[0].n, "f": 1.5}
        assert type(model.layers[1].f) is float
        (tmp_path / "config.json").write_text(ours)
        again = flags.parse(["launcher", config, *arguments]).config
        assert Workdir.check(tmp_path, again).changes == ()


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("sizes[3]=1", "config.model.sizes has 3 items", "the first is --config.model.sizes[0]"),
        ("rates[-2]=1", "config.model.rates has 1 item\n", "--config.model.rates[0]"),
        ("empty[0]=1", "config.model.empty has 0 items", "in the config file"),
        ("sizes[0]=x", "config.model.sizes[0]=x: not an integer", "--help"),
        ("sizes[0]=None", "config.model.sizes[0]=None: not an integer", "--help"),
        ("layers[2].n=1", "config.model.layers has 2 items", "layers[0]"),
        ("layers[0].m=1", "config.model.layers[0] has no 'm'", "it has f, n"),
        ("sizes[x]=1", "is not a key with indices|is not the number of an item", ""),
        ("sizes[0=1", "is not a key with indices", "--config.layers[0].n"),
        ("sizes[:]=1", "is not the number of an item of config.model.sizes", ""),
        ("sizes[0][0]=1", "config.model.sizes[0]=1 has no items", ""),
        ("pair[0]=9", "config.model.pair is a tuple", '--config.model.pair="(1, 2)" sets all'),
        ("sizes=(1,2)", "config.model.sizes is a list", "--config.model.sizes[0]=VALUE"),
        ("siezs[0]=9", "the config has no such key", "did you mean --config.model.sizes?"),
    ],
)
def test_a_wrong_index_is_told_in_a_line(config, override, message, hint):
    with pytest.raises(UserError) as error:
        flags.parse(["launcher", config, f"--config.model.{override}"])
    assert any(part in f"{error.value.message}\n" for part in message.split("|")), error.value
    assert hint in error.value.hint
    assert "\n" not in error.value.message


def test_flags_come_from_files(config, tmp_path):
    inner, outer = tmp_path / "inner.flags", tmp_path / "outer.flags"
    inner.write_text("--config.model.names[0]=a b\n--config.seed\n3\n")
    outer.write_text(
        f"# a comment\n\n// another\n{config}\n  --workdir={tmp_path}/a run  \n"
        f"--flagfile={inner}\n--config.num_steps=7\n"
    )
    for given in ([f"--flagfile={outer}"], ["-flagfile", str(outer)]):
        options = flags.parse(["launcher", *expand_flagfiles([*given, "--config.num_steps=8"])])
        assert options.config.model.names == ["a b"]
        assert (options.config.seed, options.config.num_steps) == (3, 8)
        assert options.workdir == f"{tmp_path}/a run"


def test_flagfiles_reach_the_commands(launch, config, tmp_path):
    path = tmp_path / "my flags"
    path.write_text(f"{config}\n--config.model.sizes[0]=9\n--print_config\n")
    code, out, err = launch(f"--flagfile={path}")
    assert (code, err) == (0, "")
    assert "= [9, 2, 3]" in out
    assert "= [{'f': 1.5, 'n': 1}, {'f': 2.5, 'n': 2}]" in out
    with pytest.raises(UserError, match=r"Unable to open flagfile: .*no such file"):
        expand_flagfiles([f"--flagfile={tmp_path}/no such file"])
    with pytest.raises(UserError, match="--flagfile with no argument"):
        expand_flagfiles(["--flagfile"])
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="--flagfile: "):
        expand_flagfiles([f"--flagfile={path}"])
