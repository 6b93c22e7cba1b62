"""`python -m launcher plan`: what a run would need and how fast it would be, without the devices.

Data flows one way: `topology` (what was asked for) -> `devices` (abstract, of a compiler) ->
`program` (the run's own step, compiled) -> `predict` (a model of its time) -> `tell` and `figure`.
`command` is the way through.
"""
