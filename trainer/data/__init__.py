"""Data sources and the order of examples.

A data target returns `{"train": source, "eval": source}` ("eval" is optional), where a source is a
dict of arrays with a leading example axis, or any object with `len(source)` and
`source[indices] -> dict of arrays` (`stream.Source`). Other rooms use `stream` (`TrainStream`,
`eval_batches`, `as_source`), `prefetch` and `fingerprint` (whether two sources hold the same
examples); configs name the targets in `digits`, `grain_source`, `idx`, `images`, `synthetic`,
`text`, `tutorial` and `augment`.
"""
