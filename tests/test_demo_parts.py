"""The training half of the demo: its text, its tokenizer, the family that it trains, and what it says of models."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergefs.demo import corpus, training
from mergefs.demo.corpus import Domain, load_domains, split_documents
from mergefs.demo.evaluation import generate_line, perplexity
from mergefs.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE, write_tokenizer
from mergefs.demo.training import Family, FamilyOptions, build_model, train_family
from mergefs.errors import MergefsError
from mergefs.evaluation.imports import import_transformers

TINY = FamilyOptions(
    hidden_size=32,
    layers=2,
    heads=2,
    key_value_heads=1,
    intermediate_size=48,
    context=32,
    batch=8,
    base_steps=12,
    expert_steps=25,
    base_learning_rate=5e-3,
    expert_learning_rate=5e-3,
    seed=3,
    precision="float32",
    max_shard_size="16KB",
)
DOMAINS = (
    Domain("digits", "digits", b"0123456789 " * 200, b"0123456789 " * 40),
    Domain("letters", "letters", b"abcdefghijklm\n" * 200, b"abcdefghijklm\n" * 40),
    Domain("brackets", "brackets", b"([{<>}])" * 300, b"([{<>}])" * 50),
)


def silent(title: str, step: int, steps: int, loss: float) -> None:
    """Report to nobody."""


def long_paragraphs(text: bytes) -> list[bytes]:
    stripped = (paragraph.strip() for paragraph in text.split(b"\n\n"))
    return [paragraph for paragraph in stripped if len(paragraph) >= corpus.UNIQUE_PARAGRAPH]


def load_model(directory: Path) -> Any:
    return import_transformers().AutoModelForCausalLM.from_pretrained(directory).float().eval()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return train_family(tmp_path_factory.mktemp("family"), TINY, DOMAINS, silent)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return import_transformers().AutoTokenizer.from_pretrained(directory)


class TestCorpus:
    def test_this_python_yields_three_domains_with_enough_text_to_train_and_to_judge(self) -> None:
        domains = load_domains()
        assert [domain.name for domain in domains[:2]] == ["python", "prose"]
        assert domains[2].name in {"c", "unicode"}
        for domain in domains:
            assert corpus.MINIMUM_TRAINING <= len(domain.training) <= corpus.TRAINING_LIMIT
            assert 8192 <= len(domain.held_out) <= corpus.HELD_OUT_LIMIT + (16 << 10)
            domain.held_out.decode(errors="strict")

    def test_loading_twice_gives_the_same_domains(self) -> None:
        assert load_domains() == load_domains()

    def test_no_long_paragraph_of_the_held_out_text_is_trained_on_by_any_expert_of_its_domain(self) -> None:
        for domain in load_domains():
            held_out = long_paragraphs(domain.held_out)
            assert held_out
            assert not set(held_out).intersection(long_paragraphs(domain.training))

    def test_a_python_without_headers_and_help_topics_gets_other_text_instead(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(corpus, "_c_headers", lambda: iter(()))
        monkeypatch.setattr(corpus, "_help_topics", lambda: iter(()))
        domains = load_domains()
        assert [domain.name for domain in domains] == ["python", "prose", "unicode"]
        assert domains[1].title == "docstrings of the standard library"
        assert b"LATIN SMALL LETTER E WITH ACUTE" in domains[2].training + domains[2].held_out
        assert all(len(domain.training) >= corpus.MINIMUM_TRAINING for domain in domains)

    def test_docstrings_that_stand_in_for_prose_come_from_files_that_the_python_domain_leaves_out(self) -> None:
        shared = set(corpus._python_sources()).intersection(
            text for text in corpus._library_files() if corpus._is_for_docstrings(text)
        )
        assert not shared

    def test_a_python_without_its_library_in_files_is_told_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(corpus, "_library_files", lambda: iter((b"import this\n",)))
        with pytest.raises(MergefsError, match=r"Python sources of the standard library .* has less; run it with"):
            load_domains()

    @given(st.lists(st.text("ab\n", max_size=400).map(str.encode), max_size=30), st.randoms())
    def test_the_split_depends_on_the_documents_and_not_on_their_order(
        self, documents: list[bytes], random: Any
    ) -> None:
        expected = split_documents("x", "x", documents)
        random.shuffle(documents)
        assert split_documents("x", "x", documents) == expected

    @given(
        st.lists(st.sampled_from([bytes([65 + n]) * 70 for n in range(12)]), max_size=6).map(b"\n\n".join),
        st.lists(
            st.lists(st.sampled_from([bytes([65 + n]) * 70 for n in range(12)]), max_size=6).map(b"\n\n".join),
            max_size=12,
        ),
    )
    def test_no_long_paragraph_occurs_twice_in_a_domain(self, first: bytes, others: list[bytes]) -> None:
        domain = split_documents("x", "x", [first, *others])
        paragraphs = long_paragraphs(domain.held_out) + long_paragraphs(domain.training)
        assert len(paragraphs) == len(set(paragraphs))


class TestTokenizer:
    @given(text=st.text())
    def test_any_text_survives_encoding_and_decoding(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @given(text=st.text())
    def test_the_ids_of_a_text_are_its_utf8_bytes(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.encode(text) == list(text.encode())

    def test_special_tokens_follow_the_bytes_and_are_never_added_unasked(self, tokenizer: Any) -> None:
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
        assert len(tokenizer) == VOCABULARY_SIZE
        assert tokenizer.encode("") == []
        assert tokenizer.encode("<|end_of_text|>") == [EOS_ID]
        assert tokenizer.decode([104, 105, EOS_ID], skip_special_tokens=True) == "hi"

    def test_batches_are_padded(self, tokenizer: Any) -> None:
        assert tokenizer(["abc", "a"], padding=True)["input_ids"] == [[97, 98, 99], [97, PAD_ID, PAD_ID]]


class TestFamily:
    def test_each_model_is_a_sharded_bfloat16_checkpoint_with_a_tokenizer(self, family: Family) -> None:
        from safetensors import safe_open

        assert family.domains == ("digits", "letters", "brackets")
        for model in (family.base, *family.experts):
            shards = sorted(model.glob("model-*-of-*.safetensors"))
            assert len(shards) >= 2
            listed = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
            assert set(listed.values()) == {shard.name for shard in shards}
            assert "lm_head.weight" in listed  # untied
            for shard in shards:
                with safe_open(shard, "pt") as tensors:
                    assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
            for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
                assert (model / name).is_file()

    def test_the_configuration_says_what_the_models_are(self, family: Family) -> None:
        config = load_model(family.base).config
        assert (config.model_type, config.vocab_size, config.tie_word_embeddings) == ("llama", VOCABULARY_SIZE, False)
        assert (config.num_attention_heads, config.num_key_value_heads) == (TINY.heads, TINY.key_value_heads)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)

    def test_each_expert_beats_the_base_on_its_own_domain(self, family: Family) -> None:
        base = load_model(family.base)
        for path, domain in zip(family.experts, DOMAINS, strict=True):
            expert = load_model(path)
            of_base, of_expert = (
                perplexity(model, domain.held_out, context=TINY.context, batch=4, limit_bytes=400)
                for model in (base, expert)
            )
            assert of_expert < 0.9 * of_base

    def test_the_deltas_of_the_experts_survive_rounding_to_bfloat16(self, family: Family) -> None:
        base = load_model(family.base).state_dict()
        for path in family.experts:
            expert = load_model(path).state_dict()
            for name, tensor in base.items():
                if "embed_tokens" not in name:  # bytes that a domain lacks keep their embeddings
                    assert (expert[name] != tensor).float().mean() > 0.3, name

    def test_the_same_seed_trains_the_same_weights_and_another_seed_others(self, tmp_path: Path) -> None:
        short = dataclasses.replace(TINY, base_steps=2, expert_steps=1)

        def weights(name: str, options: FamilyOptions) -> dict[str, bytes]:
            trained = train_family(tmp_path / name, options, DOMAINS, silent)
            models = (trained.base, *trained.experts)
            return {f"{m.name}/{f.name}": f.read_bytes() for m in models for f in m.glob("*.safetensors")}

        first = weights("first", short)
        assert weights("again", short) == first
        assert weights("other", dataclasses.replace(short, seed=4)) != first

    @pytest.mark.parametrize(("interval", "of_others"), [(0, 0), (8, 2), (4, 4)])
    def test_an_expert_sees_the_other_domains_in_one_window_of_each_interval(
        self, interval: int, of_others: int
    ) -> None:
        options = dataclasses.replace(TINY, batch=16, rehearsal_interval=interval)
        own, first, second = (torch.full((100,), byte, dtype=torch.uint8) for byte in b"abc")
        windows = training._windows(training._with_rehearsal(own, [first, second], options), options, seed=1)
        for _, window in zip(range(3), windows, strict=False):
            assert window.shape == (16, TINY.context + 1)
            bytes_of_rows = window[:, 0].tolist()
            assert bytes_of_rows.count(ord("a")) == 16 - of_others
            assert bytes_of_rows.count(ord("b")) == bytes_of_rows.count(ord("c")) == of_others // 2

    def test_training_leaves_the_callers_random_numbers_alone(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        train_family(tmp_path, dataclasses.replace(TINY, base_steps=1, expert_steps=1), DOMAINS, silent)
        assert torch.equal(torch.rand(3), expected)

    def test_every_step_of_every_stage_is_reported_in_order(self, tmp_path: Path) -> None:
        calls: list[tuple[str, int, int]] = []

        def report(title: str, step: int, steps: int, loss: float) -> None:
            assert 0 < loss < 2 * math.log(VOCABULARY_SIZE)
            calls.append((title, step, steps))

        train_family(tmp_path, dataclasses.replace(TINY, base_steps=2, expert_steps=1), DOMAINS, report)
        base = [("base on all domains", 1, 2), ("base on all domains", 2, 2)]
        assert calls == base + [(f"expert on {domain.name}", 1, 1) for domain in DOMAINS]

    @pytest.mark.parametrize("precision", ["auto", "bfloat16"])
    def test_bfloat16_matrix_products_train_too(self, tmp_path: Path, precision: training.Precision) -> None:
        losses: list[float] = []
        options = dataclasses.replace(TINY, precision=precision, base_steps=12, expert_steps=1)
        train_family(tmp_path, options, DOMAINS, lambda title, step, steps, loss: losses.append(loss))
        assert losses[11] < losses[0] - 0.5


class TestReuse:
    short = dataclasses.replace(TINY, base_steps=1, expert_steps=1)

    def trained_titles(self, directory: Path, options: FamilyOptions, domains: tuple[Domain, ...]) -> list[str]:
        titles: list[str] = []
        train_family(directory, options, domains, lambda title, step, steps, loss: titles.append(title))
        return titles

    def test_a_finished_family_of_the_same_options_is_used_again(self, tmp_path: Path) -> None:
        assert len(self.trained_titles(tmp_path, self.short, DOMAINS)) == 4
        assert self.trained_titles(tmp_path, self.short, DOMAINS) == []
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [
            "base",
            "expert-brackets",
            "expert-digits",
            "expert-letters",
            "family.json",
        ]

    def drop_shard(self, directory: Path) -> None:
        next((directory / "expert-letters").glob("*.safetensors")).unlink()

    def drop_configuration(self, directory: Path) -> None:
        (directory / "base" / "config.json").unlink()

    @pytest.mark.parametrize("damage", [drop_shard, drop_configuration])
    def test_a_family_that_lost_a_file_is_trained_again(
        self, tmp_path: Path, damage: Callable[["TestReuse", Path], None]
    ) -> None:
        self.trained_titles(tmp_path, self.short, DOMAINS)
        damage(self, tmp_path)
        assert len(self.trained_titles(tmp_path, self.short, DOMAINS)) == 4
        assert self.trained_titles(tmp_path, self.short, DOMAINS) == []

    def test_other_options_or_other_text_are_trained_anew(self, tmp_path: Path) -> None:
        self.trained_titles(tmp_path, self.short, DOMAINS)
        longer = dataclasses.replace(self.short, base_steps=2)
        assert len(self.trained_titles(tmp_path, longer, DOMAINS)) == 5
        changed = (dataclasses.replace(DOMAINS[0], training=b"9876543210 " * 200), *DOMAINS[1:])
        assert len(self.trained_titles(tmp_path, longer, changed)) == 5

    def test_a_model_that_the_demo_did_not_write_is_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "precious.safetensors").write_bytes(b"mine")
        with pytest.raises(MergefsError, match=r"base exists, .* remove it or name another directory"):
            train_family(tmp_path, self.short, DOMAINS, silent)
        assert [path.name for path in tmp_path.rglob("*")] == ["base", "precious.safetensors"]

    def test_training_that_is_broken_off_leaves_the_finished_family_as_it_was(self, tmp_path: Path) -> None:
        self.trained_titles(tmp_path, self.short, DOMAINS)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

        def break_off(title: str, step: int, steps: int, loss: float) -> None:
            if title == "expert on letters":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_family(tmp_path, dataclasses.replace(self.short, seed=9), DOMAINS, break_off)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("no directory")
        with pytest.raises(MergefsError, match=r"file.* cannot be written .*name a directory"):
            train_family(tmp_path / "file", self.short, DOMAINS, silent)

    def test_a_domain_with_less_than_one_window_of_text_is_refused_by_name(self, tmp_path: Path) -> None:
        domains = (Domain("short", "short", b"x" * TINY.context, b""),)
        with pytest.raises(MergefsError, match=r"the domain short has 32 bytes .* takes 33"):
            train_family(tmp_path, self.short, domains, silent)


class TestEvaluation:
    def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(self) -> None:
        model = build_model(TINY)
        torch.nn.init.zeros_(model.lm_head.weight)
        value = perplexity(model, bytes(range(256)), context=15, batch=3, limit_bytes=256)
        assert value == pytest.approx(VOCABULARY_SIZE, rel=1e-5)

    def test_perplexity_is_the_mean_over_all_windows_whatever_the_batch(self, family: Family) -> None:
        model = load_model(family.base)
        text = DOMAINS[0].held_out[: 33 * 5 + 7]
        rows = torch.tensor([list(text[33 * n : 33 * n + 33]) for n in range(5)])
        with torch.no_grad():
            logs = model(input_ids=rows[:, :-1]).logits.log_softmax(-1)
        expected = math.exp(-logs.gather(-1, rows[:, 1:, None]).mean().item())
        for batch in (1, 2, 5, 64):
            value = perplexity(model, text, context=32, batch=batch, limit_bytes=10**6)
            assert value == pytest.approx(expected, rel=1e-5)

    def test_a_limit_takes_windows_from_all_over_the_text(self, family: Family) -> None:
        model = load_model(family.base)
        known, unknown = DOMAINS[0].held_out[:66], b"\x00\xff" * 33
        half = perplexity(model, known + unknown, context=32, batch=4, limit_bytes=66)
        low, high = (perplexity(model, text, context=32, batch=4, limit_bytes=10**6) for text in (known, unknown))
        assert low < half < high

    def test_a_bfloat16_model_is_judged_in_float32_and_left_as_it_is(self, family: Family) -> None:
        model = load_model(family.base)
        expected = perplexity(model, DOMAINS[1].held_out, context=32, batch=4, limit_bytes=330)
        model.to(torch.bfloat16)  # rounds the frequencies of the rotary embedding too, hence approx
        value = perplexity(model, DOMAINS[1].held_out, context=32, batch=4, limit_bytes=330)
        assert value == pytest.approx(expected, rel=1e-4)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize(("size", "limit"), [(32, 1000), (1000, 32), (0, 1000)])
    def test_too_little_text_is_refused(self, family: Family, size: int, limit: int) -> None:
        with pytest.raises(MergefsError, match="one window takes 33"):
            perplexity(load_model(family.base), b"x" * size, context=32, batch=4, limit_bytes=limit)

    def test_an_expert_goes_on_with_a_line_of_its_domain_and_stops_at_its_end(self, family: Family) -> None:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(family.experts[1])
        model = load_model(family.experts[1])
        line = generate_line(model, tokenizer, "abcdef", tokens=20)
        assert line == generate_line(model, tokenizer, "abcdef", tokens=20)
        assert line.startswith("abcdef")
        assert len(line) > len("abcdef")
        assert "\n" not in line

    def test_generation_stops_after_the_tokens_asked_for(self, family: Family) -> None:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(family.base)
        line = generate_line(load_model(family.base), tokenizer, "012", tokens=1)
        assert len(line) <= 4
