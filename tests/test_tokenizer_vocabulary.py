"""The merged vocabulary is that of mergekit: ids, permutations and files."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers_models import SPECIAL, trained, word_level, write_config, write_tokenizer_model
from tokenizers_oracle import mergekit_vocabulary
from tokenizers_recipes import quick_builder, reference, tokenizer_of, vocabulary_of
from transformers import AutoTokenizer

from mergefs.errors import CheckpointError, MergefsError, MissingDependencyError
from mergefs.tokenizer import service
from mergefs.tokenizer.vocabulary import MergedVocabulary

pytestmark = pytest.mark.usefixtures("quick_builder")
__all__ = ["quick_builder"]

CIRCUMSTANCES = ("is_local", "local_files_only")


def recipe(models: Sequence[Path], base: Path | None = None, **tokenizer: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": str(path)} for path in models],
        "tokenizer": tokenizer,
    }
    return document if base is None else document | {"base_model": str(base)}


def expected_permutation(permutation: Mapping[int, int], size: int) -> list[int]:
    """Return a permutation of mergekit's as an array; what it has no entry for, it fails to merge."""
    return [permutation.get(number, -1) for number in range(size)]


def read_files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def tokens_of(files: Mapping[str, bytes], directory: Path) -> dict[str, int]:
    """Return the ids by token, as whoever loads the files sees them."""
    directory.mkdir()
    for name, data in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(directory).get_vocab()
    return vocabulary


def assert_equal_to_mergekit(document: Mapping[str, Any], directory: Path) -> MergedVocabulary:
    theirs = mergekit_vocabulary(document)
    theirs.tokenizer.save_pretrained(directory / "theirs")
    ours = vocabulary_of(document, directory / "catalog")
    tokens = theirs.tokenizer.get_vocab()
    assert tokens_of(ours.files, directory / "ours") == tokens
    assert np.flatnonzero(ours.used).tolist() == sorted(set(tokens.values()))
    for model, permutation in theirs.permutations.items():
        found = ours.permutations[reference(model)]
        assert found[: len(tokens)].tolist() == expected_permutation(permutation, len(tokens))
        assert (found[len(tokens) :] == -1).all()
    saved = read_files(directory / "theirs")
    assert ours.files.keys() == saved.keys()
    for name in saved:
        if name == "tokenizer_config.json":
            settings = json.loads(saved[name])
            assert json.loads(ours.files[name]) == {k: v for k, v in settings.items() if k not in CIRCUMSTANCES}
        else:
            assert ours.files[name] == saved[name], name
    return ours


