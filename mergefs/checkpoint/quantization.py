"""Recognising quantised checkpoints, whose numbers are codes and must not be merged as if they were weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from mergefs.checkpoint.dtypes import DType
from mergefs.errors import UnsupportedCheckpointError


class _Tensor(Protocol):
    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


_Tensors = Mapping[str, _Tensor]

_REMEDIES: Final = {
    "fp8": "load it with FineGrainedFP8Config(dequantize=True) of transformers and save_pretrained() the result",
    "mxfp4": "load it with Mxfp4Config(dequantize=True) of transformers and save_pretrained() the result",
    "bitsandbytes": "load it with transformers, call dequantize() on the model and save_pretrained() the result",
}
_DEFAULT_REMEDY: Final = "dequantise it first"
_SHOWN_NAMES: Final = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4", "fp4": "FP4", "fp6": "FP6"}
_BITSANDBYTES_SUFFIXES: Final = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")


def refuse_quantized(directory: Path, config: Mapping[str, Any], tensors: _Tensors) -> None:
    """Raise UnsupportedCheckpointError when ``config`` or ``tensors`` say that the model is quantised.

    ``config`` is the content of ``config.json``. The sentence names the scheme, a tensor if one gives it away, and
    what to do.
    """
    declared = _declared_scheme(config)
    revealed = _revealed_scheme(tensors)
    if declared is None and revealed is None:
        return
    scheme = declared or (revealed[0] if revealed else "")
    evidence = [f"quantization_config in {directory / 'config.json'}"] if declared else []
    if revealed is not None:
        evidence.append(f"tensor {revealed[1]!r}, {revealed[2]}")
    remedy = _REMEDIES.get(scheme, _DEFAULT_REMEDY)
    raise UnsupportedCheckpointError(
        f"{directory} is quantised with {_SHOWN_NAMES.get(scheme, scheme)} ({'; '.join(evidence)}), and codes cannot "
        f"be merged as if they were weights; use the original weights of the model, or {remedy}"
    )


def _declared_scheme(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation method that ``config`` names, for the whole model or for its text part."""
    for section in (config, config.get("text_config")):
        if not isinstance(section, Mapping):
            continue
        for key in ("quantization_config", "compression_config"):
            declaration = section.get(key)
            if not declaration:
                continue
            method = declaration.get("quant_method") if isinstance(declaration, Mapping) else None
            if isinstance(method, str) and method:
                return method.lower()
            if isinstance(declaration, Mapping) and {"load_in_4bit", "load_in_8bit"} & declaration.keys():
                return "bitsandbytes"  # older files leave quant_method out
            return "compressed-tensors" if key == "compression_config" else "an unnamed method"
    return None


def _revealed_scheme(tensors: _Tensors) -> tuple[str, str, str] | None:
    """Return (scheme, tensor, what gives it away) of the first tensor that is no plain weight, or None.

    The tests that know a scheme by name go first over all tensors: codes look alike, what lies beside them does not.
    """
    for test in _TESTS:
        for name, tensor in tensors.items():
            found = test(name, tensor, tensors)
            if found is not None:
                return found[0], name, found[1]
    return None


def _mxfp4_blocks(name: str, tensor: _Tensor, tensors: _Tensors) -> tuple[str, str] | None:
    if not name.endswith("_blocks") or tensor.dtype.name != "U8":
        return None
    scales = tensors.get(name.removesuffix("_blocks") + "_scales")
    return ("mxfp4", "U8 blocks beside U8 scales") if scales is not None and scales.dtype.name == "U8" else None


def _bitsandbytes_state(name: str, tensor: _Tensor, tensors: _Tensors) -> tuple[str, str] | None:
    if ".quant_state." not in name and not name.endswith(_BITSANDBYTES_SUFFIXES):
        return None
    return "bitsandbytes", "quantisation state"


def _packed_group_codes(name: str, tensor: _Tensor, tensors: _Tensors) -> tuple[str, str] | None:
    """GPTQ and AWQ: 32-bit words, packed along the input dimension by GPTQ and along the output one by AWQ."""
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("qweight", "qzeros") or tensor.dtype.kind != "integer":
        return None
    weight, scales = tensors.get(f"{stem}.qweight"), tensors.get(f"{stem}.scales")
    if f"{stem}.g_idx" in tensors:
        scheme = "gptq"
    elif weight is not None and scales is not None and weight.shape and scales.shape:
        scheme = "gptq" if weight.shape[-1] == scales.shape[-1] else "awq"
    else:
        scheme = "GPTQ or AWQ"
    return scheme, f"{tensor.dtype.name} codes of several weights each"


def _small_float_codes(name: str, tensor: _Tensor, tensors: _Tensors) -> tuple[str, str] | None:
    if tensor.dtype.kind != "code":
        return None
    scheme = f"fp{tensor.dtype.bits}"
    beside = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in tensors), None)
    return scheme, f"dtype {tensor.dtype.name}" + (f" with the scales {beside!r}" if beside else "")


def _integer_weight(name: str, tensor: _Tensor, tensors: _Tensors) -> tuple[str, str] | None:
    """Whole-number matrices under the name of a weight: codes of a scheme that is not known by name."""
    is_weight = name.endswith((".weight", ".weight_packed")) and len(tensor.shape) > 1
    if not is_weight or tensor.dtype.kind != "integer":
        return None
    return f"{tensor.dtype.name} codes", f"dtype {tensor.dtype.name}"


_Test = Callable[[str, _Tensor, _Tensors], tuple[str, str] | None]
_TESTS: Final[tuple[_Test, ...]] = (
    _mxfp4_blocks,
    _bitsandbytes_state,
    _packed_group_codes,
    _small_float_codes,
    _integer_weight,
)
