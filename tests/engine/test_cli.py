"""The real command line: a run from YAML to a used adapter, and what it says about bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import petl
from petl.cli import find_config, list_configs, main
from tests.engine.conftest import petl_command


def test_from_yaml_to_a_used_adapter(config: Path, tmp_path: Path) -> None:
    done = petl_command("fit", "--config", str(config), cwd=tmp_path)
    assert "epoch 3/3" in done.stdout
    assert "train/loss" in done.stdout
    run = tmp_path / "run"
    written = sorted(p.name for p in (run / "adapter").iterdir())
    assert written == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert model["method"]["init_args"]["keep_rate"] == 0.6
    assert list((run / "metrics").glob("version_*/metrics.csv"))
    assert len(list((run / "pictures").glob("tokens_step*.png"))) == 3
    assert json.loads((run / "fit_metrics.json").read_text())["seconds"] > 0
    protocol = json.loads((run / "adapter" / "adapter_config.json").read_text())["protocol"]
    assert protocol["training"]["seed"] == 3
    assert protocol["data"]["splits"]["val"]["images"] == 37
    assert 0 <= protocol["metrics"]["val/acc"] <= 1

    petl_command("test", "--config", str(run / "config.yaml"), cwd=tmp_path)
    tested = json.loads((run / "test_metrics.json").read_text())
    petl_command("predict", "--config", str(run / "config.yaml"), cwd=tmp_path)
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    assert len(rows) == 41
    from petl.data import Digits

    data = Digits(64, 37, 41, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    data.setup("test")
    hits = sum(int(r["prediction"]) == data.splits["test"][int(r["index"])][1] for r in rows)
    assert hits / 41 == pytest.approx(tested["test/acc"], abs=1e-6)

    info = petl_command("info", str(run / "adapter"), cwd=tmp_path).stdout
    assert "sparse_tuning (keep_rate=0.6" in info
    assert "intact     yes" in info


def test_an_existing_run_is_not_overwritten_unless_asked(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("precious: true\n")
    done = petl_command("fit", "--config", str(config), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "--ckpt_path last" in done.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == "precious: true\n"


def test_classify_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from petl.backbones.classifier import Classifier
    from petl.nn.head import Head

    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    network = petl.load_backbone("timm/vit_tiny_patch16_224", args, pretrained=False)
    from safetensors.torch import save_file

    save_file(network.state_dict(), tmp_path / "w.safetensors")
    model = Classifier(petl.attach(network, petl.SparseTuning(bottleneck=4)), Head("linear", 24, 2))
    record = {"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "mode": "resize"}
    petl.save(model, tmp_path / "a", "timm/vit_tiny_patch16_224", backbone_args=args, weights_file="w.safetensors",
              labels=["cat", "dog"], preprocessing=record)  # fmt: skip
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "x.jpg")
    command = ["classify", str(tmp_path / "a"), str(tmp_path / "x.jpg"), "--weights", str(tmp_path / "w.safetensors")]
    assert main([*command, "--out", str(tmp_path / "drawn.png")]) == 0
    out = capsys.readouterr().out
    assert "cat" in out
    assert "%" in out
    assert Image.open(tmp_path / "drawn.png").size[0] > 300
    assert main([*command, str(tmp_path / "gone.jpg")]) == 2
    assert "gone.jpg" in capsys.readouterr().err


# ---- bad input: exit code 2, one clear line, nothing written

BAD = [
    ("run_dir:", "run_dirr:", "line 2: the config has no option 'run_dirr': did you mean 'run_dir'"),
    ("    lr: 1.0e-2", "    lrr: 1.0e-2", "model has no option 'lrr': did you mean 'lr'"),
    ("keep_rate: 0.6", "keep_rat: 0.6", "model.method has no option 'keep_rat': did you mean 'keep_rate'"),
    ("max_epochs: 3", "max_epoch: 3", "'trainer.max_epoch': did you mean 'trainer.max_epochs'"),
    ("petl.SparseTuning", "petl.SparseTunning", "did you mean 'petl.SparseTuning'"),
    ("petl.data.Digits", "petl.data.Digit", "did you mean 'petl.data.Digits'"),
    ("train_size: 64", "train_size: many", "data.train_size must be of type int, not 'many'"),
    ("keep_rate: 0.6", "keep_rate: 1.6", "keep_rate is 1.6"),
    ("bottleneck: 4", "drop_blocks: [1, 9]", "this backbone has 4 blocks, 0 to 3; [9] lie beyond"),
    ("vit_tiny_patch16_224", "vit_tinny_patch16_224", "did you mean 'timm/vit_tiny_patch16_224"),
    ("petl.data.Digits", "os.system", "asks for the class 'os.system'"),
    ("petl.data.Digits", "lightning.pytorch.callbacks.LambdaCallback", "asks for the class"),
    ("seed_everything: 3", "seed_everything: !!python/object/apply:os.getcwd []", "not plain YAML"),
    ("trainer:", "trainer", "not plain YAML"),
    ("train_size: 64", "train_size: 4", "4 samples, fewer than one batch of 8"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_bad_configs(old: str, new: str, message: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new, 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["petl"])
    assert main(["fit", "--config", str(config)]) == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "adapter").exists()


def test_bad_words_on_the_command_line(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["petl"])
    for args, word in (
        (["fitt"], "did you mean 'fit'"),
        (["fit", "--config", "quickstart/clasification"], "did you mean 'quickstart/classification'"),
        (["fit", "--config", str(config), "--model.method.keep_rat", "0.5"], "did you mean 'keep_rate'"),
        (["fit", "--config", str(config), "--select", "bset"], "did you mean 'best'"),
        (["test", "--config", str(config)], "has no adapter to test"),
        (["cp", "vtab/sparse_tunin"], "did you mean 'vtab/sparse_tuning'"),
        (["info", str(tmp_path)], "is not an adapter"),
        (["report"], "give a config"),
        (["data", "chekc"], "usage: petl data check"),
    ):
        assert main(args) == 2, args
        assert word in capfd.readouterr().err, args
    assert not (tmp_path / "run").exists()


def test_report_and_data_check(config: Path, tmp_path: Path) -> None:
    out = petl_command("report", "--config", str(config), cwd=tmp_path).stdout
    assert "method      sparse_tuning, input 3x32x32" in out
    assert "+ 250 in the head" in out
    out = petl_command("data", "check", "--config", str(config), cwd=tmp_path).stdout
    assert "64 images" in out
    assert "no problems found" in out


def test_ls_cp_and_help_import_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from petl.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'timm', 'lightning', 'transformers', 'numpy'} & sys.modules.keys(); assert not heavy, heavy"
    )
    for args in (["--help"], ["ls"], ["cp", "vtab/sparse_tuning", str(tmp_path)]):
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "sparse_tuning.yaml").read_text() == find_config("vtab/sparse_tuning").read_text()
    assert main(["cp", "vtab/sparse_tuning", str(tmp_path)]) == 2, "a second copy must not overwrite the first"


@pytest.mark.parametrize("name", list_configs())
def test_shipped_configs_are_commented_and_parse(name: str) -> None:
    from petl.engine.errors import check_class_paths

    file = find_config(name)
    check_class_paths(["--config", str(file)])
    content = yaml.safe_load(file.read_text())
    run = {"seed_everything", "run_dir", "select", "checkpoint_every", "cache", "cache_dtype"}
    assert set(content) <= run | {"model", "data", "trainer"}
    assert file.read_text().startswith("# ")


def test_vtab_and_folder_configs_run_on_their_tiny_twins(tmp_path: Path) -> None:
    import numpy as np

    task = tmp_path / "vtab" / "dtd"
    (task / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(task / "images" / f"{i}.png")
        for split in ("train", "val"):
            folder = tmp_path / "mine" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lists = {"train800": range(8), "val200": range(8, 10), "train800val200": range(10), "test": range(10, 12)}
    for name, members in lists.items():
        (task / f"{name}.txt").write_text("".join(f"images/{i}.png {i % 2}\n" for i in members))
    tiny = ["--model.backbone", "timm/vit_tiny_patch16_224", "--model.pretrained", "false", "--model.backbone_args",
            "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 4, num_heads: 3}", "--trainer.max_epochs", "1",
            "--data.batch_size", "4", "--data.num_workers", "0", "--model.warmup_epochs", "0"]  # fmt: skip
    vtab = ["--config", "vtab/sparse_tuning", "--data.root", str(tmp_path / "vtab"), "--data.task", "dtd", *tiny]
    petl_command("fit", *vtab, "--run_dir", "runs/choose", cwd=tmp_path)
    petl_command("fit", *vtab, "--data.train_split", "train800val200", "--run_dir", "runs/final", cwd=tmp_path)
    petl_command("test", "--config", "runs/final/config.yaml", cwd=tmp_path)
    assert "test/acc" in json.loads((tmp_path / "runs/final/test_metrics.json").read_text())
    petl_command("fit", "--config", "folder/sparse_tuning", "--data.root", str(tmp_path / "mine"), *tiny, cwd=tmp_path)
    assert (tmp_path / "runs/folder/adapter/adapter_config.json").is_file()
