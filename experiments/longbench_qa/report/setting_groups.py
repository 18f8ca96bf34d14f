"""Settings that differ only in the attention and in how long a prompt may be: what is measured to be seen together."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.longbench_qa.comparable import ComparableCell, LeftOut, setting_columns, text, within_settings
from experiments.longbench_qa.comparison import Comparison
from experiments.longbench_qa.figure_tables import without_max_length
from experiments.longbench_qa.results import Results

VARIED = ("model.max_length", "attention")


@dataclass(frozen=True)
class SettingGroup:
    """Settings that are the same but for `VARIED`.

    Attributes:
        name: model and protocol, in words, without what differs.
        settings: {setting: in words what tells it from the others}, by length and attention; "" for one alone.
        cells: the complete ones of these settings that may be compared.
        failures: a sentence for each attention with cells that are not among them.
    """

    name: str
    settings: dict[str, str]
    cells: Sequence[ComparableCell]
    failures: Sequence[str]


def setting_groups(results: Results, comparison: Comparison) -> list[SettingGroup]:
    """In the order of the comparison's settings."""
    known = results.cells[results.cells["path"].isin([cell.path for cell in comparison.cells])]
    known = known.set_index("path", drop=False)
    shared = known.assign(model=known["model"].map(without_max_length))
    names = within_settings(shared, [column for column in setting_columns(shared) if column not in VARIED], VARIED)
    left_out = {cell.path: cell for cell in comparison.left_out}
    groups: dict[str, list[ComparableCell]] = {}
    for cell in comparison.cells:
        groups.setdefault(names[cell.path], []).append(cell)
    found = []
    for name, cells in groups.items():
        of_group = known.loc[[cell.path for cell in cells]]
        varied = [column for column in VARIED if column in known and of_group[column].nunique(dropna=False) > 1]
        of_group = of_group.sort_values([column for column in VARIED if column in known], kind="stable")
        settings = {cell.path: cell.setting for cell in cells}
        told: dict[str, str] = {}
        for path, row in of_group[varied].astype(object).to_dict("index").items():
            words = [f"{column.removeprefix('model.')}={text(value)}" for column, value in row.items()]
            told.setdefault(settings[str(path)], ", ".join(words))
        compared = [cell for cell in cells if cell.path not in left_out]
        failed = [left_out[path] for path in of_group.index if path in left_out]
        attentions, lengths = (
            dict(zip(of_group["path"], map(text, of_group[column]), strict=True)) if column in varied else {}
            for column in ("attention", "model.max_length")
        )
        found.append(SettingGroup(name, told, compared, _failures(cells, failed, attentions, lengths)))
    return found


def _failures(
    cells: Sequence[ComparableCell], failed: Sequence[LeftOut], attentions: dict[str, str], lengths: dict[str, str]
) -> list[str]:
    """`failed` by ascending length, so that the first is where a line ends."""
    sentences = []
    for attention in dict.fromkeys(attentions.get(cell.path, "") for cell in failed):
        of_attention = [cell for cell in failed if attentions.get(cell.path, "") == attention]
        n = sum(attentions.get(cell.path, "") == attention for cell in cells)
        at = ", ".join(dict.fromkeys(lengths[cell.path] for cell in of_attention)) if lengths else ""
        which = f"{len(of_attention)} of {n} cells{f' of attention={attention}' if attention else ''}"
        where = f" (max_length {at})" if at else ""
        first = of_attention[0]
        reason = first.reason or first.status
        sentences.append(f"{which} {'is' if len(of_attention) == 1 else 'are'} not drawn{where}; the first: {reason}.")
    return sentences
