"""The folder of a run on disk, without jax.

`workdir.Workdir` has its paths and decides whether a config may resume the run in it;
`workdir.read_config` reads the config of a run. `lock` keeps two jobs out of one folder,
`environment` describes software and devices for `env.json`, and `paths` handles local and remote
(`gs://...`) paths and replaces files atomically.
"""
