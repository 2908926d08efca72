"""Tables 1, 2 and 3 of the TreeDiffusion papers over a list of runs, the papers' numbers beside ours, and their texts.

A number is the mean over runs that differ in their seed alone. Runs that differ in anything else that results depend
on, or in how their samples were measured (their protocol), are rows of their own, and a note says in what they differ.
A tree counts once, however many runs share it. FID is what `fid_…` of evaluation.json holds, nothing else; Fréchet
distances in the features of a classifier have columns of their own.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal

from tdiff.evaluation import published
from tdiff.evaluation.published import Published, method

Numbers = Mapping[str, Any]

CONDITIONS = ("none", "recon", "recon+leaf", "recon+latent", "recon+leaf+latent", "leaf+latent", "recon+path", "path")
"""What a diffusion model can be told, in the order of the papers' Table 3."""

TOLD = {"recon": "reconstruction", "leaf": "leaf", "latent": "leaf latent", "path": "path"}
"""Part of a condition's name -> its column in Table 3."""

SHOWN_DIFFERENCES = 12

SEEDS_ALONE = "n: runs, which differ in their seed alone."


@dataclass(frozen=True)
class Entry:
    """One run. run: a name that no other has. data, digest: name and SHA-256 of its data set; images: how many by
    split, as far as known.

    settings: dotted name -> value of all that results depend on, but the seed and the condition.
    tree: SHA-256 of its tree's weights; numbers: its evaluation.json, any part of which may be missing.
    """

    run: str
    data: str
    digest: str
    images: Mapping[str, int]
    seed: int
    condition: str
    settings: Mapping[str, Any]
    tree: str
    numbers: Numbers

    def clusters(self, name: str) -> Numbers:
        return (self.numbers.get("clustering") or {}).get(name) or {}

    def samples(self, name: str) -> Numbers:
        return (self.numbers.get("samples") or {}).get(name) or {}

    @property
    def protocol(self) -> dict[str, Any]:
        """How the samples were measured; empty where there are none."""
        found = self.numbers.get("samples") or {}
        named = {name: found.get(name) for name in ("draws", "blocks", "reconstructions", "per_leaf")}
        for part, names in (
            ("reference", ("split", "images")),
            ("inception", ("digest",)),
            ("classifier", ("network", "digest", "test_accuracy")),
        ):
            named |= {f"{part}.{name}": self.samples(part).get(name) for name in names}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Score:
    """Mean over n runs, and their standard deviation (n - 1 in the denominator; None for one run).

    Of a paper's numbers n and deviation are None where it does not tell them.
    """

    mean: float
    deviation: float | None
    n: int | None


@dataclass(frozen=True)
class Column:
    """A number of every row. best: which value is, if any; scale: what our values are multiplied by.

    of_samples: whether it depends on how samples were measured, and not on the tree and the data alone.
    """

    key: str
    title: str
    digits: int
    best: Literal["lowest", "highest"] | None
    scale: float = 1.0
    of_samples: bool = True

    def shown(self, score: Score) -> str:
        deviation = "" if score.deviation is None else f" ± {score.deviation:.{self.digits}f}"
        return f"{score.mean:.{self.digits}f}{deviation}"

    @property
    def header(self) -> str:
        return self.title + {"lowest": " ↓", "highest": " ↑", None: ""}[self.best]


FID_REC = Column("fid_rec", "FID (rec)", 1, "lowest")
FID_GEN = Column("fid_gen", "FID (gen)", 1, "lowest")
FRECHET_REC = Column("classifier_frechet_rec", "Fréchet distance (rec), classifier features; not FID", 2, "lowest")
FRECHET_GEN = Column("classifier_frechet_gen", "Fréchet distance (gen), classifier features; not FID", 2, "lowest")
ENTROPY = Column("classifier_entropy", "mean entropy, nats", 2, "lowest")
CONFIDENCE = Column("classifier_confidence", "classifier's confidence", 3, None)
JUDGE = Column("test_accuracy", "classifier's test accuracy, %", 1, None, 100)
ACC = Column("acc", "ACC, %", 1, "highest", 100, of_samples=False)
NMI = Column("nmi", "NMI, %", 1, "highest", 100, of_samples=False)
ARI = Column("ari", "ARI, %", 1, "highest", 100, of_samples=False)
PURITY = Column("leaf_purity", "leaf purity, %", 1, "highest", 100, of_samples=False)


