"""Train a small BERT from scratch on sentences of your own and save it as an ordinary Hugging Face folder.

A stand-in where no pre-trained text classifier is at hand: a few minutes on one CPU core. The files are those of
`petl.data.Sentences`: lines "label text", CSV, TSV or JSON lines. Of all epochs, the one that is best on --dev is kept.

    python recipes/train_sentence_classifier.py --vocab vocab.txt --train train.txt --dev dev.txt --out bert
    AutoModelForSequenceClassification.from_pretrained("bert"), AutoTokenizer.from_pretrained("bert")
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

from petl.data import Sentences


class Encoded(NamedTuple):
    """A split as tensors: ids and mask (N, T), labels (N,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def part(self, rows: Tensor) -> Encoded:
        """These rows, without the columns that are padding in all of them."""
        longest = int(self.mask[rows].sum(1).max())
        return Encoded(self.ids[rows, :longest], self.mask[rows, :longest], self.labels[rows])


def encode(data: Sentences, split: str, tokenizer: Any, length: int) -> Encoded:
    batch = tokenizer(data.texts(split), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    labels = torch.tensor([s.label for s in data.splits[split].samples])
    return Encoded(batch["input_ids"], batch["attention_mask"], labels)


def shuffled(mask: Tensor, size: int) -> list[Tensor]:
    """Rows of each batch: random, but of similar length, so that little is padded."""
    batches: list[Tensor] = []
    for chunk in torch.randperm(len(mask)).split(20 * size):
        batches += chunk[mask[chunk].sum(1).argsort(stable=True)].split(size)
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


@torch.inference_mode()
def accuracy(model: nn.Module, data: Encoded) -> float:
    model.eval()
    hits = 0
    for rows in data.mask.sum(1).argsort().split(128):
        part = data.part(rows)
        hits += int((model(input_ids=part.ids, attention_mask=part.mask).logits.argmax(-1) == part.labels).sum())
    return hits / len(data.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=Path, required=True, help="WordPiece vocabulary, one piece per line")
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", help="default: a tenth of --train")
    parser.add_argument("--test", help="default: --dev")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=["negative", "positive"], help="of the labels, in their order")
    parser.add_argument("--encoding", default="utf-8")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=48, help="pieces of a sentence at most")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--drop-words", type=float, default=0.15, help="share of pieces replaced by [UNK] in training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if not args.vocab.is_file():
        parser.error(f"--vocab {args.vocab} does not exist")
    torch.manual_seed(args.seed)
    data = Sentences(args.train, args.dev, args.test, names=args.names, encoding=args.encoding, seed=args.seed)
    data.setup("fit")
    tokenizer: Any = BertTokenizer(vocab=str(args.vocab), model_max_length=args.length)
    train, dev = (encode(data, split, tokenizer, args.length) for split in ("train", "val"))
    names = dict(enumerate(data.labels))
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=args.width, num_hidden_layers=args.layers,
            num_attention_heads=args.heads, intermediate_size=4 * args.width, max_position_embeddings=args.length,
            hidden_dropout_prob=args.dropout, pad_token_id=tokenizer.pad_token_id,
            initializer_range=width_range(args.width), num_labels=len(names), id2label=names,
            label2id={name: i for i, name in names.items()},
        )
    )  # fmt: skip
    for part in (model.bert.embeddings.position_embeddings, model.bert.embeddings.token_type_embeddings):
        nn.init.zeros_(part.weight)  # places are noise until words mean something
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98),
        fused=True,
    )  # fmt: skip
    steps = -(-len(train.ids) // args.batch)
    warm_up, total = steps // 2, steps * args.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warm_up + 1), 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    special = torch.tensor(tokenizer.all_special_ids)
    best, kept, began = -1.0, {}, time.time()
    for epoch in range(1, args.epochs + 1):
        model.train()
        losses = 0.0
        for rows in shuffled(train.mask, args.batch):
            ids, mask, labels = train.part(rows)
            dropped = (torch.rand(ids.shape) < args.drop_words) & ~torch.isin(ids, special)
            ids = ids.masked_fill(dropped, tokenizer.unk_token_id)
            loss = F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses += loss.item()
        now = accuracy(model, dev)
        print(f"epoch {epoch} loss {losses / steps:.3f} dev {now:.4f} {time.time() - began:.0f} s", flush=True)
        if now > best:
            best, kept = now, {name: value.clone() for name, value in model.state_dict().items()}

    model.load_state_dict(kept)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = AutoModelForSequenceClassification.from_pretrained(args.out)
    test = encode(data, "test", AutoTokenizer.from_pretrained(args.out), args.length)
    print(
        f"{args.out}: {sum(p.numel() for p in saved.parameters()):,} parameters, dev {accuracy(saved, dev):.4f}, "
        f"test {accuracy(saved, test):.4f} ({data.split_names['test']})"
    )


def width_range(width: int) -> float:
    """Scale of the random weights: with BERT's 0.02, made for a width of 768, a narrow network does not get started."""
    return 1.0 / math.sqrt(width)


if __name__ == "__main__":
    main()
