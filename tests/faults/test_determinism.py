"""The same bytes on other people's computers, and how far another CPU is off (see ``determinism``)."""

import pytest

from tests.faults.determinism import BYTES, KERNELS, built, differing, moved

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("name", ["C locale", "not ASCII"])
def test_place_locale_time_zone_hash_seed_umask_and_order_of_files_change_no_byte(reproduced, tmp_path, name):
    root = built(reproduced, tmp_path, BYTES[name])
    assert differing(reproduced, root) == []
    assert (root / "data/models/kfac-80/SHA256SUMS").is_file()


def test_another_cpu_stays_within_what_the_documents_say(reproduced, tmp_path):
    limits = {"covariance": 1e-2, "singular_values": 5e-3, "ranks": 1 / 20, "objective": 2e-3, "perplexity": 1e-3}
    found = moved(reproduced, built(reproduced, tmp_path, KERNELS["an old CPU"]))
    assert {name for name, limit in limits.items() if found[name] > limit} == set(), found
