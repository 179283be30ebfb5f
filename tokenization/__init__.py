"""What AutoTokenizer, AutoFeatureExtractor and AutoProcessor load: text, scans and codes to ids.

The files of this folder travel with the checkpoints, so they import torch, transformers, numpy and
each other, nothing else. Each of the three classes calls ``register_for_auto_class``, so
``save_pretrained`` ships its code. The package's own registration with the Auto classes pairs
``AVQTokenizer``, ``AVQFeatureExtractor`` and ``AVQProcessor`` with ``AVQConfig`` and
``AVQLMConfig`` of ``cortexicon.modeling``; this room does not know those.
"""

from .feature_extraction_avq import AVQFeatureExtractor
from .processing_avq import AVQProcessor
from .tokenization_avq import AVQTokenizer
from .tokenization_errors import TokenizationError

__all__ = ["AVQFeatureExtractor", "AVQProcessor", "AVQTokenizer", "TokenizationError"]
