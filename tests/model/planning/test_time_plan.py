"""Times of runs: how they scale, and what a step consists of."""

from pathlib import Path

import pytest

from model import config
from model.errors import UserError
from model.planning import memory_plan, roofline, time_plan
from model.planning.time_plan import TimePlan
from model.train import TrainConfig

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
DEMO = YAMLS / "demo/stage1.yaml"


def predict(*overrides: str, yaml: Path = DEMO, gpus: int = 1) -> dict[str, TimePlan]:
    return {plan.device.name: plan for plan in time_plan.predict(config.load(TrainConfig, yaml, overrides), gpus)}


def test_each_known_gpu_has_a_plan_whose_step_is_its_microbatches_and_the_update() -> None:
    plans = predict("global_batch=32", "microbatch=8", "schedule.steps=7")
    assert plans.keys() == roofline.DEVICES.keys()
    for plan in plans.values():
        for time in (plan.eager, plan.fused):
            assert time.step == pytest.approx(32 * time.video + time.update)
            assert time.run == pytest.approx(7 * time.step)
        assert plan.fused.video < plan.eager.video


def test_twice_the_gpus_take_half_the_time_but_for_the_update() -> None:
    for name, one in predict("global_batch=32", "microbatch=8").items():
        two = predict("global_batch=32", "microbatch=8", gpus=2)[name]
        assert two.eager.step - two.eager.update == pytest.approx((one.eager.step - one.eager.update) / 2)


def test_fused_parts_add_up_to_the_microbatch() -> None:
    plan = predict("global_batch=8", "microbatch=8")["H200"]
    assert sum(row.seconds for row in plan.parts_fused) == pytest.approx(8 * plan.fused.video)


def test_the_update_moves_weights_gradients_moments_and_averages() -> None:
    """As often as lamb.py goes through them, in bytes of the weights."""
    c = config.load(TrainConfig, YAMLS / "stage1_500m.yaml")
    weights = 4 * memory_plan.count(c).parameters.total  # bytes
    moved = sum(operation.bytes for operation in time_plan.trace_updates(c))
    # 6 for the moments' kernel (gradients, which become updates, and two moments, read and written), 3 for weight decay,
    # 2 for the norms of weights and updates, 3 for the step, 3 for the average.
    assert moved / weights == pytest.approx(6 + 3 + 2 + 3 + 3, rel=0.01)


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(UserError, match="does not split"):
        predict("global_batch=32", gpus=3)
