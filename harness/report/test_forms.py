"""Tests of harness/report/forms.py: cells in the forms of other projects."""

import ast
import json

import pytest

from harness import cli
from harness.report import forms
from harness.report.cells import PUBLISHED, read_genotype
from pdarts import GENOTYPES, Genotype, InputError

PDARTS = GENOTYPES["PDARTS"]
BASE = "NetworkSelectorDatasetInfo:darts:"
# Written by hand, from the drawing of the paper's normal cell.
NNI = """
normal/op_2_0 skip_connect 0, normal/op_2_1 dil_conv_3x3 1, normal/op_3_0 skip_connect 0, normal/op_3_1 sep_conv_3x3 1,
normal/op_4_0 sep_conv_3x3 1, normal/op_4_1 sep_conv_3x3 3, normal/op_5_0 sep_conv_3x3 0, normal/op_5_1 dil_conv_5x5 4
"""
NASBENCH301 = {
    "edge_normal_0": "skip_connect", "edge_normal_1": "dil_conv_3x3", "edge_normal_2": "skip_connect",
    "edge_normal_3": "sep_conv_3x3", "edge_normal_6": "sep_conv_3x3", "edge_normal_8": "sep_conv_3x3",
    "edge_normal_9": "sep_conv_3x3", "edge_normal_13": "dil_conv_5x5",
    "inputs_node_normal_3": "0_1", "inputs_node_normal_4": "1_3", "inputs_node_normal_5": "0_4",
}  # fmt: skip


def in_order(genotype: Genotype):
    """A cell with the pairs of each node in the order of their inputs."""
    cells = []
    for pairs in genotype.normal, genotype.reduce:
        nodes = (pairs[i : i + 2] for i in range(0, len(pairs), 2))
        cells.append([pair for node in nodes for pair in sorted(node, key=lambda pair: pair[1])])
    return genotype._replace(normal=cells[0], reduce=cells[1])


@pytest.mark.parametrize("name", GENOTYPES)
@pytest.mark.parametrize("form", forms.WRITTEN)
def test_a_cell_goes_through_every_form_and_comes_back(tmp_path, capsys, name, form):
    assert cli.command(["cell", name, "--as", form]) == 0
    text = capsys.readouterr().out
    (tmp_path / "cell").write_text(text)
    expected = in_order(GENOTYPES[name]) if form == "nasbench301" else GENOTYPES[name]
    assert read_genotype(text) == read_genotype(str(tmp_path / "cell")) == expected
    if "Genotype(" not in text:  # as Python prints the dictionary
        assert read_genotype(str(json.loads(text))) == expected


@pytest.mark.parametrize("name", ["NASNet", "AmoebaNet"])
def test_other_cells_are_written_where_the_form_has_them(name):
    for form in "autodl", "python":
        assert read_genotype(forms.write(PUBLISHED[name], form)) == PUBLISHED[name]
    for form in "nni", "nasbench301":
        with pytest.raises(InputError, match=f"the normal cell has 5 nodes, .* which {form} has no form for; expected"):
            forms.write(PUBLISHED[name], form)


def test_the_forms_are_those_of_the_projects():
    nni, nasbench301 = (json.loads(forms.write(PDARTS, form)) for form in ("nni", "nasbench301"))
    for key, operation, source in (entry.split() for entry in NNI.split(",")):
        assert nni[key] == operation and nni[key.replace("op", "input")] == [int(source)]
    assert len(nni) == 32 and nni["reduce/op_3_1"] == "dil_conv_5x5" and nni["reduce/input_3_1"] == [2]
    for key, value in NASBENCH301.items():
        assert nasbench301.pop(BASE + key) == value
    assert nasbench301[f"{BASE}edge_reduce_0"] == "avg_pool_3x3"  # the numbers start again
    assert len(nasbench301) == 11 and nasbench301[f"{BASE}inputs_node_reduce_3"] == "0_2"
    printed = ast.parse(forms.write(PDARTS, "autodl"), mode="eval").body
    fields = {word.arg: ast.literal_eval(word.value) for word in printed.keywords}
    assert fields["normal"][3] == (("sep_conv_3x3", 0), ("dil_conv_5x5", 4)) and fields["connectN"] is None


def test_further_spellings_are_read():
    nni, nasbench301 = (json.loads(forms.write(PDARTS, form)) for form in ("nni", "nasbench301"))
    numbers = {key: value[0] if isinstance(value, list) else value for key, value in nni.items()}
    assert read_genotype(json.dumps(numbers | {"width": 36, "num_cells": 20})) == PDARTS
    assert read_genotype(json.dumps({key.removeprefix(BASE): v for key, v in nasbench301.items()})) == PDARTS
    weighed = {
        kind: [tuple((*pair, 0.25) for pair in pairs[i : i + 2]) for i in range(0, 8, 2)]
        for kind, pairs in (("normal", PDARTS.normal), ("reduce", PDARTS.reduce))
    }
    assert read_genotype(str(PDARTS._asdict() | weighed)) == PDARTS  # as AutoDL's logs hold it


@pytest.mark.parametrize(
    "form, change, message",
    [
        ("nni", {"normal/op_3_0": None}, "the genotype: NNI's export lacks normal/op_3_0; expected two edges into"),
        ("nni", {"reduce/op_6_0": "skip_connect"}, "NNI's export has reduce/op_6_0; expected .* of 4 nodes, and"),
        ("nni", {"normal/input_3_0": [0, 1]}, r"normal/input_3_0 is \[0, 1\]; expected one input of an"),
        ("nni", {"normal/input_3_0": [3]}, r"normal\[2\] has input 3; node 1 can take 0 to 2"),
        ("nni", {"normal/op_3_0": "conv_3x3"}, r"normal\[2\] has unknown operation 'conv_3x3'; expected one of none"),
        ("nasbench301", {"inputs_node_reduce_4": None}, "inputs_node_reduce_4 is None; expected two inputs from 0"),
        ("nasbench301", {"inputs_node_reduce_3": "1_1"}, "inputs_node_reduce_3 is '1_1'; expected two inputs from 0 t"),
        ("nasbench301", {"inputs_node_normal_3": "0_3"}, "is '0_3'; expected two inputs from 0 to 2, such as"),
        ("nasbench301", {"inputs_node_normal_3": "0_2"}, "configuration lacks edge_normal_4; expected"),
        ("nasbench301", {"edge_normal_5": "skip_connect"}, "nasbench301's configuration has edge_normal_5; expected"),
    ],
)
def test_what_cannot_be_said_here_is_refused_with_the_reason(form, change, message):
    content = json.loads(forms.write(PDARTS, form))
    base = BASE if form == "nasbench301" else ""
    content |= {base + key: value for key, value in change.items()}
    with pytest.raises(InputError, match=message):
        read_genotype(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_cells_that_a_form_lacks_are_refused_with_the_reason():
    pairs = [("sep_conv_3x3", 0)] * 8
    twice = Genotype(pairs, [2, 3, 4, 5], pairs, [2, 3, 4, 5])
    with pytest.raises(InputError, match="node 0 of the normal cell reads input 0 twice, which nasbench301 has no"):
        forms.write(twice, "nasbench301")
    assert read_genotype(forms.write(twice, "nni")) == twice
    with pytest.raises(InputError, match="the reduce cell has the operation none, which nni has no form for; expected"):
        forms.write(PDARTS._replace(reduce=[("none", 0)] * 8), "nni")
    with pytest.raises(InputError, match="the genotype is not valid .ValueError: connectN is 2, where cells here have"):
        read_genotype(forms.write(PDARTS, "autodl").replace("connectN=None", "connectN=2"))
