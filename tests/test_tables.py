"""Protects the papers' tables: means over seeds and nothing else, FID never mixed with what is not FID, the papers'
numbers as printed, text that says what is in it and does no more; and the command on run folders, with MLflow.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import making
import pytest
from finished import finished_run

from tdiff import cli, comparison, results, storage
from tdiff import config as configs
from tdiff import tables as command
from tdiff.data.shards import read_manifest
from tdiff.diffusion.condition import CONDITIONS as KNOWN_CONDITIONS
from tdiff.evaluation import published
from tdiff.evaluation.tables import (
    CONDITIONS,
    TOLD,
    Entry,
    Row,
    Table,
    as_csv,
    escaped,
    markdown,
    tables,
)
from tdiff.runs import Run, existing
from tdiff.work.sampling import draw_shard

INCEPTION, JUDGE = "1a" * 32, "2b" * 32


def numbers(
    fid: float | None = 10.0,
    frechet: float | None = 3.0,
    entropy: float = 0.5,
    acc: float | None = 0.5,
    **protocol: Any,
) -> dict[str, Any]:
    """An evaluation.json. fid, frechet: of draws; reconstructions have half of it, the tree alone ten times it.

    protocol: what replaces the usual entries of `samples`.
    """

    def of(scale: float) -> dict[str, Any]:
        found: dict[str, Any] = {"classifier_entropy": entropy * scale, "classifier_histograms": [[1, 2]]}
        if fid is not None:
            found |= {"fid_gen": fid * scale, "fid_rec": fid * scale / 2}
        if frechet is not None:
            found |= {"classifier_frechet_gen": frechet * scale, "classifier_frechet_rec": frechet * scale / 2}
        return found

    clusters = {} if acc is None else {"tree_test": {"acc": acc, "nmi": acc / 2, "ari": 0.25, "leaf_purity": 0.75}}
    return {
        "clustering": clusters | {"kmeans_test": {"acc": 0.4, "nmi": 0.3}},
        "samples": {
            "reference": {"split": "test", "images": 10_000},
            "draws": 10_000,
            "blocks": 3,
            "reconstructions": 10_000,
            "per_leaf": 1000,
            "classifier": {"digest": JUDGE, "network": "small", "test_accuracy": 0.9},
            "inception": {"digest": INCEPTION},
            "treevae": of(10),
            "treediffusion": of(1),
            "real": {"classifier_frechet_gen": 0.125, "fid_gen": 1.5},
        }
        | protocol,
    }


def entry(seed: int = 0, condition: str = "path", data: str = "cifar10", **changed: Any) -> Entry:
    """A run of its own tree; settings: those that differ from the usual ones."""
    settings = {"tree.size": 4, "tree.max_leaves": 10, "diffusion.width": 128} | changed.pop("settings", {})
    made = Entry(
        run=f"{condition}-{seed}",
        data=data,
        digest="d" * 64,
        images={"train": 50_000, "test": 10_000},
        seed=seed,
        condition=condition,
        settings=settings,
        tree=f"tree-{seed}",
        numbers=numbers(),
    )
    return replace(made, **changed)


def named(found: list[Table], name: str) -> Table:
    (table,) = [table for table in found if table.name == name]
    return table


def rows_of(found: list[Table], name: str, method: str) -> list[Row]:
    return [row for row in named(found, name).rows if row.method == method]


def parsed(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as cells; by GitHub's rule that only a | without a backslash parts cells."""
    out: list[list[list[str]]] = []
    for block in re.split(r"\n(?=## )", text):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        assert set("".join(cells[1])) == {"-"}
        out.append([cells[0], *cells[2:]])
    return out


def read_csv(found: list[Table]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(as_csv(found))))


# --- means over seeds --------------------------------------------------------------------------------


