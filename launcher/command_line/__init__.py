"""Reads command lines and config files, without jax.

`flags.parse` returns the `Options` of a training run; `parse` reads the flags of any command
(`read_command` with a config, `read_arguments` without); `config_file` runs a config file,
`overrides` checks `--config.KEY=VALUE`, and `variants` reads the variants of a sweep.
"""