@dataclass(frozen=True)
class Row:
    """What is measured (data set, method, settings where there are several), and its scores by the columns' keys.

    marks: further labels; n: how many runs (of TreeVAE: trees) the scores are of, at most.
    """

    data: str
    method: str
    settings: str
    ours: Mapping[str, Score]
    runs: tuple[str, ...] = ()
    protocol: str = ""
    paper: Mapping[str, Score] = field(default_factory=dict)
    marks: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return max((score.n or 0 for score in self.ours.values()), default=0)


@dataclass(frozen=True)
class Table:
    """name: as in the CSV. labels: headers of data, method and settings, then of the marks. note: sentences.

    paper: what the paper's numbers go by.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: tuple[str, ...]
    paper: str = "paper"

    @property
    def header(self) -> list[str]:
        """Titles of what `cells` gives: labels, n, and every column that has a number, with the paper's beside it."""
        ours, paper = self._filled()
        header = [*self._shown_labels(self.labels), "n"]
        for column in self.columns:
            header += [column.header] if column.key in ours else []
            header += [f"{self.paper}: {column.header}"] if column.key in paper else []
        return header

    def cells(self) -> list[list[tuple[str, bool]]]:
        """Every row's cells: text, and whether it is the best of those that can be compared with it.

        Compared are the rows of one data set and, for samples, of one protocol; one alone is not the best.
        """
        ours, paper = self._filled()
        out = []
        for row in self.rows:
            labels = self._shown_labels((row.data, row.method, row.settings, *row.marks))
            cells = [(text, False) for text in (*labels, str(row.n or ""))]
            for column in self.columns:
                if column.key in ours:
                    score = row.ours.get(column.key)
                    fewer = f" (n={score.n})" if score and score.n != row.n else ""
                    cells.append(self._cell(column, score, fewer, [one.ours for one in self._rivals(row, column)]))
                if column.key in paper:
                    rivals = [one.paper for one in self.rows if one.data == row.data]
                    cells.append(self._cell(column, row.paper.get(column.key), "", rivals))
            out.append(cells)
        return out

    def _filled(self) -> tuple[set[str], set[str]]:
        """Keys of the columns with a number of ours, and of those with one of the paper's, beside which ours belong."""
        paper = {key for row in self.rows for key in row.paper}
        return {key for row in self.rows for key in row.ours} | paper, paper

    def _shown_labels(self, labels: Sequence[str]) -> list[str]:
        """Labels without `settings` where every run has the same."""
        return [text for k, text in enumerate(labels) if k != 2 or any(row.settings for row in self.rows)]

    def _rivals(self, row: Row, column: Column) -> list[Row]:
        return [
            one for one in self.rows if one.data == row.data and (one.protocol == row.protocol or not column.of_samples)
        ]

    @staticmethod
    def _cell(column: Column, score: Score | None, after: str, rivals: list[Mapping[str, Score]]) -> tuple[str, bool]:
        if score is None:
            return "", False
        means = [one[column.key].mean for one in rivals if column.key in one and math.isfinite(one[column.key].mean)]
        text = column.shown(score) + after
        if column.best is None or len(means) < 2 or not math.isfinite(score.mean):
            return text, False
        best = min(means) if column.best == "lowest" else max(means)
        return text, f"{score.mean:.{column.digits}f}" == f"{best:.{column.digits}f}"


@dataclass(frozen=True)
class Settings:
    """Runs that agree in all but seed and condition, protocol included. name: empty where a data set has just these."""

    name: str
    entries: tuple[Entry, ...]
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class DataSet:
    """All runs on one data set. label: its name, with the digest's start where two go by one name."""

    label: str
    entries: tuple[Entry, ...]
    settings: tuple[Settings, ...]

    @property
    def name(self) -> str:
        return self.entries[0].data

    def named(self, entries: Iterable[Entry]) -> str:
        """Names of the settings that these runs have."""
        wanted = {entry.run for entry in entries}  # names are unique
        return ", ".join(one.name for one in self.settings if wanted & {entry.run for entry in one.entries})


