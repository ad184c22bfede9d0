"""Rows on the wire, tokens in their frame, packed vectors, settings, backend and scorer choice: all without a model."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from infermesh.errors import MeshError
from services.chassis.encoding import exports, settings
from services.chassis.encoding.encoder import LoadPlan, StartAgain
from services.chassis.encoding.rows import (
    HEAD_BYTES,
    Row,
    pack_batch,
    pack_result,
    padded,
    unpack_batch,
    unpack_head,
    unpack_result,
)
from services.chassis.encoding.tokens import Cut, TextTokenizer, TooLong, share_room
from services.embedding.settings import EmbeddingSettings
from services.embedding.vectors import check_dimensions, finish
from services.rerank.scorer import ranked
from services.rerank.settings import choose_scorer

VOCABULARY = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6, "d": 7}
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), st.booleans()), min_size=1, max_size=9
)


@pytest.fixture
def tokenizer():
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_truncation(3)
    made.enable_padding()
    return TextTokenizer(made.to_str(), 8)


@given(ROWS, st.integers(0, 9), st.integers(0, 2**40))
def test_a_batch_survives_the_wire(rows, skip, serial):
    made = [Row(np.array(ids, np.int32), np.ones(len(ids), np.int8) if typed else None, skip) for ids, typed in rows]
    frame = pack_batch(serial, made)
    head = unpack_head(frame[:HEAD_BYTES])
    assert (head.serial, head.rows, head.size) == (serial, len(rows), len(frame) - HEAD_BYTES)
    back = unpack_batch(head, frame[HEAD_BYTES:])
    assert [row.ids.tolist() for row in back] == [ids for ids, _ in rows]
    assert {row.skip for row in back} == {skip}
    for (ids, typed), row in zip(rows, back, strict=True):
        assert row.types is None if not any(t for _, t in rows) else row.types.tolist() == [int(typed)] * len(ids)


def test_a_result_survives_the_wire():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    frame = pack_result(9, values)
    assert np.array_equal(unpack_result(unpack_head(frame[:HEAD_BYTES]), frame[HEAD_BYTES:]), values)


@pytest.mark.parametrize(("left", "ids", "mask"), [(False, [5, 0], [1, 0]), (True, [0, 5], [0, 1])])
def test_rows_are_padded_on_the_models_side(left, ids, mask):
    found = padded([Row(np.array([5], np.int32)), Row(np.array([6, 7], np.int32))], 0, left=left)
    assert (found[0].tolist(), found[1].tolist()) == ([ids, [6, 7]], [mask, [1, 1]])


def test_rows_stand_between_the_models_special_tokens(tokenizer):
    assert tokenizer.row(tokenizer.encode(["a b c"])[0]).ids.tolist() == [1, 4, 5, 6, 2]
    long = tokenizer.encode(["a b c d a b c d"])[0]
    assert tokenizer.row(long).ids.tolist() == [1, 4, 5, 6, 7, 4, 5, 2]
    assert tokenizer.row(long, cut=Cut.START, limit=4).ids.tolist() == [1, 6, 7, 2]
    with pytest.raises(TooLong, match="10 tokens, at most 8"):
        tokenizer.row(long, cut=Cut.NONE)


def test_pairs_carry_their_segments(tokenizer):
    query, document = tokenizer.encode(["a", "b c d a b c"])
    row = tokenizer.pair_row(query, document)
    assert row.ids.tolist() == [1, 4, 2, 5, 6, 7, 4, 2]
    assert row.types.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    with pytest.raises(TooLong):
        tokenizer.pair_row(query, document, cut=Cut.NONE)


def test_a_tokenizer_that_was_left_to_cut_and_pad_has_the_digest_of_one_that_was_not(tokenizer):
    again = TextTokenizer(tokenizer._tokenizer.to_str(), 4)
    assert again.digest == tokenizer.digest


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 40))
def test_the_longer_of_a_pair_is_cut_first(first, second, room):
    one, two = share_room(first, second, room)
    assert one <= first
    assert two <= second
    assert one + two == min(first + second, room)
    if first <= room // 2:
        assert one == first


def test_vectors_are_cut_then_normalised_and_packed_little_endian():
    values = np.array([[3, 4, 12], [0, 0, 5]], np.float32)
    found = [np.frombuffer(vector.packed, "<f4") for vector in finish(values, 2, unit=True)]
    assert np.allclose(found, [[0.6, 0.8], [0, 0]])
    assert np.frombuffer(finish(values, 3, unit=False)[0].packed, "<f4").tolist() == [3, 4, 12]
    assert check_dimensions(0, 3) == 3
    with pytest.raises(MeshError):
        check_dimensions(4, 3)


def test_ranking_keeps_the_order_of_equals():
    assert ranked(np.array([0.5, 0.9, 0.5, -1], np.float32), 3) == [1, 0, 2]
    assert ranked(np.array([0.1, 0.2], np.float32), 0) == [1, 0]


def test_every_device_gets_its_replicas_and_cpu_cores_are_divided(monkeypatch):
    monkeypatch.setattr(settings, "cores", lambda: 8)
    plans = EmbeddingSettings(devices=("cuda:2", "cuda:3"), replicas=2).plans("embedding", "m")
    assert [plan.device for plan in plans] == ["cuda:2", "cuda:2", "cuda:3", "cuda:3"]
    assert {plan.threads for plan in plans} == {2}
    assert EmbeddingSettings(replicas=3, threads=5).plans("embedding", "m")[0].threads == 5


def test_all_faults_of_the_settings_are_told_at_once():
    with pytest.raises(ValidationError) as caught:
        EmbeddingSettings(model="other", devices=("tpu", "cuda:x"), kv_tokens=5, context=(0, 10))
    text = str(caught.value)
    for part in ("source:", "'tpu'", "'cuda:x'", "kv_tokens:", "context:"):
        assert part in text


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (["BertForSequenceClassification"], "cross-encoder"),
        (["Qwen3ForCausalLM"], "cross-encoder"),
        (["BertModel"], "bi-encoder"),
        (None, "bi-encoder"),
    ],
)
def test_the_model_folder_tells_the_scorer(tmp_path, heads, expected):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": heads}))
    assert choose_scorer("auto", str(tmp_path))[0] == expected
    assert choose_scorer("bi-encoder", str(tmp_path))[0] == "bi-encoder"


class Model:
    """Stands for a library model in an export: encodes to `value`."""

    def __init__(self, value):
        self.value = value

    def encode(self, texts, show_progress_bar):
        return np.full((len(texts), 2), self.value)

    def save_pretrained(self, folder):
        open(f"{folder}/model.xml", "w").close()


@pytest.mark.parametrize(("difference", "backend"), [(1e-7, "openvino"), (1e-3, "torch")])
def test_auto_takes_openvino_only_where_it_equals_torch(tmp_path, monkeypatch, difference, backend):
    monkeypatch.setattr(exports, "_missing", lambda name: "")
    plan = LoadPlan(purpose="embedding", source="m", export_dir=str(tmp_path / "exports"))
    opened = []

    def open_model(kind):
        opened.append(kind)
        return Model(1.0 + (difference if kind == "openvino" else 0))

    with pytest.raises(StartAgain):
        exports.choose(plan, "v1", "cpu", print, open_model)
    chosen, reason, folder = exports.choose(plan, "v1", "cpu", print, open_model)
    assert (chosen, opened) == (backend, ["openvino", "torch"])
    assert f"{difference:.1e}" in reason
    assert bool(folder) == (backend == "openvino")
    with pytest.raises(StartAgain):
        exports.choose(plan, "v2", "cpu", print, open_model)


def test_auto_falls_back_to_torch_and_says_why(tmp_path, monkeypatch):
    plan = LoadPlan(purpose="embedding", source="m", export_dir=str(tmp_path))

    def broken(kind):
        raise RuntimeError("no such operator")

    assert exports.choose(plan, "v", "cuda:0", print, broken)[:2] == ("torch", "auto: a GPU")
    monkeypatch.setattr(exports, "_missing", lambda name: "optimum.intel")
    assert "optimum.intel is not installed" in exports.choose(plan, "v", "cpu", print, broken)[1]
    with pytest.raises(ValueError, match=r"sentence-transformers\[onnx\]"):
        exports.choose(plan.model_copy(update={"backend": "onnx"}), "v", "cpu", print, broken)
    monkeypatch.setattr(exports, "_missing", lambda name: "")
    chosen, reason, _ = exports.choose(plan, "v", "cpu", print, broken)
    assert chosen == "torch"
    assert "no such operator" in reason
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "a broken export was left behind"


def test_the_weights_version_follows_the_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = exports.weights_version(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    after = exports.weights_version(str(tmp_path), None)
    assert before != after
    assert exports.weights_version(str(tmp_path), None) == after
    assert exports.weights_version("org/name", "0123456789abcdef0123") == "0123456789abcdef"
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        before, after = after, exports.weights_version(str(tmp_path), None)
        assert before != after, f"{name} changes the vectors, and an export of the old one would stay"


def test_a_model_folder_that_moved_is_not_exported_again(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "_missing", lambda name: "")
    for place in ("here", "there"):
        (tmp_path / place / "m").mkdir(parents=True)
    plans = [
        LoadPlan(purpose="embedding", source=str(tmp_path / place / "m"), export_dir=str(tmp_path / "exports"))
        for place in ("here", "there")
    ]
    with pytest.raises(StartAgain):
        exports.choose(plans[0], "v", "cpu", print, lambda kind: Model(1.0))
    assert exports.choose(plans[1], "v", "cpu", print, lambda kind: Model(1.0))[0] == "openvino"


def test_a_source_is_a_folder_a_hub_name_or_the_default(tmp_path):
    assert settings.find_source(str(tmp_path)) == str(tmp_path)
    assert settings.find_source("BAAI/bge-m3") == "BAAI/bge-m3"
    with pytest.raises(ValueError, match="is not a folder"):
        settings.find_source(str(tmp_path / "absent"))
    assert settings.find_source("").endswith("model")
