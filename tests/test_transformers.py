"""transformers loads a mounted merge as it loads a materialized one: same tensors, same logits, same tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import METHODS, Families, FamilyKind
from mounting import mounted_recipes
from recipes import recipe_document, write_document
from tensors import bits, differing, load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergefs
from mergefs.materialize.materialize import materialize

pytestmark = pytest.mark.mounts

KINDS = [
    FamilyKind(dtype, tied, shards)
    for dtype, tied, shards in (
        (torch.bfloat16, True, 3),
        (torch.bfloat16, False, 1),
        (torch.float32, True, 1),
        (torch.float32, False, 3),
    )
]
SENTENCE = "w5 w17 w90 w42 w8"


@dataclass(frozen=True, slots=True)
class Loadable:
    """One merge, mounted and materialized, in files of at most ``max_shard_size``."""

    mounted: Path
    materialized: Path
    kind: FamilyKind
    max_shard_size: str


@pytest.fixture(scope="module", params=["5GB", "20KB"])
def mounted_kinds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, catalogs: Path, families: Families
) -> Iterator[dict[FamilyKind, Loadable]]:
    """Mount a merge of each kind of family, all by one command, and materialize them too."""
    root = tmp_path_factory.mktemp("transformers")
    catalog = catalogs / root.name
    size: str = request.param
    recipes = {kind: root / f"{kind.text}.yml" for kind in KINDS}
    for kind, recipe in recipes.items():
        write_document(recipe, recipe_document(METHODS["ties"], families(kind)))
        with mergefs.open(recipe, catalog=catalog, max_shard_size=size) as model:
            materialize(model.plan, root / "out" / kind.text, model._resources)
    with mounted_recipes(
        *recipes.values(),
        mountpoint=root / "mnt",
        state=root / "state",
        options=["--max-shard-size", size],
        extra={"MERGEFS_CATALOG": str(catalog)},
    ):
        yield {kind: Loadable(root / "mnt" / kind.text, root / "out" / kind.text, kind, size) for kind in KINDS}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.text)
def loadable(request: pytest.FixtureRequest, mounted_kinds: dict[FamilyKind, Loadable]) -> Loadable:
    """Give one merge after the other."""
    return mounted_kinds[request.param]


def load(directory: Path) -> Any:
    """Load a model in the dtype that its files have; every weight must be found, and none be left over."""
    found: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model, report = found
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


def test_the_mount_loads_as_the_materialized_directory_does(loadable: Loadable) -> None:
    mounted, materialized = load(loadable.mounted), load(loadable.materialized)
    assert mounted.dtype == loadable.kind.dtype
    assert mounted.config.to_dict() | {"_name_or_path": ""} == materialized.config.to_dict() | {"_name_or_path": ""}
    assert differing(mounted.state_dict(), materialized.state_dict()) == {}
    tokens = torch.tensor([[1, 5, 17, 90, 42, 8], [1, 4, 4, 33, 60, 2]])
    found = logits(mounted, tokens)
    assert torch.equal(bits(found), bits(logits(materialized, tokens)))
    assert torch.isfinite(found).all()
    assert found.float().std() > 0


def test_the_loaded_model_holds_the_merged_tensors_and_ties_them_as_its_inputs_do(loadable: Loadable) -> None:
    state = load(loadable.mounted).state_dict()
    merged = load_model(loadable.materialized)
    assert len(list(loadable.mounted.glob("*.safetensors"))) > 1 or loadable.max_shard_size == "5GB"
    assert ("lm_head.weight" in merged) is not loadable.kind.tied
    tied = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert tied is loadable.kind.tied
    if loadable.kind.tied:
        merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    assert differing(dict(state), merged) == {}


def test_the_mount_generates_what_the_materialized_directory_generates(loadable: Loadable) -> None:
    texts = []
    for directory in (loadable.mounted, loadable.materialized):
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        encoded = tokenizer(SENTENCE, return_tensors="pt", return_token_type_ids=False)
        assert encoded["input_ids"].tolist() == [[5, 17, 90, 42, 8]]
        model = load(directory)
        tokens = model.generate(**encoded, max_new_tokens=8, do_sample=False, pad_token_id=0)
        texts.append((tokens.tolist(), tokenizer.decode(tokens[0])))
    assert texts[0] == texts[1]
    assert texts[0][1].startswith(SENTENCE)


def test_a_merge_into_another_dtype_loads_in_that_dtype(tmp_path: Path, families: Families) -> None:
    kind = KINDS[0]
    document = recipe_document(METHODS["linear"], families(kind), dtype="float32", out_dtype="float16")
    with mergefs.open(write_document(tmp_path / "recipe.yml", document)) as merge:
        materialize(merge.plan, tmp_path / "out", merge._resources)
    assert load(tmp_path / "out").dtype == torch.float16
