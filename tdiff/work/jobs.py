"""What can be drawn from a run: options, and the run's config where they say nothing, made into a job.

All that can be known to be wrong is told here, before anything is drawn.
"""

from __future__ import annotations

import math
from typing import Any

from tdiff import storage
from tdiff.config import Config
from tdiff.diffusion.condition import CLUSTERS
from tdiff.diffusion.samplers import GRIDS, SAMPLERS, STARTS, check_eta
from tdiff.errors import ConfigError
from tdiff.runs import Run
from tdiff.work.growing import load_topology
from tdiff.work.sampling import MODELS, MODES, SampleJob, load_spec
from tdiff.work.snapshots import recipe

Settings = dict[str, Any]

KNOWN = {"mode": MODES, "model": MODELS, "sampler": SAMPLERS, "grid": GRIDS, "start": STARTS}


def sample_job(run: Run, name: str, of_test_images: bool = True, **settings: Any) -> SampleJob:
    """A job into RUN/samples/NAME, by the run's config where `settings` say nothing. Raises ConfigError.

    of_test_images: whether what is reconstructed, if anything is, are the run's test images.
    """
    config, record = run.config(), run.record()
    tree_url, diffusion_url = run.grown_tree, run.at("diffusion")
    if settings.get("model") != "treevae" and not storage.finished(diffusion_url):
        raise ConfigError(
            f"RUN {run.url} has no diffusion model yet: finish it with python -m tdiff.train, or take model=treevae."
        )
    for key, known in KNOWN.items():
        if settings.get(key) not in (None, *known):
            raise ConfigError(f"{key}={settings[key]} is not known: take one of {', '.join(known)}.")
    topology = load_topology(tree_url)
    drawn_by = ("steps", "sampler", "eta", "grid", "start", "guidance", "guidance_interval", "ema")
    defaults: Settings = {
        "mode": "sample",
        "model": "treediffusion",
        "num": config.samples.per_leaf,
        "seed": config.seed,
        "leaf": None,
        "node": None,
        **{key: getattr(config.samples, key) for key in drawn_by},
    }
    chosen = defaults | {key: value for key, value in settings.items() if value is not None}
    _check_effect(chosen, {key: settings[key] for key in drawn_by if settings.get(key) is not None})
    if settings.get("eta") is None and chosen["sampler"] != "ddim":
        chosen["eta"] = 0.0  # the run's own is of its own sampler
    node, leaf = chosen["node"], chosen["leaf"]
    if node is not None and node not in topology:
        there = ", ".join(str(known.id) for known in topology.nodes)
        raise ConfigError(f"node={node} does not exist: the tree of RUN {run.url} has nodes {there}.")
    if node is not None and leaf is not None:
        raise ConfigError(f"leaf={leaf} and node={node} exclude each other: leave one of them out.")
    leaves = len(topology.leaves if node is None else topology.leaves_below(node))
    # Few images are one smaller shard: what a shard computes beyond them would be thrown away.
    per_draw = leaves if str(chosen["mode"]).endswith("all-leaves") else 1
    chosen.setdefault("batch", max(1, min(config.samples.batch, int(chosen["num"]) * per_draw)))
    if leaf is not None and not 0 <= leaf < leaves:
        raise ConfigError(f"leaf={leaf} does not exist: RUN {run.url} has leaves 0 to {leaves - 1}.")
    if leaf is not None and chosen["mode"].endswith("all-leaves"):
        raise ConfigError(f"leaf={leaf} has no effect with mode={chosen['mode']}: leave one of them out.")
    if chosen["model"] == "treediffusion":
        _check_denoising(config, diffusion_url, chosen)
    for key in ("num", "batch"):
        if chosen[key] < 1:
            raise ConfigError(f"{key}={chosen[key]} cannot be used: take 1 or more.")
    data_url = record["data_url"]
    if of_test_images and chosen["mode"].startswith("reconstruct"):
        splits = run.manifest()
        count = splits.samples("test") if "test" in splits.splits else 0
        if chosen["num"] > count:
            raise ConfigError(f"num={chosen['num']} is more than the {count} test images: take at most {count}.")
    return SampleJob(
        url=run.at("samples", name),
        tree_url=tree_url,
        diffusion_url=diffusion_url,
        data_url=data_url,
        bf16=record["bf16"],
        leaves=leaves,
        max_bad_samples=config.data.max_bad_samples,
        **chosen,
    )


def _check_effect(chosen: Settings, given: Settings) -> None:
    """Raises ConfigError where something is given of how to denoise that changes nothing."""
    if chosen["model"] == "treevae" and given:
        raise ConfigError(f"{min(given)}={given[min(given)]} has no effect with model=treevae: leave it out.")
    if "guidance_interval" in given and not chosen["guidance"]:
        raise ConfigError("guidance_interval has no effect with guidance=0: give guidance a weight, or leave it out.")


def _check_denoising(config: Config, diffusion_url: str, chosen: Settings) -> None:
    """Raises ConfigError if the diffusion model cannot be asked to denoise so; settles which EMA draws."""
    spec = load_spec(diffusion_url)
    steps, most = chosen["steps"], spec.timesteps
    if spec.objective == "edm" and chosen["grid"] != "karras":
        raise ConfigError(f"grid={chosen['grid']} is one of time steps, and this model has noise levels: take karras.")
    if steps < 2 or (spec.objective != "edm" and steps > most):
        raise ConfigError(f"steps={steps} cannot be used: take from 2 to the schedule's {most}.")
    try:
        check_eta(chosen["sampler"], chosen["eta"])
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    if not 0 <= chosen["guidance"] < math.inf:
        raise ConfigError(f"guidance={chosen['guidance']} cannot be used: take 0 or more.")
    if chosen["guidance"] and not spec.null:
        raise ConfigError(
            f"guidance={chosen['guidance']:g} needs a model that was sometimes told nothing: train one with "
            "diffusion.condition_dropout=0.1."
        )
    if spec.condition in CLUSTERS:
        asked = [f"{key}={chosen[key]}" for key in ("leaf", "node") if chosen[key] is not None]
        asked += [f"mode={chosen['mode']}"] if chosen["mode"].endswith("all-leaves") else []
        if asked:
            raise ConfigError(
                f"{asked[0]} asks for leaves, and the model of diffusion.condition={spec.condition} knows none: leave "
                "it out, or take model=treevae."
            )
    if (interval := chosen["guidance_interval"]) and not 0 <= interval[0] <= interval[1]:
        raise ConfigError(f"guidance_interval={list(interval)} must be two rising noise levels of at least 0.")
    if chosen["ema"] == config.diffusion.ema and config.diffusion.ema_decay is None:
        chosen["ema"] = None  # which is the one in ema.safetensors
    if chosen["ema"] is not None:
        recipe(diffusion_url, chosen["ema"])
