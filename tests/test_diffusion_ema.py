"""Protects the moving averages: their formulas, the profile of the power function, saving and loading; and that any
width can be rebuilt from snapshots of two, or what lacks for it is said in one sentence.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from tdiff.config import load
from tdiff.diffusion.ema import (
    TRACKS,
    Ema,
    Profile,
    combination,
    constant_decay,
    gamma_from_width,
    inner_products,
    power_decay,
    relative_width,
    snapshot_steps,
)
from tdiff.errors import ConfigError, DataError, Problem
from tdiff.work.diffusing import tracks_of
from tdiff.work.snapshots import Snapshots, rebuild

torch.set_num_threads(1)


def history(steps: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=rng) for _ in range(steps + 1)]


def averaged(ema_decay: object, values: list[torch.Tensor]) -> torch.Tensor:
    """The average after a parameter has taken `values`, the first of them at the start."""
    parameter = torch.nn.Parameter(values[0].clone())
    ema = Ema([parameter], ema_decay)  # type: ignore[arg-type]
    for step, value in enumerate(values[1:], 1):
        with torch.no_grad():
            parameter.copy_(value)
        ema.update(step)
    return ema.averages[0]


@pytest.mark.parametrize("decay", [constant_decay(0.9), power_decay(4.0), power_decay(0.5)])
def test_update_against_an_explicit_loop(decay: object) -> None:
    values = history(30)
    expected = values[0].double()
    for step, value in enumerate(values[1:], 1):
        beta = decay(step)  # type: ignore[operator]
        expected = beta * expected + (1 - beta) * value
    torch.testing.assert_close(averaged(decay, values), expected.float())


def test_power_function_weights_in_closed_form() -> None:
    gamma, steps, values = 6.94, 50, history(50)
    shares = [(i / steps) ** (gamma + 1) - ((i - 1) / steps) ** (gamma + 1) for i in range(1, steps + 1)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * value for share, value in zip(shares, values[1:], strict=True))
    torch.testing.assert_close(averaged(power_decay(gamma), values), expected)


def test_gamma_zero_is_the_plain_mean() -> None:
    values = history(20)
    torch.testing.assert_close(averaged(power_decay(0.0), values), torch.stack(values[1:]).mean(0))


def test_constant_decay_forgets_its_start_as_slowly_as_it_says() -> None:
    values = [torch.ones(1)] + [torch.zeros(1)] * 2000
    assert averaged(constant_decay(0.9999), values).item() == pytest.approx(0.9999**2000, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.28, 0.1, 0.05, 0.01])
def test_gamma_from_width_inverts_the_width(sigma_rel: float) -> None:
    assert relative_width(gamma_from_width(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_width_is_the_spread_of_the_profile() -> None:
    assert gamma_from_width(0.1) == pytest.approx(6.94, abs=0.01)
    gamma, steps = gamma_from_width(0.1), 20000
    i = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    share = i ** (gamma + 1) - (i - 1 / steps) ** (gamma + 1)
    mean = (share * i).sum()
    assert (share * (i - mean).square()).sum().sqrt().item() == pytest.approx(0.1, rel=1e-3)


def test_averages_are_float32_and_their_own() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, constant_decay(0.999))
    before = ema.state_dict()["w"]
    with torch.no_grad():
        parameter += 1
    assert torch.equal(before, torch.ones(3))
    ema.update(1)
    assert ema.state_dict()["w"] is before
    assert before.dtype == torch.float32
    assert not before.requires_grad
    torch.testing.assert_close(before, torch.full((3,), 1.001))


def test_replaced_storage_is_followed() -> None:
    # DeepSpeed and `module.to` assign `parameter.data` anew.
    parameter = torch.nn.Parameter(torch.zeros(2))
    ema = Ema([parameter], constant_decay(0.0))
    parameter.data = torch.full((2,), 3.0)
    ema.update(1)
    assert torch.equal(ema.averages[0], torch.full((2,), 3.0))


def test_saved_and_loaded_goes_on_alike() -> None:
    weights = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    first = Ema(weights, power_decay(3.0))
    for step in range(1, 4):
        for tensor in weights.values():
            tensor += 1
        first.update(step)
    second = Ema(weights, power_decay(3.0))
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for ema in (first, second):
        ema.update(4)
    assert all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in weights)


def test_a_list_is_named_by_position_and_may_be_empty() -> None:
    assert list(Ema([torch.ones(1), torch.ones(2)], constant_decay(0.5)).state_dict()) == ["0", "1"]
    Ema([], constant_decay(0.5)).update(1)


def test_what_does_not_fit_is_refused() -> None:
    ema = Ema({"a": torch.zeros(3), "b": torch.zeros(2)}, constant_decay(0.5))
    with pytest.raises(ValueError, match="'c'"):
        ema.load_state_dict({"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\[4\], but \[2\] here"):
        ema.load_state_dict({"a": torch.ones(3), "b": torch.ones(4)})
    assert not ema.state_dict()["a"].any()
    with pytest.raises(ValueError, match="step is 0"):
        ema.update(0)
    for wrong in (0.0, 0.3, -1.0):
        with pytest.raises(ValueError, match="relative width"):
            gamma_from_width(wrong)
    with pytest.raises(ValueError, match="gamma is -1"):
        power_decay(-1)
    with pytest.raises(ValueError, match=r"decay of an EMA is 1\.0"):
        constant_decay(1.0)


# --- any width, from snapshots of two ------------------------------------------------------------

STEPS, COUNT = 640, 16


def profile(step: int, width: float) -> Profile:
    return Profile(step, gamma_from_width(width))


@pytest.mark.parametrize(("steps", "count", "expected"), [
    (10, 5, [2, 4, 6, 8, 10]), (10, 3, [4, 7, 10]), (3, 16, [1, 2, 3]), (10, 1, [10]), (10, 0, []),
])  # fmt: skip
def test_snapshots_are_regular_and_end_with_training(steps: int, count: int, expected: list[int]) -> None:
    assert snapshot_steps(steps, count) == expected


def test_inner_products_against_numeric_integration() -> None:
    profiles = [Profile(40, 0.0), profile(40, 0.1), profile(25, 0.05), profile(3, 0.2), profile(40, 0.02)]
    tau = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 10_000  # midpoints, to the end of the longest
    values = [torch.where(tau < t, (g + 1) * tau**g / t ** (g + 1), 0.0) for t, g in profiles]
    for value in values:
        assert value.sum().item() / 10_000 == pytest.approx(1, rel=1e-6)
    expected = torch.stack([torch.stack([(a * b).sum() / 10_000 for b in values]) for a in values])
    torch.testing.assert_close(inner_products(profiles, profiles), expected, rtol=1e-6, atol=0)


def test_inner_products_of_long_trainings_are_finite() -> None:
    found = inner_products([profile(10**6, 0.01)], [profile(10**6, 0.01), profile(1, 0.01)])
    assert found.isfinite().all()


def test_combination_adds_up_to_one_and_tells_its_distance() -> None:
    basis = [profile(step, width) for step in snapshot_steps(STEPS, COUNT) for width in TRACKS]
    distances = {}
    for width in (0.02, 0.05, 0.07, 0.1, 0.15, 0.25):
        target = profile(STEPS, width)
        coefficients, distances[width] = combination(target, basis)
        assert sum(coefficients) == pytest.approx(1, abs=1e-12)
        x = torch.tensor(coefficients, dtype=torch.float64)
        square = inner_products([target], [target]) - 2 * inner_products([target], basis) @ x
        square = square + x @ inner_products(basis, basis) @ x
        norm = inner_products([target], [target])
        assert distances[width] == pytest.approx((square / norm).clamp(min=0).sqrt().item(), abs=1e-7)
        nudged = x + 1e-3 * (torch.arange(len(x)) % 2 - 0.5)  # another sum of coefficients that add up to 1
        worse = norm - 2 * inner_products([target], basis) @ nudged + nudged @ inner_products(basis, basis) @ nudged
        assert worse > square, "the nearest one"
    assert distances[0.05] == distances[0.1] == pytest.approx(0, abs=1e-7)
    assert max(distances[0.07], distances[0.15]) < 0.01
    assert distances[0.25] < 0.08
    assert distances[0.02] < 0.13
    before = [profile(step, width) for step in snapshot_steps(STEPS, COUNT)[:-1] for width in TRACKS]
    assert combination(profile(STEPS, 0.1), before)[1] > 0.3, "without the target's own step nothing is near"


Walk = tuple[Path, dict[float, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Weights on a random walk: the folder with their snapshots, their averages followed directly, and the last ones.

    They start far from 0, as against how far they go, so that what sums to other than 1 would be seen.
    """
    folder = tmp_path_factory.mktemp("walk")
    rng = torch.Generator().manual_seed(0)
    weights = {"model.w": torch.full((300,), 100.0), "model.fixed": torch.full((2, 3), 7.0)}
    emas = {width: Ema(weights, power_decay(gamma_from_width(width))) for width in (0.02, 0.03, 0.07, 0.15, 0.2, 0.25)}
    emas |= {width: Ema(weights, power_decay(gamma_from_width(width))) for width in TRACKS}
    snapshots = Snapshots(str(folder / "ema"), snapshot_steps(STEPS, COUNT), "model.")
    snapshots.start(0)
    for step in range(1, STEPS + 1):
        weights["model.w"] += torch.randn(300, generator=rng)
        for ema in emas.values():
            ema.update(step)
        if step in snapshots.steps:
            for width in TRACKS:
                snapshots.write(step, str(width), emas[width].state_dict())
    return folder, {width: ema.state_dict()["model.w"] for width, ema in emas.items()}, weights["model.w"]


