"""Cells in the forms of other projects, read and written: NNI, nasbench301, AutoDL, and the printed Genotype.

docs/CELLS.md says how each of them numbers states and edges.
"""

from __future__ import annotations

import json
import re

from harness.files import short
from pdarts import PRIMITIVES, Genotype, InputError, cell_edges

# NNI and nasbench301 have names for the cells of the DARTS search space only.
NODES, OPERATIONS = 4, PRIMITIVES[1:]
NNI = re.compile(r"(normal|reduce)/(op|input)_(\d+)_(\d+)")
NASBENCH301 = re.compile(r"(?:NetworkSelectorDatasetInfo:darts:)?(edge|inputs_node)_(normal|reduce)_(\d+)")
EDGES = {edge: number for number, edge in enumerate(cell_edges(NODES))}  # (node, source) -> number


def plain(content, name: str):
    """Return a dictionary of one of the two projects as one with the fields of a Genotype, and all else as it is."""
    keys = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
    for form, read in (NNI, _nni), (NASBENCH301, _nasbench301):
        entries = {found.groups(): content[key] for key in keys if (found := form.fullmatch(key))}
        if entries:
            cells = {kind: read(entries, kind, name) for kind in ("normal", "reduce")}
            concat = list(range(2, 2 + NODES))
            return cells | {"normal_concat": concat, "reduce_concat": concat}
    return content


def _nni(entries, kind, name):
    """NNI 3.0: op_I_K and input_I_K are the K-th operation of state I and its input, which is in a list."""
    expected = {(kind, what, str(i), str(k)) for what in ("op", "input") for i in range(2, 2 + NODES) for k in (0, 1)}
    _complete(expected, {key for key in entries if key[0] == kind}, "{}/{}_{}_{}", f"{name}: NNI's export")
    pairs = []
    for i in range(2, 2 + NODES):
        for k in "01":
            source = entries[kind, "input", str(i), k]
            if isinstance(source, list):
                if len(source) != 1:
                    raise InputError(
                        f"{name}: {kind}/input_{i}_{k} is {short(source)}; expected one input of an operation"
                    )
                source = source[0]
            pairs.append((entries[kind, "op", str(i), k], source))
    return pairs


def _nasbench301(entries, kind, name):
    """nasbench301: edge_KIND_E is the operation of edge E, inputs_node_KIND_I "A_B" are the inputs of state I."""
    edges = []
    for node in range(NODES):
        inputs = entries.get(("inputs_node", kind, str(2 + node)), "0_1" if node == 0 else None)
        found = re.fullmatch(r"(\d)_(\d)", str(inputs))
        sources = [int(source) for source in found.groups()] if found else []
        if len(set(sources)) < 2 or max(sources) > 1 + node:
            raise InputError(
                f"{name}: inputs_node_{kind}_{2 + node} is {short(inputs)}; expected two inputs from 0 to {1 + node}, "
                'such as "0_1"'
            )
        edges += [(node, source) for source in sources]
    expected = {("edge", kind, str(EDGES[edge])) for edge in edges}
    given = {key for key in entries if key[:2] == ("edge", kind)}
    _complete(expected, given, "{}_{}_{}", f"{name}: nasbench301's configuration")
    return [(entries["edge", kind, str(EDGES[edge])], edge[1]) for edge in edges]


def _complete(expected, given, form, name):
    for keys, wrong in (expected - given, "lacks"), (given - expected, "has"):
        if keys:
            why = f"expected two edges into each of {NODES} nodes, and no others"
            raise InputError(f"{name} {wrong} {form.format(*min(keys))}; {why}")


def write(genotype: Genotype, form: str) -> str:
    """Return the text of a genotype in a form; InputError with the reason if it cannot be said in this form."""
    cells = {"normal": genotype.normal, "reduce": genotype.reduce}
    concats = genotype.normal_concat, genotype.reduce_concat
    if form == "python":
        return repr(genotype)
    if form == "autodl":
        nodes = [list(zip(pairs[::2], pairs[1::2])) for pairs in cells.values()]
        fields = zip(Genotype._fields, (nodes[0], concats[0], nodes[1], concats[1]))
        return f"Genotype({', '.join(f'{field}={value}' for field, value in fields)}, connectN=None, connects=None)"
    for (kind, pairs), concat in zip(cells.items(), concats):
        reason = ""
        if len(pairs) != 2 * NODES or sorted(concat) != list(range(2, 2 + NODES)):
            reason = f"has {len(pairs) // 2} nodes, of which {len(concat)} are concatenated"
        if others := [operation for operation, _ in pairs if operation not in OPERATIONS]:
            reason = f"has the operation {others[0]}"
        if reason:
            raise InputError(
                f"the {kind} cell {reason}, which {form} has no form for; expected a cell of the DARTS search space: "
                f"{NODES} nodes, all of them concatenated, and operations of {', '.join(OPERATIONS)}"
            )
    return json.dumps({"nni": _as_nni, "nasbench301": _as_nasbench301}[form](cells), indent=1)


def _as_nni(cells):
    entries = {}
    for kind, pairs in cells.items():
        for i, (operation, source) in enumerate(pairs):
            place = f"{2 + i // 2}_{i % 2}"
            entries |= {f"{kind}/op_{place}": operation, f"{kind}/input_{place}": [source]}
    return entries


def _as_nasbench301(cells):
    entries = {}
    for kind, pairs in cells.items():
        for node in range(NODES):
            first, second = sorted(pairs[2 * node : 2 * node + 2], key=lambda pair: pair[1])
            if first[1] == second[1]:
                raise InputError(
                    f"node {node} of the {kind} cell reads input {first[1]} twice, which nasbench301 has no form for; "
                    "expected two inputs"
                )
            for operation, source in (first, second):
                entries[f"edge_{kind}_{EDGES[node, source]}"] = operation
            if node:  # the first node has no choice
                entries[f"inputs_node_{kind}_{2 + node}"] = f"{first[1]}_{second[1]}"
    return {f"NetworkSelectorDatasetInfo:darts:{key}": value for key, value in entries.items()}


WRITTEN = ("nni", "nasbench301", "autodl", "python")
