"""Between the gradients and the optimiser: clip them, or keep a broken step from the weights.

A step is broken if its loss or the norm of its gradients is not finite, or its loss is a spike. Nothing of it reaches the
weights, the optimiser's state or what follows the weights, such as their average. What made a loss spike may be in the weights
already, from the steps before. To roll back takes these steps, too, from all of these, and goes on with the next batch: none is
met again.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from model import resume
from model.denoiser import LossTerms
from model.errors import RunError
from model.follower import Follower
from model.gradients import clip, local_shard, whole_norms

WINDOW = 100  # steps whose loss tells what is usual; no loss is a spike before there were as many
NAMED = 8  # most samples that the log names; the file names all


@dataclass(frozen=True)
class FaultsConfig:
    """What to do about a broken step."""

    policy: Literal["stop", "skip", "roll_back"] = "stop"
    spike: float | None = (
        None  # a loss of more than this many times the mean of the steps before breaks a step; None: no loss does
    )
    in_a_row: int = 10  # after as many skipped steps the next broken one ends the run
    roll_backs: int = 3  # to one checkpoint; the next broken step before a newer one ends the run

    def __post_init__(self) -> None:
        if self.spike is not None and not self.spike > 1:
            raise ValueError(f"spike must be more than 1, got {self.spike}")
        if self.in_a_row < 1:
            raise ValueError(f"in_a_row must be at least 1, got {self.in_a_row}")
        if self.roll_backs < 1:
            raise ValueError(f"roll_backs must be at least 1, got {self.roll_backs}")


@dataclass(frozen=True)
class History:
    """What is usual."""

    mean: float = 0.0  # of the loss over about the last ``WINDOW`` sound steps
    steps: int = 0  # sound ones so far
    skipped: int = 0  # so far
    in_a_row: int = 0  # skipped since the last sound one
    rolled_back: int = 0  # so far
    back_to: int = 0  # the step of the checkpoint rolled back to last
    times: int = 0  # to that one

    def with_sound(self, loss: float) -> "History":
        """After a step that trained."""
        steps = self.steps + 1
        return replace(self, mean=self.mean + (loss - self.mean) / min(steps, WINDOW), steps=steps, in_a_row=0)

    def with_skipped(self) -> "History":
        """After a step that did not."""
        return replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)

    def with_roll_back(self, then: "History", step: int) -> "History":
        """After a return to the checkpoint of ``step``: what was usual ``then``, and what happened since."""
        times = 1 + (self.times if self.back_to == step else 0)
        counted = replace(self, in_a_row=0, rolled_back=self.rolled_back + 1, back_to=step, times=times)
        return replace(counted, mean=then.mean, steps=then.steps)


def fault(loss: float, gradient_norm: float, history: History, spike: float | None) -> str | None:
    """What breaks a step, in words; None for a sound one."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the norm of the gradients is {gradient_norm}, with a loss of {loss:.4g}"
    if spike is not None and history.steps >= WINDOW and loss > spike * history.mean:
        return f"the loss is {loss:.4g}, {loss / history.mean:.1f} times the mean of {history.mean:.4g}"
    return None


Remedy = Literal["stopped", "skipped", "rolled back"]


def remedy(config: FaultsConfig, history: History, newest: int | None) -> Remedy:
    """What to do about a broken step; ``newest`` is the step of the newest whole checkpoint, if there is one to roll back to."""
    if config.policy == "roll_back" and newest is not None:
        spent = history.times if history.back_to == newest else 0
        return "rolled back" if spent < config.roll_backs else "stopped"
    return "skipped" if config.policy != "stop" and history.in_a_row < config.in_a_row else "stopped"


@dataclass(frozen=True)
class Suspect:
    """A sample of a broken step."""

    key: str
    seed: int  # of its noise
    loss: float


def name_suspects(suspects: Sequence[Suspect]) -> str:
    """The samples to look at first: those whose loss is not finite, else those of the largest losses."""
    broken = [suspect for suspect in suspects if not math.isfinite(suspect.loss)]
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        return f"not finite in {', '.join(suspect.key for suspect in broken[:NAMED])}{more}"
    largest = sorted(suspects, key=lambda suspect: -suspect.loss)[:NAMED]
    return "largest in " + ", ".join(f"{suspect.key} ({suspect.loss:.4g})" for suspect in largest)


