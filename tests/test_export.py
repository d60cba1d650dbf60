"""Labels for other trainers: the exported file, and RFT in transformers' Trainer."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import Dataset
from model import Transformer
from processes import call
from rft import rft_loss
from shad import Labels, load_labels
from support.export import export_labels
from support.templates import Renderer
from test_methods import batch_loss
from tiny import apigen, make_checkpoint, read_lines, talk, write


def rebuilt_labels(record, dataset):
    """The labels of the tokens of a record's only output, by the span in which each begins."""
    [output] = record["outputs"]
    spans = output["spans"]
    assert "".join(output["text"][start:end] for start, end, _ in spans) == output["text"]
    for span, following in zip(spans, spans[1:], strict=False):
        assert span[2] != following[2]
    labels = []
    encoding = dataset.renderer.tokenizer.encode(output["text"], add_special_tokens=False)
    for start, _ in encoding.offsets:
        [label] = [name for first, end, name in spans if first <= start < end]
        labels.append(label == "reasoning")
    return labels


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_the_exported_file_holds_every_token_its_label_and_the_spans(request, tmp_path, template):
    directory = request.getfixturevalue(template)
    samples = [talk(("user", "What?"), ("assistant", "Oslo, Bern\n and  Lima"), ("user", "more"),
                    ("assistant", "é 北京 ok"), id="a"),
               talk(("user", "word " * 300), ("assistant", "dropped"), id="b"),
               talk(("user", "?"), ("assistant", "Oslo, in two  days\n ok"), id="c")]
    dataset = Dataset(samples, Renderer(directory), max_length=200)
    generator = np.random.default_rng(0)
    difference = generator.normal(size=dataset.output_starts[-1]).astype(np.float32)
    labels = Labels(difference, threshold=0.2)
    export_labels(str(tmp_path / "x.jsonl"), dataset, labels)
    records = read_lines(tmp_path / "x.jsonl")
    assert [record["id"] for record in records] == ["a", "c"]
    for i, record in zip(dataset.kept, records, strict=True):
        here = slice(dataset.output_starts[i], dataset.output_starts[i + 1])
        assert record["input_ids"] == dataset.ids[i].tolist()
        mask = np.array(record["output_mask"]) == 1
        assert np.array_equal(mask, dataset.is_output[i])
        marked = np.array(record["is_reasoning"])
        assert not marked[~mask].any()
        assert marked[mask].tolist() == labels[here].astype(int).tolist()
        assert record["loss_difference"] == pytest.approx(difference[here], abs=1e-6)
        texts = [message.text for message in samples[i].messages if message.is_output]
        assert [output["text"] for output in record["outputs"]] == texts
    # in ASCII no two tokens share a character, so the spans say all that the labels do
    expected = labels[dataset.output_starts[2]:dataset.output_starts[3]]
    assert rebuilt_labels(records[1], dataset) == expected[:-1].tolist()


def test_labels_are_exported_as_they_are_made_and_again_without_a_model(tmp_path):
    make_checkpoint(tmp_path / "model")
    write(tmp_path / "data.json", apigen(12))
    arguments = ["shad", "--model", tmp_path / "model", "--data", tmp_path / "data.json",
                 "--out", tmp_path / "labels"]
    code, text = call(tmp_path, *arguments, "--export", tmp_path / "first.jsonl")
    assert code == 0, text
    (tmp_path / "model" / "model.safetensors").unlink()
    code, text = call(tmp_path, *arguments, "--export", tmp_path / "again.jsonl")
    assert code == 0, text
    assert "losses of" not in text
    first = (tmp_path / "first.jsonl").read_bytes()
    assert (tmp_path / "again.jsonl").read_bytes() == first
    dataset = Dataset.load(
        [str(tmp_path / "data.json")], str(tmp_path / "model"), "auto", 2048)
    labels = load_labels(str(tmp_path / "labels"), dataset)
    marked = []
    for record in read_lines(tmp_path / "first.jsonl"):
        mask = np.array(record["output_mask"]) == 1
        marked.append(np.array(record["is_reasoning"])[mask])
    assert np.array_equal(np.concatenate(marked), labels[:])

    code, text = call(tmp_path, *arguments)
    assert code == 2, text
    assert "is there already" in text


# --------------------------------------------------------------------------------------------------
# The README's example

def compute_loss_func(outputs, labels, num_items_in_batch=None):
    vocabulary = outputs.logits.shape[-1]
    labels = labels[:, 1:]                                                      # (B, T - 1)
    is_output = labels != -100
    is_reasoning = labels >= vocabulary
    targets = torch.where(is_reasoning, labels - vocabulary, labels)
    logits = outputs.logits[:, :-1].float().transpose(1, 2)                     # (B, V, T - 1)
    losses = F.cross_entropy(logits, targets, reduction="none")
    loss = rft_loss(losses, is_reasoning, is_output=is_output)                  # (B,)
    tokens = is_output.sum(1)
    return (loss * tokens).sum() / (num_items_in_batch or tokens.sum())


def marked_labels(record, vocabulary):
    """-100 for input tokens, an output token's id, plus `vocabulary` where it is reasoning."""
    labels = np.array(record["input_ids"]) + vocabulary * np.array(record["is_reasoning"])
    return np.where(record["output_mask"], labels, -100).tolist()


@pytest.mark.parametrize("batch, accumulation", [(6, 1), (2, 3)])
def test_rft_in_the_trainer_of_transformers(tmp_path, batch, accumulation):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    directory = make_checkpoint(tmp_path / "model")
    write(tmp_path / "data.json", apigen(6))
    dataset = Dataset.load([str(tmp_path / "data.json")], directory, "auto", 2048)
    difference = np.random.default_rng(0).normal(size=dataset.output_starts[-1])
    labels = Labels(difference.astype(np.float32))
    export_labels(str(tmp_path / "labels.jsonl"), dataset, labels)

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{directory}/tokenizer.json", pad_token="<|endoftext|>")
    rows = []
    for line in (tmp_path / "labels.jsonl").read_text().splitlines():
        record = json.loads(line)
        rows.append({"input_ids": record["input_ids"],
                     "labels": marked_labels(record, model.config.vocab_size)})
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0,
        lr_scheduler_type="constant", max_grad_norm=1e9, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, compute_loss_func=compute_loss_func,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer))
    trainer.train()

    # one step of SGD with a rate of 1: the gradient is what the weights have lost
    ours = Transformer.from_pretrained(directory).double()
    total = 0
    for i in range(6):
        ids = torch.tensor(dataset.ids[i]).long()
        is_output = torch.from_numpy(dataset.is_output[i][1:])
        losses = F.cross_entropy(ours(ids[None, :-1])[0], ids[1:], reduction="none")[is_output]
        here = slice(dataset.output_starts[i], dataset.output_starts[i + 1])
        sample = (losses, torch.from_numpy(labels[here]))
        total = total + len(losses) * batch_loss([sample], "rft")
    (total / dataset.output_starts[-1]).backward()
    after = model.state_dict()
    for name, p in ours.named_parameters():
        expected = p.detach() - p.grad
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-4, atol=1e-5)
