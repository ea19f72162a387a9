"""What grounding says about bad input: exit code 2, one clear error, nothing written; and what it warns of."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from petl.data import Scenes
from tests.data.refer import pictures, refs, write_refer
from tests.data.test_expressions import entry, write
from tests.engine.grounding import QUICK, SCENES, Petl, commands, tiny_pair

PREPROCESSING = {"image_size": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def petl() -> Iterator[Petl]:
    with commands() as run:
        yield run


@pytest.fixture(scope="module")
def trained(petl: Petl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, ``run``, on the bundled pair, and a picture, ``scene.png``. Tests do not write into it."""
    folder = tmp_path_factory.mktemp("trained")
    petl("fit", *SCENES, "--run_dir", "run", cwd=folder)
    data = Scenes(1, 0, 0)
    data.read()
    data.splits["train"][0].image.save(folder / "scene.png")
    return folder


def refused(petl: Petl, *args: object, cwd: Path) -> str:
    """The one error that a command ends with."""
    done = petl(*args, cwd=cwd, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("petl: ") == 1, done.stderr
    return done.stderr.partition("petl: ")[2]


OPTIONS = [
    (
        ["--model.method", "M2ISTT"],
        "model.method asks for the class 'M2ISTT', which there is not: did you mean 'petl.M2",
    ),
    (["--model.method.bottelneck", 2], "model.method has no option 'bottelneck': did you mean 'bottleneck'"),
    (["--model.query_lenght", 9], "model has no option 'query_lenght': did you mean 'query_length'"),
    (["--data.tset_split", "val"], "data has no option 'tset_split': did you mean 'test_split'"),
    (
        ["--model.method.shared_dim", 129],
        "wider than an encoder; these have 128 (image) and 128 (text) channels, so at m",
    ),
    (["--model.method.pairs", 5], "the encoders have 12 and 4 layers, so at most 4 can be paired"),
    (["--model.method.text_layers", "frist"], "did you mean 'first'?"),
    (["--model.method", "SparseTuning"], "'sparse_tuning' does not work on timm_vit as half of a pair"),
    (["--model", "petl.Classification"], "'m2ist' does not work on a lone timm_vit; it needs a petl.GroundingModel"),
    (["--model.text", "bundled/tiny_clip_txt"], "did you mean 'bundled/tiny_clip_text'?"),
    (["--model.query_length", 700], "query_length=700: it lies between 3 (start, a word, end) and the 32 positions"),
    (["--model.fusion_heads", 7], "fusion_heads 7"),
    (["--model.fusion_dim", 0], "fusion_dim"),
    (["--model.dropout", 1.5], "dropout"),
    (["--model.image_size", 32], "image_size=32: this image encoder has position embeddings for 64 x 64 pixels"),
    (["--data.image_size", 32], "image_size"),
    (["--data.test_split", "tset"], "Scenes(test_split='tset'): did you mean 'test'?"),
    (["--data.batch_size", 100], "the training set has 48 samples, fewer than one batch of 100"),
]


@pytest.mark.parametrize(
    ("options", "message"), OPTIONS, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else ""
)
def test_options(options: list[object], message: str, petl: Petl, tmp_path: Path) -> None:
    said = refused(petl, "fit", *SCENES, *options, "--run_dir", "run", cwd=tmp_path)
    assert message in said
    assert said.count("\n") == 1, said
    assert not [*tmp_path.rglob("*")], "nothing is written, so that the next try is not held up"


def test_data_of_another_task(petl: Petl, tmp_path: Path) -> None:
    small = [*SCENES[:2], *QUICK, "--data", "petl.data.Digits", "--data.train_size", 32, "--run_dir", "run"]
    assert "digits" in refused(petl, "fit", *small, cwd=tmp_path)
    swapped = ["--config", "quickstart/classification", "--trainer.accelerator", "cpu", "--data", "petl.data.Scenes"]
    assert "number of classes is not known" in refused(
        petl, "fit", *swapped, "--data.train_size", 70, "--run_dir", "run", cwd=tmp_path
    )


def test_lists_that_cannot_be_right(petl: Petl, tmp_path: Path) -> None:
    good = [entry(n, expression=f"thing {n}") for n in range(9)]
    for lines, message in (
        ([*good, entry(1, expression="  ")], "list.jsonl line 10: the expression is empty"),
        ([*good, entry(1, bbox=[4, 3, 60, 12])], "1 of 10 boxes (10.0%) are impossible"),
        ([entry(n, bbox=[20, 20, 39, 29]) for n in range(9)], 'if they are (x0, y0, x1, y1), name the key "bbox_xyxy"'),
        ([*good, entry(1, split="vall")], "'vall'; did you mean 'val'?"),
        ([], "list.jsonl holds no expressions"),
    ):
        root = tmp_path / f"{len(message)}"
        write(root, *lines)
        given = ["--data", "petl.data.Expressions", "--data.file", "list.jsonl", "--run_dir", "run"]
        assert message in refused(petl, "fit", *SCENES[:2], *QUICK, *given, cwd=root)
        assert not (root / "run" / "adapter").exists()
        assert not (root / "run" / "config.yaml").exists()
    write(tmp_path / "missing", *good)
    for n in (2, 5, 7):
        (tmp_path / "missing" / f"{n}.png").unlink()
    said = refused(petl, "fit", *SCENES[:2], *QUICK, *given, cwd=tmp_path / "missing")
    assert "3 of 9 image files do not exist: 2.png, 5.png, 7.png" in said


def test_refcoco_that_cannot_be_right(petl: Petl, tmp_path: Path) -> None:
    write_refer(tmp_path)
    pictures(tmp_path / "train2014")
    refcoco = [*SCENES[:2], *QUICK, "--data", "petl.data.RefCOCO", "--data.root", ".", "--data.batch_size", 2,
               "--data.dataset", "refcoco", "--run_dir", "run"]  # fmt: skip
    for options, message in (
        (["--data.image_root", "train2014", "--data.test_split", "testC"], "its splits are train, val, testA, testB"),
        (["--data.image_root", "train2014"], "train has 2 referred objects, refcoco unc has 42,404"),
        (["--data.image_root", "refcoco", "--data.partial", "true"], "2 of 2 image files do not exist: refcoco/COCO_"),
        (["--data.image_root", "train2014", "--data.dataset", "refcoco++"], "did you mean 'refcoco+'"),
        (["--data.image_root", "train2014", "--data.dataset", "refcoco+"], "holds neither refcoco+/refs(unc).p"),
    ):
        assert message in refused(petl, "fit", *refcoco, *options, cwd=tmp_path)
        assert not (tmp_path / "run" / "adapter").exists()
        assert not (tmp_path / "run" / "config.yaml").exists()


# ---- adapters


def test_pictures_and_expressions_that_cannot_be_used(petl: Petl, trained: Path, tmp_path: Path) -> None:
    adapter, scene = trained / "run" / "adapter", trained / "scene.png"
    (tmp_path / "text.jpg").write_text("not an image")
    for args, message in (
        ([adapter, scene, "the circle", "  "], "the expression is empty: say what to look for"),
        ([adapter, "gone.png", "the circle"], "image gone.png does not exist"),
        ([adapter, "text.jpg", "the circle"], "image text.jpg is cut short or not an image"),
        ([adapter.parent, scene, "the circle"], "is not an adapter: it has no adapter_config.json"),
        ([adapter, scene, "the circle", "--out", "x.bmpx"], "x.bmpx"),
        ([adapter, scene, "the circle", "--out", "text.jpg/x.png"], "could not be written to text.jpg/x.png"),
    ):
        assert message in refused(petl, "ground", *args, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["text.jpg"]
    done = petl("ground", adapter, scene, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "the following arguments are required: expression" in done.stderr


def test_adapters_of_another_task(petl: Petl, trained: Path, tmp_path: Path) -> None:
    import petl as library
    from petl.nn.head import Head

    vit = library.attach(library.load_backbone("bundled/tiny_clip_vision"), library.LinearProbe())
    library.save(library.Classifier(vit, Head("linear", 128, 2)), tmp_path / "classifier", "bundled/tiny_clip_vision",
                 labels=["cat", "dog"], preprocessing=PREPROCESSING | {"mode": "resize"})  # fmt: skip
    said = refused(petl, "ground", "classifier", trained / "scene.png", "the circle", cwd=tmp_path)
    assert "trained for 'classification', not for grounding" in said
    said = refused(petl, "classify", trained / "run" / "adapter", trained / "scene.png", cwd=tmp_path)
    assert "trained for 'grounding', not for classification" in said
    assert [p.name for p in tmp_path.iterdir()] == ["classifier"]


def test_an_adapter_is_not_tested_on_what_it_was_not_trained_on(petl: Petl, trained: Path, tmp_path: Path) -> None:
    encoders = tiny_pair(tmp_path, ["red"], width=128)
    run = ["test", "--config", trained / "run" / "config.yaml", "--run_dir", trained / "run"]
    for options, message in (
        (encoders[2:], "was trained on bundled/tiny_clip_text, and this text encoder is another architecture (hf_bert"),
        ([*encoders[:2], "--model.image_size", 96], "and this image encoder is another architecture (detr"),
        (["--model.pretrained", "false"], "is the right architecture with other weights"),
        (["--model.method", "DARA"], "not the same method"),
        (["--model.query_length", 9], "has another vision-language part than the model: query_length differ"),
        (["--model.fusion_layers", 2], "fusion_layers differ"),
    ):
        assert message in refused(petl, *run, *options, cwd=tmp_path), options
    assert not (trained / "run" / "test_metrics.json").exists()


# ---- warnings


def test_expressions_that_are_cut_are_counted_once(petl: Petl, tmp_path: Path) -> None:
    long = {"expression": "the small red circle to the left of the large blue square"}
    write(tmp_path, *(entry(n, **(long if n < 3 else {})) for n in range(9)), entry(9, split="test", **long))
    given = [*SCENES[:2], *QUICK, "--data", "petl.data.Expressions", "--data.file", "list.jsonl", "--run_dir", "run"]
    done = petl("fit", *given, "--model.query_length", 8, cwd=tmp_path)
    assert done.stderr.count("3 of 9 expressions are longer than query_length=8 and lose their end") == 1
    assert done.stderr.count("lose their end") == 1
    assert "1 of 1 expressions" in petl("test", "--config", "run/config.yaml", cwd=tmp_path).stderr

    write_refer(tmp_path)  # "the bright man" and "man" in testA
    pictures(tmp_path / "train2014")
    refcoco = ["--data", "petl.data.RefCOCO", "--data.dataset", "refcoco", "--data.root", ".", "--data.image_root",
               "train2014", "--data.partial", "true"]  # fmt: skip
    done = petl("test", *SCENES[:2], *QUICK, "--run_dir", "run", "--model.query_length", 8, *refcoco, cwd=tmp_path)
    assert "lose their end" not in done.stderr
    listed = refs()
    listed[3]["sentences"][0] |= dict.fromkeys(("raw", "sent"), long["expression"])
    write_refer(tmp_path, listed)
    done = petl("test", *SCENES[:2], *QUICK, "--run_dir", "run", "--model.query_length", 8, *refcoco, cwd=tmp_path)
    assert "1 of 2 expressions are longer than query_length=8" in done.stderr, "whatever the test split is called"


def test_a_terminated_training_does_not_end_as_if_all_were_well(petl: Petl, tmp_path: Path) -> None:
    """SIGTERM, as a cluster sends it before it takes the machine away."""
    command = ["fit", *SCENES, "--trainer.max_epochs", 2, "--checkpoint_every", 2, "--run_dir", "run"]
    done = petl(*command, cwd=tmp_path, check=False, kill=(8, "training_step", signal.SIGTERM))
    assert done.returncode != 0
    assert "--ckpt_path last" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    petl(*command, "--ckpt_path", "last", cwd=tmp_path)
    assert (tmp_path / "run" / "adapter").exists()


def test_random_encoders_leak_nothing(petl: Petl, tmp_path: Path) -> None:
    encoders = tiny_pair(tmp_path, ["man"])
    write_refer(tmp_path)
    pictures(tmp_path / "train2014")
    given = ["--config", "refcoco/dara", *QUICK, *encoders, "--model.image_size", 96, "--model.method.shared_dim", 16,
             "--model.pretrained", "false", "--data.root", ".", "--data.image_root", "train2014", "--data.partial",
             "true", "--data.num_workers", 0, "--data.batch_size", 2, "--run_dir", "run"]  # fmt: skip
    done = petl("fit", *given, cwd=tmp_path)
    assert "share pictures" not in done.stderr
    protocol = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["protocol"]
    assert protocol["training"]["pretrained"] is False
    assert protocol["training"]["leak"] == "none known"
    petl("test", *given, cwd=tmp_path)  # the same random encoders again: the seed decides


def test_pictures_of_every_mode_are_grounded(petl: Petl, trained: Path, tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK", "I;16"):
        Image.new(mode, (90, 40)).save(tmp_path / "x.tif")
        done = petl("ground", trained / "run" / "adapter", "x.tif", "the circle", cwd=tmp_path)
        assert "pixels of 90 x 40" in done.stdout, mode
