"""Protects the noise schedule, what each objective asks and means, the draw of times, and the loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tdiff.diffusion.process import OBJECTIVES, Edm, Process, VariancePreserving, make_process

torch.set_num_threads(1)

NOISE, V, EDM = VariancePreserving(), VariancePreserving(objective="v"), Edm()


def image_of(process: Process, x_t: torch.Tensor, t: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The image that an answer at x_t means: (x_t - sigma_t noise) / signal_t."""
    signal, sigma = process.signal_sigma(t)
    return (x_t - sigma * process.to_noise(x_t, t, output)) / signal


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_times(process: Process) -> torch.Tensor:
    return torch.tensor([0.002, 0.1, 2.0, 80.0] if isinstance(process, Edm) else [0, 10, 400, 999])


# --- the process in whole steps ----------------------------------------------------------------------


def test_alphas_bar_against_float64() -> None:
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    assert NOISE.alphas_bar.dtype == torch.float32
    np.testing.assert_array_equal(NOISE.alphas_bar.numpy(), expected.astype(np.float32))
    np.testing.assert_allclose([NOISE.alpha_bar(t) for t in range(1000)], expected, rtol=1e-13)
    assert NOISE.alpha_bar(0) == 1 - 1e-4
    np.testing.assert_allclose([NOISE.level(t) ** 2 for t in range(1000)], (1 - expected) / expected, rtol=1e-10)


def test_sigma_is_exact_where_float32_cancels() -> None:
    signal, sigma = NOISE.signal_sigma(torch.tensor([0, 999]))
    assert signal.shape == (2, 1, 1, 1)
    assert sigma[0].item() == pytest.approx(0.01, rel=1e-7)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones_like(signal))


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    process, t = VariancePreserving(steps=10, objective="v"), torch.tensor([3])
    with torch.inference_mode():
        process.signal_sigma(t)
    output = torch.ones(1, 1, 2, 2, requires_grad=True)
    process.to_noise(torch.ones(1, 1, 2, 2), t, output).sum().backward()
    assert output.grad is not None


@pytest.mark.parametrize(("process", "times"), [(NOISE, (0, 300, 999)), (EDM, (0.002, 0.5, 80.0))])
def test_q_sample_has_the_moments_of_the_forward_process(process: Process, times: tuple[float, ...]) -> None:
    noise, x0 = draws(0, 20000, 1, 1, 2), torch.tensor([0.5, -1.0]).expand(20000, 1, 1, 2)
    for t in times:
        x_t = process.q_sample(x0, torch.full((20000,), t), noise)
        bar = process.alpha_bar(t)
        torch.testing.assert_close(x_t.mean((0, 1, 2)), bar**0.5 * x0[0, 0, 0], rtol=0, atol=4 / 20000**0.5)
        torch.testing.assert_close(x_t.var((0, 1, 2)), torch.full((2,), 1 - bar), rtol=0.04, atol=0)


@pytest.mark.parametrize("arguments", [{"steps": 1}, {"beta_first": 0.0}, {"beta_first": 0.5}, {"beta_last": 1.0}])
def test_what_is_no_schedule_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"steps is|beta runs"):
        VariancePreserving(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [-1, 1000, 0.5, 3.0])
def test_what_is_no_step_is_refused(t: float) -> None:
    with pytest.raises(ValueError, match=rf"t is {t}, but the steps"):
        NOISE.alpha_bar(t)


@pytest.mark.parametrize("level", [0.002, 0.3, 80.0])
def test_the_times_of_edm_are_levels(level: float) -> None:
    assert EDM.level(level) == EDM.time_at(level) == level
    assert EDM.alpha_bar(level) == pytest.approx(1 / (1 + level**2), rel=1e-15)


