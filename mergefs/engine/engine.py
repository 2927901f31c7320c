"""The engine: any byte range of a planned model, from only those blocks that the plan paid for."""

import logging
import threading
from bisect import bisect_right
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import numpy as np

from mergefs.checkpoint.dtypes import DType
from mergefs.engine.compute import is_finite
from mergefs.engine.inputs import InputReader
from mergefs.engine.merging import coefficients_of, merge_block
from mergefs.engine.resources import Resources
from mergefs.engine.tally import Tally
from mergefs.errors import NonFiniteError, PlanError
from mergefs.kernels.fused import prepare
from mergefs.kernels.precision import Raw
from mergefs.planner.plan import MergePlan, OutputFile, TensorPlan
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import Place
from mergefs.sources.reader import check_unchanged

_LOG = logging.getLogger(__name__)


class Engine:
    """Computes the bytes of one plan. Safe to share between threads.

    ``strict`` says what happens when a merge has no finite result: with it a NonFiniteError names the tensor, without
    it the values are served as they are and the log names the tensor, because an error would kill who reads a mount.
    A ``nested`` engine computes the inputs of another one, within the memory that the other has reserved. ``tally``
    counts what is really read of experts.
    """

    def __init__(self, plan: MergePlan, resources: Resources, strict: bool, nested: bool = False) -> None:
        self.plan = plan
        self._resources = resources
        self._strict = strict
        self._nested = nested
        self._files = {file.name: file for file in plan.files}
        self._plane_files = plan.plane_files
        self._coefficients: dict[str, Any] = {}
        self._gathering = {name: threading.Lock() for name in plan.tensors}
        self._prepared: set[str] = set()
        self._working_bytes: dict[str, int] = {}
        self.tally = Tally(resources.ledger)
        self._reported: set[str] = set()
        self._lock = threading.Lock()
        number = 0
        if not nested:  # else its blocks are the outer one's
            files = (file for source in plan.sources for file in source.checked_files)
            number = resources.shared.add_user(self, files)
        self._inputs = InputReader(resources.reader, self.tally, from_the_middle=number % 2 == 1)

    def read_file(self, name: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a weight file from ``offset``; fewer only where the file ends."""
        file = self._files[name]
        end = min(offset + size, file.size)
        pieces: list[bytes | Raw] = []
        if offset < min(end, len(file.header)):
            pieces.append(file.header[offset : min(end, len(file.header))])
        position = max(offset, len(file.header))
        while position < end:
            tensor, begin = self._tensor_at(file, position)
            stop = min(end - begin, tensor.nbytes)
            pieces += self._pieces(tensor, position - begin, stop)
            position = begin + stop
        data = b"".join(piece if isinstance(piece, bytes) else piece.data for piece in pieces)
        self._resources.ledger.record_served(len(data))
        return data

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a weight file from ``offset``, at which there must be so many.

        Of the blocks only those at the edges are kept in the cache: who reads in this way comes by once.
        """
        file, end = self._files[name], offset + len(view)
        filled = np.frombuffer(view, dtype=np.uint8)  # numpy lets other threads run while it copies
        header = file.header[offset:end]
        view[: len(header)] = header
        position = offset + len(header)
        while position < end:
            tensor, begin = self._tensor_at(file, position)
            stop = min(end - begin, tensor.nbytes)
            into = filled[position - offset : begin + stop - offset]
            for piece in self._pieces(tensor, position - begin, stop, into=into):
                target = filled[position - offset : position - offset + piece.nbytes]
                if not np.may_share_memory(piece, target):
                    target[:] = piece
                position += piece.nbytes
            position = begin + stop
        self._resources.ledger.record_served(len(view))

    def read_tensor(self, name: str, begin: int, end: int) -> Raw:
        """Return the bytes ``begin`` to ``end`` of a tensor, as a fresh array."""
        pieces = list(self._pieces(self.plan.tensors[name], begin, end))
        result: Raw = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint8)
        self._resources.ledger.record_served(result.nbytes)
        return result

    def prepare(self) -> None:
        """Load the compiled kernels that the plan needs, so that no read waits for a compiler."""
        _prepare_kernels(self.plan)

    def read_elements(self, name: str, start: int, stop: int, purpose: Purpose) -> Raw:
        """Return the bytes of the elements ``start`` to ``stop`` (flat indices) of a tensor, as a fresh array."""
        tensor = self.plan.tensors[name]
        itemsize = tensor.dtype.itemsize
        pieces = list(self._pieces(tensor, start * itemsize, stop * itemsize, purpose))
        result: Raw = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint8)
        return result

    def prepare_tensor(self, name: str) -> None:
        """Gather what computing any part of a tensor needs to know of the whole; what is known is not read again."""
        tensor = self.plan.tensors[name]
        if name in self._prepared:
            return
        # The inputs first: who waits for statistics must hold nothing that the gathering of them could wait for.
        tensor.prepare()
        if tensor.context is not None:
            self._coefficients_of(tensor)
        self._prepared.add(name)

    def forget_tensor(self, name: str) -> None:
        """Let go of what is held of a tensor's inputs: all of it has been read."""
        for stored in self.plan.tensors[name].stored():
            self._resources.reader.forget(stored.shard, stored.tensor)

    def will_read(self, name: str, offset: int, size: int) -> None:
        """Have the system hold what a range of a weight file is computed from."""
        file = self._files[name]
        position, end = max(offset, len(file.header)), min(offset + size, file.size)
        while position < end:
            tensor, begin = self._tensor_at(file, position)
            stop = min(end - begin, tensor.nbytes)
            self._inputs.will_read(
                tensor, (position - begin) // tensor.dtype.itemsize, -(-stop // tensor.dtype.itemsize)
            )
            position = begin + stop

    def header_size(self, name: str) -> int:
        """Return the bytes of a weight file before its first tensor."""
        return len(self._files[name].header)

    def block_end(self, name: str, position: int) -> int:
        """Return where the block ends that has the byte at ``position`` of a weight file; the header is one, too."""
        file = self._files[name]
        if position < len(file.header):
            return len(file.header)
        tensor, begin = self._tensor_at(file, position)
        step = tensor.grid.step * tensor.dtype.itemsize
        return begin + min(((position - begin) // step + 1) * step, tensor.nbytes)

    def tensor_end(self, name: str, position: int) -> int:
        """Return where the tensor ends that has the byte at ``position`` of a weight file; in the header, its end."""
        file = self._files[name]
        if position < len(file.header):
            return len(file.header)
        tensor, begin = self._tensor_at(file, position)
        return begin + tensor.nbytes

    def compute_ahead(self, name: str, position: int) -> None:
        """Have the block that has the byte at ``position`` of a weight file in the cache before anybody asks for it.

        One that is a copy of a source's needs no computing, and is left to who reads it.
        """
        file = self._files[name]
        if position < len(file.header):
            return
        tensor, begin = self._tensor_at(file, position)
        block = (position - begin) // (tensor.grid.step * tensor.dtype.itemsize)
        if _is_copied(tensor, block):
            return
        self.prepare_tensor(tensor.name)
        self._resources.cache.prepare(self._key(tensor, block), partial(self._reserved, tensor, block, Purpose.EXPERT))

    def check_sources(self) -> None:
        """Raise SourceChangedError when a source is no longer what the plan was made from."""
        check_unchanged(file for source in self.plan.sources for file in source.checked_files)
        check_unchanged(self._plane_files)

    def _tensor_at(self, file: OutputFile, position: int) -> tuple[TensorPlan, int]:
        """Return the tensor that holds the byte at ``position`` of a file, and where it begins there."""
        index = bisect_right(file.offsets, position) - 1
        return self.plan.tensors[file.tensors[index]], file.offsets[index]

    def _pieces(
        self, tensor: TensorPlan, begin: int, end: int, purpose: Purpose = Purpose.EXPERT, into: Raw | None = None
    ) -> Iterator[Raw]:
        """Yield views into the blocks that hold the bytes ``begin`` to ``end`` of a tensor.

        With ``into``, memory for these bytes, no block that lies there as a whole is kept in the cache; it may have
        been computed in its place there. What lies there in part is kept until somebody takes the rest.
        """
        step = tensor.grid.step * tensor.dtype.itemsize
        for block in range(begin // step, -(-end // step)):
            first, last = block * step, min((block + 1) * step, tensor.nbytes)
            whole = begin <= first and last <= end
            if into is None:
                data = self._block(tensor, block, purpose)
            elif whole:
                data = self._block(tensor, block, purpose, into[first - begin : last - begin])
            else:
                data = self._edge(tensor, block, purpose)
            yield data[max(begin - first, 0) : end - first]

    def _block(self, tensor: TensorPlan, block: int, purpose: Purpose, into: Raw | None = None) -> Raw:
        """Return one block of the merged tensor from the cache, or compute it, reading for ``purpose``.

        Where it may lie ``into`` memory of the caller's it is computed, and not kept.
        """
        self.prepare_tensor(tensor.name)
        if into is not None:
            return self._reserved(tensor, block, purpose, into)
        compute = partial(self._reserved, tensor, block, purpose)
        return self._resources.cache.get(self._key(tensor, block), compute)

    def _edge(self, tensor: TensorPlan, block: int, purpose: Purpose) -> Raw:
        """Return a block that lies in two ranges of somebody who comes by once: it is kept until wanted twice."""
        self.prepare_tensor(tensor.name)
        compute = partial(self._reserved, tensor, block, purpose)
        return self._resources.cache.get_source(("edge", self._key(tensor, block)), compute, users=2)

    def _key(self, tensor: TensorPlan, block: int) -> Hashable:
        """Return what the cache knows a block by.

        Not the same for a nested engine: one who holds memory would wait for another who waits for that memory.
        """
        return self.plan.plan_id, self._nested, tensor.name, block

    def _reserved(self, tensor: TensorPlan, block: int, purpose: Purpose, into: Raw | None = None) -> Raw:
        """Compute one block in memory that is reserved for it."""
        if self._nested:
            return self._compute(tensor, block, purpose, into)
        size = self._working_bytes.get(tensor.name)
        if size is None:
            size = self._working_bytes[tensor.name] = _working_bytes(tensor)
        with self._resources.room.reserve(size):
            return self._compute(tensor, block, purpose, into)

    def _compute(self, tensor: TensorPlan, block: int, purpose: Purpose, into: Raw | None) -> Raw:
        """Compute one block from the bytes that are bought."""
        if tensor.method is None or tensor.context is None:
            return self._copy(tensor, block, purpose)
        merged, inputs = merge_block(tensor, self._coefficients[tensor.name], self._inputs, block, purpose, into)
        if inputs and not is_finite(merged, tensor.dtype):
            self._report_non_finite(tensor, inputs, block)
        return merged

    def _copy(self, tensor: TensorPlan, block: int, purpose: Purpose) -> Raw:
        """Return a block of a tensor that every model has alike; a strict engine makes sure that they do."""
        data = self._inputs.whole(tensor, 0, block, purpose)
        if self._strict and tensor.selection is None:
            for place in tensor.alike:
                if not np.array_equal(data, self._inputs.bytes_at(place, tensor, block, Purpose.ANALYSIS)):
                    raise PlanError(
                        f"tensor {tensor.name!r} ({tensor.dtype.name}) differs between {tensor.places[0].describe()} "
                        "and "
                        f"{place.describe()}; tensors that are not floating-point must agree to be merged"
                    )
        return data

    def _coefficients_of(self, tensor: TensorPlan) -> None:
        """Keep the coefficients of a tensor, gathering its statistics on the first touch."""
        with self._gathering[tensor.name]:
            if tensor.name not in self._coefficients:
                self._coefficients[tensor.name] = coefficients_of(tensor, self._resources.statistics)

    def _report_non_finite(self, tensor: TensorPlan, inputs: tuple[tuple[Raw, DType], ...], block: int) -> None:
        """Say, once for each tensor, that a merge has NaN or infinity in it and where they come from."""
        places = zip(inputs, tensor.places, strict=True)
        culprit = next((place for (raw, dtype), place in places if not is_finite(raw, dtype)), None)
        if culprit is None:
            cause = f"values outgrow {tensor.dtype.name}"
        else:
            cause = f"{self._origin_of_non_finite(culprit, tensor, block).describe()} holds some"
        sentence = (
            f"the merge of tensor {tensor.name!r} has NaN or infinity in it: {cause}; repair or leave out that model, "
            "or choose another dtype"
        )
        if self._strict:
            raise NonFiniteError(sentence)
        with self._lock:
            if tensor.name in self._reported:
                return
            self._reported.add(tensor.name)
        _LOG.warning("%s", sentence)

    def _origin_of_non_finite(self, place: Place, tensor: TensorPlan, block: int) -> Place:
        """Return the tensor in a file that NaN or infinity of a computed place come from, or else the place itself."""
        alike = (part for part in place.parts if part.elements == place.elements and part.dtype.is_float)
        for part in alike:
            if not is_finite(self._inputs.bytes_at(part, tensor, block, Purpose.ANALYSIS), part.dtype):
                return self._origin_of_non_finite(part, tensor, block)
        return place


def _is_copied(tensor: TensorPlan, block: int) -> bool:
    """Return whether a block is that of a source as it is, and no kernel runs for it."""
    return tensor.method is None or (tensor.selection is not None and not tensor.selection.computed[block])


def _working_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of memory that computing one block takes: its inputs, its result, and a mask to check it by."""
    itemsizes = [place.dtype.itemsize for place in tensor.places]
    itemsizes += [stored.dtype.itemsize for place in tensor.places if place.parts for stored in place.stored()]
    if tensor.coded:  # inputs are put together in the compute dtype, from the base's values in it
        itemsizes += [tensor.compute.itemsize] * (len(tensor.places) + 1)
    return (sum(itemsizes) + tensor.dtype.itemsize + 1) * min(tensor.grid.step, tensor.grid.size)


def _prepare_kernels(plan: MergePlan) -> None:
    """Load the compiled kernels of a plan, and of those that it merges the results of."""
    merged = [tensor for tensor in plan.tensors.values() if tensor.context is not None]
    conversions = {(place.dtype, tensor.compute) for tensor in merged for place in tensor.places}
    conversions |= {(tensor.compute, tensor.dtype) for tensor in merged}
    # Sorted, since sets have no order and what is compiled first should not depend on chance.
    pairs = sorted(conversions, key=lambda pair: (pair[0].name, pair[1].name))
    computed = dict.fromkeys(tensor.compute for tensor in merged)
    prepare(plan.method.kernels(), computed, pairs)
    prepare(("finite",), dict.fromkeys(tensor.dtype for tensor in merged))
    of_inputs = {kernel for tensor in plan.tensors.values() for place in tensor.places for kernel in place.kernels()}
    of_inputs |= {kernel for tensor in plan.tensors.values() for one in tensor.coded if one for kernel in one.kernels()}
    for module, dtype in sorted(of_inputs, key=lambda kernel: (kernel[0], kernel[1].name)):
        prepare((module,), (dtype,))
    for nested in plan.nested:
        _prepare_kernels(nested)
