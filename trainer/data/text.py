"""Text as characters: Python's own `pydoc_data.topics`, or any file."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.errors import UserError


def characters(
    length: int,
    vocab_size: int,
    path: str | None = None,
    stride: int | None = None,
    held_out_fraction: float = 0.1,
) -> dict[str, Any]:
    """Windows of text: `x` uint8 (examples, length), and `y`, shifted by one character.

    Characters are numbered by frequency. The rarest, beyond `vocab_size - 1`, share the last
    number, so the size of a model does not depend on the Python version that the text comes from.

    Args:
        length: characters per window.
        vocab_size: how many numbers there are, at most 256.
        path: a text file in UTF-8; None: the topics of `pydoc_data` (about 465,000 characters of
            English prose and code, in every Python).
        stride: characters from one training window to the next; None: `length`.
        held_out_fraction: the fraction of the text, at its end, to keep for evaluation.

    Raises:
        UserError: the file cannot be read, or an argument is out of range.
    """
    if not 2 <= vocab_size <= 256:
        raise UserError(f"config.data.vocab_size={vocab_size} should be 2 to 256")
    if path is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        from etils import epath

        try:
            text = epath.Path(path).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"config.data.path={path!r} cannot be read: {error}") from error
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    _, first, inverse, counts = np.unique(
        codes, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(counts), np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    tokens = np.minimum(rank, vocab_size - 1)[inverse].astype(np.uint8)
    split = int(len(tokens) * (1 - held_out_fraction))
    if min(split, len(tokens) - split) <= length:
        raise UserError(
            f"config.data.length={length}: the text of {len(tokens)} characters is too short"
        )

    def windows(tokens: np.ndarray, step: int) -> dict[str, np.ndarray]:
        # A view, so that only the windows of a batch are ever copied.
        view = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::step]
        return {"x": view[:, :-1], "y": view[:, 1:]}

    return {
        "train": windows(tokens[:split], stride or length),
        "eval": windows(tokens[split:], length),
    }
