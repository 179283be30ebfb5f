"""What `AutoModel` loads: the autoencoders (AVQ, MAE) and the language models that read scans."""

from .configuration_avq import AVQConfig, ConfigurationError
from .configuration_avq_connectome import AVQConnectomeConfig
from .configuration_avq_lm import AVQLMConfig
from .configuration_fmri_mae import FMRIMAEConfig
from .configuration_fmri_prefix_lm import FMRIPrefixLMConfig
from .generation_avq_lm import AnswersOnly, CodesOnly
from .inputs_avq import fisher_z_matrices
from .modeling_avq import AVQModel
from .modeling_avq_connectome import AVQConnectomeModel
from .modeling_avq_lm import AVQLMForConditionalGeneration
from .modeling_fmri_mae import FMRIMAEEncoderOutput, FMRIMAEModel, FMRIMAEOutput
from .modeling_fmri_prefix_lm import FMRIPrefixLM
from .outputs_avq import AVQDecoderOutput, AVQEncoderOutput, AVQOutput
from .outputs_avq_connectome import (
    AVQConnectomeDecoderOutput,
    AVQConnectomeEncoderOutput,
    AVQConnectomeOutput,
)

__all__ = [
    "AVQConfig",
    "AVQConnectomeConfig",
    "AVQConnectomeDecoderOutput",
    "AVQConnectomeEncoderOutput",
    "AVQConnectomeModel",
    "AVQConnectomeOutput",
    "AVQDecoderOutput",
    "AVQEncoderOutput",
    "AVQLMConfig",
    "AVQLMForConditionalGeneration",
    "AVQModel",
    "AVQOutput",
    "AnswersOnly",
    "CodesOnly",
    "ConfigurationError",
    "FMRIMAEConfig",
    "FMRIMAEEncoderOutput",
    "FMRIMAEModel",
    "FMRIMAEOutput",
    "FMRIPrefixLM",
    "FMRIPrefixLMConfig",
    "fisher_z_matrices",
]
