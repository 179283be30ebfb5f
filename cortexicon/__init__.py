"""Cortexicon: parcellated fMRI as tokens that a language model reads."""

import os as _os

__version__ = "0.1.0"

# In a checkout the rooms are siblings of this folder; in a wheel they lie inside it.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "pyproject.toml")) and _os.path.isdir(
    _os.path.join(_root, "modeling")
):
    __path__.append(_root)
