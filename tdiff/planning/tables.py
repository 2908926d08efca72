"""A plan as tables."""

from __future__ import annotations

from collections.abc import Sequence

from tdiff.planning.expected import Plan

Rows = Sequence[Sequence[str]]


def tables(plan: Plan, zero: int) -> list[tuple[str, Rows]]:
    """Titled tables, each with its header first. zero: the ZeRO stage that the config names."""
    machines, data = plan.machines, plan.data
    shape = "x".join(map(str, data.shape))
    header = ("stage", "parameters", "MFLOP/image", "images", "steps", "workers", "images/s", "hours", "$")
    rows = [
        (
            row.name,
            f"{row.parameters:,}" if row.parameters else "",
            f"{row.flops / 1e6:,.1f}" if row.flops else "",
            f"{row.images:,}" if row.images else "",
            f"{row.steps:,}" if row.steps else "",
            str(row.workers),
            f"{row.rate:,.0f}" if row.images else "",
            f"{row.seconds / 3600:,.3f}",
            f"{row.seconds / 3600 * machines.workers * machines.price:,.2f}",
        )
        for row in plan.rows
    ]
    rows.append(("all", "", "", "", "", str(machines.workers), "", f"{plan.hours:,.3f}", f"{plan.cost:,.2f}"))
    title = (
        f"{data.images:,} images of {shape} on {machines.workers} x {machines.name} at ${machines.price:g} an hour each"
    )
    room = machines.kind.memory
    memory = [
        (
            held.stage + (" (as configured)" if held.stage == "diffusion" and held.zero == zero else ""),
            str(held.zero),
            *(f"{size / 1e9:,.2f}" for size in (held.states, held.transient, held.activations)),
            f"{held.total / 1e9:,.2f}",
            f"{held.total / 1e9 / room:.0%}",
        )
        for held in plan.memory
    ]
    of_memory = ("stage", "ZeRO", "states", "transient", "activations", "all", f"of {room:g}")
    traffic = [
        (
            row.name,
            f"{row.computing * 1e3:,.1f}",
            f"{row.sent / 1e6:,.1f}",
            f"{row.sent / (0.1 * row.computing) / 1e9:,.2f}" if row.sent else "",
            f"{row.read / 1e6:,.1f}",
            f"{row.requests:,.2f}",
            f"{row.checkpoint / 1e9:,.2f}",
            f"{row.checkpoint / 1e9 / machines.storage:,.1f}",
            f"{row.points / row.seconds:,.2f}" if row.seconds else "",
        )
        for row in plan.rows
        if row.steps
    ]
    of_traffic = (
        "stage",
        "ms/step",
        "MB sent/step",
        "GB/s for 10%",
        "MB read/s",
        "GET/s",
        "GB saved",
        "s",
        "metrics/s",
    )
    host = [(name, f"{size / 1e9:,.2f}") for name, size in plan.host.items()]
    host.append(("all", f"{sum(plan.host.values()) / 1e9:,.2f} of {machines.memory:,.0f}"))
    return [
        (title, [header, *rows]),
        ("GB on a worker", [of_memory, *memory]),
        ("network, storage, tracking, where no cache holds the images", [of_traffic, *traffic]),
        *([("GB in a node's memory, while the tree grows", [("what", "GB"), *host])] if plan.host else []),
    ]
