"""Drawings of explanations: maps over pictures, coloured sentences in a terminal and in HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from petl.errors import PetlError
from petl.heatmaps import AGAINST, FOR, NEUTRAL, WHITE, _mix, _text_on, heatmap_grid, luminance
from petl.heatmaps import sentence_html as html
from petl.heatmaps import sentence_terminal as terminal

WORDS = ["not", "a", "good", "film"]
VALUES = [-0.5, 0.0, 0.25, 0.01]


# ---- pictures


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def draw(tmp_path: Path, values: list[Tensor] | Tensor, size: tuple[int, int] = (64, 64), **options: int) -> np.ndarray:
    """Grey pictures with these maps."""
    file = tmp_path / "new" / "map.png"
    images = torch.full((len(values), 3, *size), 0.5)
    assert heatmap_grid(images, values, [f"picture {i}" for i in range(len(values))], file, **options) == file
    return pixels(file)


def colored(drawn: np.ndarray) -> tuple[int, int]:
    """How many pixels are red, and blue."""
    difference = drawn[..., 0] - drawn[..., 2]
    return int((difference > 25).sum()), int((difference < -25).sum())


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (48, 96)])
def test_signs_have_their_colours_and_cells_their_share(tmp_path: Path, size: tuple[int, int]) -> None:
    cells = torch.zeros(4, 4)
    cells[0, 0], cells[3, 2:] = -0.2, 0.2
    red, blue = colored(draw(tmp_path, [cells], size))
    mirrored = colored(draw(tmp_path, [-cells], size))
    bar = 0.4 * red  # half of the bar is red, half is blue
    assert blue - red > bar > 0  # two cells against one
    assert mirrored[0] == pytest.approx(blue, rel=0.02)
    assert mirrored[1] == pytest.approx(red, rel=0.02)


def test_every_map_has_its_own_symmetric_scale(tmp_path: Path) -> None:
    cells = torch.tensor([[1.0, -0.5], [0.0, 0.25]])
    same = draw(tmp_path, [cells, cells * 1e-4], columns=1)
    upper, lower = colored(same[: len(same) // 2]), colored(same[len(same) // 2 :])
    assert upper == pytest.approx(lower, rel=0.05)
    assert min(upper) > 10_000
    red, blue = colored(draw(tmp_path, torch.tensor([[[0.3, 0.3], [0.3, 0.3]]])))
    assert red < 0.1 * blue, "positive values alone are never red, but in the bar"


def test_zero_values_and_one_player(tmp_path: Path) -> None:
    red, blue = colored(draw(tmp_path, torch.zeros(1, 3, 3)))
    assert max(red, blue) < 2000, "only the bar"
    assert colored(draw(tmp_path, [torch.tensor([[0.4]])]))[1] > 50_000
    assert colored(draw(tmp_path, [torch.tensor([[-0.4]])]))[0] > 50_000


def test_the_grid_has_the_columns_asked_for(tmp_path: Path) -> None:
    maps = torch.randn(3, 4, 4)
    row, column = draw(tmp_path, maps), draw(tmp_path, maps, columns=1)
    assert row.shape[1] > 2.8 * column.shape[1]
    assert column.shape[0] > 2.5 * row.shape[0]
    assert draw(tmp_path, maps[:1], columns=5).shape == (row.shape[0], column.shape[1], 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([torch.zeros(2, 2)] * 2, "1 images, 2 maps, 1 titles"),
        ([], "1 images, 0 maps"),
        ([torch.zeros(4)], r"map 0 has the shape \(4,\), not \(rows, columns\)"),
        ([torch.zeros(0, 4)], r"map 0 has the shape \(0, 4\)"),
        ([torch.tensor([[float("nan")]])], "map 0 holds values that are not finite"),
    ],
)
def test_maps_that_cannot_be_drawn(tmp_path: Path, values: list[Tensor], message: str) -> None:
    with pytest.raises(PetlError, match=message):
        heatmap_grid(torch.zeros(1, 3, 8, 8), values, ["one"], tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()


# ---- terminal


def test_words_in_a_terminal() -> None:
    painted = terminal(WORDS, VALUES)
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == "not a good film"
    grounds = re.findall(r"\x1b\[48;2;(\d+);(\d+);(\d+)m\x1b\[38;2;255;255;255m(\w+)\x1b\[0m", painted)
    assert [w for *_, w in grounds] == ["not", "good"], "near zero: not painted"
    assert tuple(map(int, grounds[0][:3])) == AGAINST
    red, _, blue = map(int, grounds[1][:3])
    assert red < blue < FOR[2]


def test_words_in_a_terminal_without_colour() -> None:
    assert terminal(WORDS, VALUES, colour=False) == "not (-0.50) a (0.00) good (+0.25) film (+0.01)"
    assert terminal(["x", "y"], torch.tensor([-0.00312, 1e-9]), colour=False) == "x (-0.0031) y (0.0000)"
    assert terminal(["x"], [1234.5], colour=False) == "x (+1234.50)"


@pytest.mark.parametrize("colour", [True, False])
def test_no_words_one_word_and_zeros_in_a_terminal(colour: bool) -> None:
    assert terminal([], [], colour) == ""
    assert terminal(["it"], [0.0], colour) == ("it" if colour else "it (0.00)")
    assert "it" in terminal(["it"], [-3], colour)


def test_a_word_cannot_send_escape_codes() -> None:
    shown = terminal(["\x1b[2J", "a\nb"], [0.0, 0.0])
    assert shown == "\ufffd[2J a\ufffdb"


# ---- HTML


class Reader(HTMLParser):
    """Tags, texts and the values on hovering."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.titles: list[str | None] = []
        self.feed(text)
        self.close()
        assert not self.open, "a tag is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [v for k, v in attrs if k == "title"]
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


