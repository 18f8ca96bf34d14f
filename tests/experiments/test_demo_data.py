import hashlib

from experiments.longbench_qa.demo_data import demo_rows
from experiments.longbench_qa.metrics import score_sample

# A change of the rows makes results of before and after incomparable: it should be seen.
SHA256 = "39e84b65f35e315ed44ba10a4544f1fc644dd4a9f1e32154175daa631135fe37"


def test_rows_never_change() -> None:
    rows = demo_rows()
    text = "\n".join(row.context + row.input + row.answers[0] for row in rows)
    assert rows == demo_rows()
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256


def test_each_row() -> None:
    rows = demo_rows()
    assert len({row.id for row in rows}) == len({row.context for row in rows}) == 20
    for row in rows:
        (answer,) = row.answers
        assert row.dataset == "demo_qa"
        assert 1000 <= len(row.context) <= 1500
        assert row.length == len(row.context.split())
        assert row.context.count(answer) == 1
        assert score_sample("demo_qa", f" The {answer}.", row.answers) == 100


def test_families() -> None:
    rows = demo_rows()
    for row in rows[0::3]:
        tool, name = row.input.removeprefix("Where is the ").removesuffix(" kept?").split(" of ")
        assert f"The {tool} of {name} is kept in the {row.answers[0]}." in row.context
    for row in rows[1::3]:
        name = row.input.removeprefix("On which street does ").removesuffix(" work?")
        trade = row.context.split(f"{name} walks to work at the ")[1].split(".")[0]
        assert f"You will find the {trade} on {row.answers[0]}." in row.context
        assert not any(name in fact and row.answers[0] in fact for fact in row.context.split("."))
    for row in rows[2::3]:
        name = row.input.removeprefix("Which three things did ").split(" ")[0]
        assert f"{name} packed {row.answers[0]}." in row.context
