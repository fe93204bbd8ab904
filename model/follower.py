"""Callbacks whose state goes with the weights: what keeps a step from the weights keeps it from them, too (model/faults.py)."""

from composer.core import Callback, State
from composer.loggers import Logger


class Follower(Callback):
    """Follows each step that trained; its ``state_dict`` is taken back with the weights.

    Attributes:
        rest: set by who keeps a step from the weights; the state then stays as it is once.
    """

    rest = False

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.rest:
            self.follow(state)
        self.rest = False

    def follow(self, state: State) -> None:
        """Take the step that was made last into the state."""
        raise NotImplementedError