def test_the_nearest_step_of_a_level() -> None:
    assert all(NOISE.time_at(NOISE.level(t)) == t for t in range(1000))
    assert NOISE.time_at(0.99 * NOISE.level(500) + 0.01 * NOISE.level(501)) == 500
    assert NOISE.time_at(1e-9) == 0
    assert NOISE.time_at(1e9) == 999
    assert NOISE.levels == (NOISE.level(0), NOISE.level(999))


# --- EDM ---------------------------------------------------------------------------------------------


def preconditioned(output: torch.Tensor, x: torch.Tensor, level: float, d: float = 0.5) -> torch.Tensor:
    """D(x; level) as Karras et al. write it: equation 7, table 1, x = x_0 + level * noise."""
    skip, out = d**2 / (level**2 + d**2), level * d / (level**2 + d**2) ** 0.5
    return skip * x + out * output


@pytest.mark.parametrize("level", [0.002, 0.3, 5.0, 80.0])
def test_edm_in_its_papers_coordinates(level: float) -> None:
    x0, noise, output = draws(1, 2, 1, 3, 3).double(), draws(2, 2, 1, 3, 3).double(), draws(3, 2, 1, 3, 3).double()
    t = torch.full((2,), level, dtype=torch.float64)
    x_t, x = EDM.q_sample(x0, t, noise), x0 + level * noise
    torch.testing.assert_close(x_t * (1 + level**2) ** 0.5, x)
    told, label = EDM.network_input(x_t, t)
    torch.testing.assert_close(told, x / (level**2 + 0.25) ** 0.5)
    torch.testing.assert_close(label, torch.full_like(t, 1000 * math.log(level) / 4))
    denoised = preconditioned(output, x, level)
    torch.testing.assert_close(image_of(EDM, x_t, t, output), denoised)
    torch.testing.assert_close(EDM.to_noise(x_t, t, output), (x - denoised) / level, rtol=1e-6, atol=1e-9)
    # Its loss is lambda |D - x_0|², lambda = (s² + d²) / (s d)² (equation 8 and table 1).
    expected = (level**2 + 0.25) / (level * 0.5) ** 2 * (denoised - x0).square().mean((1, 2, 3))
    loss = EDM.loss(lambda x, t: output, x0, t, noise).per_sample.double()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("level", [0.002, 0.1, 0.5, 2.0, 80.0])
def test_edm_gives_the_network_inputs_and_targets_of_variance_one(level: float) -> None:
    process = Edm(sigma_data=0.3)
    x0, noise, t = 0.3 * draws(4, 20000, 1, 1, 1), draws(5, 20000, 1, 1, 1), torch.full((20000,), level)
    told, _ = process.network_input(process.q_sample(x0, t, noise), t)
    for values in (told, process.target(x0, t, noise)):
        assert values.var().item() == pytest.approx(1, abs=0.04)  # 4 standard errors


def test_edm_with_unit_data_is_v_up_to_its_sign() -> None:
    t = torch.tensor([250])
    x0, noise, level = draws(1, 1, 1, 2, 2), draws(2, 1, 1, 2, 2), torch.tensor([V.level(250)])
    torch.testing.assert_close(Edm(sigma_data=1.0).target(x0, level, noise), -V.target(x0, t, noise))


@pytest.mark.parametrize(
    "arguments", [{"sigma_data": 0}, {"std": -1}, {"level_min": 0}, {"level_min": 90}, {"sigma_data": math.nan}]
)
def test_what_is_no_edm_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"is 0, but|is -1, but|is nan, but|levels run"):
        Edm(**arguments)


