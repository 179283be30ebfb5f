"""What `AutoModel` loads: the autoencoder (AVQ) and the language model that reads and writes its codes."""

from .configuration_avq import AVQConfig, ConfigurationError
from .configuration_avq_lm import AVQLMConfig
from .modeling_avq import AVQDecoderOutput, AVQEncoderOutput, AVQModel, AVQOutput
from .modeling_avq_lm import AVQLMForConditionalGeneration

__all__ = [
    "AVQConfig",
    "AVQDecoderOutput",
    "AVQEncoderOutput",
    "AVQLMConfig",
    "AVQLMForConditionalGeneration",
    "AVQModel",
    "AVQOutput",
    "ConfigurationError",
]