def tables(entries: Sequence[Entry]) -> list[Table]:
    """Tables 1, 2, 3 (one for every data set) and the controls; those without a row are left out."""
    names = [name for name, _ in dict.fromkeys((entry.data, entry.digest) for entry in entries)]
    sets = []
    for of_set in _partition(entries, lambda entry: [entry.data, entry.digest]):
        name = of_set[0].data
        label = name if names.count(name) == 1 else f"{name} ({of_set[0].digest[:8]})"
        sets.append(DataSet(label, tuple(of_set), _settings(of_set)))
    found = [_table_1(sets), _table_2(sets), *(_table_3(one) for one in sets), _controls(sets)]
    return [table for table in found if table.rows]


def _partition(entries: Iterable[Entry], key: Callable[[Entry], Any]) -> list[list[Entry]]:
    """Entries of one key together, in the order in which keys first come."""
    out: dict[str, list[Entry]] = {}
    for entry in entries:
        out.setdefault(json.dumps(key(entry), sort_keys=True), []).append(entry)
    return list(out.values())


def _settings(entries: list[Entry]) -> tuple[Settings, ...]:
    """The settings of one data set's runs. Runs without samples have no protocol: they go with any that agree else."""
    found = _partition(
        (entry for entry in entries if entry.protocol), lambda entry: [dict(entry.settings), entry.protocol]
    )
    for entry in entries:
        if not entry.protocol:
            same = [group for group in found if group[0].settings == entry.settings]
            if same:
                same[0].append(entry)
            else:
                found.append([entry])
    names = [f"S{k}" for k in range(1, len(found) + 1)] if len(found) > 1 else [""]
    return tuple(Settings(name, tuple(of), of[0].protocol) for name, of in zip(names, found, strict=True))


def _scores(
    entries: Iterable[Entry],
    columns: Sequence[Column],
    numbers: Callable[[Entry], Numbers],
    unit: Callable[[Entry], Any],
) -> dict[str, Score]:
    """Score by column over units (runs, trees or seeds): the mean within a unit counts once."""
    out = {}
    entries = list(entries)
    for column in columns:
        units: dict[Any, list[float]] = {}
        for entry in entries:
            if (value := numbers(entry).get(column.key)) is not None:
                units.setdefault(unit(entry), []).append(float(value) * column.scale)
        means = [fmean(values) for values in units.values()]
        if means:
            out[column.key] = Score(fmean(means), stdev(means) if len(means) > 1 else None, len(means))
    return out


def _paper(source: Published, data: str, method: str) -> dict[str, Score]:
    found = source.numbers.get(data, {}).get(method, {})
    return {key: Score(mean, deviation, source.seeds) for key, (mean, deviation) in found.items()}


def _of_clusters(name: str) -> Callable[[Entry], Numbers]:
    return lambda entry: entry.clusters(name)


def _of_samples(name: str) -> Callable[[Entry], Numbers]:
    return lambda entry: entry.samples(name)


def _condition_rows(
    of: DataSet,
    condition: str,
    columns: Sequence[Column],
    paper: Mapping[str, Score],
    numbers: Callable[[Entry], Numbers],
) -> list[Row]:
    """The diffusion models of a condition, by their settings; one row with the paper's numbers where there are none."""
    name = method(condition)
    rows = []
    for settings in of.settings:
        chosen = [e for e in settings.entries if e.condition == condition and e.samples("treediffusion")]
        if chosen:
            ours, names = _scores(chosen, columns, numbers, lambda entry: entry.run), tuple(e.run for e in chosen)
            rows.append(Row(of.label, name, settings.name, ours, names, told(settings.protocol), paper))
    return rows or [Row(of.label, name, "", {}, paper=paper)]


# --- the tables --------------------------------------------------------------------------------------