@pytest.mark.parametrize("t", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_level_is_refused(t: float) -> None:
    with pytest.raises(ValueError, match="noise levels above 0"):
        EDM.alpha_bar(t)


# --- what every objective keeps ----------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_right_answer_gives_back_noise_and_image(objective: str) -> None:
    process = make_process(objective, 1000)  # type: ignore[arg-type]
    x0, noise, t = draws(1, 4, 2, 3, 3), draws(2, 4, 2, 3, 3), some_times(process)
    x_t, answer = process.q_sample(x0, t, noise), process.target(x0, t, noise)
    torch.testing.assert_close(process.to_noise(x_t, t, answer), noise, rtol=1e-4, atol=1e-4)
    # At t = 999 the image is 0.6% of x_t, and float32 keeps that much less of it.
    torch.testing.assert_close(image_of(process, x_t, t, answer), x0, rtol=1e-3, atol=1e-3)
    assert process.loss(lambda x, t: answer, x0, t, noise).mean.item() == 0


def test_v_against_its_formula() -> None:
    x0, noise, t = draws(1, 1, 1, 2, 2), draws(2, 1, 1, 2, 2), torch.tensor([250])
    bar = V.alpha_bar(250)
    torch.testing.assert_close(V.target(x0, t, noise), bar**0.5 * noise - (1 - bar) ** 0.5 * x0)


@pytest.mark.parametrize("process", [NOISE, V, EDM])
def test_a_network_is_asked_in_sampling_what_it_is_asked_in_training(process: Process) -> None:
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        asked.append((x, label))
        return x.bfloat16()

    x0, noise, t = draws(1, 3, 1, 4, 4), draws(2, 3, 1, 4, 4), some_times(process)[2].expand(3)
    process.loss(network, x0, t, noise)
    x_t = process.q_sample(x0, t, noise)
    eps = process.predictor(network)(x_t, t[0].item())
    assert eps.dtype == torch.float32
    assert torch.equal(eps, process.to_noise(x_t, t, asked[0][0].bfloat16().float()))
    for trained, sampled in zip(*asked, strict=True):
        assert torch.equal(trained, sampled)
        assert trained.dtype == sampled.dtype


# --- the loss ----------------------------------------------------------------------------------------


def test_loss_per_sample_is_the_mean_over_pixels() -> None:
    x0, noise, t = draws(1, 3, 1, 4, 4), draws(2, 3, 1, 4, 4), torch.tensor([1, 2, 3])
    seen = []

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x_t, t))
        return torch.zeros_like(x_t, dtype=torch.bfloat16)

    loss = NOISE.loss(network, x0, t, noise)
    torch.testing.assert_close(loss.per_sample, torch.stack([n.square().mean() for n in noise]))
    torch.testing.assert_close(loss.mean, loss.per_sample.mean())
    assert torch.equal(seen[0][0], NOISE.q_sample(x0, t, noise))
    assert torch.equal(seen[0][1], t)


@pytest.mark.parametrize("process", [NOISE, V, EDM])
def test_a_network_that_knows_nothing_loses_one(process: Process) -> None:
    # All three targets have variance 1 when the data has the spread that the objective expects.
    std = 0.5 if process is EDM else 1.0
    rng = torch.Generator().manual_seed(0)
    x0, noise = std * draws(6, 4000, 1, 2, 2), draws(7, 4000, 1, 2, 2)
    loss = process.loss(lambda x, t: torch.zeros_like(x), x0, process.draw_times(4000, rng), noise)
    assert loss.mean.item() == pytest.approx(1, abs=4 * (2 / 16000) ** 0.5)


