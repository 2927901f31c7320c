"""Quantised models are refused by name, whatever gives them away."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_model
from model_directories import BF16, directory_with, refusal, weights

from mergefs.checkpoint import DTYPES, encode_header, open_checkpoint
from mergefs.errors import UnsupportedCheckpointError


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize(
    ("declaration", "scheme"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "scheme-of-tomorrow"}, "scheme-of-tomorrow"),
        ({"bits": 3}, "an unnamed method"),
    ],
)
def test_a_declared_quantisation_is_refused_by_name(
    tmp_path: Path, declaration: dict[str, Any], scheme: str, part: str | None
) -> None:
    config: dict[str, Any] = {"quantization_config": declaration}
    write_model(tmp_path, weights(), {part: config} if part else config)
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"is quantised with {scheme} (quantization_config in {tmp_path / 'config.json'})" in message
    assert "use the original weights of the model, or " in message


FP8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)
WORDS = torch.zeros(8, 16, dtype=torch.int32)
CODES = torch.zeros(8, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "scheme", "evidence"),
    [
        ({"q.weight": FP8}, "FP8", "tensor 'q.weight', dtype F8_E4M3)"),
        (
            {"q.weight": FP8, "q.weight_scale_inv": torch.ones(1, 1)},
            "FP8",
            "tensor 'q.weight', dtype F8_E4M3 with the scales 'q.weight_scale_inv')",
        ),
        (
            {"q.weight": FP8.to(torch.float8_e5m2), "q.weight_scale": torch.ones(4)},
            "FP8",
            "tensor 'q.weight', dtype F8_E5M2 with the scales 'q.weight_scale')",
        ),
        (
            {"q.qweight": WORDS, "q.qzeros": WORDS, "q.scales": torch.ones(1, 16), "q.g_idx": WORDS[0]},
            "GPTQ",
            "tensor 'q.qweight', I32 codes",
        ),
        ({"q.qweight": WORDS, "q.scales": torch.ones(1, 16)}, "GPTQ", "tensor 'q.qweight', I32 codes"),
        ({"q.qweight": WORDS, "q.qzeros": WORDS, "q.scales": torch.ones(1, 128)}, "AWQ", "tensor 'q.qweight'"),
        (
            {"q.weight": CODES, "q.weight.absmax": torch.ones(4), "q.weight.quant_map": torch.ones(16)},
            "bitsandbytes",
            "tensor 'q.weight.absmax', quantisation state",
        ),
        (
            {"q.weight.quant_state.bitsandbytes__nf4": CODES[0]},
            "bitsandbytes",
            "tensor 'q.weight.quant_state.bitsandbytes__nf4', quantisation state",
        ),
        ({"q.SCB": torch.ones(4)}, "bitsandbytes", "tensor 'q.SCB', quantisation state"),
        (
            {"experts.down_proj_blocks": CODES, "experts.down_proj_scales": CODES},
            "MXFP4",
            "tensor 'experts.down_proj_blocks', U8 blocks beside U8 scales",
        ),
        ({"q.weight": CODES.to(torch.int8)}, "I8 codes", "tensor 'q.weight', dtype I8"),
        ({"q.weight_packed": WORDS}, "I32 codes", "tensor 'q.weight_packed', dtype I32"),
    ],
)
def test_tensors_give_away_a_quantisation_that_the_config_does_not_declare(
    tmp_path: Path, tensors: dict[str, torch.Tensor], scheme: str, evidence: str
) -> None:
    separate = {name: tensor.clone() for name, tensor in tensors.items()}
    write_model(tmp_path, {"norm.weight": torch.ones(4), **separate}, {})
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"is quantised with {scheme} (" in message
    assert evidence in message
    assert "; use the original weights of the model, or " in message


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.kind == "code"], ids=lambda d: d.name)
def test_every_code_dtype_is_refused(tmp_path: Path, dtype: Any) -> None:
    directory_with(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(encode_header([("w", dtype, (8,))], {}) + bytes(dtype.bits))
    assert f"is quantised with FP{dtype.bits} (tensor 'w', dtype {dtype.name})" in refusal(
        tmp_path, UnsupportedCheckpointError
    )


def test_a_declared_quantisation_is_shown_with_its_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, {"q.weight": FP8}, {"quantization_config": {"quant_method": "fp8"}})
    message = refusal(tmp_path, UnsupportedCheckpointError)
    assert f"FP8 (quantization_config in {tmp_path / 'config.json'}; tensor 'q.weight', dtype F8_E4M3)" in message
    assert "FineGrainedFP8Config(dequantize=True)" in message


def test_plain_models_with_unusual_tensors_are_not_taken_for_quantised_ones(tmp_path: Path) -> None:
    tensors = {
        "position_ids": torch.zeros(1, 8, dtype=torch.int64),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "step.weight": torch.zeros(3, dtype=torch.int64),
        "router.scales": torch.ones(4),
        "layer.weight": torch.ones(2, 2, dtype=BF16),
        "layer.weight_scale": torch.ones(2),
        "vision_blocks": torch.ones(2),
        "vision_scales": torch.ones(2),
    }
    undeclared: tuple[dict[str, Any] | None, ...] = (None, {})
    for declaration in undeclared:
        config = {"quantization_config": declaration, "text_config": None}
        assert len(open_checkpoint(write_model(tmp_path, tensors, config)).tensors) == len(tensors)
