"""Data: sources that gather examples by index, and the order in which they are visited.

A data target returns `{"train": source, "eval": source}` ("eval" may be absent). A source is a
dict of arrays with a leading example axis, or any object with `len(source)` and
`source[indices] -> dict of arrays` for an integer array `indices` of any shape (see
`trainer.data.stream.Source`).
"""
