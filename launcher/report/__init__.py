"""`python -m launcher report`: runs as one page of HTML that needs no other file.

Data flows one way: `read` (what a folder holds) with `attempts` (what its logs say) -> `page`, with
`chart` for curves, `thin` for fewer points and `scale` for axes. `command` is the way through.
"""
