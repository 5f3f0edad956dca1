"""How long the forms of one op take: each as a CUDA graph, replayed in turns, so that a slow moment meets them all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from deitfast.cuda_graph import capture

ROUNDS = 5
ROUND_MS = 10.0
"""What a round of one form should take; the first round, of one replay, tells how many replays that is."""


def milliseconds(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds a call, by name, in every round. The graphs share their memory, so their results are nothing."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: capture(call, device=device, pool=pool)[0] for name, call in calls.items()}
    replays = {name: max(1, min(200, int(ROUND_MS / max(_round(graph, 1), 1e-3)))) for name, graph in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(_round(graph, replays[name]))
    for graph in graphs.values():
        graph.reset()
    return times


def fastest(times: Mapping[str, list[float]], first: str) -> str:
    """The form with the least median, if it beats that of `first` by more than the rounds of either differ."""
    best = min(times, key=lambda name: statistics.median(times[name]))
    gain = statistics.median(times[first]) - statistics.median(times[best])
    noise = max(max(times[name]) - min(times[name]) for name in (best, first))
    return best if gain > noise else first


def _round(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / replays
