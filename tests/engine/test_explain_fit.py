"""Training explanations on the command line: shortened quickstart, adapters as classifiers, kills, two processes."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import petl as package
from petl.cli import find_config, list_configs
from petl.data import Digits
from petl.models.attributions import ATTRIBUTIONS
from tests.adapters.explained import text_classifier
from tests.engine import grounding
from tests.engine.conftest import petl_command
from tests.engine.grounding import Petl
from tests.engine.test_grounding_ddp import DDP, two_ranks
from tests.engine.test_grounding_errors import refused

TINY: list[object] = ["--trainer.accelerator", "cpu", "--data.train_size", 48, "--data.val_size", 17,
                      "--data.test_size", 9, "--data.batch_size", 16]  # fmt: skip
EPOCHS: list[object] = ["--model.head_epochs", 1, "--model.surrogate_epochs", 2, "--trainer.max_epochs", 5]
SHORT: list[object] = [
    "--config", "quickstart/explain", *TINY, *EPOCHS, "--trainer.check_val_every_n_epoch", 1,
    "--model.method.players", "[2, 2]", "--model.method.subsets", 4,
]  # fmt: skip
RANDOM: list[object] = [
    "--model.classifier", "timm/vit_tiny_patch16_224", "--model.pretrained", "false", "--model.backbone_args",
    "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}",
]  # fmt: skip
STEPS = 3  # of an epoch
FIRST = 3 * STEPS  # step of the explainer


@pytest.fixture(scope="module")
def petl() -> Iterator[Petl]:
    """A kill stands in the hooks of `petl.Explanation`."""
    mine, ours = "from petl.tasks.grounding import Grounding", "from petl.tasks.explanation import Explanation"
    assert mine in grounding.SERVER
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grounding, "SERVER", grounding.SERVER.replace(mine, f"{ours} as Grounding"))
        with grounding.commands() as run:
            yield run


@pytest.fixture(scope="module")
def classifier(petl: Petl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of a classifier, ``run``. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("classifier")
    petl("fit", "--config", "quickstart/classification", *TINY, "--model.method", "petl.LadderSideTuning",
         "--model.backbone_args", "{img_size: 32}", "--trainer.max_epochs", 2, "--run_dir", "run",
         cwd=folder)  # fmt: skip
    petl("predict", "--config", "run/config.yaml", cwd=folder)
    return folder


def metrics(run: Path, stage: str = "test") -> dict[str, float]:
    return json.loads((run / f"{stage}_metrics.json").read_text())


def adapter(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "adapter").iterdir())}


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "adapter" / "adapter_config.json").read_text())


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def digits(**options: Any) -> Digits:
    data = Digits(48, 17, 9, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, **options)
    data.setup("test")
    return data


# ---- from YAML to an explained picture


def test_from_yaml_to_an_explained_digit(petl: Petl, tmp_path: Path) -> None:
    done = petl_command("fit", *map(str, SHORT), "--run_dir", "run", cwd=tmp_path)
    assert "epoch 5/5" in done.stdout
    assert done.stdout.count("surrogate: KL ") == 1
    assert done.stdout.index("epoch 3/5") < done.stdout.index("surrogate: KL ") < done.stdout.index("epoch 4/5")
    assert "adapter: run/adapter   (petl info, petl explain, petl.load)" in done.stdout
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "adapter", "checkpoints", "config.yaml", "fit_metrics.json", "metrics", "surrogate.json",
    }  # fmt: skip
    assert [*adapter(run)] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    [logged] = (run / "metrics").glob("version_*/metrics.csv")
    columns = logged.read_text().partition("\n")[0].split(",")
    assert {"val/acc", "val/kl", "val/agreement", "val/loss"} <= set(columns)
    gate, protocol = json.loads((run / "surrogate.json").read_text()), record(run)["protocol"]
    assert gate["inputs"] == 17
    assert 0 <= gate["agreement"] <= 1
    assert protocol["training"]["surrogate"] == gate
    assert protocol["training"]["stages"] == {"head": 1, "surrogate": 2}
    given = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert given["method"]["init_args"]["players"] == [2, 2]

    petl("test", "--config", "run/config.yaml", cwd=tmp_path)
    tested = metrics(run)
    assert {name.split("/")[1] for name in tested} == set(ATTRIBUTIONS)
    assert all(
        {f"test/{n}/insertion", f"test/{n}/deletion", f"test/{n}/faithfulness"} <= set(tested) for n in ATTRIBUTIONS
    )
    assert tested["test/autognothi/efficiency_gap"] <= 1e-6
    assert tested["test/autognothi/prediction_preserved"] == 1.0
    assert tested["test/autognothi/relative_l2"] > 0
    petl("validate", "--config", "run/config.yaml", cwd=tmp_path)
    assert (
        metrics(run, "validate").keys()
        == {"val/acc", "val/kl", "val/agreement", "val/loss"}
        == set(protocol["metrics"])
    )
    assert metrics(run, "validate")["val/kl"] == pytest.approx(gate["kl"], abs=1e-6)
    petl("predict", "--config", "run/config.yaml", cwd=tmp_path)

    data = digits()
    data.splits["test"][3].image.save(tmp_path / "digit.png")
    done = petl_command("explain", "run/adapter", "digit.png", "--out", "map.png", cwd=tmp_path)
    row = rows(run)[3]
    assert done.stdout.startswith(f"prediction: {row['label']} ")
    assert "strongest 4 of 4 players in 2 rows and 2 columns" in done.stdout
    assert Image.open(tmp_path / "map.png").size[0] > 200
    found = package.load(run / "adapter").explain(data.splits["test"][3].image)
    values = [float(v) for v in row["values"].split()]
    assert found.values[0, :, int(row["prediction"])].tolist() == pytest.approx(values, abs=1e-5)


def test_an_adapter_is_explained(petl: Petl, classifier: Path, tmp_path: Path) -> None:
    given = [*SHORT, "--model.classifier", classifier / "run" / "adapter", "--model.head_epochs", 0]
    done = petl("fit", *given, "--model.method.subsets", 8, "--run_dir", "run", cwd=tmp_path)
    assert "the game of every training input is computed once: 16 coalitions of 4 players" in done.stdout
    petl("test", "--config", "run/config.yaml", "--model.baselines", "[kernelshap]", cwd=tmp_path)
    petl("predict", "--config", "run/config.yaml", cwd=tmp_path)
    config = record(tmp_path / "run")
    assert (config["task"], config["classifier"]["method"]["name"]) == ("explanation", "ladder_side_tuning")
    assert metrics(tmp_path / "run")["test/autognothi/prediction_preserved"] == 1.0
    mine, plain = rows(tmp_path / "run"), rows(classifier / "run")
    assert [(r["label"], r["probability"]) for r in mine] == [(r["label"], r["probability"]) for r in plain]
    tensors = (load_file(f / "run" / "adapter" / "adapter_model.safetensors") for f in (classifier, tmp_path))
    before, after = tensors
    assert all(torch.equal(t, after[f"classifier.{n}"]) for n, t in before.items())
    assert "ladder_side_tuning" in petl("info", "run/adapter", cwd=tmp_path).stdout

    petl("fit", "--config", classifier / "run" / "config.yaml", "--run_dir", "other", "--seed_everything", 5,
         "--trainer.max_epochs", 1, cwd=tmp_path)  # fmt: skip
    said = refused(petl, "test", "--config", "run/config.yaml", "--model.classifier", "other/adapter", cwd=tmp_path)
    assert "other weights" in said


# ---- kills

KILLS = [
    (4, "training_step"),
    (FIRST - 1, "on_before_optimizer_step"),
    (FIRST, "on_train_epoch_start"),  # before the surrogate is judged
    (FIRST, "on_before_optimizer_step"),  # behind that, before the explainer's first step
    (FIRST, "on_save_checkpoint"),
    (FIRST + 4, "training_step"),
    (5 * STEPS, "validation_step"),
    (5 * STEPS, "protocol"),  # while the adapter is written
]


def test_a_killed_run_ends_with_the_same_adapter(petl: Petl, tmp_path: Path) -> None:
    command = ["fit", *SHORT, *RANDOM, "--data.augmentation", "shift", "--checkpoint_every", 2]
    petl(*command, "--run_dir", "whole", cwd=tmp_path)
    expected, gate = adapter(tmp_path / "whole"), (tmp_path / "whole" / "surrogate.json").read_bytes()
    for step, hook in KILLS:
        run = f"{step}-{hook}"
        killed = petl(*command, "--run_dir", run, cwd=tmp_path, check=False, kill=(step, hook, signal.SIGKILL))
        assert killed.returncode == -9, run
        assert not (tmp_path / run / "adapter").exists()
        resumed = petl(*command, "--run_dir", run, "--ckpt_path", "last", cwd=tmp_path)
        assert "epoch 1/5" not in resumed.stdout, "it went on, and did not start again"
        assert resumed.stdout.count("surrogate: KL") == (step <= FIRST), run
        assert adapter(tmp_path / run) == expected, run
        assert (tmp_path / run / "surrogate.json").read_bytes() == gate


@pytest.mark.parametrize("kept", [("method.subsets", 8), ("bank", 8)], ids=str)
def test_a_killed_run_on_games_that_are_kept(
    kept: tuple[str, int], petl: Petl, classifier: Path, tmp_path: Path
) -> None:
    command = ["fit", *SHORT, "--model.classifier", classifier / "run" / "adapter", "--model.head_epochs", 0,
               f"--model.{kept[0]}", kept[1], "--checkpoint_every", 1]  # fmt: skip
    petl(*command, "--run_dir", "whole", "--cache", "off", cwd=tmp_path)
    command += ["--cache_dir", "taps", "--run_dir", "killed"]
    kill = (2 * STEPS + 2, "training_step", signal.SIGKILL)
    assert petl(*command, cwd=tmp_path, check=False, kill=kill).returncode == -9
    resumed = petl(*command, "--ckpt_path", "last", cwd=tmp_path)
    assert "0 computed now and 65 found" in resumed.stdout
    assert resumed.stdout.count("the game of every training input is computed once") == 1, "it is not in the run state"
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "killed")


def test_a_bad_surrogate_ends_the_run_and_a_lower_bar_continues_it(petl: Petl, tmp_path: Path) -> None:
    bar = ["fit", *SHORT, *RANDOM, "--model.surrogate_lr", 1e-6, "--run_dir", "run", "--checkpoint_every", 4,
           "--model.min_agreement"]  # fmt: skip
    said = refused(petl, *bar, 1.0, cwd=tmp_path)
    assert "min_agreement asks for 100.0 %" in said
    assert said.count("\n") == 1
    assert not [*(tmp_path / "run").glob("*adapter*")]
    assert not (tmp_path / "run" / "fit_metrics.json").exists()
    petl(*bar, 0.0, "--ckpt_path", "last", cwd=tmp_path)
    assert record(tmp_path / "run")["protocol"]["training"]["surrogate"]["agreement"] < 1


# ---- two processes


def test_two_processes_go_through_the_same_stages(petl: Petl, tmp_path: Path) -> None:
    given = [*SHORT, *RANDOM, "--model.baselines", "[kernelshap]"]
    petl("fit", *given, "--run_dir", "one", cwd=tmp_path)
    done = petl("fit", *given, *DDP, "--run_dir", "two", cwd=tmp_path, environments=two_ranks())
    assert "find_unused_parameters" not in done.stderr
    assert done.stdout.count("surrogate: KL") == 1
    assert [f"epoch {e}/5" in done.stdout for e in range(1, 6)] == [True] * 5
    one, two = (load_file(tmp_path / r / "adapter" / "adapter_model.safetensors") for r in ("one", "two"))
    assert one.keys() == two.keys()
    head = [k for k in one if k.startswith("classifier.head.")]
    assert len(head) == 2
    for key in head:  # draws nothing: the same batches give the same head
        torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=1e-3)
    gates = [json.loads((tmp_path / r / "surrogate.json").read_text()) for r in ("one", "two")]
    assert gates[0]["inputs"] == gates[1]["inputs"] == 17, "every process judges on all of them"
    assert gates[0]["kl"] == pytest.approx(gates[1]["kl"], rel=0.5)
    training = record(tmp_path / "two")["protocol"]["training"]
    assert (training["devices"], training["surrogate"]) == (2, gates[1])
    petl("test", *given, "--run_dir", "two", cwd=tmp_path)
    before = metrics(tmp_path / "two")
    petl("test", *given, *DDP, "--run_dir", "two", cwd=tmp_path, environments=two_ranks())
    for key, value in metrics(tmp_path / "two").items():
        if key.startswith("test/autognothi/") and key.split("/")[2] in ("pearson", "relative_l2", "insertion"):
            assert value == pytest.approx(before[key], abs=1e-4), key


def test_two_processes_on_tabulated_games(petl: Petl, classifier: Path, tmp_path: Path) -> None:
    given = [*SHORT, "--model.classifier", classifier / "run" / "adapter", "--model.head_epochs", 0,
             "--model.surrogate_lr", 0, "--model.method.subsets", 8, "--trainer.max_epochs", 4]  # fmt: skip
    petl("fit", *given, "--run_dir", "one", cwd=tmp_path)
    done = petl("fit", *given, *DDP, "--run_dir", "two", cwd=tmp_path, environments=two_ranks())
    assert done.stdout.count("the game of every training input is computed once") == 1
    one, two = (load_file(tmp_path / r / "adapter" / "adapter_model.safetensors") for r in ("one", "two"))
    # the last bias adds the same to every player, which the normalisation takes away: its gradient is rounding alone
    for key in one.keys() - {"petl.explainer.mlp.4.bias"}:  # the same game, and no draw in the explainer's training
        torch.testing.assert_close(two[key], one[key], atol=2e-3, rtol=1e-2)


# ---- bad input

REFUSED: list[tuple[list[object], str]] = [
    (["--model.classifier", "bundled/tiny_clip_vison"], "did you mean 'bundled/tiny_clip_vision'"),
    (["--model.classifier", "timm/vit_tiny_patch16_244"], "did you mean 'timm/vit_tiny_patch16_"),
    (["--model.classifier", "timm/vit_tinny_patch16_224", "--model.head_epochs", 0], "did you mean 'timm/vit_tiny"),
    (["--model.classifier", "gone/adapter", "--model.head_epochs", 0], "neither an adapter (no adapter_config.json th"),
    (["--model.clasifier", "x"], "model has no option 'clasifier': did you mean 'classifier'"),
    (["--model.method.subset", 4], "model.method has no option 'subset': did you mean 'subsets'"),
    (["--model.method.subsets", 3], "so subsets is even: 4, for instance"),
    (["--model.method", "SparseTuning"], "petl.Explanation trains petl.AutoGnothi, not SparseTuning"),
    (["--model.method.sampler", "kernl"], "did you mean 'kernel'"),
    (["--model.method.reduction", 3], "ladder reduction=3 does not divide the width 128. Reductions that fit here: 1"),
    (["--model.baselines", "[rise, gradcm]"], "'gradcm': did you mean 'gradcam'"),
    (["--trainer.max_epochs", 3], "leaves no epoch for the explainer after 1 of the head and 2 of the surrogate"),
    (["--data.val_size", 0], "add a val split"),
    (["--select", "best"], "select: best is for a classifier's val/acc"),
    (["--data", "petl.data.Scenes"], "number of classes is not known"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else ""
)
def test_options(options: list[object], message: str, petl: Petl, tmp_path: Path) -> None:
    said = refused(petl, "fit", *SHORT, *options, "--run_dir", "run", cwd=tmp_path)
    assert message in said
    assert said.count("\n") == 1, said
    assert not [*tmp_path.rglob("*")], "nothing is written, so that the next try is not held up"


def test_classifiers_that_do_not_fit(petl: Petl, classifier: Path, tmp_path: Path) -> None:
    given = [*SHORT, "--model.classifier", classifier / "run" / "adapter", "--run_dir", "run"]
    assert "set head_epochs to 0" in refused(petl, "fit", *given, cwd=tmp_path)
    (tmp_path / "a.txt").write_text("1 fine\n0 dull\n" * 40)
    texts = ["--data", "petl.data.Sentences", "--data.train", "a.txt", "--model.head_epochs", 0]
    assert "the data has 2 classes, the classifier 10" in refused(petl, "fit", *given, *texts, cwd=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


# ---- the shipped configs on tiny twins


def tiny_images(folder: Path) -> None:
    """``mine`` in class folders, ``vtab/oxford_iiit_pet`` in the layout of VTAB: 12 pictures."""
    rng, task = np.random.default_rng(0), folder / "vtab" / "oxford_iiit_pet"
    (task / "images").mkdir(parents=True)
    for i in range(12):
        picture = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
        picture.save(task / "images" / f"{i}.png")
        for split in ("train", "val"):
            place = folder / "mine" / split / f"class{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{i}.png")
    for name, members in {"train800": range(8), "val200": range(8, 10), "test": range(10, 12)}.items():
        (task / f"{name}.txt").write_text("".join(f"images/{i}.png {i}\n" for i in members))


def test_shipped_configs_run_on_their_tiny_twins(petl: Petl, tmp_path: Path) -> None:
    assert {n for n in list_configs() if n.startswith("explain/")} == {
        f"explain/{n}" for n in ("autognothi", "bert", "pets_vtab")
    }
    tiny_images(tmp_path)
    text_classifier(tmp_path / "runs" / "bert")
    (tmp_path / "all.txt").write_text("1 a stirring film\n0 dull and not stirring\n" * 30)
    vit = str(RANDOM[-1]).replace("}", ", num_classes: 2}")
    tiny = ["--trainer.accelerator", "cpu", "--data.num_workers", 0, "--data.batch_size", 4]
    short = [*tiny, "--model.surrogate_epochs", 1, "--trainer.max_epochs", 2, "--model.min_agreement", 0,
             "--model.test_inputs", 2, "--model.baselines", "[rise]", "--trainer.check_val_every_n_epoch",
             1]  # fmt: skip
    ladder = ["--model.backbone", "bundled/tiny_clip_vision", "--model.backbone_args", "{img_size: 32}", *tiny,
              "--model.method", "LadderSideTuning", "--trainer.max_epochs", 1]  # fmt: skip
    petl("fit", "--config", "vtab/sparse_tuning", *ladder, "--data.task", "oxford_iiit_pet", "--data.root", "vtab",
         "--run_dir", "runs/vtab/pets", cwd=tmp_path)  # fmt: skip
    petl("fit", "--config", "folder/sparse_tuning", *ladder, "--data.root", "mine", "--run_dir", "runs/m", cwd=tmp_path)
    for name, given in {
        "autognothi": ["--data.root", "mine", *RANDOM[:-1], vit],
        "pets_vtab": ["--data.root", "vtab"],
        "bert": ["--data.train", "all.txt", "--model.method.reduction", 4],
        "autognothi on an adapter": ["--data.root", "mine", "--model.classifier", "runs/m/adapter"],
    }.items():
        config = f"explain/{name.split()[0]}"
        shipped: Any = yaml.safe_load(find_config(config).read_text())
        run = tmp_path / (shipped["run_dir"] if " " not in name else "runs/adapted")
        place = ["--run_dir", run] if " " in name else []
        petl("fit", "--config", config, *given, *short, *place, cwd=tmp_path)
        petl("test", "--config", run / "config.yaml", cwd=tmp_path)
        assert metrics(run)["test/autognothi/efficiency_gap"] <= 1e-6
        assert metrics(run)["test/autognothi/prediction_preserved"] == 1
        options = shipped["model"]["init_args"]["method"]["init_args"]
        assert options.items() <= record(run)["method"]["options"].items() | {("reduction", options["reduction"])}, name
    image = tmp_path / "mine" / "val" / "class1" / "3.png"
    assert "prediction: class" in petl("explain", run / "adapter", image, cwd=tmp_path).stdout
    assert "players" in petl("explain", "runs/explain/bert/adapter", "a stirring film", cwd=tmp_path).stdout
