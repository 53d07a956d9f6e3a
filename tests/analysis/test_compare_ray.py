"""Trials on a local Ray cluster give what they give in one process."""

import pytest

from veneer.analysis.budget import Budget
from veneer.analysis.compare import Comparison, Here, OnRay
from veneer.analysis.trials import Setting
from veneer.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'veneer[ray]'")


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.timeout(600)
def test_a_cluster_gives_the_same_numbers_as_one_process(words_model, colours, cluster, tmp_path):
    data, general = colours
    setting = Setting(model=str(words_model), data=str(data), general=str(general), batch_size=4, eval_rows=8)
    found = {}
    for name, runners in (("here", Here(setting)), ("ray", OnRay(setting))):
        made = Comparison(
            setting, ["lora", "pissa"], Budget(steps=4), seeds=(0, 1), search=2, rank=2, out=tmp_path / name
        )
        found[name] = made.run(runners=runners)
    for one, other in zip(found["here"]["rows"], found["ray"]["rows"]):
        assert one["lr"] == other["lr"]
        assert one["held_out_loss"]["values"] == pytest.approx(other["held_out_loss"]["values"], rel=1e-5)
        assert one["search"]["runs"] == other["search"]["runs"] == 2

    class Broken(OnRay):
        def __init__(self, made):
            self.bench, self.workers = made.bench, made.workers

    with pytest.raises(UserError, match="ranck"):
        from veneer.analysis.trials import Trial

        list(Broken(runners).run([Trial("lora(ranck=2)", None, 0, 1e-3, 1)]))
