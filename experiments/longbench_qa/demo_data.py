"""demo_qa: a small question-answering set of the project's own, so that everything runs without a download.

A context tells about six villagers: where each keeps something, where each works, what each packed, and where
the workplaces are. One villager is asked about; what is told of the others is the distraction. Three families
of questions take turns: one fact, two facts that must be joined, and a list.
"""

import random

from experiments.longbench_qa.data import DEMO, Row

ROWS = 20
VILLAGERS = 6
SEED = 20240229

NAMES = "Mara, Oskar, Tilda, Bruno, Ines, Felix, Greta, Anton, Lotte, Pavel, Rosa, Edwin, Hanna, Casper"
TOOLS = "lantern, violin, saddle, telescope, kettle, anvil, compass, loom, ladder, accordion"
ROOMS = "boat shed, bell tower, root cellar, hay loft, chapel porch, mill attic, school pantry, stable yard"
TRADES = "bakery, tannery, printworks, brewery, pottery, dairy, smithy, sawmill, nursery"
STREETS = "Quay Street, Alder Lane, Canal Row, Market Hill, Orchard Walk, Lime Court, Ferry Road, Abbey Close"
GOODS = (
    "ropes, candles, maps, plums, nails, blankets, coins, ribbons, spoons, pears, hooks, feathers, seeds, "
    "bottles, gloves, buttons, onions, letters, pencils, walnuts, mirrors, lemons, needles, boots"
)
FILLERS = (
    "Rain fell on the roofs for most of the week.",
    "The ferry was late again and nobody minded.",
    "A grey cat slept on the wall of the well.",
    "In the evening the whole square smelled of smoke.",
    "Children raced paper boats along the gutter.",
)


def demo_rows() -> list[Row]:
    """The set's 20 rows, the same on every call and Python version. `length` counts the context's words."""
    rng = random.Random(SEED)
    return [_row(rng, index) for index in range(ROWS)]


def _row(rng: random.Random, index: int) -> Row:
    pools = (NAMES, TOOLS, ROOMS, TRADES, STREETS)
    names, tools, rooms, trades, streets = (_draw(rng, pool.split(", "), VILLAGERS) for pool in pools)
    goods = _draw(rng, GOODS.split(", "), 3 * VILLAGERS)
    packed = ["{}, {} and {}".format(*goods[3 * i : 3 * i + 3]) for i in range(VILLAGERS)]

    facts = list(FILLERS)
    for i, name in enumerate(names):
        facts.append(f"The {tools[i]} of {name} is kept in the {rooms[i]}.")
        facts.append(f"Every morning {name} walks to work at the {trades[i]}.")
        facts.append(f"For the journey {name} packed {packed[i]}.")
        facts.append(f"You will find the {trades[i]} on {streets[i]}.")

    # The first villager is asked about: names are already in random order.
    question, answer = (
        (f"Where is the {tools[0]} of {names[0]} kept?", rooms[0]),
        (f"On which street does {names[0]} work?", streets[0]),
        (f"Which three things did {names[0]} pack for the journey?", packed[0]),
    )[index % 3]
    context = " ".join(_draw(rng, facts, len(facts)))
    return Row(f"demo-{index:03d}", question, context, [answer], len(context.split()), DEMO, "en", None)


def _draw(rng: random.Random, pool: list[str], count: int) -> list[str]:
    """`count` different items of `pool` in random order, from `rng.random()` alone.

    Python promises that method's sequence for a seed, but not that of `sample` or `shuffle`.
    """
    left = list(pool)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]
