"""Tests of the count of launches and bytes on CUDA."""


def test_ours_move_less_than_torchs_convolutions_on_cuda_would(rows, few_cells):
    found = rows("traffic", "--stages", "1", "--channels", "8", "--batch", "2")
    assert [row["convolutions and pooling"] for row in found] == ["torch's"] * 2 + ["ours"] * 2 + ["cells"] * 2
    for torchs, ours, cells in zip(found[:2], found[2:4], found[4:]):
        assert 0 < cells["GB"] < ours["GB"] < torchs["GB"] and 0 < 2 * cells["launches"] < ours["launches"]
        assert 0 < cells["GB saved"] < ours["GB kept"] < torchs["GB kept"]