def _table_1(sets: Sequence[DataSet]) -> Table:
    samples, clusters = (FID_REC, FID_GEN, FRECHET_REC, FRECHET_GEN), (ACC, NMI)
    rows: list[Row] = []
    for of in sets:
        paper = _paper(published.FID, of.name, "treevae") | _paper(published.CLUSTERS, of.name, "treevae")
        rows += [replace(row, paper=paper) for row in _tree_rows(of, samples, clusters)]
        there = {entry.condition for entry in of.entries}
        for condition in dict.fromkeys(("recon", "path", *CONDITIONS)):
            if condition in there | {"recon", "path"}:
                beside = _paper(published.FID, of.name, condition)
                rows += _condition_rows(of, condition, samples, beside, _of_samples("treediffusion"))
    note = [
        f"{SEEDS_ALONE} Of TreeVAE: trees, for a tree counts once however many runs share it.",
        "± is the standard deviation over them (n - 1).",
        "ACC and NMI of the test images belong to the tree: a diffusion model does not change them.",
        f"Paper: {published.FID.seeds} seeds; 10,000 draws (gen), and reconstructions of the test images (rec).",
        "Both are held against the test images there.",
        f"FID: {published.FID.source}. ACC and NMI: {published.CLUSTERS.source}.",
        *_other_images(sets, published.FID),
        *_notes(sets),
    ]
    kept = tuple(row for row in rows if row.ours or row.paper)
    columns = (FID_REC, FID_GEN, *clusters, FRECHET_REC, FRECHET_GEN)
    return Table("1", "Table 1. Generation and clustering", ("data", "method", "settings"), columns, kept, tuple(note))


def _tree_rows(of: DataSet, samples: Sequence[Column], clusters: Sequence[Column]) -> list[Row]:
    """A data set's trees, by what trees depend on; a row for every protocol, the first with the scores of clusters."""
    rows = []
    for alike in _partition(
        of.entries, lambda entry: {k: v for k, v in entry.settings.items() if k.startswith(("data.", "tree."))}
    ):
        measured = [entry for entry in alike if entry.samples("treevae")]
        for k, part in enumerate(_partition(measured, lambda entry: entry.protocol) or [[]]):
            ours = _scores(part, samples, _of_samples("treevae"), lambda entry: entry.tree)
            if k == 0:
                ours |= _scores(alike, clusters, _of_clusters("tree_test"), lambda entry: entry.tree)
            behind = alike if k == 0 else part
            protocol = told(part[0].protocol) if part else ""
            names = tuple(entry.run for entry in behind)
            rows.append(Row(of.label, method("treevae"), of.named(behind), ours, names, protocol))
    return rows


def _table_2(sets: Sequence[DataSet]) -> Table:
    rows: list[Row] = []
    measured = [of for of in sets if any(ENTROPY.key in entry.samples("treediffusion") for entry in of.entries)]
    for of in measured:
        for condition in ("recon", "path"):
            beside = _paper(published.ENTROPY, of.name, condition)
            rows += _condition_rows(of, condition, (ENTROPY, JUDGE), beside, _entropy_and_judge)
    note = [
        "Entropy of the classes that a classifier sees in a leaf's images, mean over leaves.",
        "Lower is more specific, unless the classifier sees one class in everything.",
        SEEDS_ALONE,
        f"Paper: {published.ENTROPY.source}, by a ResNet-50.",
        *_other_classifiers(measured),
        *_other_images(measured, published.ENTROPY),
        *_notes(measured),
    ]
    kept = tuple(row for row in rows if row.ours or row.paper)
    title = "Table 2. Cluster specificity of the images of every leaf"
    return Table("2", title, ("data", "method", "settings"), (ENTROPY, JUDGE), kept, tuple(note))


def _entropy_and_judge(entry: Entry) -> Numbers:
    """Mean entropy, and the test accuracy of the classifier that saw it."""
    return {
        ENTROPY.key: entry.samples("treediffusion").get(ENTROPY.key),
        JUDGE.key: entry.samples("classifier").get(JUDGE.key),
    }