@pytest.fixture(params=["WordLevel", "BPE", "Unigram"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Three models with tokenizers of one kind, which share some tokens, added and special ones among them."""
    return [
        write_tokenizer_model(
            tmp_path / topic,
            trained(request.param, topic),
            [AddedToken(f"<|{topic}|>", special=True), AddedToken("<shared>", lstrip=topic == "code"), f"{topic}_word"],
            chat_template=f"{{{{ '{topic}' }}}}",
        )
        for topic in ("fox", "code", "math")
    ]


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("source", ["union", "base", "code"])
def test_vocabularies_equal_those_of_mergekit(models: list[Path], tmp_path: Path, source: str, with_base: bool) -> None:
    wanted = str(models[1]) if source == "code" else source
    assert_equal_to_mergekit(recipe(models, models[2] if with_base else None, source=wanted), tmp_path)


@pytest.mark.parametrize("source", ["union", "base", "code"])
def test_tokens_of_the_recipe_are_added_in_its_order(models: list[Path], tmp_path: Path, source: str) -> None:
    wanted = str(models[1]) if source == "code" else source
    tokens = {token: {"source": str(models[1])} for token in ("<z>", "<shared>", "<a>", "code_word", "</s>")}
    vocabulary = assert_equal_to_mergekit(recipe(models, models[0], source=wanted, tokens=tokens), tmp_path)
    known = tokens_of(vocabulary.files, tmp_path / "again")
    assert [token.number for token in vocabulary.tokens] == [known[token] for token in tokens]


def test_a_base_that_is_merged_with_itself_keeps_its_vocabulary(models: list[Path], tmp_path: Path) -> None:
    vocabulary = assert_equal_to_mergekit(recipe(models[:1], models[0], source="union"), tmp_path)
    assert vocabulary.permutations[reference(models[0])].tolist() == list(range(vocabulary.size))


def test_the_vocabulary_may_come_from_a_model_that_takes_no_part(tmp_path: Path) -> None:
    models = [write_tokenizer_model(tmp_path / topic, trained("BPE", topic)) for topic in ("fox", "code", "math")]
    vocabulary = assert_equal_to_mergekit(recipe(models[:2], source=str(models[2])), tmp_path)
    assert "in none of the merged models; their embeddings are zero" in vocabulary.notes[-1]


# Sizes that differ


def test_embeddings_may_have_more_rows_than_there_are_tokens(tmp_path: Path) -> None:
    models = [
        write_tokenizer_model(tmp_path / topic, trained("BPE", topic), rows=rows)
        for topic, rows in (("fox", 64), ("code", 100))
    ]
    for source in ("union", "base"):
        directory = tmp_path / source
        directory.mkdir()
        tokens = {"<new>": {"source": str(models[1])}}
        vocabulary = assert_equal_to_mergekit(recipe(models, models[0], source=source, tokens=tokens), directory)
    # As in mergekit: a base whose own vocabulary is kept has the tokens that are added to it, where it has rows.
    number = vocabulary.tokens[0].number
    assert [vocabulary.permutations[reference(model)][number] for model in models] == [number, -1]


def test_tokens_beyond_the_embeddings_of_the_base_are_taken_out(tmp_path: Path) -> None:
    base = write_tokenizer_model(tmp_path / "fox", trained("BPE", "fox", 60), ["<one>", "<two>"], rows=61)
    other = write_tokenizer_model(tmp_path / "code", trained("BPE", "code", 60))
    for source in ("union", "base"):
        directory = tmp_path / source
        directory.mkdir()
        vocabulary = assert_equal_to_mergekit(recipe([base, other], base, source=source), directory)
        known = tokens_of(vocabulary.files, directory / "again")
        assert "<one>" in known
        assert "<two>" not in known


def test_learned_tokens_beyond_the_embeddings_go_with_the_merges_that_make_them(tmp_path: Path) -> None:
    """mergekit keeps those merges, and the tokenizer that it makes of the rest cannot be loaded."""
    base = write_tokenizer_model(tmp_path / "base", trained("BPE", "fox", 60), rows=50)
    document = recipe([base], base, source="base")
    with pytest.raises(Exception, match="out of vocabulary"):
        mergekit_vocabulary(document)
    vocabulary = vocabulary_of(document, tmp_path / "catalog")
    known = tokens_of(vocabulary.files, tmp_path / "ours")
    assert sorted(known.values()) == list(range(50))
    assert vocabulary.permutations[reference(base)].tolist() == list(range(50))


def test_tokens_beyond_the_embeddings_of_other_models_are_left_out(tmp_path: Path) -> None:
    base = write_tokenizer_model(tmp_path / "base", word_level(["a", "b"]))
    other = write_tokenizer_model(tmp_path / "other", word_level(["a", "c", "b", "d"]), rows=5)
    theirs = mergekit_vocabulary(recipe([other], base, source="union"))
    ours = vocabulary_of(recipe([other], base, source="union"), tmp_path / "catalog")
    assert (
        tokens_of(ours.files, tmp_path / "ours")
        == theirs.tokenizer.get_vocab()
        == {
            **{token: number for number, token in enumerate(SPECIAL)},
            "a": 3,
            "b": 4,
            "c": 5,
        }
    )
    # 'b' has a row in the base alone; mergekit stops here, because the other model lacks an entry for it.
    assert ours.permutations[reference(other)].tolist() == [0, 1, 2, 3, -1, 4]
    assert ours.notes == (
        f"{other}: 2 of its tokens ('b', 'd') are left out, because their ids lie beyond the 5 rows of its embeddings",
        f"{other}: 1 tokens ('b') count as missing, because their ids lie beyond the 5 rows of its embeddings",
    )


@pytest.mark.parametrize(("multiple", "size"), [(1, 6), (4, 8), (6, 6), (64, 64)])
def test_a_vocabulary_is_padded(tmp_path: Path, multiple: int, size: int) -> None:
    model = write_tokenizer_model(tmp_path / "model", word_level(["a", "b", "c"]))
    vocabulary = vocabulary_of(recipe([model], pad_to_multiple_of=multiple), tmp_path / "catalog")
    assert vocabulary.size == size
    assert vocabulary.used.tolist() == [True] * 6 + [False] * (size - 6)
    assert vocabulary.permutations[reference(model)].tolist() == [*range(6), *[-1] * (size - 6)]


def with_a_hole(directory: Path) -> Path:
    """Write a tokenizer that has no token with id 3."""
    model = write_tokenizer_model(directory, word_level(["a", "b", "c"]))
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["a"]
    path.write_text(json.dumps(content))
    return model


def test_ids_that_no_token_has_count_as_padding(tmp_path: Path) -> None:
    """mergekit makes the embeddings too small, and fails when it writes the last rows."""
    model = with_a_hole(tmp_path / "model")
    vocabulary = vocabulary_of(recipe([model], source="base"), tmp_path / "catalog")
    assert vocabulary.used.tolist() == [True, True, True, False, True, True]
    assert vocabulary.permutations[reference(model)].tolist() == [0, 1, 2, -1, 4, 5]


@pytest.mark.parametrize("sections", [("text_config",), (), ("text_config", None)], ids=str)
def test_the_size_is_that_of_the_text_model(tmp_path: Path, sections: tuple[str | None, ...]) -> None:
    model = write_tokenizer_model(tmp_path / "model", trained("BPE", "fox", 60), ["<one>", "<two>"])
    content = json.loads((model / "config.json").read_text())
    content["vocab_size"] = 61
    if "text_config" in sections:
        content["text_config"] = {"vocab_size": 61}
        content["vocab_size"] = 1000
        if None not in sections:
            del content["vocab_size"]
    (model / "config.json").write_text(json.dumps(content))
    assert vocabulary_of(recipe([model], source="base"), tmp_path / "catalog").size == 61


# Models without tokenizers, and tokenizers that cannot be used


def test_a_model_without_tokenizer_is_taken_to_have_that_of_the_base(tmp_path: Path) -> None:
    base = write_tokenizer_model(tmp_path / "base", word_level(["a", "b"]))
    other = write_config(tmp_path / "other", 8)
    vocabulary = assert_equal_to_mergekit(recipe([base, other], base, source="union"), tmp_path)
    assert vocabulary.notes == (f"{other} has no tokenizer; it is taken to have that of {base}",)


def needs_code(directory: Path) -> None:
    content = json.loads((directory / "tokenizer_config.json").read_text())
    content |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    (directory / "own.py").write_text(f"open({str(directory / 'was-run')!r}, 'w')\nclass OwnTokenizer: pass\n")
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"model_type": "own"}))


def is_damaged(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("spoil", [is_damaged, needs_code])
@pytest.mark.parametrize("position", [0, 1], ids=["base", "other"])
def test_a_tokenizer_that_cannot_be_loaded_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], position: int
) -> None:
    models = [write_tokenizer_model(tmp_path / name, word_level(["a", "b"])) for name in ("one", "two")]
    spoil(models[position])
    with pytest.raises(CheckpointError) as caught:
        vocabulary_of(recipe(models, models[0], source="union"), tmp_path / "catalog")
    assert str(caught.value).startswith(f"{models[position]}: its tokenizer cannot be loaded by transformers (")
    assert str(caught.value).endswith(
        "; repair it, or remove 'tokenizer' from the recipe to keep the tokenizer of the base"
    )
    assert not (models[position] / "was-run").exists()


def test_a_base_without_tokenizer_is_refused(tmp_path: Path) -> None:
    base, other = write_config(tmp_path / "base", 6), write_tokenizer_model(tmp_path / "other", word_level(["a"]))
    with pytest.raises(CheckpointError) as caught:
        vocabulary_of(recipe([other], base, source="union"), tmp_path / "catalog")
    assert str(caught.value) == (
        f"{base}: has no tokenizer, which the merged one would start from; add its tokenizer files, or name another "
        "base_model"
    )


def test_a_tokenizer_source_without_tokenizer_is_refused(tmp_path: Path) -> None:
    model, donor = write_tokenizer_model(tmp_path / "model", word_level(["a"])), write_config(tmp_path / "donor", 6)
    with pytest.raises(CheckpointError, match="has no tokenizer files; name another model as tokenizer source"):
        vocabulary_of(recipe([model], source=str(donor)), tmp_path / "catalog")


def test_tokens_beyond_the_embeddings_of_a_base_that_is_not_bpe_are_refused(tmp_path: Path) -> None:
    base = write_tokenizer_model(tmp_path / "base", word_level(["a", "b", "c"]), rows=4)
    document = recipe([base], base, source="base")
    with pytest.raises(RuntimeError, match="only BPE"):
        mergekit_vocabulary(document)
    with pytest.raises(CheckpointError) as caught:
        vocabulary_of(document, tmp_path / "catalog")
    assert str(caught.value) == (
        f"{base}: 2 of its tokens ('b', 'c') have ids beyond the 4 rows of its embeddings, and they can be taken out "
        "of a BPE tokenizer only, not out of one of type WordLevel; remove them from the tokenizer, or name another "
        "base_model"
    )


# How it is built


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that every run of the builder adds to."""
    runs: list[Path] = []
    before = service.run_builder

    def run(directory: Path) -> str:
        runs.append(directory)
        return before(directory)

    monkeypatch.setattr(service, "run_builder", run)
    return runs


def test_a_vocabulary_is_built_once_for_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = counted(monkeypatch)
    model = write_tokenizer_model(tmp_path / "model", word_level(["a", "b"]))

    def build(**tokenizer: Any) -> MergedVocabulary:
        return vocabulary_of(recipe([model], **tokenizer), tmp_path / "catalog")

    first = build(source="union")
    again = build(source="union")
    assert len(runs) == 1
    assert (again.files, again.digest()) == (first.files, first.digest())
    assert build(source="union", pad_to_multiple_of=8).digest() != first.digest()
    assert len(runs) == 1
    build(source="union", tokens={"<new>": {"source": {"kind": "zero"}}})
    assert len(runs) == 2
    write_tokenizer_model(model, word_level(["a", "c"]))
    assert build(source="union").files != first.files
    assert len(runs) == 3


def test_settings_of_tokens_are_part_of_the_digest(tmp_path: Path) -> None:
    model = write_tokenizer_model(tmp_path / "model", word_level(["a", "b"]))
    sources: list[dict[str, Any]] = [
        {"source": str(model)},
        {"source": {"kind": "zero"}},
        {"source": {"kind": "zero"}, "force": True},
        {"source": {"kind": "model_token", "model": str(model), "token": "b"}},
        {"source": {"kind": "model_token", "model": str(model), "token_id": 4}},
    ]
    digests = {
        vocabulary_of(recipe([model], tokens={"a": source}), tmp_path / "catalog").digest() for source in sources
    }
    assert len(digests) == len(sources)


def test_the_process_that_builds_is_another_one_and_its_result_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [write_tokenizer_model(tmp_path / topic, trained("BPE", topic)) for topic in ("fox", "code")]
    document = recipe(models, models[0], source="union")
    here = vocabulary_of(document, tmp_path / "here")
    monkeypatch.undo()
    there = vocabulary_of(document, tmp_path / "there")
    assert (there.files, there.digest(), there.notes) == (here.files, here.digest(), here.notes)


def test_only_the_process_that_builds_imports_transformers() -> None:
    script = (
        "import sys, mergefs.tokenizer.service, mergefs.tokenizer.chat_template\n"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_without_transformers_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tokenizer_model(tmp_path / "model", word_level(["a"]))
    monkeypatch.setattr(service.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"install it with `pip install 'mergefs\[tokenizers\]'`"):
        vocabulary_of(recipe([model]), tmp_path / "catalog")


def test_a_process_that_dies_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tokenizer_model(tmp_path / "model", word_level(["a"]))
    monkeypatch.setattr(service, "run_builder", lambda directory: "ImportError: transformers is broken")
    with pytest.raises(MergefsError) as caught:
        vocabulary_of(recipe([model]), tmp_path / "catalog")
    assert str(caught.value) == (
        "the merged tokenizer could not be built ('ImportError: transformers is broken'); check the tokenizer files of "
        "the models, and the installation of transformers"
    )


def test_code_in_a_model_directory_is_no_part_of_its_tokenizer(tmp_path: Path) -> None:
    model = write_tokenizer_model(tmp_path / "model", word_level(["a"]))
    (model / "tokenization_own.py").write_text("raise SystemExit")
    assert sorted(tokenizer_of(model).files) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
