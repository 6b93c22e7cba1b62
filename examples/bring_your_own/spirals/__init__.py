"""An example of a package of your own: a model that separates two interleaved spirals."""