def _table_3(of: DataSet) -> Table:
    columns, rows = (FID_GEN, FRECHET_GEN), list[Row]()
    if any(entry.samples("treediffusion") for entry in of.entries):
        for condition in CONDITIONS:
            marks = tuple("x" if part in condition.split("+") else "" for part in TOLD)
            beside = _paper(published.VARIANTS, "cifar10", condition)
            told_so = _condition_rows(of, condition, columns, beside, _of_samples("treediffusion"))
            rows += [replace(row, method=condition, marks=marks) for row in told_so]
    comparable = of.name == "cifar10"
    note = [
        "Marked is what a diffusion model is told: the leaf's reconstruction, the leaf, its latent, the whole path.",
        SEEDS_ALONE,
        f"Paper: CIFAR-10, 10,000 draws, {published.VARIANTS.seeds} seeds; {published.VARIANTS.source}.",
        *(() if comparable else (f"{of.label} is not CIFAR-10: the paper's column cannot be compared with ours.",)),
        *(_other_images([of], published.VARIANTS) if comparable else ()),
        *_notes([of]),
    ]
    labels = ("data", "condition", "settings", *TOLD.values())
    title = f"Table 3. Conditioning variants, {of.label}"
    return Table("3", title, labels, columns, tuple(rows), tuple(note), "paper, CIFAR-10")


def _controls(sets: Sequence[DataSet]) -> Table:
    clusters, samples = (ACC, NMI, ARI, PURITY), (FID_GEN, FRECHET_GEN, CONFIDENCE)
    rows: list[Row] = []
    for of in sets:
        rows += _tree_rows(of, (), clusters)
        for condition in sorted({entry.condition for entry in of.entries} - set(CONDITIONS)):
            rows += _condition_rows(of, condition, samples, {}, _of_samples("treediffusion"))
        names = tuple(entry.run for entry in of.entries)
        for key, title in (("kmeans_test", "k-means on pixels"), ("ward_test", "Ward on pixels")):
            ours = _scores(of.entries, clusters, _of_clusters(key), lambda entry: entry.seed)
            rows.append(Row(of.label, title, "", ours, names))
        for alike in _partition((e for e in of.entries if e.samples("real")), lambda entry: entry.protocol):
            ours = _scores(alike, samples, _of_samples("real"), lambda entry: entry.seed)
            names, protocol = tuple(entry.run for entry in alike), told(alike[0].protocol)
            rows.append(Row(of.label, "real images", of.named(alike), ours, names, protocol))
    note = [
        "ACC … leaf purity: of the test images. k-means and Ward are told how many classes there are, the tree is not.",
        "Ward is fitted to the images that it is scored on.",
        "Diffusion, kmeans-… or shuffled-leaf: told the image's cluster, or another image's leaf, in the tree's place.",
        "n: seeds; of TreeVAE: trees.",
        *_notes(sets),
    ]
    kept = tuple(row for row in rows if row.ours)
    title = "Controls beside the tables"
    return Table("controls", title, ("data", "method", "settings"), (*clusters, *samples), kept, tuple(note))


# --- what notes say ----------------------------------------------------------------------------------


def told(protocol: Mapping[str, Any]) -> str:
    """A protocol in words, as far as it is known."""

    def count(name: str, unit: str) -> list[str]:
        return [f"{protocol[name]:,} {unit}"] if name in protocol else []

    parts = [
        *count("draws", "draws"),
        *count("blocks", "blocks of draws"),
        *count("reconstructions", "reconstructions"),
    ]
    parts += count("per_leaf", "images a leaf")
    images = count("reference.images", f"{protocol.get('reference.split', '')} images".strip())
    parts += [f"reference {images[0]}"] if images else []
    if "inception.digest" in protocol:
        parts.append(f"Inception {protocol['inception.digest'][:8]}")
    judge = [str(protocol.get("classifier.network", "")), str(protocol.get("classifier.digest", ""))[:8]]
    if any(judge):
        right = protocol.get("classifier.test_accuracy")
        known = "" if right is None else f" (right about {right:.1%} of the held-out images)"
        parts.append(" ".join(["classifier", *(part for part in judge if part)]) + known)
    return ", ".join(parts)


