"""The merged model without a mount: ``mergefs.open``."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from mergefs.catalog import Catalog, default_location
from mergefs.engine.model_files import ModelFiles
from mergefs.engine.readings import keep_reading
from mergefs.engine.resources import DEFAULT_CACHE_SIZE, Resources
from mergefs.engine.workspace import Workspace
from mergefs.errors import MergefsError
from mergefs.kernels.precision import Raw
from mergefs.planner.options import DEFAULT_SHARD_SIZE, PlanOptions
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.planner.targets import plan_target
from mergefs.progress import Progress
from mergefs.units import parse_size

if TYPE_CHECKING:
    import torch


class TensorNotFoundError(MergefsError, KeyError):
    """A tensor name that the merged model does not have."""

    def __str__(self) -> str:
        return str(self.args[0])


class TensorSlice:
    """A tensor that is read only as far as it is indexed, as ``safetensors.safe_open(...).get_slice``."""

    def __init__(self, model: "MergedModel", plan: TensorPlan) -> None:
        self._model = model
        self._plan = plan

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self._plan.shape)

    def get_dtype(self) -> str:
        """Return the safetensors name of the dtype, such as ``BF16``."""
        return self._plan.dtype.name

    def __getitem__(self, index: Any) -> "torch.Tensor":
        """Return what torch's indexing would return of the whole tensor.

        The first dimension is cut before anything is read; the rest is done on what was read.
        """
        whole = index if isinstance(index, tuple) else (index,)
        shape = self._plan.shape
        first = whole[0] if whole else slice(None)
        if not shape or isinstance(first, bool) or not isinstance(first, (slice, int)):
            return self._model.get_tensor(self._plan.name)[index]
        if isinstance(first, int):
            row = first + shape[0] if first < 0 else first
            if not 0 <= row < shape[0]:
                raise IndexError(f"index {first} is out of bounds for dimension 0 with size {shape[0]}")
            return self._rows(row, row + 1)[(0,) + whole[1:]]
        start, stop, step = first.indices(shape[0])
        if step < 1:
            raise ValueError(f"tensor slices go forward, and the step is {step}")
        return self._rows(start, max(start, stop))[(slice(None, None, step),) + whole[1:]]

    def _rows(self, start: int, stop: int) -> "torch.Tensor":
        """Return entries ``start`` to ``stop`` of the first dimension."""
        shape = self._plan.shape
        entry = self._plan.nbytes // shape[0] if shape[0] else 0
        raw = self._model.files.engine.read_tensor(self._plan.name, start * entry, stop * entry)
        return _as_torch(raw, self._plan, (stop - start, *shape[1:]))


class MergedModel:
    """A merged model, with the interface of ``safetensors.safe_open(..., framework="pt")`` over all its shards.

    Nothing is read before it is asked for. Use it as a context manager, or call ``close``.
    """

    def __init__(self, plan: MergePlan, resources: Resources) -> None:
        self._resources = resources
        self._closed = False
        self.files = ModelFiles(plan, resources, strict=False)

    @property
    def plan(self) -> MergePlan:
        """The plan that the bytes are computed from."""
        return self.files.plan

    @property
    def bytes_read(self) -> Mapping[str, int]:
        """What was really read so far, in bytes by purpose."""
        totals = self._resources.ledger.totals()
        return {name: getattr(totals, name) for name in totals.__slots__}

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.plan.tensors)

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the safetensors headers."""
        return {"format": "pt"}

    def get_tensor(self, name: str) -> "torch.Tensor":
        """Return a whole tensor; TensorNotFoundError when there is none of that name."""
        plan = self._tensor(name)
        raw = self.files.engine.read_tensor(name, 0, plan.nbytes)
        return _as_torch(raw, plan, plan.shape)

    def get_slice(self, name: str) -> TensorSlice:
        """Return a tensor that is read as far as it is indexed."""
        return TensorSlice(self, self._tensor(name))

    def read_file(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file of the model's directory, such as ``config.json`` or ``model.safetensors``."""
        if name not in self.files.sizes:
            raise TensorNotFoundError(f"the merged model has no file {name!r}; it has {', '.join(self.files.sizes)}")
        return self.files.read(name, offset, self.files.sizes[name] - offset if size is None else size)

    def close(self) -> None:
        """Close source files and catalog, which keeps what was read for `mergefs explain`."""
        if not self._closed:
            self._closed = True
            keep_reading(self.files.engine, "open", self._resources.catalog)
            self._resources.close()

    def __enter__(self) -> "MergedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> TensorPlan:
        plan = self.plan.tensors.get(name)
        if plan is None:
            raise TensorNotFoundError(f"the merged model has no tensor {name!r}; keys() lists those that it has")
        return plan


def open_model(
    recipe: str | Path,
    *,
    budget: str | None = None,
    base: str | None = None,
    random_seed: int = 0,
    catalog: str | Path | None = None,
    cache_size: int | str = DEFAULT_CACHE_SIZE,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    verify_reads: bool = True,
    progress: Progress | None = None,
) -> MergedModel:
    """Plan the recipe file and return the merged model without mounting it; ``recipe`` may be the id of a kept plan.

    ``budget``, ``base`` and ``random_seed`` mean what they mean on the command line; sizes are bytes or text such as
    ``"2GiB"``. ``verify_reads`` holds what is read against the hashes of the last analysis. Raises the errors of
    ``mergefs.errors``.
    """
    options = PlanOptions(budget, base, random_seed, _size(max_shard_size))
    opened = Catalog(Path(catalog) if catalog else default_location())
    resources = Workspace.create(opened, _size(cache_size), verify_reads)
    try:
        plan = plan_target(Path(recipe), options, resources, progress)
        return MergedModel(plan, resources)
    except BaseException:
        resources.close()
        raise


def _size(value: int | str) -> int:
    return value if isinstance(value, int) else parse_size(value)


def _as_torch(raw: Raw, plan: TensorPlan, shape: tuple[int, ...]) -> "torch.Tensor":
    """Return bytes of the plan's dtype as a torch tensor of ``shape``, without another copy."""
    import torch  # here, because a mount's server must do without it

    dtype: torch.dtype = getattr(torch, plan.dtype.torch_name)
    if raw.size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.ascontiguousarray(raw)).view(dtype).reshape(shape)
