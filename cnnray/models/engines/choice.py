"""Which engine a job asks for, and whether it can be had; known before anything is started."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

from cnnray.errors import SettingsError

PRECISIONS = {
    "eager": ("fp32", "bf16"),
    "compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
"""The engines, and the precisions of each. (ONNX Runtime has no bfloat16 on CPUs.)"""

PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "onnx", "onnxscript"),
}
"""The engines that take ONNX, with what they and the export need; they run on CPUs."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """An engine and its precision; ``or_fp32`` where fp32 will do if the labels differ."""

    name: str = "eager"
    precision: str = "fp32"
    or_fp32: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"

    @property
    def is_reference(self) -> bool:
        """Whether this is what engines are compared with."""
        return (self.name, self.precision) == ("eager", "fp32")

    @property
    def takes_onnx(self) -> bool:
        """Whether it runs an exported model."""
        return self.name in PACKAGES

    @property
    def in_fp32(self) -> EngineChoice:
        """The same engine in float32."""
        return replace(self, precision="fp32", or_fp32=False)


def choose_engine(name: str, precision: str, *, use_gpu: bool) -> EngineChoice:
    """The engine that the settings mean.

    ``auto`` is eager, in bf16 on a GPU if the labels stay, else in fp32. Raises ``SettingsError``
    for what does not go together, and for a package that is not installed.
    """
    name = "eager" if name == "auto" else name
    if use_gpu and name in PACKAGES:
        raise SettingsError(
            f"engine {name} runs on CPUs", hint="leave out --scaling.use_gpu, or --engine.name"
        )
    if precision == "auto":
        choice = EngineChoice(name, "bf16" if use_gpu else "fp32", or_fp32=use_gpu)
    else:
        choice = EngineChoice(name, precision)
    if choice.precision not in PRECISIONS[name]:
        others = [other for other, known in PRECISIONS.items() if choice.precision in known]
        raise SettingsError(
            f"engine {name} does not compute in {choice.precision}",
            hint=f"--engine.precision {' or '.join(PRECISIONS[name])},"
            f" or --engine.name {' or '.join(others)}",
        )
    _require_packages(choice)
    return choice


def _require_packages(choice: EngineChoice) -> None:
    extras = [choice.name] if choice.takes_onnx else []
    if choice.precision == "int8" and choice.name != "onnxruntime":
        extras.append("onnxruntime")  # whose quantisation it is
    for extra in extras:
        for package in PACKAGES[extra]:
            if importlib.util.find_spec(package) is None:
                raise SettingsError(
                    f"engine {choice} needs the package {package}, which is not installed",
                    hint=f"pip install 'cnnray[{','.join(extras)}]'",
                )