def test_mean_and_deviation_over_seeds() -> None:
    values = {0: 1.0, 1: 2.0, 2: 6.0}
    found = tables([entry(seed, numbers=numbers(fid=value, acc=value / 10)) for seed, value in values.items()])
    (row,) = rows_of(found, "1", "TreeDiffusion")
    assert (row.n, row.settings) == (3, "")
    assert row.ours["fid_gen"].mean == pytest.approx(3)
    assert row.ours["fid_gen"].deviation == pytest.approx(7**0.5)  # squares 4 + 1 + 9, over 3 - 1
    assert row.ours["fid_rec"].mean == pytest.approx(1.5)
    assert "acc" not in row.ours
    (tree,) = rows_of(found, "1", "TreeVAE")
    assert tree.ours["fid_gen"].mean == pytest.approx(30)
    assert tree.ours["acc"].mean == pytest.approx(30)  # percent
    assert tree.ours["nmi"].deviation == pytest.approx(5 * 7**0.5)
    assert tree.ours["acc"].n == 3


def test_one_seed_has_no_deviation() -> None:
    found = tables([entry()])
    (row,) = rows_of(found, "1", "TreeDiffusion")
    assert (row.ours["fid_gen"].deviation, row.n) == (None, 1)
    shown = next(cells for cells in parsed(markdown(found))[0] if cells[1] == "TreeDiffusion")
    assert "**10.0**" in shown
    ours = [line for line in read_csv(found) if line["source"] == "ours"]
    assert {line["standard_deviation"] for line in ours} == {""}


def test_a_tree_counts_once_however_many_runs_share_it() -> None:
    shared = [entry(0, c, tree="t0", numbers=numbers(acc=0.2)) for c in ("path", "recon", "none")]
    found = tables([*shared, entry(1, tree="t1", numbers=numbers(acc=0.6))])
    (tree,) = rows_of(found, "1", "TreeVAE")
    assert tree.ours["acc"].mean == pytest.approx(40)
    assert (tree.ours["acc"].n, tree.n) == (2, 2)
    assert set(tree.runs) == {"path-0", "recon-0", "none-0", "path-1"}


def test_diffusion_models_of_one_tree_are_said_to_be() -> None:
    note = named(tables([entry(seed, tree="one") for seed in range(3)]), "1").note
    assert any("the 3 runs of path have 1 different tree," in sentence for sentence in note)
    note = named(tables([entry(seed) for seed in range(3)]), "1").note
    assert not any("different tree" in sentence for sentence in note)


def test_runs_that_differ_in_more_than_the_seed_stand_apart() -> None:
    other = {"tree.size": 2}
    runs = [entry(0), entry(1), entry(2, settings=other, run="small", numbers=numbers(fid=99.0))]
    found = tables(runs)
    first, second = rows_of(found, "1", "TreeDiffusion")
    assert (first.settings, first.n, first.ours["fid_gen"].mean) == ("S1", 2, 10)
    assert (second.settings, second.n, second.ours["fid_gen"].mean) == ("S2", 1, 99)
    assert [row.settings for row in rows_of(found, "1", "TreeVAE")] == ["S1", "S2"]
    note = " ".join(named(found, "1").note)
    assert "S2 differs from S1 in tree.size=2 (S1: 4). They are not averaged." in note
    assert "cifar10, S2: " in note
    assert "runs: small (path, seed 2)" in note


def test_trees_do_not_depend_on_settings_of_diffusion() -> None:
    found = tables([entry(0), entry(1, settings={"diffusion.width": 64})])
    assert [row.n for row in rows_of(found, "1", "TreeDiffusion")] == [1, 1]
    (tree,) = rows_of(found, "1", "TreeVAE")
    assert (tree.n, tree.settings) == (2, "S1, S2")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"draws": 1000}, "draws=1000 (S1: 10000)"),
        ({"reference": {"split": "train", "images": 10_000}}, "reference.split=train (S1: test)"),
        ({"reference": {"split": "test", "images": 5}}, "reference.images=5 (S1: 10000)"),
        ({"inception": {"digest": "3c" * 32}}, "inception.digest=3c3c3c3c (S1: 1a1a1a1a)"),
        ({"inception": {}}, "inception.digest=none (S1: 1a1a1a1a)"),
        ({"classifier": {"digest": JUDGE, "network": "resnet50"}}, "classifier.network=resnet50 (S1: small)"),
    ],
)
def test_runs_measured_in_another_way_are_never_averaged(change: dict[str, Any], said: str) -> None:
    found = tables([entry(0, numbers=numbers(acc=0.2)), entry(1, numbers=numbers(fid=20.0, acc=0.4, **change))])
    for method in ("TreeVAE", "TreeDiffusion"):
        first, second = rows_of(found, "1", method)
        assert (first.ours["fid_gen"].n, second.ours["fid_gen"].n) == (1, 1)
        assert first.protocol != second.protocol
    # clusters do not depend on it, and stand once
    first, second = rows_of(found, "1", "TreeVAE")
    assert (first.ours["acc"].mean, first.ours["acc"].n) == (pytest.approx(30), 2)
    assert "acc" not in second.ours
    assert any(f"S2 differs from S1 in {said}" in sentence for sentence in named(found, "1").note)
    assert not any(best for cells in named(found, "3").cells() for text, best in cells if text in ("10.0", "20.0"))


