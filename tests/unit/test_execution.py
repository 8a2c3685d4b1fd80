import pytest

from workers.execution import ExecutionSettings, SilentProgress


@pytest.mark.parametrize(
    "change", [{"num_cpus": 0}, {"encoder_actors": 0}, {"max_failures": -1}, {"max_quarantined_fraction": 1.5}, {"eval_batch_size": 0}]
)
def test_settings_out_of_range_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ExecutionSettings(**change)


def test_silent_progress_is_a_progress():
    progress = SilentProgress()
    progress.start("work", 3)
    progress.advance(1, loss=0.5)
    progress.finish()