@pytest.mark.parametrize(
    ("width", "error"), [(0.02, 0.08), (0.03, 0.02), (0.07, 1e-3), (0.15, 1e-3), (0.2, 5e-3), (0.25, 0.03)]
)
def test_any_width_is_rebuilt(walk: Walk, width: float, error: float) -> None:
    """Errors as shares of how far the average is from the last weights, over all weights."""
    folder, followed, last = walk
    found = rebuild(str(folder), width)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "w": (torch.float32, (300,)),
        "fixed": (torch.float32, (2, 3)),
    }
    distance = (followed[width] - last).square().mean().sqrt()
    assert (found["w"] - followed[width]).square().mean().sqrt() < error * distance
    assert torch.allclose(found["fixed"], torch.tensor(7.0), rtol=1e-6), "what stood still comes back as it was"


def test_the_widths_followed_come_back_to_the_last_bit(walk: Walk) -> None:
    folder, followed, _ = walk
    for width in TRACKS:
        assert torch.equal(rebuild(str(folder), width)["w"], followed[width])
        near = rebuild(str(folder), width * (1 + 1e-9))["w"]  # not the shortcut
        torch.testing.assert_close(near, followed[width], rtol=2e-7, atol=0)


def test_an_average_of_earlier_in_the_run(walk: Walk) -> None:
    folder, followed, _ = walk
    rng, weights = torch.Generator().manual_seed(0), {"w": torch.full((300,), 100.0)}
    ema = Ema(weights, power_decay(gamma_from_width(0.07)))
    for step in range(1, STEPS // 2 + 1):
        weights["w"] += torch.randn(300, generator=rng)
        ema.update(step)
    distance = (ema.averages[0] - weights["w"]).square().mean().sqrt()
    found = rebuild(str(folder), 0.07, step=STEPS // 2)["w"]
    assert (found - ema.averages[0]).square().mean().sqrt() < 5e-3 * distance
    assert (found - followed[0.07]).square().mean().sqrt() > distance


def test_a_coarse_rebuild_says_so(walk: Walk, caplog: pytest.LogCaptureFixture) -> None:
    folder, _, _ = walk
    with caplog.at_level(logging.WARNING):
        rebuild(str(folder), 0.07)
    assert not caplog.messages
    rebuild(str(folder), 0.02)
    (message,) = caplog.messages
    assert "width 0.02 at step 640" in message
    assert "12% off" in message
    assert "diffusion.snapshots" in message


@pytest.fixture
def own(walk: Walk, tmp_path: Path) -> Path:
    """A copy of the walk's folder to spoil."""
    (tmp_path / "ema").mkdir()
    for file in (walk[0] / "ema").iterdir():
        (tmp_path / "ema" / file.name).write_bytes(file.read_bytes())
    return tmp_path


def problem(kind: type[Problem], folder: Path, width: float = 0.07, step: int | None = None) -> str:
    with pytest.raises(kind) as caught:
        rebuild(str(folder), width, step)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_rebuilt_says_why(own: Path, tmp_path: Path) -> None:
    file = own / "ema" / "000000320-0.05.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert problem(DataError, own).startswith(f"{file} is damaged: ")
    rebuild(str(own), 0.1)  # does not need it
    rebuild(str(own), 0.07, step=280)
    file.write_bytes((own / "ema" / "000000320-0.1.safetensors").read_bytes().replace(b"fixed", b"other"))
    assert problem(DataError, own).startswith(f"{file} is damaged: its tensors are not those of the first snapshot")
    file.unlink()
    assert problem(DataError, own) == f"{file} is missing"
    for index in ("{}", '{"steps": [], "widths": [0.1]}', '{"steps": ["1"], "widths": [0.1]}', "["):
        (own / "ema" / "index.json").write_text(index)
        assert problem(DataError, own).startswith(f"{own / 'ema' / 'index.json'} is damaged: ")
    assert "diffusion.snapshots=16" in problem(ConfigError, tmp_path / "none")


def test_what_is_asked_wrongly_is_refused(walk: Walk) -> None:
    folder, _, _ = walk
    assert "step=300" in problem(ConfigError, folder, step=300)
    assert problem(ConfigError, folder, step=310).endswith("such as 320")
    for wrong in (0.0, 0.3, float("nan")):
        assert problem(ConfigError, folder, wrong).startswith(f"sigma_rel={wrong}")


def test_training_that_goes_on_removes_later_snapshots(own: Path) -> None:
    folder = own / "ema"
    half_written = folder / f"000000480-0.1.safetensors.{32 * 'a'}.partial"
    half_written.write_bytes(b"half")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    Snapshots(str(folder), snapshot_steps(STEPS, COUNT), "model.").start(320)
    left = {file.name: file.read_bytes() for file in folder.iterdir()}
    expected = [f"{40 * k:09d}-{width}.safetensors" for k in range(1, 9) for width in TRACKS]
    assert sorted(left) == sorted([*expected, "index.json"])
    assert left == {name: before[name] for name in left}
    assert json.loads(left["index.json"]) == {"steps": list(range(40, 641, 40)), "widths": list(TRACKS)}


def test_snapshots_in_a_bucket(s3: str) -> None:
    snapshots = Snapshots(f"{s3}/ema", [1, 2], "")
    snapshots.start(0)
    for step in snapshots.steps:
        for track in snapshots.tracks:
            snapshots.write(step, track, {"w": torch.full((3,), float(step))})
    assert torch.equal(rebuild(s3, 0.07)["w"], rebuild(s3, 0.07, step=2)["w"])
    snapshots.start(1)
    torch.testing.assert_close(rebuild(s3, 0.07, step=1)["w"], torch.ones(3))
    with pytest.raises(DataError, match=f"{s3}/ema/000000002-0.05.safetensors is missing"):
        rebuild(s3, 0.07)


@pytest.mark.parametrize(("config", "settings", "sampled", "tracks", "count"), [
    (None, [], "0.1", ["0.05", "0.1"], 16),
    (None, ["diffusion.ema=0.2", "diffusion.snapshots=4"], "0.2", ["0.05", "0.1", "0.2"], 4),
    (None, ["diffusion.ema=0.2", "diffusion.snapshots=0"], "0.2", ["0.2"], 0),
    ("configs/cifar10.yaml", [], "constant", ["constant"], 0),
    ("configs/cifar10.yaml", ["diffusion.snapshots=8"], "constant", ["0.05", "0.1", "constant"], 8),
])  # fmt: skip
def test_what_training_follows(
    config: str | None, settings: list[str], sampled: str, tracks: list[str], count: int
) -> None:
    section = load(config and str(Path(__file__).parents[1] / config), settings).diffusion
    name, decays = tracks_of(section)
    assert (name, list(decays), section.snapshot_count) == (sampled, tracks, count)
    for track, decay in decays.items():
        expected = 0.9999 if track == "constant" else power_decay(gamma_from_width(float(track)))(7)
        assert decay(7) == expected