def test_many_differences_are_counted() -> None:
    many = {f"diffusion.{k}": k for k in range(20)}
    sentence = next(line for line in named(tables([entry(0), entry(1, settings=many)]), "1").note if "differs" in line)
    assert sentence.count("=") == 12
    assert "and 8 more" in sentence


def test_a_run_of_the_tree_alone_counts_for_its_tree() -> None:
    alone = entry(1, numbers=numbers(acc=0.7) | {"samples": {}})
    found = tables([alone, entry(0)])
    (tree,) = rows_of(found, "1", "TreeVAE")
    assert (tree.settings, tree.ours["acc"].n, tree.ours["fid_gen"].n) == ("", 2, 1)
    cells = next(cells for cells in parsed(markdown(found))[0] if cells[1] == "TreeVAE")
    assert cells[2] == "2"
    assert "100.0 (n=1)" in cells
    assert [row.n for row in rows_of(found, "1", "TreeDiffusion")] == [1]


def test_two_data_sets_of_one_name_stay_apart() -> None:
    found = tables([entry(0), entry(1, digest="e" * 64)])
    assert {row.data for row in named(found, "1").rows} == {"cifar10 (dddddddd)", "cifar10 (eeeeeeee)"}
    assert all(row.n == 1 for row in rows_of(found, "1", "TreeDiffusion"))
    assert sum(table.name == "3" for table in found) == 2


@pytest.mark.parametrize(
    "part", [{}, {"samples": None, "clustering": None}, {"samples": {"draws": 5}}, {"samples": {"treediffusion": {}}}]
)
def test_whatever_is_missing_is_left_out(part: dict[str, Any]) -> None:
    text = markdown(tables([entry(numbers=part)]))  # of CIFAR-10: the paper's numbers are there
    assert "None" not in text
    assert [table.name for table in tables([entry(numbers=part)])] == ["1"]
    assert tables([entry(numbers=part, data="noise")]) == []


# --- what stands where -------------------------------------------------------------------------------


def test_fid_columns_hold_fid_alone() -> None:
    without = tables([entry(seed, data="noise", numbers=numbers(fid=None)) for seed in range(2)])
    for table in without:
        filled = {column.key for row in table.rows for column in table.columns if column.key in row.ours}
        assert not {"fid_gen", "fid_rec"} & filled or table.name == "controls"
    header = named(without, "1").header
    assert not any(title.startswith("FID") for title in header)
    titles = [title for title in header if "classifier features" in title]
    assert len(titles) == 2
    assert all("not FID" in title for title in titles)
    both = named(tables([entry()]), "1")
    (row,) = [row for row in both.rows if row.method == "TreeDiffusion"]
    by_title = {column.title: row.ours[column.key].mean for column in both.columns if column.key in row.ours}
    assert by_title == {
        "FID (rec)": 5,
        "FID (gen)": 10,
        "Fréchet distance (rec), classifier features; not FID": 1.5,
        "Fréchet distance (gen), classifier features; not FID": 3,
    }


