"""The words of demo_qa: every one a token of the demo model's tokenizer."""


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FIRST_NAMES = _split(
    "Ada Alba Anton Arne Astrid Basil Bea Benno Boris Britta Carl Celia Clara Conrad Cora Dario Dina Doris Edgar Edith "
    "Elias Elsa Emil Enzo Erik Esther Fabian Felix Flora Frida Gerda Gregor Greta Hanna Hector Hilda Hugo Ida Ines "
    "Ivan Jonas Judith Karla Kurt Lars Leo Lotte Magda Marek Mara Nadia Nils Olga Oskar Paula Pavel Quinn Rosa Rufus "
    "Selma Tilda Ursula Viktor Wanda"
)
LAST_NAMES = _split(
    "Abel Acker Bauer Beck Berg Brandt Busch Dahl Decker Dorn Eber Engel Falk Faber Fink Forst Gerber Glas Graf Haas "
    "Hagen Hardt Heller Holm Huber Jansen Kaiser Keller Kern Klein Koch Kraus Lang Lenz Lind Lorenz Maier Marten Moser "
    "Nagel Neumann Nord Otten Pfeil Quast Rabe Reiter Richter Roth Sauer Scholz Seidel Stein Sturm Thoma Ulmer Vogel "
    "Voss Wagner Weber Winkler Wolf Zander Ziegler"
)
ATTRIBUTES = _split("badge boat lantern violin saddle kettle anvil ladder clock ring hat cart flag mask drum key")
RELATIONS = _split("mentor cousin landlord tailor neighbour rival")
QUALITIES = _split(
    "amber ancient azure bitter blue brass brittle broad bronze calm carved chalk cheap clean cobalt coarse copper "
    "coral crimson cracked curved damp dark dusty ebony faded fancy flat fragile frosted gilded glossy green grey "
    "heavy hollow indigo iron ivory jade light linen marble mossy narrow oaken olive opal painted pale pearl plain "
    "purple ragged red rough rusty sandy scarlet silver slim smooth spotted striped"
)
THINGS = _split(
    "acorn apple arrow barrel basket beacon bell bottle bramble bridge broom bucket button candle castle cedar chain "
    "cherry chisel cloud clover comet crane crown dagger dolphin dragon eagle falcon feather fern fiddle fountain fox "
    "goblet hammer harbour harp hawk heron hornet island jackal jug kite leaf lemon lily lion magpie maple mirror moth "
    "needle orchid otter owl pebble plum quill raven ribbon river rocket"
)
VERBS = _split("waited rested stood turned slept shone hung lay")
PLACES = _split("mill well gate quay barn tower chapel orchard stable market cellar ferry")
NUMBERS = tuple(str(number) for number in range(1, 65))
OTHERS = _split("'s is . ? : , The the near packed and Passage passage Question Answer what which did pack tells of")

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
WORDS = (
    "<pad>", "<bos>", "<eos>", "<unk>", *FIRST_NAMES, *LAST_NAMES, *ATTRIBUTES, *RELATIONS, *QUALITIES, *THINGS, *VERBS,
    *PLACES, *NUMBERS, *OTHERS,
)  # fmt: skip
ID = {word: index for index, word in enumerate(WORDS)}
