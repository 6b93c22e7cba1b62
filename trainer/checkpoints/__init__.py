"""States that outlive their run: on disk with Orbax, checked byte for byte, and in memory."""