def test_every_table_names_its_protocol() -> None:
    for table in tables([entry(), entry(1, "recon")]):
        note = " ".join(table.note)
        for part in (
            "10,000 draws",
            "3 blocks",
            "10,000 test images",
            "Inception 1a1a1a1a,",
            "classifier small 2b2b2b2b",
        ):
            assert part in note, (table.name, part)
        assert "1000 a leaf" in note or "1,000 images a leaf" in note


def test_methods_in_the_paper_s_order() -> None:
    there = ["path", "recon+leaf", "leaf+latent", "none", "recon"]
    found = named(tables([entry(k, condition) for k, condition in enumerate(there)]), "1")
    assert [row.method for row in found.rows] == [
        "TreeVAE",
        "TreeVAE + Diffusion",
        "TreeDiffusion",
        "Diffusion alone",
        "Diffuse-TreeVAE",
        "Diffusion, leaf+latent",
    ]


def test_table_2_has_the_classifier_s_accuracy_beside_every_entropy() -> None:
    runs = [entry(0), entry(1), entry(0, "recon", numbers=numbers(entropy=1.0)), entry(0, "none")]
    found = named(tables(runs), "2")
    assert [(row.method, row.n) for row in found.rows] == [("TreeVAE + Diffusion", 1), ("TreeDiffusion", 2)]
    for row in found.rows:
        assert row.ours["test_accuracy"].mean == pytest.approx(90)
        assert row.ours["test_accuracy"].n == row.ours["classifier_entropy"].n
    assert [row.paper["classifier_entropy"].mean for row in found.rows] == [1.12, 0.93]
    assert any("classifiers are small" in sentence for sentence in found.note)
    same = entry(numbers=numbers(classifier={"digest": JUDGE, "network": "resnet50"}))
    assert not any("classifiers are" in sentence for sentence in named(tables([same]), "2").note)


def test_table_3_has_every_variant_and_what_it_tells() -> None:
    found = named(tables([entry(0), entry(0, "recon+latent")]), "3")
    assert [row.method for row in found.rows] == list(KNOWN_CONDITIONS) == list(CONDITIONS)
    for row in found.rows:
        told = dict(zip(TOLD, row.marks, strict=True))
        for part, mark in told.items():
            assert (mark == "x") == getattr(KNOWN_CONDITIONS[row.method], part)
        assert row.n == (row.method in ("path", "recon+latent"))
    assert [row.paper["fid_gen"].mean for row in found.rows] == [18.1, 19.7, 19.1, 18.9, 19.2, 19.1, 18.2, 17.8]
    assert not any("cannot be compared" in sentence for sentence in found.note)
    elsewhere = named(tables([entry(0, data="digits")]), "3")
    assert "paper, CIFAR-10: FID (gen) ↓" in elsewhere.header
    assert "digits is not CIFAR-10: the paper's column cannot be compared with ours." in elsewhere.note
    assert [row.paper["fid_gen"].mean for row in elsewhere.rows] == [row.paper["fid_gen"].mean for row in found.rows]


def test_controls_beneath() -> None:
    found = tables([entry(0), entry(0, "recon"), entry(1)])
    assert [table.name for table in found] == ["1", "2", "3", "controls"]
    (kmeans,) = rows_of(found, "controls", "k-means on pixels")
    assert (kmeans.ours["acc"].mean, kmeans.n) == (40, 2)  # seeds, not runs
    assert rows_of(found, "controls", "Ward on pixels") == []
    (real,) = rows_of(found, "controls", "real images")
    assert {key: score.mean for key, score in real.ours.items()} == {"classifier_frechet_gen": 0.125, "fid_gen": 1.5}


def test_what_a_control_is_told_stands_beneath_and_is_no_variant() -> None:
    found = tables([entry(0), *(entry(seed, "kmeans-10", numbers=numbers(fid=20.0 + seed)) for seed in (0, 2))])
    (row,) = rows_of(found, "controls", "Diffusion, kmeans-10")
    assert (row.ours["fid_gen"].mean, row.n) == (21, 2)
    assert rows_of(found, "1", "Diffusion, kmeans-10") == []
    assert [row.method for row in named(found, "3").rows] == list(CONDITIONS)
    assert rows_of(tables([entry(0)]), "controls", "Diffusion, path") == []


