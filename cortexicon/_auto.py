"""Registers AVQ with the Auto classes of transformers, at the first moment it is needed.

``import cortexicon`` must make ``AutoModel.from_pretrained(folder)`` work, yet importing torch and
transformers takes seconds that ``cortexicon --help`` and the cohort tools need not pay. So the
registration waits until somebody else loads the Auto classes: a finder at the front of
``sys.meta_path`` notices imports of transformers (and of the two rooms that AutoModel loads), and
once the outermost of them has finished, it registers and removes itself.

NOTE: waiting for the *outermost* import is the point. Inside transformers the Auto classes are
loaded half-way through other modules (``modeling_layers`` does so); importing our models there
would meet half-initialised modules.
"""

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO_CLASSES = "transformers.models.auto.configuration_auto"
_OWN_ROOMS = ("cortexicon.modeling", "cortexicon.tokenization")


def register_auto_classes() -> None:
    """Make transformers' Auto classes and pipelines know the AVQ codec and language model.

    Safe to call more than once. An error inside one of the rooms is not caught.
    """
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForMultimodalLM,
        AutoProcessor,
        AutoTokenizer,
    )

    from cortexicon import _pipeline
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

    for config_class in (AVQConfig, AVQLMConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoTokenizer.register(config_class, tokenizer_class=AVQTokenizer, exist_ok=True)
        AutoFeatureExtractor.register(config_class, AVQFeatureExtractor, exist_ok=True)
        AutoProcessor.register(config_class, AVQProcessor, exist_ok=True)
    AutoConfig.register(AVQConnectomeConfig.model_type, AVQConnectomeConfig, exist_ok=True)
    AutoConfig.register(FMRIMAEConfig.model_type, FMRIMAEConfig, exist_ok=True)
    AutoFeatureExtractor.register(FMRIMAEConfig, AVQFeatureExtractor, exist_ok=True)
    AutoModel.register(AVQConfig, AVQModel, exist_ok=True)
    AutoModel.register(FMRIMAEConfig, FMRIMAEModel, exist_ok=True)
    AutoConfig.register(FMRIPrefixLMConfig.model_type, FMRIPrefixLMConfig, exist_ok=True)
    AutoModel.register(FMRIPrefixLMConfig, FMRIPrefixLM, exist_ok=True)
    AutoModel.register(AVQConnectomeConfig, AVQConnectomeModel, exist_ok=True)
    AutoModel.register(AVQLMConfig, AVQLMForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(AVQLMConfig, AVQLMForConditionalGeneration, exist_ok=True)
    _pipeline.register()


def install() -> None:
    """Register now if the Auto classes are already loaded, else as soon as they are."""
    if _AUTO_CLASSES in sys.modules:
        register_auto_classes()
    else:
        sys.meta_path.insert(0, _OutermostImport())


class _OutermostImport(MetaPathFinder):
    """Finds nothing itself; wraps the loader of the outermost watched import of each thread."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        watched = fullname.partition(".")[0] == "transformers" or fullname in _OWN_ROOMS
        if not watched or getattr(self._thread, "busy", False):
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Notifying(spec.loader, self)
                return spec
        return None

    def run(self, loader: Loader, module: ModuleType) -> None:
        """Execute `module`, then register when that has brought the Auto classes in."""
        self._thread.busy = True
        try:
            loader.exec_module(module)
            if _AUTO_CLASSES in sys.modules and self in sys.meta_path:
                register_auto_classes()
                sys.meta_path.remove(self)
        finally:
            self._thread.busy = False


class _Notifying(Loader):
    """A loader that hands itself back to the original one before the module's code runs."""

    def __init__(self, loader: Loader, finder: _OutermostImport) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if it had never been wrapped: inspect and pkgutil read these two.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._finder.run(self._loader, module)
