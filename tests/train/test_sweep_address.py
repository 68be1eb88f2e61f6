"""Addresses at which no Ray cluster is; in a file of its own, for here Ray must not have been started."""

import pytest
import sweep_fakes
from sweep_fakes import recipe
from train_fakes import options

from rodimus_lab.errors import UserError
from rodimus_lab.sweep import SweepOptions, sweep

pytest.importorskip("ray", reason="needs Ray: pip install -e '.[sweep]'")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "'nonsense' is not the address of a Ray cluster; give HOST:PORT"),
        ("ray://127.0.0.1:10001", "is not the address of a Ray cluster; give HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 .connection refused."),
        ("127.0.0.1:99999", "no Ray cluster answers at 127.0.0.1:99999"),
    ],
)
def test_a_bad_address(tmp_path, address, message):
    with pytest.raises(UserError, match=message):
        sweep([recipe("good")], SweepOptions(ray_address=address), options(tmp_path), run=sweep_fakes.run)
    assert not list(tmp_path.rglob("*.jsonl"))
