"""`python -m surgery`, for launchers that start modules."""

from importlib import import_module

# By name, because the bench does not depend on the command line.
import_module("cli.main").entry()
