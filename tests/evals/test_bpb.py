from __future__ import annotations

import json
import math
from itertools import islice

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.data import Batch, Loader, build_source
from nanoworks.evals import bits_per_byte
from nanoworks.evals.bpb import BpbOptions, text_bits_per_byte
from nanoworks.nn.context import DenseContext


def batch(tokens, targets, weights=None, documents=None) -> Batch:
    weights = torch.ones(tokens.shape) if weights is None else weights
    return Batch(tokens, targets, weights, documents, {}, int((weights > 0).sum()), {})


def test_sum_of_nats_over_sum_of_bytes(learner):
    generator = torch.Generator().manual_seed(3)
    vocab = learner.tokenizer.vocab_size
    ids = torch.randint(0, vocab, (2, 3, 17), generator=generator)
    lengths = [i % 4 for i in range(vocab)]  # a quarter of the ids are no text
    weights = (torch.rand(2, 3, 16, generator=generator) > 0.3).float()
    batches = [batch(x[:, :-1], x[:, 1:], w) for x, w in zip(ids, weights, strict=True)]
    nats = total = text = count = 0.0
    with torch.no_grad():
        for x, w in zip(ids, weights, strict=True):
            logits = learner.model.head(learner.model(x[:, :-1], DenseContext(x[:, :-1])))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none")
            for value, target, weight in zip(loss.tolist(), x[:, 1:].flatten().tolist(), w.flatten(), strict=True):
                if weight > 0:
                    total, count = total + value, count + 1
                    nats, text = nats + value * (lengths[target] > 0), text + lengths[target]
    measured = bits_per_byte(learner.model, batches, lengths, "cpu")
    assert measured["bpb"] == pytest.approx(nats / (math.log(2) * text), rel=1e-6)
    assert measured["loss"] == pytest.approx(total / count, rel=1e-6)
    assert measured["tokens"] == count


def test_stops_after_max_tokens_and_keeps_documents_apart(learner):
    tokens = torch.tensor([[65, 66, 67, 68]])
    lengths = learner.tokenizer.token_bytes()
    apart = torch.tensor([[0, 0, 1, 1]], dtype=torch.int32)
    one = bits_per_byte(learner.model, [batch(tokens, tokens)] * 3, lengths, "cpu", max_tokens=4)
    assert one["tokens"] == 4
    separate = bits_per_byte(learner.model, [batch(tokens, tokens, documents=apart)], lengths, "cpu")
    assert separate["bpb"] != pytest.approx(one["bpb"])


def test_nothing_to_measure_is_an_error(learner):
    lengths = learner.tokenizer.token_bytes()
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(learner.model, [], lengths, "cpu")
    bos = torch.full((1, 4), learner.tokenizer.bos_id)
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(learner.model, [batch(bos, bos)], lengths, "cpu")
    masked = torch.tensor([[65, 66]])
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(learner.model, [batch(masked, masked, torch.zeros(1, 2))], lengths, "cpu")


def test_of_a_file(learner, tmp_path):
    (tmp_path / "a.txt").write_text("the sky is blue\n" * 50)
    options = BpbOptions(path=str(tmp_path / "a.txt"), sequence_length=64, batch_size=2)
    measured = text_bits_per_byte(learner.model, learner.tokenizer, options)
    assert measured["bpb"] > 0
    assert measured["tokens"] == pytest.approx(len(learner.tokenizer.encode("the sky is blue\n" * 50)), abs=10)


def test_nanochats_own_figure(shared_dir):
    import nanoworks

    folder = shared_dir / "golden" / "nanochat" / "old"
    golden = json.loads((folder / "golden.json").read_text())
    model = nanoworks.load(folder / "base" / "base_checkpoints" / "d2", device="cpu")
    source = build_source(
        "parquet", {"path": str(folder / "base" / "base_data"), "validation": "last_file", "split": "val"}
    )
    with Loader(
        source, model.tokenizer, sequence_length=256, batch_size=2, packing="stream", documents=False
    ) as loader:
        batches = list(islice(loader, 4))
    # nanochat's old rule for the bytes of a token, see the README of the golden data
    measured = bits_per_byte(model.model, batches, golden["token_bytes"]["values"], "cpu")
    assert measured["bpb"] == pytest.approx(golden["base_d2"]["bpb_val_4_batches_B2_T256"], abs=2e-6)
