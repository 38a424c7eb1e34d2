"""What ``gpu_readiness`` measures, on cnnray's own pieces and without Ray.

It is made for machines that hold little more than PyTorch: where simplejpeg is missing, Pillow
decodes alone, which cnnray does anyway for any file that simplejpeg refuses.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import NoReturn


def _refuse(*_: object, **__: object) -> NoReturn:
    raise ValueError("simplejpeg is not installed")


def _stand_in_for_simplejpeg() -> bool:
    """Whether a module had to take simplejpeg's place, which sends every file on to Pillow."""
    if (
        sys.modules.get("simplejpeg") is not None
        or importlib.util.find_spec("simplejpeg") is not None
    ):
        return False
    module = types.ModuleType("simplejpeg")
    vars(module).update(decode_jpeg_header=_refuse, decode_jpeg=_refuse)
    sys.modules["simplejpeg"] = module
    return True


# Here, as decoding processes import this package before anything of cnnray's, too.
JPEG_DECODER = "Pillow, as simplejpeg is missing" if _stand_in_for_simplejpeg() else "simplejpeg"