@pytest.mark.parametrize("objective", ["noise", "v"])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_the_image_by_the_capped_ratio(objective: str, gamma: float) -> None:
    plain = VariancePreserving(objective=objective)  # type: ignore[arg-type]
    weighted = VariancePreserving(objective=objective, min_snr=gamma)  # type: ignore[arg-type]
    t = torch.arange(1000)
    snr = np.array([NOISE.alpha_bar(k) / (1 - NOISE.alpha_bar(k)) for k in range(1000)])
    expected = np.minimum(snr, gamma) / (snr if objective == "noise" else snr + 1)
    weights = weighted.weight(t)
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)
    assert plain.weight(t) is None

    # The same loss, seen as an error of the image: min(SNR, gamma) |x0_hat - x0|².
    x0, noise, output = (draws(seed, 3, 1, 2, 2) for seed in (1, 2, 3))
    t = torch.tensor([50, 300, 700])
    loss = weighted.loss(lambda x, t: output, x0, t, noise)
    image = image_of(weighted, weighted.q_sample(x0, t, noise), t, output)
    capped = torch.tensor(np.minimum(snr, gamma)[t.numpy()])
    torch.testing.assert_close(
        loss.per_sample.double(), capped * (image - x0).double().square().mean((1, 2, 3)), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(loss.mean, loss.per_sample.mean())


@pytest.mark.parametrize("objective", ["noise", "v"])
def test_the_expected_loss_with_min_snr(objective: str) -> None:
    process = VariancePreserving(objective=objective, min_snr=5.0)  # type: ignore[arg-type]
    x0, noise = draws(6, 4000, 1, 2, 2), draws(7, 4000, 1, 2, 2)
    t = process.draw_times(4000, torch.Generator().manual_seed(1))
    loss = process.loss(lambda x, t: torch.zeros_like(x), x0, t, noise).mean.item()
    snr = np.array([process.alpha_bar(k) / (1 - process.alpha_bar(k)) for k in range(1000)])
    expected = (np.minimum(snr, 5) / (snr if objective == "noise" else snr + 1)).mean()
    assert loss == pytest.approx(expected, abs=4 * (2 / 16000) ** 0.5)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_a_gamma_that_is_none_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="min_snr is"):
        make_process("noise", 1000, gamma)


def test_what_make_process_makes() -> None:
    assert make_process("noise", 20) == VariancePreserving(20)
    assert make_process("v", 20, 5.0) == VariancePreserving(20, objective="v", min_snr=5.0)
    assert make_process("edm", 20) == Edm()
    with pytest.raises(ValueError, match=r"min_snr is 5\.0, but objective 'edm'"):
        make_process("edm", 20, 5.0)
    with pytest.raises(ValueError, match="objective is 'x0'"):
        make_process("x0", 20)  # type: ignore[arg-type]


# --- the draw of times -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 64, 3000])
def test_steps_fall_one_in_each_stratum(count: int) -> None:
    t = NOISE.draw_times(count, torch.Generator().manual_seed(count))
    assert t.dtype == torch.int64
    assert t.min() >= 0
    assert t.max() <= 999
    low = torch.arange(count) * 1000 / count
    ordered = t.sort().values
    assert (ordered >= low.floor()).all()
    assert (ordered < low + 1000 / count).all()


def test_steps_of_each_sample_are_uniform() -> None:
    rng, process = torch.Generator().manual_seed(0), VariancePreserving(steps=10)
    first = torch.stack([process.draw_times(4, rng) for _ in range(5000)])
    counts = torch.stack([row.bincount(minlength=10) for row in first.T]).float()
    # 500 expected in each cell, with a standard deviation of 21.
    assert (counts - 500).abs().max() < 100


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_levels_fall_one_in_each_part_of_the_lognormal(count: int) -> None:
    t = EDM.draw_times(count, torch.Generator().manual_seed(count))
    assert t.dtype == torch.float32
    normal = (t.double().log() + 1.2) / 1.2
    quantile = torch.special.ndtr(normal).sort().values * count
    assert (quantile > torch.arange(count) - 1e-3).all()
    assert (quantile < torch.arange(count) + 1 + 1e-3).all()


def test_levels_of_each_sample_are_lognormal() -> None:
    rng = torch.Generator().manual_seed(0)
    logs = torch.stack([EDM.draw_times(4, rng) for _ in range(5000)]).log()
    torch.testing.assert_close(logs.mean(0), torch.full((4,), -1.2), rtol=0, atol=4 * 1.2 / 5000**0.5)
    torch.testing.assert_close(logs.std(0), torch.full((4,), 1.2), rtol=0.04, atol=0)


@pytest.mark.parametrize("process", [NOISE, EDM])
def test_times_repeat_with_their_seed(process: Process) -> None:
    a, b, c = (process.draw_times(16, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
