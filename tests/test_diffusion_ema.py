"""Protects the moving averages: their formulas, the profile of the power function, saving and loading."""

from __future__ import annotations

import pytest
import torch

from tdiff.diffusion.ema import Ema, constant_decay, gamma_from_width, power_decay, relative_width

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
