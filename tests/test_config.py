"""Protects the configuration: what wins over what, which settings make a run another run, and what people are told.

Everything that can be typed wrongly must end in ONE sentence that names the setting, its value and a remedy;
a run's identity (the digest) must change with whatever its results depend on, and with nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tdiff import config as configs
from tdiff.config import Config, differences, flat, load
from tdiff.errors import ConfigError

# Another valid value of every setting, and whether the results depend on it. A new setting must be entered here.
OTHER: dict[str, tuple[Any, bool]] = {
    "name": ("mine", False),
    "runs": ("elsewhere", False),
    "seed": (1, True),
    "workers": (1, False),
    "precision": ("fp32", False),
    "on_nonfinite": ("rollback", False),
    "tracking": ("http://mlflow:5000", False),
    "data.name": ("mnist", False),
    "data.source_dir": ("/data/mnist", False),
    "data.url": ("s3://bucket/digits", False),
    "data.shard_samples": (100, False),
    "data.block": (100, True),
    "data.cache": ("/scratch/cache", False),
    "data.cache_gb": (1.5, False),
    "data.max_bad_samples": (3, False),
    "tree.run": ("runs/other", False),
    "tree.encoder": ("cnn2", True),
    "tree.likelihood": ("gaussian", True),
    "tree.features": (6, True),
    "tree.latent_channels": (8, True),
    "tree.feature_channels": (16, True),
    "tree.size": (4, True),
    "tree.residual": (True, True),
    "tree.max_leaves": (9, True),
    "tree.batch": (64, True),
    "tree.slots": (1, True),
    "tree.augmentation": ("celeba", True),
    "tree.contrastive": (100.0, True),
    "tree.reach_threshold": (0.001, True),
    "tree.epochs.initial": (1, True),
    "tree.epochs.split": (1, True),
    "tree.epochs.refit": (0, True),
    "tree.epochs.final": (1, True),
    "tree.kl_start": (0.5, True),
    "tree.kl_step": (0.01, True),
    "tree.learning_rate": (1e-4, True),
    "tree.weight_decay": (0.0, True),
    "tree.decay_every": (50, True),
    "tree.refit_every": (2, True),
    "tree.checkpoint_images": (1000, False),
    "diffusion.images": (1000, True),
    "diffusion.epochs": (3, True),
    "diffusion.condition": ("recon+path", True),
    "diffusion.node_encoding": ("index", True),
    "diffusion.objective": ("v", True),
    "diffusion.min_snr": (5.0, True),
    "diffusion.timesteps": (500, True),
    "diffusion.width": (16, True),
    "diffusion.multipliers": ([1, 2, 2], True),
    "diffusion.attention": ([], True),
    "diffusion.heads": (2, True),
    "diffusion.dropout": (0.0, True),
    "diffusion.condition_dropout": (0.1, True),
    "diffusion.batch": (64, True),
    "diffusion.slots": (4, True),
    "diffusion.learning_rate": (1e-4, True),
    "diffusion.warmup_images": (0, True),
    "diffusion.clip": (0.5, True),
    "diffusion.ema": (0.05, True),
    "diffusion.ema_decay": (0.999, True),
    "diffusion.snapshots": (4, True),
    "diffusion.deepspeed": ("configs/deepspeed/zero1.json", False),
    "diffusion.validations": (2, False),
    "diffusion.validation_images": (100, False),
    "diffusion.zero": (2, True),
    "diffusion.recompute": (True, False),
    "diffusion.compile": (True, True),
    "diffusion.checkpoint_images": (1000, False),
    "samples.per_leaf": (10, True),
    "samples.draws": (100, True),
    "samples.blocks": (3, True),
    "samples.reconstructions": (10, True),
    "samples.draws_all_leaves": (2, True),
    "samples.steps": (20, True),
    "samples.sampler": ("ddpm", True),
    "samples.eta": (0.5, True),
    "samples.grid": ("uniform", True),
    "samples.start": ("recon", True),
    "samples.guidance": (0.5, True),
    "samples.guidance_interval": ([0.5, 5.0], True),
    "samples.ema": (0.07, True),
    "samples.batch": (100, True),
    "evaluation.likelihood_images": (10, False),
    "evaluation.likelihood_samples": (10, False),
    "evaluation.features": (["inception"], False),
    "evaluation.inception": ("weights.pth", False),
    "evaluation.reference": ("test", False),
    "evaluation.reference_images": (100, False),
    "evaluation.neighbour_images": (100, False),
    "evaluation.nearest_images": (0, False),
    "evaluation.resamples": (0, False),
    "evaluation.classifier.network": ("resnet50", False),
    "evaluation.classifier.images": (1000, False),
    "evaluation.classifier.batch": (64, False),
    "evaluation.classifier.slots": (1, False),
    "evaluation.classifier.learning_rate": (1e-4, False),
    "evaluation.classifier.seed": (1, False),
    "recovery.checkpoint_minutes": (1.5, False),
    "recovery.checkpoints": (3, False),
    "recovery.rollbacks": (1, False),
    "recovery.retries": (0, False),
    "recovery.first_step_seconds": (60.0, False),
    "recovery.step_seconds": (10.0, False),
}


NEEDS = {
    "tree.contrastive": ["tree.augmentation=cifar10"],
    "samples.guidance": ["diffusion.condition_dropout=0.1"],
}
"""Settings that cannot be changed alone."""


def base(name: str) -> Config:
    """The defaults, but for what the setting `name` needs."""
    return load(None, NEEDS.get(name, []))


def changed(name: str, value: Any) -> Config:
    """The same with one setting changed."""
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...").strip()
    return load(None, [*NEEDS.get(name, []), f"{name}={text}"])


def problem(*overrides: str, path: Path | str | None = None) -> str:
    """The message about these settings, which must be one sentence."""
    with pytest.raises(ConfigError) as caught:
        load(None if path is None else str(path), list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?", message
    assert not re.search(r"[.?!]\s+[A-Z]", message), message
    return message


# --- where values come from --------------------------------------------------------------------------


def test_defaults_then_yaml_then_command_line(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\ntree:\n  max_leaves: 4\n  epochs:\n    split: 7\n")
    config = load(str(file), ["tree.max_leaves=6"])
    assert config.seed == 5
    assert config.tree.epochs.split == 7
    assert config.tree.max_leaves == 6
    assert config.tree.batch == Config().tree.batch


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str):
    file = tmp_path / "empty.yaml"
    file.write_text(text)
    assert load(str(file)) == Config() == load()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("tree.learning_rate=1e-3", 1e-3),  # a string to YAML 1.1, a number to everybody else
        ("tree.learning_rate=2.5e-4", 2.5e-4),
        ("diffusion.multipliers=[1, 2, 4]", (1, 2, 4)),
        ("diffusion.attention=[]", ()),
        ("data.url=s3://bucket/a?b=c", "s3://bucket/a?b=c"),
        ("name=", None),
        ("data.url=null", None),
        ("tree.residual=true", True),
        ("seed='3'", 3),
        ("seed=99999999999999999999999", 99999999999999999999999),
    ],
)
def test_values_are_read_as_meant(setting: str, value: object):
    here: Any = load(None, [setting])
    for part in setting.partition("=")[0].split("."):
        here = getattr(here, part)
    assert here == value


def test_the_last_of_two_settings_wins_and_sections_may_be_given_whole():
    assert load(None, ["seed=1", "seed=2"]).seed == 2
    config = load(None, ["tree={batch: 8, epochs: {split: 3}}", "tree.epochs.final=2"])
    assert (config.tree.batch, config.tree.epochs.split, config.tree.epochs.final) == (8, 3, 2)


def test_what_is_written_is_read_back(tmp_path: Path):
    config = load(None, ["tree.learning_rate=1e-5", "diffusion.multipliers=[1,2,2]", "name=a-b", "tree.epochs.refit=0"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load(str(file)) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "named", "hint"),
    [
        ("tree.max_leafs=3", "tree.max_leafs", "tree.max_leaves"),
        ("max_leaves=3", "max_leaves", "tree.max_leaves"),
        ("treee.batch=3", "treee", "tree"),
        ("tree.epochs.splits=3", "tree.epochs.splits", "tree.epochs.split"),
        ("worker=1", "worker", "workers"),
        ("Seed=1", "Seed", "seed"),
        (" seed=1", "seed", "seed"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(setting: str, named: str, hint: str):
    message = problem(setting)
    assert named in message
    assert "is not a known setting" in message
    assert message.endswith(f"did you mean {hint}?")


@pytest.mark.parametrize("setting", ["zzzzzz=3", "a..b=1", "{}=3", "<<=3", "tree.=3", "tree.batch.x=3", "seed.x=1"])
def test_other_keys_that_are_none(setting: str):
    assert setting.split(".")[0].split("=")[0] in problem(setting)


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        # wrong type
        ("seed=abc", "'abc'", "integer"),
        ("seed=1.5", "1.5", "integer"),
        ("seed=", "None", "integer"),
        ("seed=[1]", "[1]", "integer"),
        ("tree.batch=1e400", "1e400", "integer"),
        ("tree.residual=maybe", "'maybe'", "boolean"),
        ("diffusion.multipliers=2", "2", "tuple"),
        ("diffusion.multipliers=1,2", "'1,2'", "tuple"),
        ("diffusion.multipliers=[]", "[]", "at least 1"),
        ("name={}", "{}", "string"),
        ("tree=3", "3", "is a section, so set tree.…=…"),
        ("tree=", "None", "is a section"),
        ("tree.epochs=5", "5", "set tree.epochs.…=…"),
        ("seed=true", "True", "number"),
        ("tree.kl_step=false", "False", "number"),
        # out of range
        ("seed=-1", "-1", "0"),
        ("workers=0", "0", "1"),
        ("tree.max_leaves=1", "1", "2"),
        ("tree.kl_start=1.5", "1.5", "1"),
        ("tree.epochs.split=0", "0", "1"),
        ("tree.learning_rate=0", "0", "greater than 0"),
        ("tree.learning_rate=-1e-3", "-1e-3", "greater than 0"),
        ("diffusion.dropout=1", "1", "less than 1"),
        ("diffusion.ema=0.5", "0.5", "0.28"),
        ("samples.ema=0.5", "0.5", "0.28"),
        ("samples.guidance=-1", "-1", "0"),
        ("samples.sampler=euler", "'euler'", "'dpm-solver++'"),
        ("samples.eta=-0.1", "-0.1", "0"),
        ("samples.eta=1.1", "1.1", "1"),
        ("samples.eta=nan", "nan", "finite"),
        ("samples.guidance_interval=3", "3", "tuple"),
        ("samples.draws=1", "1", "2"),
        ("evaluation.features=[]", "[]", "at least 1"),
        ("samples.steps=1", "1", "2"),
        # one of several
        ("data.name=imagenet", "'imagenet'", "'digits'"),
        ("precision=fp16", "'fp16'", "'bf16'"),
        ("diffusion.zero=4", "4", "0, 1, 2 or 3"),
        ("diffusion.condition=pth", "'pth'", "path"),
        # not numbers to compute with
        ("tree.learning_rate=inf", "inf", "finite"),
        ("tree.learning_rate=.inf", "inf", "finite"),
        ("tree.kl_step=nan", "nan", "finite"),
        ("tree.kl_step=.nan", "nan", "finite"),
        ("diffusion.clip=-.inf", "-inf", "finite"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(setting: str, value: str, remedy: str):
    message = problem(setting)
    assert setting.partition("=")[0] + "=" in message
    assert value in message
    assert remedy in message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["tree.batch=127", "tree.slots=2"], ["tree.batch=127", "tree.slots=2", "tree.batch=126"]),
        (["diffusion.batch=100", "diffusion.slots=8"], ["diffusion.batch=100", "diffusion.slots=8", "=96"]),
        (["diffusion.batch=1", "diffusion.slots=2"], ["diffusion.batch=1", "diffusion.slots=2", "diffusion.batch=2"]),
        (["tree.batch=4", "tree.slots=4"], ["tree.batch=4", "tree.slots=4", "tree.batch=8"]),
        (["tree.max_leaves=65", "tree.features=7"], ["tree.max_leaves=65", "tree.features=7", "tree.features=8"]),
        (
            ["samples.steps=1001", "diffusion.timesteps=1000"],
            ["samples.steps=1001", "diffusion.timesteps=1000", "at most 1000"],
        ),
        (["diffusion.objective=edm"], ["samples.grid=quadratic", "diffusion.objective=edm", "samples.grid=karras"]),
        (["diffusion.objective=edm", "diffusion.min_snr=5"], ["diffusion.min_snr is 5", "edm"]),
        (["diffusion.compile=true", "diffusion.zero=3"], ["diffusion.compile", "diffusion.zero=3", "=2"]),
        (["samples.guidance=1"], ["samples.guidance=1", "diffusion.condition_dropout=0.1"]),
        (
            ["samples.guidance=1", "diffusion.condition_dropout=0.1", "diffusion.condition=none"],
            ["samples.guidance=1", "condition"],
        ),
        (["samples.eta=0.5", "samples.sampler=heun"], ["samples.eta=0.5", "sampler=heun", "sampler=ddim", "eta=0"]),
        (["samples.guidance_interval=[5, 1]"], ["samples.guidance_interval=[5.0, 1.0]", "rising"]),
        (["samples.ema=0.07", "diffusion.snapshots=0"], ["samples.ema=0.07", "diffusion.snapshots=16"]),
        (["samples.ema=0.1", "diffusion.ema_decay=0.99"], ["samples.ema=0.1", "diffusion.snapshots=16"]),
        (
            ["evaluation.classifier.slots=3"],
            ["evaluation.classifier.batch=128", "evaluation.classifier.slots=3", "=126"],
        ),
        (
            ["evaluation.classifier={batch: 4, slots: 4}"],
            ["evaluation.classifier.batch=4", "evaluation.classifier.slots=4", "evaluation.classifier.batch=8"],
        ),
    ],
)
def test_settings_that_do_not_fit_each_other(settings: list[str], parts: list[str]):
    message = problem(*settings)
    for part in parts:
        assert part in message


def test_the_remedies_for_settings_that_do_not_fit_do_work():
    for settings in (
        ["tree.batch=126", "tree.slots=2"],
        ["diffusion.batch=96", "diffusion.slots=8"],
        ["tree.batch=8", "tree.slots=4"],
        ["tree.max_leaves=65", "tree.features=8"],
        ["tree.max_leaves=64", "tree.features=7"],
        ["samples.steps=1000", "diffusion.timesteps=1000"],
        ["diffusion.objective=edm", "samples.grid=karras", "samples.steps=2000"],
        ["samples.guidance=1", "diffusion.condition_dropout=0.1"],
        ["samples.eta=0.5", "samples.sampler=ddim"],
        ["samples.eta=0", "samples.sampler=heun"],
        ["samples.ema=0.07"],
        ["samples.ema=0.1", "diffusion.snapshots=0"],  # the one that is sampled anyway
    ):
        load(None, settings)


@pytest.mark.parametrize(
    "name",
    [".", "..", "../x", "a/b", "/etc", "''", ".hidden", "it's", "a b", "~", '"a\\nb"', *configs.TAKEN],
)
def test_a_name_is_that_of_a_folder_below_runs(name: str):
    if name == "~":  # null: the derived name
        assert load(None, ["name=~"]).name is None
    else:
        assert "cannot name a run's folder" in problem(f"name={name}")


@pytest.mark.parametrize("name", ["a", "digits-1a2b", "2024-01-01_x", "a.b", "lr=3"])
def test_plain_names_are_taken(name: str):
    assert load(None, [f"name={name}"]).name == name


def test_numbers_too_large_for_anything():
    assert load(None, ["tree.features=1000000000000"]).tree.features == 10**12  # at once
    assert "tree.batch=" in problem("tree.batch=" + "9" * 5000)


@pytest.mark.parametrize("argument", ["foo", "=3", "=", "--seed", "tree.batch"])
def test_what_is_no_setting_at_all(argument: str):
    assert repr(argument) in problem(argument)
    assert "a.b=c" in problem(argument)


@pytest.mark.parametrize("value", ["[1", "{a: ", "*x", "!!python/object/apply:os.getcwd []", "'", "@x"])
def test_a_value_that_is_not_yaml(value: str):
    message = problem(f"data.url={value}")
    assert "data.url=" in message
    assert "quote it" in message


# --- the file ----------------------------------------------------------------------------------------


def test_a_missing_file_is_answered_with_the_nearest_there(tmp_path: Path):
    (tmp_path / "cifar10.yaml").write_text("seed: 1\n")
    message = problem(path=tmp_path / "cifar.yaml")
    assert f"{tmp_path / 'cifar.yaml'} does not exist" in message
    assert f"did you mean {tmp_path / 'cifar10.yaml'}?" in message
    far = problem(path=tmp_path / "nowhere" / "x.yaml")
    assert "does not exist" in far
    assert "name a YAML file" in far
    assert "does not exist" in problem(path="a" * 5000)
    assert "is a folder" in problem(path=tmp_path)


@pytest.mark.parametrize(
    "content", [b"seed: 1\n  a: b\n c", b"a: [1\n", b"\xff\xfe\x00", b"x: \x07\n", b"seed: 1\n---\nseed: 2\n"]
)
def test_a_file_that_is_not_yaml(tmp_path: Path, content: bytes):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    assert f"CONFIG {file} is not YAML" in problem(path=file)


@pytest.mark.parametrize(("content", "kind"), [("- 1\n", "list"), ("digits\n", "str"), ("3\n", "int")])
def test_a_file_that_holds_no_settings(tmp_path: Path, content: str, kind: str):
    file = tmp_path / "list.yaml"
    file.write_text(content)
    assert f"holds a {kind}" in problem(path=file)
    assert f"holds a {kind}" in problem("seed=3", path=file)


@pytest.mark.parametrize("content", ["tree: 3\n", "tree:\n", "tree: [1]\n", "1: 2\n", "a: &a [*a]\n"])
def test_a_file_with_the_wrong_shape(tmp_path: Path, content: str):
    file = tmp_path / "shape.yaml"
    file.write_text(content)
    problem(path=file)
    problem("tree.batch=4", path=file)


def test_a_file_runs_no_code(tmp_path: Path):
    mark = tmp_path / "mark"
    file = tmp_path / "code.yaml"
    file.write_text(f"name: !!python/object/apply:os.mkdir ['{mark}']\n")
    assert "is not YAML" in problem(path=file)
    assert not mark.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "FILE seed=1 --until tree",
        "FILE --until tree seed=1",
        "--until tree FILE seed=1",
        "FILE --fresh seed=0 --until tree seed=1",
    ],
)
def test_settings_may_stand_before_and_after_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str):
    from tdiff import train

    file = tmp_path / "mine.yaml"
    file.write_text("seed: 7\nworkers: 1\n")
    asked: list[Any] = []

    def stop(config: Config, until: str, fresh: bool, say: object) -> None:
        asked.extend((config.seed, config.workers, until))
        raise SystemExit

    monkeypatch.setattr(train, "train", stop)
    monkeypatch.setattr("sys.argv", ["tdiff.train", *arguments.replace("FILE", str(file)).split()])
    with pytest.raises(SystemExit):
        train.main()
    assert asked == [1, 1, "tree"]


# --- which run it is ---------------------------------------------------------------------------------


def test_every_setting_stands_in_the_table_above():
    assert list(OTHER) == list(flat(Config()))


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of data.name
def test_the_identity_changes_with_what_results_depend_on_and_nothing_else(name: str):
    value, matters = OTHER[name]
    config, before = changed(name, value), base(name)
    assert {key for key, now in flat(config).items() if now != flat(before)[key]} == {name}
    assert (config.identity() != before.identity()) == matters


def test_the_identity_is_of_values_not_of_how_they_were_written(tmp_path: Path):
    file = tmp_path / "order.yaml"
    file.write_text("tree:\n  slots: 1\n  learning_rate: 0.0010\n  batch: 64\nseed: 0\n")
    identity = load(str(file)).identity()
    assert identity == load(None, ["tree.batch=64.0", "tree.slots=1", "tree.learning_rate=1e-3"]).identity()


def test_differences_are_told_field_by_field():
    ours, theirs = load(None, ["seed=1", "tree.epochs.split=2"]), load(None, ["seed=0", "tree.epochs.split=60"])
    assert differences(ours, theirs) == ["seed: 1 here, 0 there", "tree.epochs.split: 2 here, 60 there"]
    assert differences(Config(), Config()) == []
    assert differences(load(None, ["name=a", "workers=1", "data.url=x"]), Config()) == []  # they do not matter


# --- help --------------------------------------------------------------------------------------------


def test_help_shows_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from tdiff import train

    monkeypatch.setattr("sys.argv", ["tdiff.train", "--help"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name, value in flat(Config()).items():
        shown = [line for line in lines if line == f"{name}={value}" or line.startswith(f"{name}={value}  (")]
        assert len(shown) == 1, name
    for name, about in ((name, configs.description(name)) for name in flat(Config())):
        assert about is None or f"{name}={flat(Config())[name]}  ({about})" in lines


def test_the_help_of_names_that_scripts_rely_on():
    names = set(flat(Config()))
    assert {"name", "runs", "seed", "workers", "data.name", "data.url", "tree.max_leaves", "precision"} <= names
    assert {f"tree.epochs.{part}" for part in ("initial", "split", "refit", "final")} <= names
    assert {"diffusion.images", "diffusion.condition"} <= names


def test_the_tree_gets_its_shape_from_the_config_and_the_data():
    spec = load(None, ["tree.latent_channels=4", "tree.size=4", "tree.encoder=cnn2"]).tree_spec(3, 32)
    assert (spec.channels, spec.image_size, spec.latent_channels, spec.size, spec.encoder) == (3, 32, 4, 4, "cnn2")


# --- the files in configs/ ---------------------------------------------------------------------------

SHAPES = {
    "mnist": (1, 28),
    "fashion-mnist": (1, 28),
    "fashion-cpu": (1, 28),
    "fashion-cpu-edm": (1, 28),
    "cifar10": (3, 32),
    "cifar10-edm": (3, 32),
    "celeba": (3, 64),
    "cubicc": (3, 64),
    "scale": (3, 64),
}


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parent.parent.glob("configs/*.yaml")), ids=lambda file: file.stem
)
def test_every_config_fits_its_data_set(file: Path):
    config = load(str(file))
    if config.data.url is None:
        assert config.data.name == file.stem.removesuffix("-edm").replace("fashion-cpu", "fashion-mnist")
    channels, size = SHAPES.get(file.stem, (1, 8))
    tree, unet = config.tree_spec(channels, size), config.unet_spec(channels, size)
    assert (tree.likelihood == "bernoulli") == (channels == 1)
    assert tree.projections == (config.tree.contrastive > 0) == (channels == 3)
    assert unet.channels == channels


@pytest.mark.parametrize("stem", ["fashion-cpu", "cifar10"])
def test_a_config_of_the_same_tree_can_take_it(stem: str):
    folder = Path(__file__).parent.parent / "configs"
    ours, theirs = load(str(folder / f"{stem}-edm.yaml")), load(str(folder / f"{stem}.yaml"))
    told = [line.partition(":")[0] for line in differences(ours, theirs)]
    assert {"diffusion.objective", "samples.sampler"} <= set(told)
    assert [name for name in told if not name.startswith(("diffusion.", "samples."))] == []


@pytest.mark.parametrize(
    ("stem", "epochs", "kl", "batch", "latent"),
    [
        ("mnist", (150, 150, 80, 200), (0, 0.001), 256, (2, 16, 32)),
        ("fashion-mnist", (150, 150, 80, 200), (0.5, 0.001), 256, (2, 16, 32)),
        ("cifar10", (150, 150, 0, 0), (0.01, 0.01), 256, (4, 64, 128)),
        ("celeba", (35, 35, 0, 0), (0.01, 0.01), 128, (4, 64, 128)),
        ("cubicc", (150, 150, 0, 0), (0.01, 0.01), 128, (4, 64, 128)),
    ],
)
def test_the_papers_values(stem: str, epochs: tuple, kl: tuple, batch: int, latent: tuple):
    """The table of METHOD.md (public configs)."""
    tree = load(str(Path(__file__).parent.parent / "configs" / f"{stem}.yaml")).tree
    assert tuple(tree.epochs.model_dump().values()) == epochs
    assert (tree.kl_start, tree.kl_step, tree.batch, tree.slots) == (*kl, batch, 1)
    assert (tree.size, tree.latent_channels, tree.feature_channels) == latent
    assert (tree.max_leaves, tree.features) == (10, 7)
    assert tree.contrastive == (100 if latent[0] == 4 else 0)
