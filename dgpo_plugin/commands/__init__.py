"""The ``dgpo`` command."""
