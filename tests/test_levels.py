"""What is read of each input: selections by cells and levels, and the blocks that are put together from them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Family, family
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from recipes import Merge, write_recipe

from mergefs.catalog import Catalog
from mergefs.checkpoint.dtypes import BF16, F32, DType
from mergefs.checkpoint.source import AuxiliaryFile, Fingerprint, SourceFile
from mergefs.engine.engine import Engine
from mergefs.engine.workspace import Workspace
from mergefs.kernels.precision import Raw, load, store
from mergefs.planner.build import PlanOptions, make_plan
from mergefs.planner.levels import EQUAL, NOTHING, WHOLE, Selection, own_bytes
from mergefs.planner.plan import MergePlan, TensorPlan
from mergefs.recipe.model import load_recipe
from mergefs.sources import blocks
from mergefs.sources.blocks import BlockGrid
from mergefs.sources.ledger import Purpose
from mergefs.sources.place import block_sizes
from mergefs.sources.reader import SourceReader

CELL = 64
TENSOR = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class EveryLevelAddsOne:
    """Planes that move the base's values by the level, so that who decodes what can be seen."""

    grid: BlockGrid
    planes: int = 3
    digest: bytes = b"one for each"

    @property
    def file(self) -> SourceFile:
        return AuxiliaryFile(Path(__file__), Fingerprint.of(Path(__file__).stat()), "planes")

    def kernels(self) -> Iterator[tuple[str, DType]]:
        yield from ()

    def bytes_read(self, level: int) -> NDArray[np.int64]:
        return block_sizes(self.grid) * level

    def decode(self, reader: SourceReader, base_values: Raw, cells: range, level: int, purpose: Purpose) -> Raw:
        return store(load(base_values, BF16, F32) + np.float32(level), F32, BF16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("models"), experts=2, dtype=torch.bfloat16, tied=False, shards=1)


def with_selection(plan: MergePlan, selection: Selection) -> MergePlan:
    tensor = plan.tensors[TENSOR]
    coded = tuple(EveryLevelAddsOne(selection.cells) for _ in tensor.places)
    changed: TensorPlan = replace(tensor, selection=selection, coded=coded)
    return replace(plan, tensors={**plan.tensors, TENSOR: changed}, plan_id=f"{id(selection)}")


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_merge_sees_the_cells_that_are_bought_and_the_base_elsewhere(
    models: Family, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    merge = Merge("linear", ({"weight": 0.5}, {"weight": 0.25}), {"normalize": False}, with_base=False)
    with pytest.MonkeyPatch.context() as patch, Catalog(tmp_path_factory.mktemp("catalog")) as catalog:
        patch.setattr(blocks, "BLOCK_ELEMENTS", 4 * CELL)
        workspace = Workspace.create(catalog)
        document = write_recipe(tmp_path_factory.mktemp("recipe") / "merge.yml", merge, models)
        plan = make_plan(load_recipe(document), PlanOptions(base=str(models.base)), workspace)
        tensor = plan.tensors[TENSOR]
        grid = tensor.grid
        cells = BlockGrid(grid.size, CELL)
        choice = st.sampled_from([NOTHING, 1, 2, 3, EQUAL, WHOLE])
        levels = np.array(
            data.draw(st.lists(choice, min_size=2 * cells.count, max_size=2 * cells.count)), dtype=np.uint8
        ).reshape(2, cells.count)
        givers = own_bytes(2, grid.count)
        for block in range(grid.count):
            if data.draw(st.booleans()):
                givers[1, block] = 0
                span = slice(block * 4, block * 4 + 4)
                levels[1, span] = levels[0, span]
        selection = Selection(grid, CELL, levels, givers, np.ones(grid.count, dtype=np.bool_))
        values = [
            load(place.read(workspace.reader, 0, grid.size, Purpose.ANALYSIS), BF16, BF16) for place in tensor.places
        ]
        base = tensor.stand_in
        assert base is not None
        base_values = load(base.read(workspace.reader, 0, grid.size, Purpose.ANALYSIS), BF16, BF16)
        seen = []
        for index in range(2):
            mine = base_values.copy()
            for cell, (start, stop) in enumerate(cells):
                level, giver = int(levels[index, cell]), int(givers[index, start // grid.step])
                if level == WHOLE:
                    mine[start:stop] = values[giver][start:stop]
                elif level not in (NOTHING, EQUAL):
                    mine[start:stop] = load(store(base_values[start:stop] + np.float32(level), F32, BF16), BF16, BF16)
            seen.append(mine)
        expected = store(np.float32(0.5) * seen[0] + np.float32(0.25) * seen[1], F32, BF16)
        before = workspace.ledger.totals().expert_bytes_read
        changed = with_selection(plan, selection)
        merged = Engine(changed, workspace, strict=True).read_tensor(TENSOR, 0, grid.size * 2)
        assert merged.tobytes() == expected.tobytes()
        whole = sum(int(block_sizes(cells)[selection.paid(index) == WHOLE].sum()) * 2 for index in range(2))
        assert workspace.ledger.totals().expert_bytes_read - before == whole
        planes = sum(
            int((block_sizes(cells) * level)[selection.paid(index) == level].sum())
            for index in range(2)
            for level in range(1, 4)
        )
        assert sum(changed.tensors[TENSOR].planned_bytes(index) for index in range(2)) == whole + planes
        workspace.reader.close()


def test_questions_about_blocks_are_answered_from_their_cells() -> None:
    grid = BlockGrid(10 * CELL, 4 * CELL)  # three blocks of 4, 4 and 2 cells
    levels = np.full((2, 10), WHOLE, dtype=np.uint8)
    levels[1] = [WHOLE, EQUAL, EQUAL, WHOLE, EQUAL, EQUAL, EQUAL, EQUAL, 2, NOTHING]
    selection = Selection(grid, CELL, levels, own_bytes(2, 3), np.array([True, True, True]))
    assert selection.bought.tolist() == [[True, True, True], [True, True, False]]
    assert selection.read.tolist() == [[True, True, True], [True, False, True]]
    assert selection.leaning.tolist() == [True, True, True]
    assert not selection.complete
    assert [list(selection.cells_of(block)) for block in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_bytes_that_another_input_gives_are_not_paid_again() -> None:
    grid = BlockGrid(4 * CELL, 2 * CELL)
    levels = np.full((3, 4), WHOLE, dtype=np.uint8)
    givers = own_bytes(3, 2)
    givers[2, 1] = 1
    selection = Selection(grid, CELL, levels, givers, np.array([True, True]))
    assert selection.complete
    assert selection.paid(2).tolist() == [WHOLE, WHOLE, NOTHING, NOTHING]
    assert selection.read.tolist() == [[True, True], [True, True], [True, False]]
