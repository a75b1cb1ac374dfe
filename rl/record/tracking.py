"""Sends metrics to TensorBoard, Weights & Biases or MLflow, as the recipe's `log.trackers` says.

Each library is imported only if the recipe names it. The complete record is metrics.jsonl in the run folder.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)
FOLDER = "tracking"  # inside the run folder


class Tracker(Protocol):
    """A service or file that stores metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes event files to RUN_DIR/tracking/tensorboard.

    A resumed run may log steps a second time, from step `first_step` on. TensorBoard then hides the older values of
    these steps.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / FOLDER / "tensorboard", purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to a run of wandb. Environment variables (WANDB_PROJECT, WANDB_MODE, ...) configure wandb.

    A resumed run keeps its wandb id. Steps that wandb already has are ignored.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], first_step: int) -> None:
        import wandb

        place = folder / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        known = _remembered(place / "wandb_id")
        self._run = wandb.init(dir=place, name=folder.name, config=dict(recipe), id=known, resume="allow")
        (place / "wandb_id").write_text(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Logs to a run of MLflow. Environment variables (MLFLOW_TRACKING_URI, ...) configure MLflow."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any], first_step: int) -> None:
        import mlflow

        place = folder / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        known = _remembered(place / "mlflow_run")
        self._mlflow = mlflow
        run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        if not known:
            mlflow.log_dict(dict(recipe), "recipe.yaml")
        (place / "mlflow_run").write_text(run.info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


# name in the recipe -> (module that must be installed, package to install, class)
TRACKERS: dict[str, tuple[str, str, Callable[[Path, Mapping[str, Any], int], Tracker]]] = {
    "tensorboard": ("tensorboard", "tensorboard", TensorBoard),
    "wandb": ("wandb", "wandb", WeightsAndBiases),
    "mlflow": ("mlflow", "mlflow", MLflow),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError if a tracker does not exist or if its package is missing. Does not import the packages."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"log.trackers: there is no tracker {name!r}; choose from {', '.join(TRACKERS)}")
        module, package, _ = TRACKERS[name]
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"log.trackers: the package of {name} is missing; run `pip install {package}`")


class Trackers:
    """All trackers of a run.

    A tracker that fails is removed with a warning, and the run continues, because metrics.jsonl has all metrics anyway.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        recipe: Mapping[str, Any] | None = None,
        first_step: int = 0,
    ) -> None:
        """Starts the named trackers for the run in `folder`.

        `recipe` is stored with the metrics. `first_step` is the first iteration to be logged (0: a new run). Raises
        ValueError in the same cases as check_trackers, or the exception of a library that cannot start.
        """
        check_trackers(names)
        self._open = {name: TRACKERS[name][2](folder, recipe or {}, first_step) for name in names}

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs all metrics that are numbers, except `iteration`."""
        numbers = {name: value for name, value in metrics.items() if _is_curve(name, value)}
        for name in list(self._open):
            self._guarded(name, lambda tracker: tracker.log(step, numbers))

    def close(self) -> None:
        """Closes all trackers, after everything is written or sent."""
        for name in list(self._open):
            self._guarded(name, lambda tracker: tracker.close())
        self._open.clear()

    def _guarded(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._open[name])
        except Exception as problem:  # no exception of a tracker may end the run
            del self._open[name]
            logger.warning("log.trackers: %s failed and gets no more metrics: %r", name, problem)


def _is_curve(name: str, value: object) -> bool:
    return name != "iteration" and isinstance(value, (int, float))


def _remembered(file: Path) -> str | None:
    return file.read_text() if file.exists() else None