def test_a_part_of_a_data_set_is_not_the_paper_s() -> None:
    whole = named(tables([entry()]), "1").note
    part = named(tables([entry(images={"train": 500, "test": 10_000})]), "1").note
    said = "cifar10 holds 500 train and 10,000 test images here, in the paper 50,000 train and 10,000 test: "
    assert any(sentence.startswith(said) for sentence in part)
    assert not any("numbers are of other data" in sentence for sentence in whole)
    unknown = named(tables([entry(images={})]), "1").note
    assert not any("numbers are of other data" in sentence for sentence in unknown)


# --- the papers --------------------------------------------------------------------------------------


def test_table_3_begins_and_ends_with_models_of_table_1() -> None:
    for condition in ("recon", "path"):
        both = [source.numbers["cifar10"][condition]["fid_gen"] for source in (published.FID, published.VARIANTS)]
        assert both[0] == both[1]
    assert set(published.VARIANTS.numbers["cifar10"]) == set(CONDITIONS)


def test_paper_s_data_sets_are_known_by_the_names_that_packing_gives() -> None:
    known = set(configs.Data.model_fields["name"].annotation.__args__)  # type: ignore[union-attr]
    for source in (published.FID, published.CLUSTERS, published.ENTROPY, published.VARIANTS):
        assert set(source.numbers) <= known
    assert set(published.IMAGES) <= known


# --- Markdown and CSV --------------------------------------------------------------------------------


def test_the_best_is_bold_in_its_column_and_data_set() -> None:
    runs = [
        entry(0, numbers=numbers(fid=3.0)),
        entry(0, "recon", numbers=numbers(fid=2.0)),
        entry(0, data="digits", digest="e" * 64, numbers=numbers(fid=1.0)),
    ]
    first, *_ = parsed(markdown(tables(runs)))
    header, *body = first
    gen, paper = header.index("FID (gen) ↓"), header.index("paper: FID (gen) ↓")
    shown = {(cells[0], cells[1]): (cells[gen], cells[paper]) for cells in body}
    assert shown == {
        ("cifar10", "TreeVAE"): ("25.0", "188.0 ± 2.0"),  # the mean of its two runs
        ("cifar10", "TreeVAE + Diffusion"): ("**2.0**", "19.7 ± 0.2"),
        ("cifar10", "TreeDiffusion"): ("3.0", "**17.8 ± 0.4**"),
        ("digits", "TreeVAE"): ("10.0", ""),
        ("digits", "TreeDiffusion"): ("**1.0**", ""),
    }
    acc = header.index("ACC, % ↑")
    assert {cells[acc] for cells in body} == {"50.0", ""}  # one alone is not the best


def test_the_highest_is_best_of_scores() -> None:
    found = tables([entry(0, numbers=numbers(acc=0.9)), entry(1, settings={"tree.size": 2}, numbers=numbers(acc=0.2))])
    acc = named(found, "1").header.index("ACC, % ↑")
    best = [cells[acc] for cells in named(found, "1").cells() if cells[acc][0]]
    assert best == [("90.0", True), ("20.0", False)]


def test_equal_as_shown_is_equally_best_and_nan_never() -> None:
    values = {"path": 2.01, "recon": 2.04, "none": float("nan")}
    found = tables([entry(0, condition, numbers=numbers(fid=fid)) for condition, fid in values.items()])
    gen = named(found, "3").header.index("FID (gen) ↓")
    shown = [cells[gen] for cells in named(found, "3").cells() if cells[gen][0]]
    assert shown == [("nan", False), ("2.0", True), ("2.0", True)]


