"""Machine code of kernels is kept on disk: a process that finds it there loads no compiler."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_inputs import assert_equals_reference, random_inputs
from kernel_processes import run_python

from mergefs.checkpoint.dtypes import BF16, F32
from mergefs.kernels.fused import compilation, kept_code, types
from mergefs.kernels.fused.compiler import compile_kernel
from mergefs.kernels.fused.kept_code import PLACE, KeptCode
from mergefs.kernels.fused.machine_code import MachineCode, load
from mergefs.kernels.fused.memory import addresses
from mergefs.kernels.fused.values import loaded
from mergefs.methods.slerp import Slerp, SlerpCoefficients

SLERP_IN_ANOTHER_PROCESS = """
import sys
import numpy as np
from mergefs.checkpoint.dtypes import BF16
from mergefs.kernels.fused import prepare, two_factors
from mergefs.engine.compute import convert, run_kernel
from mergefs.methods.slerp import Slerp, SlerpCoefficients
prepare(["two_factors"], [BF16])
raw = np.array([0x3F80, 0x4000], dtype=np.uint16).view(np.uint8)
print(run_kernel(Slerp(), SlerpCoefficients(0, 1, 1.0, 1.0), ((raw, BF16), (raw, BF16)), BF16, BF16, 0).tobytes().hex())
print("loaded" if two_factors.KERNEL.loaded_from_disk else "compiled", "numba" in sys.modules)
"""
ONE_AND_TWO_DOUBLED = "00408040"
COMPILED = [ONE_AND_TWO_DOUBLED, "compiled", "True"]
LOADED = [ONE_AND_TWO_DOUBLED, "loaded", "False"]


def doubled(result: Any, source: Any) -> None:
    for i in range(np.uint64(result.size)):
        result[i] = source[i] * np.float32(2)


SINGLES = types.Array(types.float32, 1)
SIGNATURE = types.void(SINGLES, types.Array(types.float32, 1, readonly=True))


def kernel() -> compilation.Kernel:
    """Return a kernel that has neither been loaded nor compiled."""
    return compilation.Kernel(doubled, lambda: SIGNATURE)


def slerp_by_a_new_kernel(monkeypatch: pytest.MonkeyPatch) -> compilation.Kernel:
    """Hold a merge by a kernel that nobody has loaded before against the reference, and return the kernel."""
    from mergefs.kernels.fused import two_factors

    new = compilation.Kernel(two_factors._two_factors, two_factors._signature)
    monkeypatch.setattr(two_factors, "KERNEL", new)
    assert_equals_reference(Slerp(), SlerpCoefficients(0, 1, 0.3, 0.7), random_inputs(1, 2, 100, F32), F32)
    return new


def test_the_next_process_loads_what_was_compiled_without_a_compiler(tmp_path: Path) -> None:
    assert run_python(SLERP_IN_ANOTHER_PROCESS, tmp_path).split() == COMPILED
    assert run_python(SLERP_IN_ANOTHER_PROCESS, tmp_path).split() == LOADED


@pytest.mark.parametrize("kept_bytes", [0, 20, 100, -1])
def test_damaged_code_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    slerp_by_a_new_kernel(monkeypatch)
    assert slerp_by_a_new_kernel(monkeypatch).loaded_from_disk == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert slerp_by_a_new_kernel(monkeypatch).loaded_from_disk == 0
    assert slerp_by_a_new_kernel(monkeypatch).loaded_from_disk == 1


def test_a_changed_byte_of_kept_code_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    slerp_by_a_new_kernel(monkeypatch)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert slerp_by_a_new_kernel(monkeypatch).loaded_from_disk == 0


def test_where_no_directory_can_be_made_kernels_are_compiled_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(PLACE, str(tmp_path / "file" / "kernels"))
    assert slerp_by_a_new_kernel(monkeypatch).loaded_from_disk == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_kernels_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def fail(path: Path, data: bytes) -> None:
        attempts.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setenv(PLACE, str(tmp_path))
    monkeypatch.setattr(kept_code, "_write", fail)
    slerp_by_a_new_kernel(monkeypatch)
    assert attempts


def test_code_lies_beside_the_sources_or_else_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PLACE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    beside, cache = kept_code._directories(Path("/somewhere/kernel.py"))
    assert beside == Path("/somewhere/__pycache__")
    assert cache == tmp_path / "mergefs" / "kernels"
    monkeypatch.setattr(kept_code, "_directories", lambda source: (tmp_path / "file" / "none", cache))
    (tmp_path / "file").touch()
    kernel().compiled()
    assert len(list(cache.iterdir())) == 1


def test_code_of_other_sources_is_not_loaded_and_goes_when_new_code_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    code = compile_kernel(doubled, SIGNATURE)
    KeptCode(doubled, SIGNATURE).save(code)
    (before,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(kept_code, "sources_digest", lambda package: "other sources")
        assert KeptCode(doubled, SIGNATURE).load() is None
        KeptCode(doubled, SIGNATURE).save(code)
        assert KeptCode(doubled, SIGNATURE).load() == code
    (after,) = tmp_path.iterdir()
    assert before != after
    assert KeptCode(doubled, SIGNATURE).load() is None


def test_code_for_another_cpu_is_kept_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    code = compile_kernel(doubled, SIGNATURE)
    KeptCode(doubled, SIGNATURE).save(code)
    monkeypatch.setattr(kept_code, "circumstances", lambda: "another CPU")
    assert KeptCode(doubled, SIGNATURE).load() is None
    KeptCode(doubled, SIGNATURE).save(MachineCode((), b"other code"))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kernel_takes_arrays_of_its_types_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    compiled = kernel().compiled()
    source, result = np.arange(4, dtype=np.float32), np.zeros(4, dtype=np.float32)
    source.flags.writeable = False
    compiled(result, source)
    assert result.tolist() == [0, 2, 4, 6]
    result[:] = 0
    misfits: list[tuple[Any, ...]] = [
        (result,),
        (result, source, source),
        (result, source.astype(np.float64)),
        (result, source.reshape(2, 2)),
        (result, np.zeros(8, dtype=np.float32)[::2]),
        (source, source),
        (result, [0.0, 1.0]),
        (result, np.zeros(17, dtype=np.uint8)[1:].view(np.float32)),
    ]
    for arguments in misfits:
        with pytest.raises(TypeError, match="the kernel doubled was called with other arguments than it takes"):
            compiled(*arguments)
    assert not result.any()


def test_an_instruction_cannot_be_called_from_python() -> None:
    with pytest.raises(TypeError, match="loaded is an instruction of compiled kernels"):
        loaded(addresses([np.zeros(2, dtype=np.uint8)])[0], 0, np.zeros(0, dtype=np.uint16))


def returning(result: Any, source: Any) -> Any:
    result[0] = source[0]
    return np.float32(1)


def test_a_kernel_that_returns_something_is_refused() -> None:
    with pytest.raises(TypeError, match="the kernel returning returns a float32"):
        compile_kernel(returning, SIGNATURE)


def test_code_that_calls_what_there_is_not_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(OSError, match="compiled code calls 'no_such_function', which this process does not have"):
        load(MachineCode(("no_such_function",), b""))


def test_kernels_for_statistics_have_a_second_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergefs.kernels.fused import karcher

    monkeypatch.setenv(PLACE, str(tmp_path))
    new = compilation.Kernel(karcher._karcher, karcher._signature, for_statistics=True)
    new.compiled(BF16)
    new.compiled(BF16, F32)
    assert new.specialisations == 2
