"""Figures with matplotlib, an optional dependency, written atomically as PNG."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.common.output_paths import MAKER, writing_output
from data_pipeline.common.packages import require_package
from data_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT_COLOR = "#333333"
GRID_COLOR = "#dddddd"
_DOTS_PER_INCH = 150
_OTHER_FORMATS = frozenset(
    (".pdf", ".svg", ".eps", ".ps", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff")
)


def require_matplotlib(what: str, otherwise: str = "") -> None:
    """Raises BackendError when matplotlib, which `what` needs, is not installed.

    `otherwise`: an alternative, appended to the message.
    """
    require_package("matplotlib", what, "'megaback[plot]'", otherwise)


def require_png(path: Path) -> None:
    """Raises ConfigError for the suffix of another format of pictures."""
    if path.suffix.lower() in _OTHER_FORMATS:
        raise ConfigError(
            f"{path} cannot be written: pictures are PNG files; give {path.with_suffix('.png')}"
        )


def new_figure(width_inches: float, height_inches: float) -> "Figure":
    """An empty figure."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which keeps figures in a global list and may open a display.
    mpl.rcParams["text.parse_math"] = False  # names of runs and data sets are not formulas
    figure = Figure(figsize=(width_inches, height_inches), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: "Figure") -> bytes:
    """The figure as PNG; deterministic."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": MAKER})
    return picture.getvalue()


def write_picture(figure: "Figure", path: Path, *, overwrite: bool) -> None:
    """Write a PNG as `writing_output` does. Raises OSError, OutputExistsError."""
    picture = png_of(figure)
    with writing_output(path, overwrite=overwrite) as file:
        file.write(picture)
