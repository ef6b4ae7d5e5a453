"""A picture of the losses: each step, their running mean, and the validation's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..storage import whole_file

SIZE, MARGIN = (960, 480), 48
STEP, MEAN, VALIDATION = (190, 205, 220), (11, 110, 153), (200, 80, 30)
WINDOW = 0.05  # of all steps, for the running mean


def plot_losses(path: Path, losses: Sequence[float], validation: Sequence[tuple[int, float]] = ()) -> None:
    """Write a PNG: the loss of every step (light), its running mean, and (step, loss) of the validation (orange)."""
    if not losses:
        return
    window = max(1, round(len(losses) * WINDOW))
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    mean = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(losses))]
    highest = max([*mean[min(window, len(mean) - 1) :], *(loss for _, loss in validation)]) * 1.3 or 1.0
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)

    def at(step: float, loss: float) -> tuple[float, float]:
        across = MARGIN + step / max(1, len(losses) - 1) * (SIZE[0] - 2 * MARGIN)
        return across, SIZE[1] - MARGIN - min(1.0, loss / highest) * (SIZE[1] - 2 * MARGIN)

    def line(points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: int) -> None:
        draw.line([at(*point) for point in points], colour, width) if len(points) > 1 else draw.point(
            at(*points[0]), colour
        )

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        left, height = at(0, share * highest)
        draw.line([(left, height), (SIZE[0] - MARGIN, height)], (230, 230, 230))
        draw.text((4, height - 6), f"{share * highest:.3g}", "black")
    line(list(enumerate(losses)), STEP, 1)
    line(list(enumerate(mean)), MEAN, 3)
    if validation:
        line([(step - 1, loss) for step, loss in validation], VALIDATION, 2)
    draw.text(
        (MARGIN, SIZE[1] - MARGIN + 12),
        f"loss of {len(losses)} steps; light: each, blue: mean of {window}, orange: validation",
        "black",
    )
    with whole_file(path) as temporary:
        image.save(temporary, "PNG")
