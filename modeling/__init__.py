"""What `AutoModel` loads: the autoencoder (AVQ) and the language model that reads its codes."""

from .configuration_avq import AVQConfig, ConfigurationError
from .configuration_avq_lm import AVQLMConfig
from .modeling_avq import AVQModel
from .modeling_avq_lm import AVQLMForConditionalGeneration
from .outputs_avq import AVQDecoderOutput, AVQEncoderOutput, AVQOutput

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
