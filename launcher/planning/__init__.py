"""`python -m launcher plan`: what a run needs on devices that are not here, and how fast it is.

A `request.PlanRequest` (a config on a `topology`) goes through `forecast.make_forecast`: `devices`
finds devices of its compiler, `program` compiles the run's own step for them and reads its text
with `hlo`, `step_time` predicts its time from the constants in `chips`. `render` and `figure` show
the resulting `Forecast`. `example.in_place_of_data` also serves `export`.
"""
