"""Tests of the count of launches and bytes on CUDA."""


def test_cells_move_less_than_torchs_convolutions_on_cuda_would(rows, few_cells):
    found = rows("traffic", "--stages", "3", "--channels", "8", "--batch", "2")
    assert [row["convolutions and pooling"] for row in found] == ["torch's"] * 2 + ["cells"] * 2
    for torchs, cells in zip(found[:2], found[2:]):
        assert 0 < cells["GB"] < torchs["GB"] and 0 < 2 * cells["launches"] < torchs["launches"]
        assert 0 < cells["GB saved"] < torchs["GB saved"]
