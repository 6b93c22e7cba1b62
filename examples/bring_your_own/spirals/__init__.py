"""A package of the user's own: two interleaved spirals, to be told apart."""
