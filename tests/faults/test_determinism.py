"""The same bytes on other people's computers, and how far another CPU is off (see ``determinism``)."""

import pytest

from tests.faults.determinism import BYTES, KERNELS, differing, moved, staged

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("name", ["C locale", "not ASCII"])
def test_place_locale_time_zone_hash_seed_umask_and_order_of_files_change_no_byte(reproduced, tmp_path, name):
    root = staged(reproduced, tmp_path, BYTES[name])
    assert differing(reproduced, root) == []
    assert (root / "data/models/kfac-80/SHA256SUMS").is_file()


def test_another_cpu_stays_within_what_the_documents_say(reproduced, tmp_path):
    root = staged(reproduced, tmp_path, KERNELS["an old CPU"])
    found = moved(reproduced, root)
    assert found.covariance < 1e-2
    assert found.singular_values < 5e-3
    assert found.ranks <= found.n_units / 20
    assert found.objective < 2e-3
    assert found.perplexity < 1e-3
