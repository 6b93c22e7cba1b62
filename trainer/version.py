"""The version of podlift."""

__version__ = "0.1.0"
