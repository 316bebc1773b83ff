import pytest
import torch

from drank.model.vocabulary import TokenError, check_ids
from tests.tiny import llama


def test_ids_that_the_model_has_pass():
    check_ids(llama(), torch.tensor([[0, 319], [5, 6]]), "windows")
    check_ids(llama(), torch.empty(0, 8, dtype=torch.int64), "windows")


@pytest.mark.parametrize("outside", [-1, 320, 2**31 - 1])
def test_an_id_outside_is_named_with_its_file_and_the_vocabulary(outside):
    with pytest.raises(TokenError, match=rf"windows: holds token id {outside}, .* embeddings for 0 to 319"):
        check_ids(llama(), torch.tensor([[0, 1], [outside, 2]]), "windows")