@pytest.mark.parametrize(
    "name", ["a|b", "**x**", "<script>1</script>", "back\\slash|", "two\nlines", "_a_`b`", "[a](b)", "&lt;", 'q",uote']
)
def test_names_stay_in_their_cells(name: str) -> None:
    found = tables([entry(data=name, run=name), entry(1, "recon", data=name, run=f"{name}2")])
    for table in parsed(markdown(found)):
        assert len({len(cells) for cells in table}) == 1
        assert {cells[0] for cells in table[1:]} == {escaped(name)}
    assert re.sub(r"\\(.)", r"\1", escaped(name)) == " ".join(name.split())
    assert not re.search(r"(?<!\\)[<>*`_]", markdown(found).replace("**", ""))
    lines = read_csv(found)
    assert {line["data"] for line in lines} == {name}
    assert {line["runs"] for line in lines if line["table"] == "2" and line["source"] == "ours"} == {name, f"{name}2"}


def test_csv_holds_every_number_unrounded() -> None:
    third = [entry(seed, numbers=numbers(fid=seed / 3)) for seed in range(3)]
    found = tables([*third, entry(0, "recon")])
    lines = read_csv(found)
    for table in found:
        for row in table.rows:
            for column in table.columns:
                for source, scores in (("ours", row.ours), (table.paper, row.paper)):
                    same = [
                        line
                        for line in lines
                        if (line["table"], line["data"], line["method"], line["quantity"], line["source"])
                        == (table.name, row.data, row.method, column.title, source)
                    ]
                    assert len(same) == (column.key in scores)
                    for line in same:
                        score = scores[column.key]
                        assert (float(line["mean"]), line["n"]) == (score.mean, str(score.n or ""))
                        assert line["standard_deviation"] == ("" if score.deviation is None else repr(score.deviation))
    (gen,) = [
        line
        for line in lines
        if (line["table"], line["method"], line["quantity"], line["source"])
        == ("1", "TreeDiffusion", "FID (gen)", "ours")
    ]
    values = [seed / 3 for seed in range(3)]
    assert (float(gen["mean"]), float(gen["standard_deviation"])) == (fmean(values), stdev(values))
    assert gen["runs"] == "path-0 path-1 path-2"
    assert "Inception 1a1a1a1a" in gen["protocol"]


# --- the command -------------------------------------------------------------------------------------


def make_run(folder: Path, name: str, *settings: str, found: dict[str, Any] | None = None, **record: Any) -> Path:
    """RUN `name` below `folder`, as far as the tables read it: its record, a finished tree, its numbers."""
    data = folder / "data"
    if not data.exists():
        making.make_set(data, [3])
    config = configs.load(None, [f"runs={folder}", f"name={name}", f"data.url={data}", *settings])
    run = folder / name
    tree = run / "tree" / "00-finetune"
    tree.mkdir(parents=True)
    (tree / "model.safetensors").write_bytes(name.encode())
    storage.finish(str(tree))
    written = {
        "id": f"{name}-id",
        "digest": f"digest of {name}",
        "config": config.model_dump(mode="json"),
        "bf16": False,
        "data_url": str(data),
        "data_digest": read_manifest(str(data)).digest,
    } | record
    (run / "run.json").write_text(json.dumps(written))
    if found is not None:
        (run / "evaluation.json").write_text(json.dumps(found))
    return run


Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """The command with these arguments: what it prints; of a failure, the one sentence."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def tables_of(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tables", *map(str, arguments)])
        code = None
        try:
            cli.run_command(command.main)
        except SystemExit as stopped:
            code = stopped.code
        printed = capsys.readouterr()
        if code is None:
            return printed.out
        assert (code, printed.err.count("\n")) == (2, 1)
        return printed.err

    return tables_of


def test_runs_become_tables(tmp_path: Path, call: Call) -> None:
    runs = [make_run(tmp_path, f"s{k}", f"seed={k}", found=numbers(fid=float(k))) for k in (1, 3)]
    taken = make_run(tmp_path, "recon", "diffusion.condition=recon", "seed=3", tree_digest="4d" * 32, found=numbers())
    out = tmp_path / "out" / "deep"
    printed = call(*runs, taken, "--out", out, "--tracking", "none")
    text = (out / "tables.md").read_text()
    assert text in printed
    assert f"{out}/tables.md\n{out}/tables.csv\n" in printed
    first = parsed(text)[0]
    gen = first[0].index("FID (gen) ↓")
    assert {cells[1]: (cells[2], cells[gen]) for cells in first[1:]} == {
        "TreeVAE": ("3", "46.7 ± 47.3"),
        "TreeVAE + Diffusion": ("1", "10.0"),
        "TreeDiffusion": ("2", "**2.0 ± 1.4**"),
    }
    assert {cells[0] for cells in first[1:]} == {"noise"}  # by its manifest
    lines = list(csv.DictReader((out / "tables.csv").open(newline="")))
    assert {line["table"] for line in lines} == {"1", "2", "3", "controls"}
    assert not list(tmp_path.glob("**/mlflow.db"))


def drawn(folder: Path, condition: str, *settings: str) -> Run:
    """A finished run told so, with its draws from the prior."""
    run = finished_run(folder, settings=(f"diffusion.condition={condition}", "samples.draws=8", *settings))
    job = results.standard_jobs(run)["prior"]
    results._complete(job, [draw_shard(job, shard) for shard in range(job.shards)])
    return run


def test_models_on_one_tree_are_shown_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures 2 and 3: image k of each model is of the same latents, or it is not shown."""
    runs = [drawn(tmp_path / name, name) for name in ("recon", "path", "none")]
    other = drawn(tmp_path / "other", "path", "seed=7")
    shown: list[tuple[str, Any]] = []
    rows = comparison.sample_rows
    monkeypatch.setattr(comparison, "sample_rows", lambda blocks, **how: shown.extend(blocks) or rows(blocks, **how))
    picture = comparison.samples_side_by_side([*runs, other])
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert [name for name, _ in shown] == ["TreeVAE", "TreeVAE + Diffusion", "TreeDiffusion", "Diffusion alone"]
    assert all(len(images) == 8 for _, images in shown)
    assert comparison.samples_side_by_side([runs[0], other]) is None