def test_words_in_html() -> None:
    page = Reader(html(WORDS, VALUES, title="positive, 93 %"))
    assert page.texts == ["positive, 93 %", *WORDS, "against", "for"]
    assert page.titles == ["-0.50", "0.00", "+0.25", "+0.01"]
    text = html(WORDS, VALUES)
    assert "background:#b2182b;color:#ffffff" in text
    assert "background:#ffffff;color:#000000;padding" in text, "zero is white"
    assert Reader(html(WORDS, VALUES, numbers=True)).texts[:4] == ["not", "-0.50", "a", "0.00"]
    assert "figcaption" not in text


def test_html_is_escaped() -> None:
    nasty = ["<script>alert(1)</script>", '"><img src=x onerror=y>', "&amp;", "'"]
    page = Reader(html(nasty, [1, 2, 3, 4], title="<b>title</b>"))
    assert page.texts[:5] == ["<b>title</b>", *nasty]
    assert set(page.tags) == {"figure", "figcaption", "div", "span"}
    assert "src=" not in html(["x"], [1.0]), "nothing is fetched"


def test_no_words_one_word_and_zeros_in_html() -> None:
    assert Reader(html([], [])).texts == ["against", "for"]
    assert Reader(html(["it"], [0.0])).titles == ["0.00"]
    assert "background:#2166ac" in html(["it"], [1e-7]).split("</span>")[0]


@pytest.mark.parametrize("start", [WHITE, NEUTRAL])
def test_every_word_can_be_read(start: tuple[int, int, int]) -> None:
    for share in np.linspace(-1, 1, 201):
        ground = luminance(_mix(start, float(share)))
        text = 1.0 if start == NEUTRAL or _text_on(_mix(start, float(share))) == "#ffffff" else 0.0
        lighter, darker = max(ground, text), min(ground, text)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, share
    assert (luminance(WHITE), luminance((0, 0, 0))) == (pytest.approx(1), 0)


@pytest.mark.parametrize("show", [terminal, html])
def test_values_that_do_not_fit_the_words(show: type) -> None:
    with pytest.raises(PetlError, match=r"2 words and values of shape \(1,\): give one value per word"):
        show(["a", "b"], [1.0])
    with pytest.raises(PetlError, match="value 1 is not finite"):
        show(["a", "b"], [1.0, float("inf")])
