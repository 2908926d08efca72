"""Protects the noise schedule, the conversions between objectives, the draw of steps and the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdiff.diffusion.process import OBJECTIVES, Schedule, denoising_loss, stratified_steps

torch.set_num_threads(1)

SCHEDULE = Schedule()


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_alphas_bar_against_float64() -> None:
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    assert SCHEDULE.alphas_bar.dtype == torch.float32
    np.testing.assert_array_equal(SCHEDULE.alphas_bar.numpy(), expected.astype(np.float32))
    np.testing.assert_allclose([SCHEDULE.alpha_bar(t) for t in range(1000)], expected, rtol=1e-13)
    assert SCHEDULE.alpha_bar(0) == 1 - 1e-4


def test_sigma_is_exact_where_float32_cancels() -> None:
    signal, sigma = SCHEDULE.signal_sigma(torch.tensor([0, 999]))
    assert signal.shape == (2, 1, 1, 1)
    assert sigma[0].item() == pytest.approx(0.01, rel=1e-7)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones_like(signal))


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    schedule, t = Schedule(steps=10), torch.tensor([3])
    with torch.inference_mode():
        schedule.signal_sigma(t)
    output = torch.ones(1, 1, 2, 2, requires_grad=True)
    schedule.to_noise("v", torch.ones(1, 1, 2, 2), t, output).sum().backward()
    assert output.grad is not None


def test_q_sample_has_the_moments_of_the_forward_process() -> None:
    noise, x0 = draws(0, 20000, 1, 1, 2), torch.tensor([0.5, -1.0]).expand(20000, 1, 1, 2)
    for t in (0, 300, 999):
        x_t = SCHEDULE.q_sample(x0, torch.full((20000,), t), noise)
        bar = SCHEDULE.alpha_bar(t)
        torch.testing.assert_close(x_t.mean((0, 1, 2)), bar**0.5 * x0[0, 0, 0], rtol=0, atol=4 / 20000**0.5)
        torch.testing.assert_close(x_t.var((0, 1, 2)), torch.full((2,), 1 - bar), rtol=0.04, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_right_answer_gives_back_noise_and_image(objective: str) -> None:
    x0, noise, t = draws(1, 4, 2, 3, 3), draws(2, 4, 2, 3, 3), torch.tensor([0, 10, 400, 999])
    x_t, answer = SCHEDULE.q_sample(x0, t, noise), SCHEDULE.target(objective, x0, t, noise)
    torch.testing.assert_close(SCHEDULE.to_noise(objective, x_t, t, answer), noise, rtol=1e-4, atol=1e-4)
    # At t = 999 the image is 0.6% of x_t, and float32 keeps that much less of it.
    torch.testing.assert_close(SCHEDULE.to_x0(objective, x_t, t, answer), x0, rtol=1e-3, atol=1e-3)
    assert denoising_loss(lambda x, t: answer, SCHEDULE, x0, t, noise, objective).mean.item() == 0


def test_v_against_its_formula() -> None:
    x0, noise, t = draws(1, 1, 1, 2, 2), draws(2, 1, 1, 2, 2), torch.tensor([250])
    bar = SCHEDULE.alpha_bar(250)
    torch.testing.assert_close(SCHEDULE.target("v", x0, t, noise), bar**0.5 * noise - (1 - bar) ** 0.5 * x0)


def test_loss_per_sample_is_the_mean_over_pixels() -> None:
    x0, noise, t = draws(1, 3, 1, 4, 4), draws(2, 3, 1, 4, 4), torch.tensor([1, 2, 3])
    seen = []

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x_t, t))
        return torch.zeros_like(x_t, dtype=torch.bfloat16)

    loss = denoising_loss(predict, SCHEDULE, x0, t, noise)
    torch.testing.assert_close(loss.per_sample, torch.stack([n.square().mean() for n in noise]))
    torch.testing.assert_close(loss.mean, loss.per_sample.mean())
    assert torch.equal(seen[0][0], SCHEDULE.q_sample(x0, t, noise))
    assert torch.equal(seen[0][1], t)


@pytest.mark.parametrize("count", [1, 7, 64, 3000])
def test_steps_fall_one_in_each_stratum(count: int) -> None:
    t = stratified_steps(count, 1000, torch.Generator().manual_seed(count))
    assert t.dtype == torch.int64
    assert t.min() >= 0
    assert t.max() <= 999
    low = torch.arange(count) * 1000 / count
    ordered = t.sort().values
    assert (ordered >= low.floor()).all()
    assert (ordered < low + 1000 / count).all()


def test_steps_of_each_sample_are_uniform() -> None:
    rng = torch.Generator().manual_seed(0)
    first = torch.stack([stratified_steps(4, 10, rng) for _ in range(5000)])
    counts = torch.stack([row.bincount(minlength=10) for row in first.T]).float()
    # 500 expected in each cell, with a standard deviation of 21.
    assert (counts - 500).abs().max() < 100


def test_steps_repeat_with_their_seed() -> None:
    a, b, c = (stratified_steps(16, 1000, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("arguments", [{"steps": 1}, {"beta_first": 0.0}, {"beta_first": 0.5}, {"beta_last": 1.0}])
def test_what_is_no_schedule_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"steps is|beta runs"):
        Schedule(**arguments)  # type: ignore[arg-type]
