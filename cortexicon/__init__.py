"""Cortexicon: parcellated fMRI as discrete tokens that a language model reads.

``import cortexicon`` is light: the public names below are loaded when they are first used, and the
Auto classes of transformers learn about AVQ when transformers loads them (``_auto.py``).
"""

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout the rooms are siblings of this folder; in a wheel they lie inside it.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "pyproject.toml")) and _os.path.isdir(
    _os.path.join(_root, "modeling")
):
    __path__.append(_root)

# Public name -> the room that defines it.
_PUBLIC = {
    "AVQConfig": "modeling",
    "AVQModel": "modeling",
    "AVQConnectomeConfig": "modeling",
    "AVQConnectomeModel": "modeling",
    "AVQLMConfig": "modeling",
    "AVQLMForConditionalGeneration": "modeling",
    "FMRIMAEConfig": "modeling",
    "FMRIMAEModel": "modeling",
    "FMRIPrefixLM": "modeling",
    "FMRIPrefixLMConfig": "modeling",
    "AVQFeatureExtractor": "tokenization",
    "AVQTokenizer": "tokenization",
    "AVQProcessor": "tokenization",
    "ParcelSeries": "cohorts",
    "Cohort": "cohorts",
    "load_cohort": "cohorts",
    "save_cohort": "cohorts",
    "simulate_cohort": "cohorts",
    "make_split": "cohorts",
    "load_split": "cohorts",
}

__all__ = ["__version__", *_PUBLIC]

if _TYPE_CHECKING:
    from cortexicon.cohorts import (
        Cohort,
        ParcelSeries,
        load_cohort,
        load_split,
        make_split,
        save_cohort,
        simulate_cohort,
    )
    from cortexicon.modeling import (
        AVQConfig,
        AVQConnectomeConfig,
        AVQConnectomeModel,
        AVQLMConfig,
        AVQLMForConditionalGeneration,
        AVQModel,
        FMRIMAEConfig,
        FMRIMAEModel,
        FMRIPrefixLM,
        FMRIPrefixLMConfig,
    )
    from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cortexicon' has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"cortexicon.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_importlib.import_module("cortexicon._auto").install()
