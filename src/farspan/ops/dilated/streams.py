"""Independent calls side by side on several streams: a short one does not fill the device by itself."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]], device: torch.device, lanes: int) -> list[T]:
    """Makes the calls on so many streams, the current one first; it waits for the others.

    Results belong to the streams that made them: `release` has to come before they go.
    """
    if device.type != "cuda" or lanes == 1:
        return [call() for call in calls]
    current = torch.cuda.current_stream(device)
    streams = [current, *_sides(device, lanes)]
    for side in streams[1:]:
        side.wait_stream(current)
    results = []
    for index, call in enumerate(calls):
        with torch.cuda.stream(streams[index % lanes]):
            results.append(call())
    for side in streams[1:]:
        current.wait_stream(side)
    return results


def release(device: torch.device, lanes: int) -> None:
    """Lets the other streams wait until the current one has read their results, which may go then.

    A graph that is being captured has memory of its own, in which only `side_by_side` takes what has gone, after it has
    waited.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        for side in _sides(device, lanes):
            side.wait_stream(torch.cuda.current_stream(device))


@functools.cache
def _sides(device: torch.device, lanes: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(lanes - 1)]