def test_entries_hold_what_results_depend_on(tmp_path: Path) -> None:
    urls = [
        make_run(tmp_path, "a", "seed=1", found=numbers()),
        make_run(tmp_path, "b", "seed=2", "workers=1", "tree.size=4", found=numbers(), tree_digest="4d" * 32),
        make_run(tmp_path, "c", "seed=3", found=numbers(), bf16=True),
    ]
    a, b, c = comparison.entries([existing(str(url)) for url in urls])
    assert (a.run, a.seed, a.condition, a.data, a.images) == ("a", 1, "path", "noise", {"train": 3})
    assert {key for key in a.settings if a.settings[key] != b.settings[key]} == {"tree.size"}
    assert {key for key in a.settings if a.settings[key] != c.settings[key]} == {"bf16"}
    assert not {"seed", "diffusion.condition", "workers", "name"} & a.settings.keys()
    assert b.tree == "4d" * 32
    assert len({a.tree, b.tree, c.tree}) == 3
    (tmp_path / "c" / "tree" / "00-finetune" / "model.safetensors").write_bytes(b"a")  # the weights of a
    assert comparison.entries([existing(str(urls[2]))])[0].tree == a.tree


def test_runs_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    urls = [make_run(tmp_path / k, "same", f"seed={k}", found=numbers(), digest=k) for k in ("1", "2")]
    names = [one.run for one in comparison.entries([existing(str(url)) for url in urls])]
    assert names == [str(url) for url in urls]


def test_data_that_is_gone_goes_by_the_config(tmp_path: Path) -> None:
    kept = make_run(tmp_path, "kept", found=numbers())
    gone = make_run(tmp_path, "gone", "data.url=null", "data.name=mnist", found=numbers())
    other = make_run(tmp_path, "other", found=numbers(), data_digest="f" * 64)
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    one = comparison.entries([existing(str(other))])[0]
    assert (one.data, one.images) == ("noise", {})  # what lies there now is not what the run was made from
    shutil.rmtree(tmp_path / "data")
    one = comparison.entries([existing(str(gone))])[0]
    assert (one.data, one.images) == ("mnist", {})
    with pytest.raises(ValueError, match="is not a data set"):
        comparison.entries([existing(str(kept))])


