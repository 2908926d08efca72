"""The configuration: one typed, frozen tree. Defaults (the embedded digits demo) < YAML file < command line.

Every problem is a `ConfigError` whose message is one sentence naming field, value and remedy.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tdiff.diffusion.condition import KNOWN_CONDITIONS
from tdiff.diffusion.process import Objective, make_process
from tdiff.diffusion.samplers import Grid, Sampler, Start, check_eta
from tdiff.diffusion.unet import UNetSpec
from tdiff.errors import ConfigError, without_passwords
from tdiff.tree.model import TreeSpec

FOLDER_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")
"""Names that become a folder of their own: nothing that could lead elsewhere."""


TAKEN = ("data", "evaluation", "mlartifacts", "mlflow.db")
"""Names below `runs` that are no run's: what runs share lies there."""


SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 200, 200
"""How values are shown in messages: YAML can name one list often enough to fill the memory when it is written out."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise PydanticCustomError("bool_for_number", "it should be a number")
        if isinstance(value, str) and without_passwords(value) != value:
            raise PydanticCustomError("password", "it holds a password")
        return value


class Data(Section):
    name: Literal["digits", "mnist", "fashion-mnist", "cifar10", "celeba", "cubicc"] = Field(
        "digits", description="data set to pack where `url` names none"
    )
    source_dir: str | None = Field(None, description="folder of its original files; default: they are downloaded")
    url: str | None = Field(None, description="folder of shards that are there, local or s3://")
    shard_samples: int = Field(500, ge=1, description="images per shard when packing")
    block: int = Field(8192, ge=1, description="images that a slot shuffles at a time")
    cache: str | None = Field(None, description="folder on every node for decoded shards; default: a temporary one")
    cache_gb: float = Field(10.0, ge=0, description="how much that folder may hold, in GB; 0: no cache")
    max_bad_samples: int = Field(0, ge=0, description="damaged images that a worker may skip, telling them")


class Epochs(Section):
    initial: int = Field(60, ge=1, description="epochs of the root with two leaves")
    split: int = Field(90, ge=1, description="epochs of each split, on the leaf's images")
    refit: int = Field(10, ge=0, description="epochs of the whole tree after every third split; 0: no refits")
    final: int = Field(15, ge=0, description="epochs of the whole tree at the end")


class Tree(Section):
    run: str | None = Field(None, description="run whose finished tree is taken, instead of growing this one anew")
    encoder: Literal["cnn1", "cnn2"] = "cnn1"
    likelihood: Literal["bernoulli", "gaussian"] = Field("bernoulli", description="bernoulli: grey, gaussian: colour")
    features: int = Field(5, ge=2, description="bottom-up features; nodes go down to depth features - 1")
    latent_channels: int = Field(16, ge=1, description="D, channels of every latent")
    feature_channels: int = Field(32, ge=8, description="C, channels of the bottom-up features")
    size: int = Field(2, ge=1, description="r, height and width of latents and features")
    residual: bool = Field(False, description="shortcuts round the three convs of a block")
    max_leaves: int = Field(10, ge=2, description="K, effective leaves at which growing stops")
    batch: int = Field(128, ge=2, description="rows per step over all slots: images, or views of half as many")
    slots: int = Field(2, ge=1, description="S, parts of a batch with batch norm of their own; workers divide S")
    augmentation: Literal["none", "cifar10", "celeba"] = Field("none", description="of two views of every image")
    contrastive: float = Field(0.0, ge=0, description="lambda, weight of the contrastive terms; needs augmentation")
    reach_threshold: float = Field(0.0, ge=0, lt=0.5, description="nodes leave out rows that reach them less; 0: exact")
    epochs: Epochs = Epochs()
    kl_start: float = Field(0.0, ge=0, le=1, description="alpha in the first epoch of a phase")
    kl_step: float = Field(0.001, ge=0, description="added to alpha every epoch, up to 1")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0, description="L2 in the loss")
    decay_every: int = Field(100, ge=1, description="epochs between decays of the learning rate by 10")
    refit_every: int = Field(3, ge=1, description="splits between refits")
    checkpoint_images: int = Field(500_000, ge=1, description="images between resume checkpoints of a phase")

    @property
    def images_per_step(self) -> int:
        """How many images make a batch: each is one row, or two views."""
        return self.batch if self.augmentation == "none" else self.batch // 2


class Diffusion(Section):
    images: int = Field(75_000, ge=1, description="how many images to train on, repeats counted")
    epochs: int | None = Field(None, ge=1, description="passes through the training images; instead of `images`")
    condition: str = Field("path", description="what the U-Net is told: of the tree, or of a control's labels")
    node_encoding: Literal["index", "embedding"] = "embedding"
    objective: Objective = Field("noise", description="what the U-Net predicts; edm: preconditioned, in noise levels")
    min_snr: float | None = Field(None, gt=0, description="gamma of the min-SNR weighting of noise and v, 5 is usual")
    timesteps: int = Field(1000, ge=2, description="T")
    width: int = Field(32, ge=8)
    multipliers: tuple[int, ...] = Field((1, 2), min_length=1)
    attention: tuple[int, ...] = Field((4,), description="feature resolutions with attention")
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    condition_dropout: float = Field(0.0, ge=0, lt=1, description="share of samples trained with the null condition")
    batch: int = Field(128, ge=1, description="images per step over all slots")
    slots: int = Field(2, ge=1, description="S, parts of a batch; workers divide S")
    learning_rate: float = Field(1e-3, gt=0)
    warmup_images: int = Field(10_000, ge=0, description="images over which the learning rate rises from 0")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.1, gt=0, lt=0.28, description="relative width (sigma_rel) of the power-function EMA")
    ema_decay: float | None = Field(None, ge=0, lt=1, description="constant decay of the EMA, instead of `ema`")
    snapshots: int | None = Field(
        None,
        ge=0,
        description="how often two EMAs are kept, for any other width afterwards; default: 16, with `ema_decay` 0",
    )
    deepspeed: str | None = Field(None, description="JSON file of further DeepSpeed settings, as in configs/deepspeed")
    validations: int = Field(
        8, ge=0, description="how often the loss is measured on the same held-out images and noise"
    )
    validation_images: int = Field(500, ge=1, description="how many images that takes, in whole batches")
    zero: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    recompute: bool = Field(False, description="gradient checkpointing: less memory, a third more work")
    compile: bool = Field(False, description="torch.compile the U-Net for training; minutes at the start")
    checkpoint_images: int = Field(50_000, ge=1, description="images between resume checkpoints")

    @property
    def snapshot_count(self) -> int:
        """How often training keeps the EMAs that others are rebuilt from."""
        if self.snapshots is None:
            return 16 if self.ema_decay is None else 0
        return self.snapshots


class Samples(Section):
    per_leaf: int = Field(50, ge=1, description="images drawn for every leaf's grid")
    draws: int = Field(1500, ge=2, description="images drawn from the prior for the sample-quality numbers")
    blocks: int = Field(1, ge=1, description="how often so many are drawn, with seeds of their own")
    reconstructions: int = Field(10_000, ge=0, description="held-out images that are reconstructed, at most")
    draws_all_leaves: int = Field(4, ge=1, description="root draws shown through every leaf")
    steps: int = Field(50, ge=2, description="times of the sampler's grid")
    sampler: Sampler = "ddim"
    eta: float = Field(0.0, ge=0, le=1, description="noise that ddim adds on the way; 0: none, 1: as much as ddpm")
    grid: Grid = Field("quadratic", description="quadratic and uniform: in time steps; karras: in noise levels")
    start: Start = Field("noise", description="recon: denoising starts from the leaf's noised reconstruction")
    guidance: float = Field(0.0, ge=0, description="weight w of classifier-free guidance; needs condition_dropout")
    guidance_interval: tuple[float, float] | None = Field(
        None, description="noise levels between which guidance is active; default: everywhere"
    )
    ema: float | None = Field(None, gt=0, lt=0.28, description="width of the EMA to draw from; default: diffusion.ema")
    batch: int = Field(250, ge=1, description="images per shard, drawn in one batch")


class Classifier(Section):
    network: Literal["small", "resnet50"] = Field("small", description="what judges samples; small: a few convs")
    images: int = Field(38_400, ge=1, description="how many labelled images to train it on, repeats counted")
    batch: int = Field(128, ge=2, description="images per step over all slots; fewer where there are not so many")
    slots: int = Field(2, ge=1, description="S, parts of a batch with batch norm of their own; workers divide S")
    learning_rate: float = Field(3e-3, gt=0, description="at the start; it falls to 0 along a cosine")
    seed: int = Field(0, ge=0, description="of its own: runs on the same data share the classifier")


class Evaluation(Section):
    likelihood_images: int = Field(1000, ge=0, description="held-out images whose log-likelihood is estimated")
    likelihood_samples: int = Field(100, ge=2, description="importance samples for each of them")
    features: tuple[Literal["classifier", "inception"], ...] = Field(
        ("classifier",), min_length=1, description="networks whose features samples are judged in: inception gives FID"
    )
    inception: str | None = Field(
        None, description="torch-fidelity's InceptionV3 weights, local or s3://; default: they are downloaded"
    )
    reference: Literal["train", "test"] = Field("train", description="real images that samples are held against")
    reference_images: int | None = Field(None, ge=4, description="how many of them; default: all")
    neighbour_images: int = Field(10_000, ge=4, description="images on each side at most for precision and recall")
    nearest_images: int = Field(
        200, ge=0, description="draws whose nearest training image is looked for: are they learnt by heart?"
    )
    resamples: int = Field(200, ge=0, description="bootstrap resamples for the error of a Fréchet distance; 0: none")
    classifier: Classifier = Classifier()


class Recovery(Section):
    checkpoint_minutes: float = Field(
        10.0, gt=0, description="minutes between resume checkpoints at most, whatever checkpoint_images says"
    )
    checkpoints: int = Field(2, ge=2, description="how many of a phase's newest resume checkpoints are kept")
    rollbacks: int = Field(3, ge=0, description="how often a phase may go back, with on_nonfinite=rollback")
    retries: int = Field(5, ge=0, description="how often in a row workers may be lost without a new checkpoint")
    first_step_seconds: float = Field(
        1800.0, gt=0, description="seconds without a first step, before a worker counts as hung"
    )
    step_seconds: float = Field(
        300.0, gt=0, description="seconds without a further step, before a worker counts as hung"
    )


class Config(Section):
    name: str | None = Field(None, description="run folder below `runs`; default: derived from the config")
    runs: str = Field("runs", min_length=1, description="root folder of all runs, local or s3://")
    seed: int = Field(0, ge=0)
    workers: int | tuple[int, int] | None = Field(
        None,
        description="Ray workers at most, a stage takes a divisor of its slots; [min, max]: as many as the cluster has "
        "by then; default: 2, or fewer CPUs",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of stage 2; auto: bf16 where it is fast")
    on_nonfinite: Literal["stop", "rollback"] = Field(
        "stop", description="after a loss or gradient that is not finite; rollback: to the last checkpoint"
    )
    tracking: str | None = Field(None, description="MLflow tracking URI; default: sqlite in the runs folder")
    data: Data = Data()
    tree: Tree = Tree()
    diffusion: Diffusion = Diffusion()
    samples: Samples = Samples()
    evaluation: Evaluation = Evaluation()
    recovery: Recovery = Recovery()

    @field_validator("workers", mode="before")
    @classmethod
    def _one_number_or_two(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        fine = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
        if value is not None and not (fine and list(numbers) == sorted(numbers)):
            raise ValueError(
                f"workers={value!r} cannot be used: take a number of at least 1, or two rising ones as [1, 8]"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        # A folder of its own directly below `runs`: --fresh deletes it.
        if self.name is not None and (not FOLDER_NAME.fullmatch(self.name) or self.name in TAKEN):
            raise ValueError(
                f"name={self.name!r} cannot name a run's folder: take letters, digits, and any of . _ + = - within "
                f"(but not {', '.join(TAKEN)})"
            )
        classifier = self.evaluation.classifier
        stages = (("tree", self.tree), ("diffusion", self.diffusion), ("evaluation.classifier", classifier))
        for stage, section in stages:
            if section.batch % section.slots:
                raise ValueError(
                    f"{stage}.batch={section.batch} cannot be divided into {stage}.slots={section.slots} equal "
                    f"parts: take a multiple of {section.slots}, such as {stage}.batch="
                    f"{max(section.slots, section.batch // section.slots * section.slots)}"
                )
        for stage, normed in (("tree", self.tree), ("evaluation.classifier", classifier)):
            if normed.batch // normed.slots < 2:
                raise ValueError(
                    f"{stage}.batch={normed.batch} leaves one image in each of {stage}.slots={normed.slots} slots, and "
                    f"batch norm needs two: take {stage}.batch={2 * normed.slots} or more"
                )
        if self.tree.contrastive and self.tree.augmentation == "none":
            raise ValueError(
                f"tree.contrastive={self.tree.contrastive:g} compares two views of every image: take "
                "tree.augmentation=cifar10 or celeba with it"
            )
        if self.tree.augmentation != "none" and self.tree.batch // self.tree.slots % 2:
            raise ValueError(
                f"tree.batch={self.tree.batch} gives each of tree.slots={self.tree.slots} slots an odd number of rows, "
                f"and tree.augmentation={self.tree.augmentation} makes two of every image: take a multiple of "
                f"{2 * self.tree.slots}"
            )
        needed = (self.tree.max_leaves - 1).bit_length() + 1
        if needed > self.tree.features:
            deepest = 2 ** (self.tree.features - 1)
            raise ValueError(
                f"tree.max_leaves={self.tree.max_leaves} is more than the {deepest} leaves that tree.features="
                f"{self.tree.features} allow: take tree.features={needed} or more"
            )
        if self.diffusion.condition not in KNOWN_CONDITIONS:
            raise ValueError(
                f"diffusion.condition={self.diffusion.condition!r} is not known: take one of "
                f"{', '.join(KNOWN_CONDITIONS)}"
            )
        try:
            make_process(self.diffusion.objective, self.diffusion.timesteps, self.diffusion.min_snr)
        except ValueError as error:
            raise ValueError(f"diffusion.{error}") from error
        if self.diffusion.objective == "edm" and self.samples.grid != "karras":
            raise ValueError(
                f"samples.grid={self.samples.grid} is one of time steps, and with diffusion.objective=edm there are "
                "noise levels: take samples.grid=karras"
            )
        if self.diffusion.objective != "edm" and self.samples.steps > self.diffusion.timesteps:
            raise ValueError(
                f"samples.steps={self.samples.steps} is more than diffusion.timesteps={self.diffusion.timesteps}: "
                f"take at most {self.diffusion.timesteps}"
            )
        dropped = self.diffusion.condition_dropout > 0 and self.diffusion.condition != "none"
        if self.samples.guidance and not dropped:
            raise ValueError(
                f"samples.guidance={self.samples.guidance:g} needs a model that is sometimes told nothing: take "
                "diffusion.condition_dropout=0.1 and a condition with it"
            )
        if self.diffusion.compile and self.diffusion.zero == 3:
            raise ValueError(
                "diffusion.compile=true cannot trace the partitioned weights of diffusion.zero=3: take diffusion.zero=2"
            )
        try:
            check_eta(self.samples.sampler, self.samples.eta)
        except ValueError as error:
            raise ValueError(f"samples.{error}") from error
        if (interval := self.samples.guidance_interval) and not 0 <= interval[0] <= interval[1]:
            raise ValueError(
                f"samples.guidance_interval={list(interval)} must be two rising noise levels of at least 0"
            )
        followed = self.diffusion.ema if self.diffusion.ema_decay is None else None
        if self.samples.ema not in (None, followed) and not self.diffusion.snapshot_count:
            raise ValueError(
                f"samples.ema={self.samples.ema:g} is rebuilt from snapshots, and training keeps none: take "
                "diffusion.snapshots=16"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """All settings that results depend on; not names, places, workers, caches, logging, nor what is resolved later.

        Data, precision and a tree that is taken enter a run's digest as what they resolve to
        (`tdiff.opening.digest_of`).
        """
        return self.model_dump(
            mode="json",
            exclude={
                "name": True,
                "runs": True,
                "workers": True,
                "on_nonfinite": True,
                "recovery": True,
                "tracking": True,
                "precision": True,
                "data": set(Data.model_fields) - {"block"},
                "tree": {"run", "checkpoint_images"},
                "diffusion": {
                    "deepspeed",
                    "validations",
                    "validation_images",
                    "recompute",
                    "checkpoint_images",
                },
                "evaluation": True,
            },
        )

    def tree_spec(self, channels: int, image_size: int) -> TreeSpec:
        """The TreeVAE's shape for images of [channels, image_size, image_size]."""
        names = ("encoder", "likelihood", "features", "latent_channels", "feature_channels", "size", "residual")
        projections = self.tree.contrastive > 0
        return TreeSpec(channels, image_size, projections=projections, **self.tree.model_dump(include=set(names)))

    def unet_spec(self, channels: int, image_size: int) -> UNetSpec:
        """The U-Net's shape for such images. Raises ValueError, naming the field, if it cannot be built."""
        section = self.diffusion
        try:
            return UNetSpec(
                channels=channels,
                image_size=image_size,
                width=section.width,
                multipliers=section.multipliers,
                attention=section.attention,
                heads=section.heads,
                dropout=section.dropout,
                condition_channels=channels if KNOWN_CONDITIONS[section.condition].recon else 0,
            )
        except ValueError as error:
            raise ValueError(f"diffusion.{error}") from error

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def differences(ours: Config, theirs: Config) -> list[str]:
    """`field: value here, value there` for every field that results depend on and in which two configs differ."""
    a, b = dotted(ours.identity()), dotted(theirs.identity())
    return [f"{key}: {a[key]} here, {b.get(key)} there" for key in a if a[key] != b.get(key)]