class StepGuard(Callback):
    """Clips gradients and keeps broken steps from the weights. All processes judge the same numbers, so they agree.

    Attributes:
        gradient_norm: of the whole gradient before clipping, at the last step.
        history: what is usual, and what was skipped or rolled back.
    """

    def __init__(
        self,
        config: FaultsConfig,
        clip_norm: float,
        followers: Sequence[Follower],
        folder: Path,
        checkpoints: Path | None = None,
    ) -> None:
        """``folder`` is where the samples of broken steps are listed, ``checkpoints`` what to roll back to."""
        self.config = config
        self.clip_norm = clip_norm
        self.followers = followers
        self.folder = folder
        self.checkpoints = checkpoints
        self.gradient_norm = 0.0
        self.history = History()
        self._losses: list[Tensor] = []

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._losses = []

    def after_loss(self, state: State, logger: Logger) -> None:
        assert isinstance(state.outputs, LossTerms)
        self._losses.append(state.outputs.loss.detach())  # (B,) of a microbatch

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        params = [p for p in state.model.parameters() if p.grad is not None]
        gradients = [local_shard(p.grad) for p in params if p.grad is not None]
        norm = whole_norms(params, gradients)[0].norm()
        losses = torch.cat(self._losses)
        # Of the norm too: replicas of the weights could disagree on its last bit, and with it on what is finite.
        told = torch.stack([losses.sum(), losses.new_tensor(len(losses)), norm]).double()
        dist.all_reduce(told)
        total, count, norms = told.tolist()
        loss, self.gradient_norm = total / count, norms / dist.get_world_size()
        reason = fault(loss, self.gradient_norm, self.history, self.config.spike)
        if reason is None:
            clip(gradients, norm, self.clip_norm)
            self.history = self.history.with_sound(loss)
            return
        newest = self._newest_checkpoint()
        step = None if newest is None else resume.step_of(newest)
        done = remedy(self.config, self.history, step)
        told_of = self._report(state, reason, losses, f"rolled back to {step}" if done == "rolled back" else done)
        if done == "stopped":
            raise RunError(told_of)
        if dist.get_global_rank() == 0:
            print(f"\n{told_of}", file=sys.stderr, flush=True)
        for p in params:
            p.grad = None  # optimisers leave a parameter without gradient, and its state, alone
        for follower in self.followers:
            follower.rest = True
        if newest is not None and step is not None and done == "rolled back":
            now = self.history
            resume.restore(state, newest, (*self.followers, self))
            self.history = now.with_roll_back(self.history, step)
            logger.log_metrics({"faults/rolled_back": self.history.rolled_back})
        else:
            self.history = self.history.with_skipped()
            logger.log_metrics({"faults/skipped": self.history.skipped})

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.history)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = History(**state)

    def _newest_checkpoint(self) -> Path | None:
        """To roll back to, if that is the policy. Collective; reads all of it.

        Raises:
            UserError: there are checkpoints and all are damaged.
        """
        if self.config.policy != "roll_back" or self.checkpoints is None:
            return None
        return resume.find_whole(self.checkpoints).newest

    def _report(self, state: State, reason: str, losses: Tensor, outcome: str) -> str:
        """List the step's samples in a file; return the line for the log. Collective."""
        step = int(state.timestamp.batch) + 1
        batch = state.batch
        own = [Suspect(*found) for found in zip(batch["key"], batch["seed"], losses.tolist(), strict=True)]
        suspects = [suspect for part in dist.all_gather_object(own) for suspect in part]
        path = self.folder / f"step-{step:07d}.json"
        if dist.get_global_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            # JSON knows no NaN: such a loss becomes a word.
            samples = [asdict(s) if math.isfinite(s.loss) else {**asdict(s), "loss": str(s.loss)} for s in suspects]
            described = {"step": step, "fault": reason, "samples": samples}
            path.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        return f"step {step} {outcome}: {reason}; {name_suspects(suspects)}; the batch's samples are in {path}"