def test_what_cannot_be_is_one_sentence(tmp_path: Path, call: Call) -> None:
    good = make_run(tmp_path, "good", found=numbers())
    bare = make_run(tmp_path, "bare")
    assert f"is not evaluated yet: python -m tdiff.evaluate {bare} gives" in call(good, bare, "--tracking", "none")
    old = make_run(tmp_path, "old", found={"samples": {"reference": "train, 1500 images"}})
    assert f"python -m tdiff.evaluate {old} gives them anew" in call(old, "--tracking", "none")
    twin = make_run(tmp_path, "twin", found=numbers(), digest="digest of good")
    for twice in (good, twin):
        assert "are one run" in call(good, twice, "--tracking", "none")
    assert "is not a run folder" in call(tmp_path / "nothing")
    (bare / "evaluation.json").write_text("{")
    assert "is damaged" in call(bare, "--tracking", "none")
    (tmp_path / "file").write_text("")
    assert "file" in call(good, "--out", tmp_path / "file" / "below", "--tracking", "none")


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_runs_and_tables_in_object_storage(tmp_path: Path, call: Call, s3: str) -> None:
    local, far = make_run(tmp_path, "run", found=numbers()), f"{s3}/runs/run"
    for file in ("run.json", "evaluation.json", "tree/00-finetune/model.safetensors", "tree/00-finetune/COMPLETE"):
        storage.write_bytes(f"{far}/{file}", (local / file).read_bytes())
    assert "has no MLflow of its own: name one with --tracking URI, or --tracking none." in call(far)
    assert f"{s3}/out/tables.csv" in call(far, "--out", f"{s3}/out", "--tracking", "none")
    call(local, "--out", tmp_path / "out", "--tracking", "none")
    for name in ("tables.md", "tables.csv"):
        assert storage.read_text(f"{s3}/out/{name}") == (tmp_path / "out" / name).read_text()


def test_a_run_s_own_mlflow_lies_beside_it(tmp_path: Path) -> None:
    run = existing(str(make_run(tmp_path, "moved", "runs=elsewhere", found=numbers())))
    assert comparison.store(run, None) == (f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/mlartifacts")
    served = existing(str(make_run(tmp_path, "served", "tracking=http://there", found=numbers())))
    assert comparison.store(served, None) == ("http://there", None)


def test_mlflow_keeps_the_tables_of_a_list_once(tmp_path: Path, call: Call) -> None:
    from mlflow.tracking import MlflowClient

    a, b = (make_run(tmp_path, name, f"seed={k}", found=numbers()) for k, name in enumerate("ab"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for order in ((a, b), (b, a)):
        assert f"MLflow    {uri}\n" in call(*order, "--out", tmp_path / "out")
    call(a)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("noise")
    found = client.search_runs([experiment.experiment_id])
    assert [(run.info.run_name, run.info.status) for run in found] == [("tables", "FINISHED")] * 2
    assert len({run.data.tags["tdiff.tables"] for run in found}) == 2
    both = found[-1].info.run_id  # the older
    assert sorted(artifact.path for artifact in client.list_artifacts(both)) == ["tables.csv", "tables.md"]
    for name in ("tables.md", "tables.csv"):
        assert Path(client.download_artifacts(both, name)).read_text() == (tmp_path / "out" / name).read_text()
        assert len(list((tmp_path / "mlartifacts").rglob(name))) == 2

    (b / "evaluation.json").write_text(json.dumps(numbers(fid=77.0)))  # evaluated anew: the files are, too
    call(a, b)
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert "FID (gen),ours,43.5," in Path(client.download_artifacts(both, "tables.csv")).read_text()


def test_mlflow_that_cannot_be_used_is_one_sentence_after_the_tables(tmp_path: Path, call: Call) -> None:
    run = make_run(tmp_path, "run", found=numbers())
    sentence = call(run, "--out", tmp_path / "out", "--tracking", f"sqlite:///{run}/run.json")  # no database
    assert "cannot be used" in sentence
    assert "--tracking none" in sentence
    assert (tmp_path / "out" / "tables.md").exists()
