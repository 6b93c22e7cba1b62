"""Configs: their keys, their checks and the code they name.

Nothing here imports jax, so a launcher can check a config at once. Other rooms use `keys` (`KEYS`,
`with_defaults`, `flatten`), `settings.check` and `settings.Settings`, `targets` (`build`, `bind`,
`resolve`) and `config_json`.
"""
