"""`petl explain`: what each patch of an image, or word of a sentence, adds to the probability of a class."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petl.engine.adapter_cli import picture_file
from petl.errors import PetlError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from petl.adapters.predictor import Predictor
    from petl.backbones.players import Players
    from petl.models.explained import ShapleyExplanation


def explain(args: Sequence[str]) -> None:
    """Print the prediction, the efficiency check and the strongest players of one input, and draw all of them."""
    parser = argparse.ArgumentParser(
        "petl explain",
        description="Shapley values of the patches of an image, or of the words of a sentence, for one class.",
    )
    parser.add_argument("adapter", help="adapter directory or hub id of an explanation (petl.Explanation)")
    parser.add_argument("input", help="image file; a sentence in quotes where the classifier reads text")
    parser.add_argument("--class", dest="name", help="label of the class to explain (default: the predicted one)")
    parser.add_argument("--weights", type=Path, help="classifier weights, where they came from a local file")
    parser.add_argument("--out", type=picture_file, help="picture to write of an image (default: explained.png)")
    parser.add_argument("--html", type=_page, help="HTML file to write of a sentence")
    parser.add_argument("--top", type=_count, default=5, help="players to print, the strongest first")
    given = parser.parse_args(args)
    from petl.adapters.predictor import load

    predictor = load(given.adapter, weights=given.weights)
    found = predictor.explain(given.input)
    if given.out and predictor.reads_text:
        raise PetlError("--out draws an image, and this classifier reads text: --html FILE writes a sentence.")
    if given.html and not predictor.reads_text:
        raise PetlError("--html writes a sentence, and this classifier looks at images: --out FILE draws one.")
    labels = predictor.labels or [str(i) for i in range(found.logits.shape[1])]
    chosen = int(found.logits[0].argmax()) if given.name is None else class_index(given.name, labels)
    title = _print_summary(predictor, found, labels, chosen)
    if predictor.reads_text:
        _explain_sentence(predictor, found, chosen, given.input, title, given.top, given.html)
    else:
        _explain_image(predictor, found, chosen, given.input, title, given.top, given.out or Path("explained.png"))


def class_index(name: str, labels: Sequence[str]) -> int:
    """Which class is called ``name``."""
    if name not in labels:
        raise PetlError(f"--class {name!r}: the classifier knows no such class; {nearest(name, labels)}")
    return list(labels).index(name)


def player_words(tokenizer: Any, ids: Tensor, players: Players) -> list[list[str]]:
    """What the players of each text are called: the pieces of the vocabulary that belong to one, put together.

    ``ids`` (B, T) as ``tokenizer`` gave them.
    """
    found = []
    for row, of, count in zip(ids.tolist(), players.of.tolist(), players.counts.tolist()):
        words = [""] * count
        for piece, player in zip(tokenizer.convert_ids_to_tokens(row), of):
            if player >= 0:  # not [CLS], [SEP] or padding
                words[player] += piece.removeprefix("##")
        found.append(words)
    return found


def _print_summary(predictor: Predictor, found: ShapleyExplanation, labels: Sequence[str], chosen: int) -> str:
    """Print prediction, class and efficiency; returns a title for what is drawn."""
    prediction = predictor.predictions(found.logits)[0]
    judge = "surrogate" if predictor.config["method"]["options"]["grand"] == "surrogate" else "classifier"
    null, grand, total = (float(t[0, chosen]) for t in (found.null, found.grand, found.values.sum(1)))
    gap = abs(float((found.values.sum(1) - (found.grand - found.null))[0, chosen]))
    print(f"prediction: {prediction.label} {prediction.probability:.1%}")
    print(f"explained: {labels[chosen]}; v is its probability by the {judge}")
    print(f"efficiency: sum of values {total:z.4f} = v(1) {grand:.4f} - v(0) {null:.4f}, gap {gap:.0e}")
    return f"predicted: {prediction.label} ({prediction.probability:.0%}); blue for {labels[chosen]}, red against"


def _print_strongest(names: Sequence[str], values: Tensor, count: int, note: str = "") -> None:
    order = values.abs().argsort(descending=True, stable=True)[:count].tolist()
    width = max((len(names[i]) for i in order), default=0)
    print(f"strongest {len(order)} of {len(names)} players{note}:")
    for i in order:
        print(f"  {names[i]:<{width}}  {float(values[i]):+z.4f}")


def _explain_image(
    predictor: Predictor, found: ShapleyExplanation, chosen: int, file: str, title: str, top: int, out: Path
) -> None:
    import torch

    from petl.heatmaps import heatmap_grid
    from petl.pictures import unnormalise

    cells = found.maps(torch.tensor([chosen], device=found.values.device))
    rows, columns = cells.shape[1:]
    names = [f"row {r}, column {c}" for r in range(1, rows + 1) for c in range(1, columns + 1)]
    _print_strongest(names, cells[0].flatten(), top, f" in {rows} rows and {columns} columns")
    preprocessing: Any = predictor.config["preprocessing"]
    shown = unnormalise(predictor.preprocess(file)[None], preprocessing["mean"], preprocessing["std"])
    try:
        heatmap_grid(shown, cells, [title], out, columns=1)
    except OSError as error:
        raise PetlError(f"the picture could not be written to {out}: {error}") from error
    print(f"drawn: {out}")


def _explain_sentence(
    predictor: Predictor, found: ShapleyExplanation, chosen: int, text: str, title: str, top: int, html: Path | None
) -> None:
    from petl.heatmaps import sentence_html, sentence_terminal

    ids = predictor.tokens(text)["input_ids"]
    words, values = player_words(predictor.tokenizer, ids, found.players)[0], found.values[0, :, chosen]
    names = [f"{number} {word}" for number, word in enumerate(words, 1)]
    _print_strongest(names, values, top)
    whole = len(predictor.tokenizer(text, verbose=False)["input_ids"])
    if whole > ids.shape[1]:
        print(f"the sentence has {whole} tokens and was cut to {ids.shape[1]}.")
    print(sentence_terminal(words, values, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if html is None:
        return
    page = f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page + sentence_html(words, values, title), encoding="utf-8")
    except OSError as error:
        raise PetlError(f"the sentence could not be written to {html}: {error}") from error
    print(f"written: {html}")


def _page(name: str) -> Path:
    file = Path(name)
    if file.suffix.lower() not in (".html", ".htm") or file.is_dir():
        raise PetlError(f"--html {name}: a page is a file that ends in .html.")
    return file


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise PetlError(f"--top {given}: it is the number of players to print, 1 or more.")
    return int(given)