def _notes(sets: Iterable[DataSet]) -> list[str]:
    """Which runs the numbers are of, how they were measured, and in what settings differ."""
    out = []
    for of in sets:
        for settings in of.settings:
            name = ", ".join(part for part in (of.label, settings.name) if part)
            runs = ", ".join(f"{entry.run} ({entry.condition}, seed {entry.seed})" for entry in settings.entries)
            out.append(f"{name}: {told(settings.protocol) or 'no samples'}; runs: {runs}.")
            for condition in dict.fromkeys(entry.condition for entry in settings.entries):
                diffused = [e for e in settings.entries if e.condition == condition and e.samples("treediffusion")]
                trees = len({entry.tree for entry in diffused})
                if trees < len(diffused):
                    out.append(
                        f"{name}: the {len(diffused)} runs of {condition} have {trees} different "
                        f"tree{'s' * (trees > 1)}, so their ± lacks some of the spread between trees."
                    )
        first = of.settings[0]
        for settings in of.settings[1:]:
            what = _differences(first, settings)
            more = f"; and {len(what) - SHOWN_DIFFERENCES} more" if len(what) > SHOWN_DIFFERENCES else ""
            out.append(
                f"{of.label}: {settings.name} differs from {first.name} in "
                f"{'; '.join(what[:SHOWN_DIFFERENCES])}{more}. They are not averaged."
            )
    return out


def _differences(first: Settings, other: Settings) -> list[str]:
    a, b = ({**one.entries[0].settings, **one.protocol} for one in (first, other))
    return [
        f"{name}={_short(b.get(name))} ({first.name}: {_short(a.get(name))})"
        for name in dict.fromkeys((*a, *b))
        if a.get(name) != b.get(name)
    ]


def _short(value: Any) -> str:
    """A setting's value; of a digest its first 8 digits."""
    text = "none" if value is None else str(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _other_images(sets: Iterable[DataSet], source: Published) -> list[str]:
    """A sentence for every data set that goes by a published name and holds another number of images."""
    out = []
    for of in sets:
        ours, theirs = of.entries[0].images, published.IMAGES.get(of.name)
        if theirs and of.name in source.numbers and any(ours.get(split, n) != n for split, n in theirs.items()):
            held = " and ".join(f"{ours.get(split, 0):,} {split}" for split in theirs)
            whole = " and ".join(f"{n:,} {split}" for split, n in theirs.items())
            out.append(f"{of.label} holds {held} images here, in the paper {whole}: the numbers are of other data.")
    return out


def _other_classifiers(sets: Iterable[DataSet]) -> list[str]:
    networks = {one.protocol.get("classifier.network") for of in sets for one in of.settings} - {None, "resnet50"}
    if not networks:
        return []
    return [
        f"Here classifiers are {' and '.join(sorted(map(str, networks)))}, the paper's is not: entropies differ by it."
    ]


# --- Markdown and CSV --------------------------------------------------------------------------------


def markdown(found: Iterable[Table]) -> str:
    """The tables as GitHub's Markdown, the best values bold. What users name is shown as it is and does nothing."""
    out = []
    for table in found:
        rows = [[escaped(title) for title in table.header], *(_bold(cells) for cells in table.cells())]
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = [" | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, " | ".join("-" * max(width, 3) for width in widths))
        notes = [f"- {escaped(sentence)}" for sentence in table.note]
        out.append("\n".join([f"## {escaped(table.title)}", "", *(f"| {line} |" for line in lines), "", *notes, ""]))
    return "\n".join(out)


def _bold(cells: Iterable[tuple[str, bool]]) -> list[str]:
    return [f"**{escaped(text)}**" if best else escaped(text) for text, best in cells]


def escaped(text: str) -> str:
    """Text as Markdown that shows it: on one line, with its special characters escaped."""
    return re.sub(r"([\\`*_~&<>|\[\]])", r"\\\1", " ".join(text.split()))


CSV_HEADER = (
    "table",
    "data",
    "method",
    "settings",
    "quantity",
    "source",
    "mean",
    "standard_deviation",
    "n",
    "protocol",
    "runs",
)


def as_csv(found: Iterable[Table]) -> str:
    """The tables as one CSV, a line for every number, ours and the paper's. Means are unrounded; ACC … in percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for table in found:
        for row in table.rows:
            for column in table.columns:
                for source, scores in (("ours", row.ours), (table.paper, row.paper)):
                    if (score := scores.get(column.key)) is not None:
                        deviation = "" if score.deviation is None else repr(score.deviation)
                        named = (table.name, row.data, row.method, row.settings, column.title, source)
                        known = (row.protocol if column.of_samples else "", " ".join(row.runs))
                        behind = known if source == "ours" else ("", "")
                        writer.writerow((*named, repr(score.mean), deviation, score.n or "", *behind))
    return out.getvalue()
