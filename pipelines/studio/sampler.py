"""Tasks -> clips in the history, with the cascades that were used last kept in memory."""

from collections import OrderedDict
from dataclasses import replace

from model.errors import UserError
from pipelines.cascade import Cascade, CascadeConfig, Progress
from pipelines.sample import made_by
from pipelines.studio.history import History
from pipelines.studio.jobs import Task


class Sampler:
    """For one thread."""

    def __init__(self, history: History, device: str, keep: int) -> None:
        """``keep`` is how many cascades stay in memory."""
        self.history = history
        self.device = device
        self.keep = keep
        self._loaded: OrderedDict[CascadeConfig, Cascade] = OrderedDict()

    def make(self, task: Task, progress: Progress) -> str:
        """Make a clip and return its name in the history.

        Raises:
            UserError: models that cannot be had, or a prompt that they do not take.
            RunError: the clip cannot be written.
        """
        require_playable(task)
        cascade = self._cascade(task.settings, progress)
        frames = cascade.sample([task.prompt], [task.seed], progress, settings=task.settings).high[0]
        return self.history.add(frames, task.prompt, task.seed, made_by(cascade, task.settings))

    def _cascade(self, settings: CascadeConfig, progress: Progress) -> Cascade:
        models = replace(
            CascadeConfig(),
            stage1=settings.stage1,
            stage2=settings.stage2,
            tracking_uri=settings.tracking_uri,
            text_encoder=settings.text_encoder,
        )
        if models in self._loaded:
            self._loaded.move_to_end(models)
            return self._loaded[models]
        while len(self._loaded) >= self.keep:  # before, not after: memory may hold no more than so many
            self._loaded.popitem(last=False)
        for _ in progress("loading models", 1):
            self._loaded[models] = Cascade(models, self.device)
        return self._loaded[models]


def require_playable(task: Task) -> None:
    """Say before the work what would fail after it.

    Raises:
        UserError: no prompt, a seed that no generator takes, or a frame rate at which no file plays.
    """
    if not task.prompt.strip():
        raise UserError("prompt: it is empty")
    if not 0 <= task.seed < 2**63:
        raise UserError(f"seed: must lie between 0 and 2^63, got {task.seed}")
    if not 0 < task.settings.frame_rate < 1000:
        raise UserError(f"frame rate: must lie between 0 and 1000 per second, got {task.settings.frame_rate}")