def flat(config: Config) -> dict[str, Any]:
    """Dotted names -> values, as for the command line."""
    return dotted(config.model_dump(mode="json"))


def dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names -> values."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def description(name: str) -> str | None:
    """What the setting with a dotted name means, where it needs saying."""
    section: type[BaseModel] = Config
    *parents, last = name.split(".")
    for parent in parents:
        annotation = section.model_fields[parent].annotation
        assert isinstance(annotation, type)
        section = annotation
    return section.model_fields[last].description


def load(path: str | None = None, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file (None: the defaults) and applies `a.b=c` overrides. Raises ConfigError."""
    raw: Any = {}
    if path is not None:
        file = Path(path)
        if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for names that are too long)
            raise ConfigError(f"CONFIG {path} is a folder: name a YAML file in it.")
        if not os.path.isfile(path):  # noqa: PTH113
            near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], 1)
            hint = f"did you mean {file.parent / near[0]}?" if near else "name a YAML file, or none for the demo."
            raise ConfigError(f"CONFIG {path} does not exist: {hint}")
        try:
            raw = yaml.safe_load(file.read_text()) or {}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"CONFIG {path} is not YAML: {reason}.") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"CONFIG {path} holds a {type(raw).__name__}, not `key: value` lines.")
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            item = without_passwords(item)
            raise ConfigError(f"{item!r} is neither a CONFIG file nor a setting: write settings as a.b=c.")
        try:
            parsed = yaml.safe_load(value) if value else None
        except (yaml.YAMLError, ValueError, RecursionError):
            shown = without_passwords(value if len(value) < 80 else f"{value[:80]}…")
            raise ConfigError(f"{key}={shown!r} cannot be read as a value: quote it.") from None  # it holds the value
        section = raw
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{key} is not a setting: {parent} is a value, not a section.")
        section[last] = parsed
    return validated(raw)


def validated(raw: dict[str, Any]) -> Config:
    """A Config from nested dicts. Raises ConfigError, one sentence about the first problem."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        # Without the error itself, which holds what was given: somebody may log it.
        raise ConfigError(without_passwords(_sentence(error))) from None


def password_told(field: str) -> str:
    """The sentence about a URL with a password in it, which a run's records and logs would show."""
    return (
        f"{field} holds a password, which the run's files would show: leave it out, and set it as "
        "MLFLOW_TRACKING_PASSWORD (with MLFLOW_TRACKING_USERNAME), PGPASSWORD or AWS_SECRET_ACCESS_KEY."
    )


def _sentence(error: ValidationError) -> str:
    """The first problem of a ValidationError as: field, value, remedy."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    shown = SHORT.repr(first["input"])
    if first["type"] == "extra_forbidden":
        known = list(flat(Config()))
        names = known + sorted({key.rpartition(".")[0] for key in known if "." in key})
        near = difflib.get_close_matches(field, names, 1, 0.4)
        by_last = [name for name in names if name.rpartition(".")[2] == field.rpartition(".")[2]]
        hint = (by_last + near)[:1]
        return f"{field} is not a known setting" + (f": did you mean {hint[0]}?" if hint else ".")
    if first["type"] == "model_type":
        return f"{field}={shown} cannot be used: {field} is a section, so set {field}.…=… within it."
    if first["type"] == "password":
        return password_told(field)
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) + "."
    remedy = first["msg"].replace("Input should be", "it should be").replace("Value should", "it should")
    return f"{field}={shown} cannot be used: {remedy[0].lower()}{remedy[1:]}."
