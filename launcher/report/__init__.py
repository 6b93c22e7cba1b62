"""`python -m launcher report`: reads the folders of runs and renders them as one page of HTML.

`read.read_runs` returns a `Run` for each folder (`sweep` uses it, too), with `attempts` from its
logs; `page.render` makes the page, with a `chart` for each metric. Nothing here imports jax.
"""
