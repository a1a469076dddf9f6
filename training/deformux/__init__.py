"""DeformUX-Net for volumetric segmentation: network, preprocessing, training, correction, scores.

The names below are the package's public interface. Each is imported when it is first used, so that ``import deformux``
imports neither PyTorch nor MONAI.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "DeformUXNet",
    "Editor",
    "Learner",
    "Preprocessing",
    "Recipe",
    "__version__",
    "evaluate",
    "fit",
    "load_model",
    "save_model",
    "segment",
]

# Deprecation warnings that MONAI 1.5 triggers itself: the user can do nothing about them.
for _message in (
    "`torch.jit.interface` is deprecated",
    "Using a non-tuple sequence for multidimensional indexing",
    "monai.metrics.utils get_mask_edges:always_return_as_numpy",
):
    warnings.filterwarnings("ignore", message=_message)

if TYPE_CHECKING:
    from deformux.data.preprocessing import Preprocessing
    from deformux.fitting.fit import fit
    from deformux.fitting.recipe import Recipe
    from deformux.inference.evaluate import evaluate
    from deformux.inference.sliding_window import segment
    from deformux.interactive.editor import Editor
    from deformux.networks.deformux_net import DeformUXNet
    from deformux.networks.model_file import load_model, save_model
    from deformux.publishing.learner import Learner
else:
    _MODULES = {
        "DeformUXNet": "deformux.networks.deformux_net",
        "Editor": "deformux.interactive.editor",
        "Learner": "deformux.publishing.learner",
        "Preprocessing": "deformux.data.preprocessing",
        "Recipe": "deformux.fitting.recipe",
        "evaluate": "deformux.inference.evaluate",
        "fit": "deformux.fitting.fit",
        "load_model": "deformux.networks.model_file",
        "save_model": "deformux.networks.model_file",
        "segment": "deformux.inference.sliding_window",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
