"""The table of a comparison, from hand-made records with known answers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import vtab
import vtab_plot
import vtab_table
from matplotlib.text import Text
from vtab_methods import read_methods

from petl.data.vtab import TASKS
from petl.errors import PetlError
from petl.methods import entries
from tests.recipes.conftest import failure, record

KNOWN = {"a": {"label": "method A", "published": {"mean": 70.0, "groups": 72.0, "source": "a paper"}}}


def rows(records: list[dict[str, Any]]) -> list[vtab_table.Row]:
    return vtab_table.make_rows(vtab_table.choose(records), KNOWN)


def put(out: Path, records: list[dict[str, Any]]) -> None:
    for r in records:
        file = out / r["method"] / r["task"] / f"seed{r['seed']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(r))


def nineteen(method: str = "a") -> list[dict[str, Any]]:
    """Natural 0.8 (7 tasks), Specialized 0.9 (4), Structured 0.5 (8)."""
    value = {"Natural": 0.8, "Specialized": 0.9, "Structured": 0.5}
    return [record(method, task, acc=value[entry.group]) for task, entry in TASKS.items()]


def test_mean_of_groups_and_mean_of_nineteen() -> None:
    [row] = rows(nineteen())
    assert {g: v.mean for g, v in row.groups.items()} == pytest.approx(
        {"Natural": 0.8, "Specialized": 0.9, "Structured": 0.5}
    )
    assert row.mean_of_groups.mean == pytest.approx((0.8 + 0.9 + 0.5) / 3)  # 73.33
    assert row.mean_of_tasks.mean == pytest.approx((7 * 0.8 + 4 * 0.9 + 8 * 0.5) / 19)  # 69.47
    assert list(row.tasks) == list(TASKS)
    text = vtab_table.markdown([row], nineteen(), KNOWN)
    assert "| mean of groups | mean of 19 | published, groups | published, 19 | source |" in text
    assert "| 73.33 | 69.47 | 72.0 | 70.0 | a paper |" in text


def test_published_numbers_stand_only_beside_what_they_measure() -> None:
    small = nineteen()
    for r in small:
        r["protocol"] = r["protocol"] | {"backbone": r["protocol"]["backbone"] | {"name": "bundled/tiny_clip_vision"}}
    for records in (small, nineteen()[:3]):
        text = vtab_table.markdown(rows(records), records, KNOWN)
        assert "published" not in text
        assert "a paper" not in text


def test_the_spread_is_over_seeds_and_of_a_mean_that_of_each_seeds_mean() -> None:
    found = [record("a", "dtd", s, acc) for s, acc in enumerate((0.4, 0.5, 0.6))]
    found += [record("a", "svhn", s, acc) for s, acc in enumerate((0.6, 0.5, 0.4))]
    [row] = rows(found)
    assert row.tasks["dtd"].mean == pytest.approx(0.5)
    assert row.tasks["dtd"].std == pytest.approx(0.1)  # sample standard deviation
    assert row.mean_of_tasks.std == pytest.approx(0.0)  # what one task gains the other loses
    assert "50.0 ± 10.0" in vtab_table.markdown([row], found, KNOWN)
    assert "Natural (2 of 7)" in vtab_table.markdown([row], found, KNOWN)


def test_own_tasks_are_a_group_of_their_own() -> None:
    [row] = rows([record("a", "dtd", acc=0.2), record("a", "signs", acc=0.4), record("a", "hats", acc=0.8)])
    assert {g: v.mean for g, v in row.groups.items()} == pytest.approx({"Natural": 0.2, "Other": 0.6})
    assert row.mean_of_groups.mean == pytest.approx(0.4)
    assert row.mean_of_tasks.mean == pytest.approx(1.4 / 3)
    assert vtab_table.group_names(row) == {"Natural": "Natural (1 of 7)", "Other": "Other"}
    own = [record("a", "signs", acc=0.4), record("a", "hats", acc=0.8)]
    assert "| method | signs | hats | mean of 2 |" in vtab_table.markdown(rows(own), own, KNOWN)


def test_what_is_missing_or_failed_is_shown_and_in_no_mean(tmp_path: Path) -> None:
    found = [record(m, t, s) for m in "ab" for t in ("dtd", "svhn") for s in (0, 1)]
    found = [r for r in found if (r["method"], r["task"], r["seed"]) != ("b", "svhn", 1)]
    found = [failure("b", "dtd", 1) if (r["method"], r["task"], r["seed"]) == ("b", "dtd", 1) else r for r in found]
    a, b = rows(found)
    assert a.mean_of_tasks.mean == 0.5
    assert b.tasks["dtd"] == (None, None, "seed 1 failed")
    assert b.tasks["svhn"] == (None, None, "seed 1 missing")
    assert b.mean_of_tasks.mean is b.mean_of_groups.mean is b.groups["Natural"].mean is None
    put(tmp_path, found)
    text = vtab_table.write(tmp_path, KNOWN)
    assert "| b | – (seed 1 failed) | – (seed 1 missing) | – (incomplete) | – (incomplete) | – (incomplete) |" in text
    assert "- b / dtd / seed 1: out of memory" in text
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))}
    assert lines["b"]["dtd"] == lines["b"]["mean_of_tasks"] == ""
    assert lines["b"]["missing"] == "dtd: seed 1 failed; svhn: seed 1 missing"
    assert lines["a"]["missing"] == ""


OTHER = [
    ({"weights": "b" * 64}, "weights of the backbone"),
    ({"preprocessing": {"image_size": [224, 224], "mean": [0.4] * 3, "std": [0.5] * 3}}, "mean"),
    ({"preprocessing": {"image_size": [224, 224], "mean": [0.5] * 3, "std": [0.2] * 3}}, "std"),
    ({"preprocessing": {"image_size": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}}, "input size"),
    ({"selection": "best val/acc over epochs"}, "selection of the epoch"),
    ({"settings": "optuna TPE, 9 trials"}, "choice of hyper-parameters"),
    ({"epochs": 50}, "epochs"),
    ({"splits": {"train": {"sha256": "dtd-other"}, "test": {"sha256": "dtd-test"}}}, "train split of dtd"),
]


@pytest.mark.parametrize(("change", "what"), OTHER, ids=[what for _, what in OTHER])
def test_runs_of_different_protocols_are_refused(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    put(tmp_path, [record("a", "dtd"), record("a", "svhn"), record("b", "dtd", **change)])
    with pytest.raises(PetlError, match="do not share one protocol") as caught:
        vtab_table.write(tmp_path, KNOWN)
    [line] = [x for x in str(caught.value).splitlines() if x.startswith(f"  {what}: ")]
    assert "b/dtd/0" in line
    assert "a/dtd/0" in line
    assert not (tmp_path / "table.md").exists()
    vtab_table.write(tmp_path, KNOWN, methods=["a"])  # those that belong together
    assert "method A" in (tmp_path / "table.md").read_text()


def test_other_splits_of_other_tasks_are_no_other_protocol() -> None:
    assert len(rows([record("a", "dtd"), record("b", "dtd"), record("a", "svhn"), record("b", "svhn")])) == 2


def test_mixed_devices_are_said(tmp_path: Path) -> None:
    put(tmp_path, [record("a", "dtd"), record("b", "dtd", device="NVIDIA H100")])
    assert "CPU, NVIDIA H100 (**mixed: speed and memory are not comparable**)" in vtab_table.write(tmp_path, KNOWN)


def test_markdown_csv_and_plot(tmp_path: Path) -> None:
    found = [record("a", t, s, 0.5 + s / 10) for t in ("dtd", "svhn") for s in (0, 1)]
    found += [record("b", t, s, 0.7) for t in ("dtd", "svhn") for s in (0, 1)]
    for r in found:
        r["cost"] |= {"peak_memory_bytes": (1 + r["seed"]) * 2**30, "seconds": 10.0 + r["seed"]}
    found[-1]["cost"]["seconds"] = None  # of a run that was continued
    put(tmp_path, found)
    text = vtab_table.write(tmp_path, KNOWN)
    assert text == (tmp_path / "table.md").read_text()
    assert "| method A | 55.0 ± 7.1 | 55.0 ± 7.1 | 55.0 ± 7.1 | 55.00 ± 7.07 | 55.00 ± 7.07 |" in text
    assert "| method A | 102,912 | 7,690 | 16.867 | 3.00 | 0.00 | 40 | 100 | 2048 | 10 |" in text
    assert f"weights {'a' * 12}" in text
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))}
    assert float(lines["a"]["mean_of_tasks"]) == pytest.approx(0.55)
    assert float(lines["a"]["mean_of_tasks_std"]) == pytest.approx(0.0707, abs=1e-4)
    assert float(lines["b"]["macs"]) == 16_867_000_000
    picture = matplotlib.image.imread(tmp_path / "table.png")
    assert picture.shape[1] > 2 * picture.shape[0] > 800  # three panels
    assert (picture[..., :3].min(-1) < 0.5).mean() > 0.005  # marks, names, axes


def test_names_in_the_plot_do_not_hide_each_other() -> None:
    names = [f"method {i}" for i in range(12)]
    figure = vtab_plot.plot(rows([record(name, "dtd", acc=0.5 + i / 400) for i, name in enumerate(names)]))
    figure.draw_without_rendering()
    for ax in figure.axes:  # where all have the same cost
        assert [t.get_text() for t in ax.texts] == names
        boxes = [Text.get_window_extent(t) for t in ax.texts]
        assert not [(i, j) for i in range(12) for j in range(i) if boxes[i].overlaps(boxes[j])]


def test_an_empty_folder_and_a_damaged_record_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PetlError, match="holds no record of a run"):
        vtab_table.write(tmp_path, KNOWN)
    put(tmp_path, [record("a", "dtd")])
    (tmp_path / "a" / "dtd" / "seed0.json").write_text('{"status": "do')
    with pytest.raises(PetlError, match=r"seed0\.json cannot be read as JSON"):
        vtab_table.write(tmp_path, KNOWN)


def test_table_only_makes_the_table_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, [record("linear", "dtd", 0, 0.25), record("linear", "dtd", 1, 0.25)])
    assert vtab.main(["--out", str(tmp_path), "--table-only"]) == 0
    assert "| linear probe | 25.0 ± 0.0 |" in capsys.readouterr().out
    assert vtab.main(["--out", str(tmp_path), "--table-only", "--seeds", "0", "1", "2"]) == 0
    assert "seed 2 missing" in capsys.readouterr().out


def test_the_table_goes_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    put(tmp_path, [record("linear", "dtd")])
    assert vtab.main(["--out", str(tmp_path), "--table-only", "--wandb"]) == 0
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [table] = run.glob("files/media/table/*.json")
    logged = json.loads(table.read_text())
    assert logged["columns"][:3] == ["method", "label", "dtd"]
    assert logged["data"][0][:3] == ["linear", "linear probe", 0.5]
    assert list(run.glob("files/media/images/plot*.png"))


# ---- the methods file


def test_every_entry_of_the_methods_file_is_a_method_with_known_options() -> None:
    from vtab_methods import arguments, changed, get

    from petl.methods.base import from_dict

    methods = read_methods()
    assert {"linear", "full", "bitfit", "vpt_deep", "adaptformer", "lora", "ssf", "sparse_tuning"} <= methods.keys()
    for name, settings in methods.items():
        if settings["method"] not in entries():
            continue
        method = from_dict({"name": settings["method"], "options": settings["options"]})
        shown = arguments(settings)
        assert json.loads(shown[1])["class_path"] == f"petl.{type(method).__name__}"
        assert shown[2:] == ["--model.lr", str(settings["lr"]), "--model.weight_decay", str(settings["weight_decay"])]
        for key, where in settings["search"].items():
            default, low, high = get(settings, key), where.get("low"), where.get("high")
            assert default in where["choices"] if "choices" in where else low <= default <= high, (name, key)
    searched = changed(methods["fact_tt"], {"lr": 0.5, "options.scale": 10.0})
    assert (searched["lr"], searched["options"]) == (0.5, {"variant": "tt", "rank": 16, "scale": 10.0})
    assert methods["fact_tt"]["options"]["scale"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {method: bitfit, lr: 1.0, weight_dcay: 0.0}", "did you mean 'weight_decay'"),
        ("a: {method: bitfit, lr: 1.0}", "a lacks weight_decay"),
        ("a/b: {method: bitfit, lr: 1.0, weight_decay: 0.0}", "'a/b' is not a name"),
        ("a: {method: bitfit, lr: 1.0, weight_decay: 0.0, search: {scale: {choices: [1]}}}", "options.NAME"),
        ("[a, b]", "no mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_methods_file_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text(text)
    with pytest.raises(PetlError, match=message):
        read_methods(file)


def test_unknown_methods_and_tasks_are_found_before_anything_runs(
    layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--root", str(layout), "--out", str(tmp_path / "out")]
    assert vtab.main(["--methods", "bitfti", "--tasks", "digits", *common]) == 2
    assert "no method 'bitfti' in the methods file: did you mean 'bitfit'" in capsys.readouterr().err
    assert vtab.main(["--methods", "linear", "--tasks", "digit", *common]) == 2
    assert "has no task 'digit': did you mean 'digits'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
