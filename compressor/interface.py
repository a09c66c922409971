"""The whole job from Python: `compress` with keywords like the command's options, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.cli.options import RECIPE_OPTIONS
from compressor.quiet import quiet_libraries
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from supernet.common.errors import RequestError, unknown
from supernet.common.files import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Result:
    """A run that has a report. `report` is what report.json holds."""

    def __init__(self, run: str | Path) -> None:
        """Opens a run of this process or an earlier one. Raises `RequestError` where it has no report."""
        self.run = Path(run)
        file = self.run / "report.json"
        if not file.is_file():
            raise RequestError(f"{self.run}: no report yet; compress, or run compressor report")
        self.report: dict[str, Any] = read_json(file)

    @property
    def front(self) -> list[dict[str, Any]]:
        """The Pareto front: a dictionary for each sub-network, the smallest first, with its `key`, `params`, `quality`
        on the search documents, `decode_tps` (tokens per second, computed from timings) and `architecture`."""
        return sorted(self.report["front"], key=lambda row: row["params"])

    @property
    def packages(self) -> dict[str, Path]:
        """The folders of the packages by name, those of the base in few bits among them."""
        rows = [*self.report["packages"], *self.report.get("quantized_base", [])]  # earlier versions had none
        return {row["name"]: self.run / row["path"] for row in rows}

    def load(self, name: str = "best") -> Any:
        """A package's network for transformers, on the CPU, in the dtype that it is stored in. The code file of an
        uneven package runs only where it is what this version writes. Raises `RequestError` for a package that there
        is not, or that transformers does not load."""
        folder = self._folder(name)
        with quiet_libraries():
            from compressor.stages.measuring import LOADABLE
            from export.package_record import read_record
            from supernet.loading import load_network
            from supernet.trust import check_code

            layout = read_record(folder).entry.layout
            if layout not in LOADABLE:
                raise RequestError(f"{folder}: transformers does not load the layout {layout}; try compressor chat")
            network, _ = load_network(folder, "auto", check_code(folder))
        return network.eval()

    def tokenizer(self, name: str = "best") -> Any:
        """A package's tokenizer."""
        from supernet.trust import load_tokenizer

        return load_tokenizer(self._folder(name))

    def _folder(self, name: str) -> Path:
        if name not in self.packages:
            raise unknown("package", name, self.packages)
        return self.packages[name]

    def plot_front(self, axes: Axes | None = None) -> Axes:
        """Quality on the search documents against size: all that was measured, and the front of these two as stairs
        (that of all objectives looks like scatter here). The colour is the decode speed, as a multiple of the base's;
        rings are what was packaged. Draws into `axes`, or new ones, and returns them."""
        import matplotlib.pyplot as plt

        from export.report.plots import undominated

        base, search = self.report["base"], self.report["search"] or {}
        axes = plt.subplots(figsize=(7, 4.5))[1] if axes is None else axes
        points = [point for point in search.get("points", self.report["front"]) if point.get("full", True)]

        def share(row: Mapping[str, Any]) -> float:
            return float(row["params"] / base["params"])

        speeds = [(row["decode_tps"] or 0) / (search.get("base_decode_tps") or 1) for row in points]
        colours = speeds if any(speeds) else None
        dots = axes.scatter(
            [share(row) for row in points], [row["quality"] for row in points], c=colours, label="measured"
        )
        if colours is not None:
            axes.figure.colorbar(dots, ax=axes, label="decode speed, base 1")
        best = sorted(undominated([(share(row), row["quality"]) for row in points], True))
        axes.step([size for size, _ in best], [quality for _, quality in best], where="post", color="grey", lw=1)
        axes.scatter([1], [base["quality"]], marker="s", color="black", label="the base")
        rows = self.report["packages"]
        shown = [(row.get("quantization_report") or {}).get("bits") or row["architecture"] for row in rows]
        packaged = [row for row in points if row["architecture"] in shown]
        axes.scatter(
            [share(row) for row in packaged],
            [row["quality"] for row in packaged],
            s=160,
            facecolors="none",
            edgecolors="red",
            label="packaged",
        )
        axes.set(xlabel="parameters, share of the base's", ylabel="quality")
        axes.legend()
        return axes


def compress(
    model: str | Path | Recipe | None,
    output: str | Path,
    *,
    recipe: str | Path | None = None,
    redo: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """What `compressor compress` does, into the folder `output`; run again, it goes on where it was.

    `model` is a checkpoint, or a whole `Recipe`. `options` are those of the command, with underscores: `data`, `tasks`
    (names, or one string with commas), `max_params`, `quantize`, `time` and so on. `recipe` is a YAML file or the name
    of one that comes with the program; `settings` is any key of a recipe, as `--set` takes it: `{"seed": 1}`. Raises
    `RequestError` in one line for what is wrong, before work begins where that can be seen. A package that its proof
    refuses says so in its row of the report (`refused`). Whether the network may be asked is the program's to say
    (`HF_HUB_OFFLINE`): the command asks none where all that it needs lies here.
    """
    with quiet_libraries():
        from compressor.pipeline import compress as run_all

    if isinstance(model, Recipe):
        if recipe is not None or settings or options:
            raise RequestError("compress: a whole recipe was given; put the options into it")
        asked = model
    else:
        asked = read_recipe(_path(recipe), _overrides(model, options) | dict(settings or {}))
    run_all(asked, Path(output), redo=redo)
    return Result(output)


def _path(recipe: str | Path | None) -> Path | None:
    return None if recipe is None else Path(recipe)


def _overrides(model: str | Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that keywords set. Raises `RequestError` for one that is no option."""
    given: dict[str, Any] = {"model": None if model is None else str(model)}
    for name, value in options.items():
        name = {"format": "formats"}.get(name, name)
        if name not in RECIPE_OPTIONS:
            raise unknown("compress", name, RECIPE_OPTIONS)
        plain = isinstance(value, int | float) and not isinstance(value, bool) and RECIPE_OPTIONS[name].kind is str
        given[RECIPE_OPTIONS[name].key] = str(value) if plain or isinstance(value, Path) else value
    return given
